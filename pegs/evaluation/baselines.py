"""
The baselines of section 6.2: a language model fine-tuned on the sessions' texts, and one that calls the sticker decoder as a tool (Figure 23).

The tool is called before the text: `Action` and `Action Input` with a sticker's caption, an `Observation` from the tool, then the reply.

Two more choose stickers alone, for another model's replies: by a sentence encoder, and by chance.
"""

import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dataset_builders.schema import Message, Session
from dataset_builders.stickers.encoder import TextEncoder
from dataset_builders.stickers.pack import StickerPack
from pegs.evaluation.predict import Predictions, Reply, SystemTurn, candidates_of, first_unsent
from pegs.training.text_states import encode_captions
from pipelines.pipeline_sticker import StickerPipeline, StickerPipelineOutput


SYSTEM = "You are a warm companion in a chat. You listen closely and answer in one or two natural sentences."
TOOL = (
    f"{SYSTEM} You can send stickers with a tool. Before your reply, write `Action: draw_sticker` and, on the next line, `Action Input:` with what the "
    "sticker shows and its emotion; an Observation tells what was drawn. Without a sticker, just reply."
)
ACTION = re.compile(r"\s*Action: draw_sticker\s+Action Input:[ \t]*(\S.*)")
SAMPLING = {"do_sample": True, "temperature": 0.4, "top_p": 0.9, "max_new_tokens": 64}  # as the mini PEGS


def context_chat(session: Session, turn: int, pack: StickerPack, with_tool: bool) -> list[dict]:
    """All messages before the System's in a turn, as strings; with stickers and calls of the tool if the model has it."""

    def told(message: Message) -> str:
        if not with_tool or message.sticker is None:
            return message.text
        return f"{message.text} [sends a sticker: {pack.by_id[message.sticker.id].caption}]"

    chat = [{"role": "system", "content": TOOL if with_tool else SYSTEM}]
    for past in session.turns[:turn]:
        chat.append({"role": "user", "content": told(past.user)})
        if past.turn < turn:
            chat += reply_chat(past.system, pack, with_tool)
    return chat


def reply_chat(message: Message, pack: StickerPack, with_tool: bool) -> list[dict]:
    """A System's message as the model says it."""
    said = [{"role": "assistant", "content": message.text}]
    if with_tool and message.sticker is not None:
        return [*call_chat(pack.by_id[message.sticker.id].caption), *said]
    return said


def call_chat(caption: str) -> list[dict]:
    """A call of the tool and its answer."""
    return [
        {"role": "assistant", "content": f"Action: draw_sticker\nAction Input: {caption}"},
        {"role": "tool", "content": f"Observation: drawn and sent: {caption}"},
    ]


def baseline_chat(session: Session, pack: StickerPack, with_tool: bool) -> list[dict]:
    """A whole session, to train on what the assistant says."""
    last = session.turns[-1]
    return [*context_chat(session, last.turn, pack, with_tool), *reply_chat(last.system, pack, with_tool)]


class BaselinePredictor:
    """
    A baseline under evaluation; see [`Predictor`].

    Args:
        language_model (`PreTrainedModel`): Fine-tuned on [`baseline_chat`].
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        pack ([`StickerPack`]): The dataset's stickers, which the tool model is told of by their captions.
        model (`str`): Name that the rows carry.
        decoder ([`StickerPipeline`], *optional*): The tool; without it the model is a text baseline.
        prompt_length (`int`, *optional*, defaults to 32): States of a caption, for a decoder without a text encoder of its own.

    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pack: StickerPack,
        model: str,
        decoder: StickerPipeline | None = None,
        prompt_length: int = 32,
    ) -> None:
        self.language_model, self.tokenizer, self.pack, self.model = language_model.eval(), tokenizer, pack, model
        self.decoder, self.prompt_length = decoder, prompt_length

    def __call__(self, turns: Sequence[SystemTurn], seed: int) -> list[Reply]:
        """Answer a batch of turns; see [`Predictor`]."""
        chats = [context_chat(t.session, t.turn.turn, self.pack, self.decoder is not None) for t in turns]
        said, odds = self._say(chats, seed)
        if self.decoder is None:
            return [Reply(text.strip()) for text in said]
        captions = {row: call[1].strip() for row, text in enumerate(said) if (call := ACTION.match(text))}
        replies = [Reply(text.strip(), sticker_logit=logit) for text, logit in zip(said, odds, strict=True)]
        if captions:
            after, _ = self._say([chats[row] + call_chat(caption) for row, caption in captions.items()], seed)
            seeds = [torch.Generator().manual_seed((seed + row) % 2**31) for row in captions]
            drawn = self._draw(self.decoder, list(captions.values()), seeds)
            for row, text, image in zip(captions, after, drawn, strict=True):
                replies[row].text, replies[row].drawn = text.strip(), image
        return replies

    def _draw(
        self, decoder: StickerPipeline, captions: list[str], seeds: list[torch.Generator]
    ) -> list[Image.Image | None]:
        """Draw captions; `None` where the safety check blocks one."""
        if decoder.components.get("text_encoder") is not None:  # type: ignore[attr-defined]
            output = decoder(prompt=captions, generator=seeds)
        else:
            output = decoder(prompt_embeds=encode_captions(captions, self.prompt_length), generator=seeds)
        assert isinstance(output, StickerPipelineOutput)
        return [
            image if blocked is None else None for image, blocked in zip(output.images, output.blocked, strict=True)
        ]

    @torch.no_grad()
    def _say(self, chats: Sequence[list[dict]], seed: int) -> tuple[list[str], list[float]]:
        """Replies, and the log-odds that they begin with a call of the tool."""
        prompts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        inputs = self.tokenizer(
            prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
        ).to(self.language_model.device)
        with torch.random.fork_rng():
            set_seed(seed % 2**32)
            output = self.language_model.generate(
                **inputs,
                **SAMPLING,
                pad_token_id=self.tokenizer.pad_token_id,
                output_logits=True,
                return_dict_in_generate=True,
            )
        calls = self.tokenizer("Action", add_special_tokens=False)["input_ids"][0]
        odds = torch.logit(output.logits[0].float().softmax(-1)[:, calls].clamp(1e-7, 1 - 1e-7))
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new_ids, skip_special_tokens=True), odds.tolist()


class StickerChooser:
    """
    A baseline that chooses stickers only: what is said, and when a sticker comes, are another model's; see [`Predictor`].

    With the encoder it sends the sticker whose caption (name and emotion) is nearest to the user's message and the reply together, of four texts of a sticker and three of a
    turn the best pair on the training sessions; without one, any.

    Args:
        replies ([`Predictions`]): The other model's.
        pack ([`StickerPack`]): The stickers.
        model (`str`): Name that the rows carry.
        encoder ([`TextEncoder`], *optional*): Embeds captions and turns.

    """

    def __init__(self, replies: Predictions, pack: StickerPack, model: str, encoder: TextEncoder | None) -> None:
        self.replies, self.pack, self.model, self.encoder = replies, pack, model, encoder
        self.vectors: dict[str, np.ndarray] = {}
        if encoder is not None:
            captions = encoder([sticker.caption for sticker in pack.stickers])
            self.vectors = dict(zip((sticker.id for sticker in pack.stickers), captions, strict=True))

    def __call__(self, turns: Sequence[SystemTurn], seed: int) -> list[Reply]:
        """
        Answer a batch of turns.

        Raises:
            InputError: If the other model did not answer one of them, or something else.

        """
        replies = []
        for turn, row in zip(turns, self.replies.replies_to(turns, self.pack), strict=True):
            said, gold = row.predicted, turn.turn.system
            reply = Reply(said.text)
            if said.sticker is not None:
                reply.sticker_id = first_unsent(turn, self._ranked(turn, said.text, seed))
            if gold.sticker is not None:
                reply.score_reference(self._ranked(turn, gold.text, seed), gold.sticker.id)
            replies.append(reply)
        return replies

    def _ranked(self, turn: SystemTurn, text: str, seed: int) -> list[str]:
        ids = candidates_of(turn.session, self.pack)
        if self.encoder is None:
            random.Random(f"{seed}/{turn.key}").shuffle(ids)
            return ids
        [query] = self.encoder([f"{turn.turn.user.text} {text}"])
        return sorted(ids, key=lambda sticker_id: -float(self.vectors[sticker_id] @ query))
