"""
The baselines of section 6.2: a language model fine-tuned on the sessions' texts, and one that calls the sticker decoder as a tool (Figure 23).

The tool is called before the text: `Action` and `Action Input` with a sticker's caption, an `Observation` from the tool, then the reply.
"""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dataset_builders.schema import Message, Session
from dataset_builders.stickers.pack import StickerPack
from pegs.evaluation.predict import Reply, SystemTurn
from pegs.training.text_states import encode_captions
from pipelines.pipeline_sticker import StickerPipeline


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
            drawn = self._draw(list(captions.values()), seeds)
            for row, text, image, blocked in zip(captions, after, drawn.images, drawn.blocked, strict=True):
                replies[row].text = text.strip()
                replies[row].drawn = None if blocked is not None else image
        return replies

    def _draw(self, captions: list[str], seeds: list[torch.Generator]):
        if self.decoder.components.get("text_encoder") is not None:
            return self.decoder(prompt=captions, generator=seeds)
        return self.decoder(prompt_embeds=encode_captions(captions, self.prompt_length), generator=seeds)

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
