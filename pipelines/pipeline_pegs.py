"""PegsPipeline: a dialogue in, a reply with text and maybe a sticker out."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image


class Pack(Protocol):
    """What the pipeline needs of a sticker pack."""

    by_id: dict[str, Any]

    def image(self, sticker_id: str) -> Image.Image:
        """RGBA picture of a sticker."""


@dataclass
class Retrieved:
    """A retrieved sticker and its cosine similarity to the reply (eq. 5)."""

    id: str
    score: float
    emotion: str | None  # `None` in a pack that is not annotated


@dataclass
class PegsReply:
    """
    A reply.

    Args:
        text (`str`): What is said.
        sticker (`PIL.Image.Image`, *optional*): RGBA, `None` if the model sends none.
        why (`str`): Why this sticker, in one sentence.
        variant (`str`): `"ret"`, `"gen"` or `"rag"`.
        retrieved (`list[Retrieved]`): Nearest stickers, best first; the first is the one sent by `"ret"` and drawn over by `"rag"`.
        sticker_id (`str`, *optional*): Id of the sticker if it was retrieved, not drawn.
        blocked (`str`, *optional*): Why the safety check refused a drawing; the retrieved sticker is sent instead.
        seed (`int`): Seed of text and drawing.
        seconds (`dict[str, float]`): Time spent on `text` and `sticker`.

    """

    text: str
    sticker: Image.Image | None
    why: str
    variant: str
    retrieved: list[Retrieved]
    sticker_id: str | None
    blocked: str | None
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)


class PegsPipeline:
    """
    Answer dialogues with text and stickers (StickerConv, figure 3).

    One instance serves many conversations: it keeps nothing of any of them.

    Args:
        model (`PegsModel`): The model.
        processor (`PegsProcessor`): Its processor.
        pack ([`Pack`]): Stickers to retrieve from.
        pack_embeds (`torch.Tensor` of shape `(M, e)`): The pack's vectors in the model's retrieval space, in the order of `pack.by_id`.
        decoder (`StickerPipeline`, *optional*): Draws stickers; needed for the variants `"gen"` and `"rag"`.

    """

    def __init__(self, model: Any, processor: Any, pack: Pack, pack_embeds: torch.Tensor, decoder: Any = None) -> None:
        self.model, self.processor, self.pack, self.decoder = model, processor, pack, decoder
        self.pack_ids = list(pack.by_id)
        self.pack_embeds = pack_embeds
        self._lock = threading.Lock()

    def retrieve(self, query: torch.Tensor, top_k: int = 5, exclude: Sequence[str] = ()) -> list[Retrieved]:
        """
        Find the stickers nearest to a reply.

        Args:
            query (`torch.Tensor` of shape `(e,)`): Unit vector, one of `sticker_queries`.
            top_k (`int`, *optional*, defaults to 5): How many.
            exclude (`Sequence[str]`, *optional*): Ids not to return, e.g. those sent before in this conversation.

        Returns:
            `list[Retrieved]`: Best first; ties in the pack's order.

        """
        scores = self.pack_embeds @ query.to(self.pack_embeds)
        excluded = set(exclude)
        order = scores.argsort(descending=True, stable=True).tolist()
        best = [i for i in order if self.pack_ids[i] not in excluded][:top_k]
        return [Retrieved(self.pack_ids[i], scores[i].item(), self.pack.by_id[self.pack_ids[i]].emotion) for i in best]

    def __call__(
        self,
        messages: list[dict],
        variant: str | None = None,
        seed: int = 0,
        exclude: Sequence[str] = (),
        max_new_tokens: int = 64,
        strength: float = 0.6,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.5,
        **generate_kwargs,
    ) -> PegsReply:
        """
        Answer the last message of a dialogue.

        Args:
            messages (`list[dict]`): The dialogue in the chat format, the last message a user's.
            variant (`str`, *optional*): `"ret"`, `"gen"` or `"rag"`, defaults to the model's.
            seed (`int`, *optional*, defaults to 0): Same seed, same reply and picture.
            exclude (`Sequence[str]`, *optional*): Sticker ids not to send again.
            max_new_tokens (`int`, *optional*, defaults to 64): Longest text.
            strength (`float`, *optional*, defaults to 0.6): How far `"rag"` goes from the retrieved sticker, in (0, 1].
            num_inference_steps (`int`, *optional*, defaults to 20): Denoising steps of a drawing.
            guidance_scale (`float`, *optional*, defaults to 2.5): Classifier-free guidance of a drawing.
            generate_kwargs: More arguments of `PegsModel.generate`.

        Returns:
            [`PegsReply`].

        Raises:
            ValueError: If the variant is unknown or cannot be served by this model or without a decoder.

        """
        variant = variant or self.model.config.variant
        self.model.config.check_variant(variant)
        if variant != "ret" and self.decoder is None:
            raise ValueError(f"`variant` {variant!r} draws stickers, but no sticker decoder was loaded.")
        started = time.perf_counter()
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(seed)  # transformers samples from the global generator only
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **generate_kwargs)
        new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        reply = PegsReply(
            text=self.processor.decode(new_ids, skip_special_tokens=True).strip(),
            sticker=None,
            why="The model ended its reply without a sticker.",
            variant=variant,
            retrieved=[],
            sticker_id=None,
            blocked=None,
            seed=seed,
            seconds={"text": time.perf_counter() - started},
        )
        started = time.perf_counter()
        if output.sticker_mask[0]:
            if output.sticker_queries is not None:
                reply.retrieved = self.retrieve(output.sticker_queries[0], exclude=exclude)
            if variant != "ret":
                init_image = self.pack.image(reply.retrieved[0].id) if variant == "rag" else None
                drawn = self.decoder(
                    prompt_embeds=output.sticker_prompt_embeds[:1],
                    init_image=init_image,
                    strength=strength,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=torch.Generator().manual_seed(seed),
                )
                reply.sticker, reply.blocked = drawn.images[0], drawn.blocked[0]
                reply.why = "Drawn from the reply's own generation tokens."
                if variant == "rag":
                    reply.why = f"Drawn over {reply.retrieved[0].id}, the nearest sticker of the pack."
            if variant == "ret" or reply.blocked is not None:
                self._send_retrieved(reply)
        reply.seconds["sticker"] = time.perf_counter() - started
        return reply

    def _send_retrieved(self, reply: PegsReply) -> None:
        reply.sticker = None
        if not reply.retrieved:
            reply.why = f"The drawing was blocked ({reply.blocked}) and there is no sticker to retrieve instead."
            return
        best = reply.retrieved[0]
        sticker = self.pack.by_id[best.id]
        reply.sticker, reply.sticker_id = self.pack.image(best.id), best.id
        known = [best.emotion] if best.emotion else []
        reply.why = f"{best.id} ({', '.join([*known, f'similarity {best.score:.2f}'])})"
        if sticker.recommendation:
            reply.why += f": {sticker.recommendation}"
        if reply.blocked is not None:
            reply.why = f"The drawing was blocked ({reply.blocked}); instead {reply.why}"


__all__ = ["PegsPipeline", "PegsReply", "Retrieved"]
