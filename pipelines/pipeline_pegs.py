"""PegsPipeline: a dialogue in, a reply with text and maybe a sticker out."""

import bisect
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch.nn import functional as F

from .finishing import finish
from .selector import StickerSelector


CONDITIONS = ("generation", "caption", "pooled", "mixed")


class TooLongError(ValueError):
    """A last message that is longer than the model can read; it says by how much."""


class Pack(Protocol):
    """What the pipeline needs of a sticker pack."""

    by_id: dict[str, Any]

    def image(self, sticker_id: str) -> Image.Image:
        """RGBA picture of a sticker."""


@dataclass(frozen=True)
class Retrieved:
    """A retrieved sticker and its cosine similarity to the reply (eq. 5)."""

    id: str
    score: float
    emotion: str | None  # `None` in a pack that is not annotated


@dataclass(frozen=True)
class Candidate:
    """
    What one drawing starts from.

    Args:
        condition (`str`): `"generation"`, `"caption"` or `"pooled"`.
        neighbours (`tuple[Retrieved, ...]`): Whose caption it is, the first one's or all; `"rag"` draws over these.

    """

    condition: str
    neighbours: tuple[Retrieved, ...]


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
        blocked (`str`, *optional*): Why the safety check refused every drawing; the retrieved sticker is sent instead.
        seed (`int`): Seed of text and drawing.
        seconds (`dict[str, float]`): Time spent on `text` and `sticker`.
        tokens (`dict[str, int]`): How many were read as `prompt` and said as `text`.
        was_cut (`bool`): Whether the text came to its longest length before its end.
        rank (`float`, *optional*): Share of the pack's stickers that the best drawing resembles less than it resembles the reply, in [0, 1].

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
    tokens: dict[str, int] = field(default_factory=dict)
    was_cut: bool = False
    rank: float | None = None


class PegsPipeline:
    """
    Answer dialogues with text and stickers (StickerConv, figure 3).

    One instance serves many conversations: it keeps nothing of any of them. `counts` says how many replies there were, with a sticker, drawn and retrieved, and
    how many drawings the safety check blocked and how many were not good enough.

    Args:
        model (`PegsModel`): The model.
        processor (`PegsProcessor`): Its processor.
        pack ([`Pack`]): Stickers to retrieve from.
        pack_embeds (`torch.Tensor` of shape `(M, e)`): The pack's vectors in the model's retrieval space, in the order of `pack.by_id`.
        decoder (`StickerPipeline`, *optional*): Draws stickers; needed for the variants `"gen"` and `"rag"`.
        encode_captions (`Callable`, *optional*): From captions to the decoder's prompt embeddings `(B, L, D)`; defaults to the decoder's own text encoder.

    Raises:
        ValueError: If the model's prompt embeddings do not fit the decoder.

    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        pack: Pack,
        pack_embeds: torch.Tensor,
        decoder: Any = None,
        encode_captions: Callable[[list[str]], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.processor, self.pack, self.decoder = model, processor, pack, decoder
        self.pack_ids = list(pack.by_id)
        self.pack_embeds = pack_embeds
        self.counts: Counter[str] = Counter()
        self._encode_captions = encode_captions
        emotions = [pack.by_id[sticker_id].emotion for sticker_id in self.pack_ids]
        self.selector = StickerSelector(pack_embeds, emotions) if model.config.num_retrieval_tokens else None
        self._lock = threading.Lock()
        if decoder is not None and model.config.num_generation_tokens:
            given = (model.config.prompt_length, model.config.prompt_dim)
            taken = (decoder.config.prompt_length, decoder.unet.config.cross_attention_dim)
            if given != taken:
                raise ValueError(
                    f"The model's feature mapper gives {given[0]} prompt embeddings of size {given[1]} (`prompt_length`, `prompt_dim`), but the "
                    f"sticker decoder takes {taken[0]} of size {taken[1]} (`prompt_length`, its UNet's `cross_attention_dim`): they were not "
                    "trained for each other."
                )

    def read_prompt_embeds(
        self, prompt_embeds: torch.Tensor | None, clarity: float = 0.93, exclude: Sequence[str] = ()
    ) -> torch.Tensor | None:
        """
        The caption that a reply's generation tokens ask for, where they clearly ask for one.

        They stand for the states of a caption. Where these are of the sentence encoder in whose space captions are retrieved, as at the mini scale, their mean is the
        caption's vector: nearly that of a sticker of the pack when the user asked for a thing or the feeling is plain, far from all when many stickers would do.

        Args:
            prompt_embeds (`torch.Tensor` of shape `(1, L, D)`, *optional*): `sticker_prompt_embeds` of a reply.
            clarity (`float`, *optional*, defaults to 0.93): Least cosine between their mean and a vector of the pack.
            exclude (`Sequence[str]`, *optional*): Ids that do not count.

        Returns:
            `torch.Tensor` of shape `(e,)`: Unit vector, to be used as a query; `None` where they are not clear, or not of that encoder.

        """
        config = self.model.config
        if prompt_embeds is None or config.retrieval_text_encoder is None or config.prompt_dim != config.retrieval_dim:
            return None
        meant = F.normalize(prompt_embeds[0].float().sum(dim=0), dim=-1)
        nearest = self.retrieve(meant, 1, exclude) if self.selector is not None else []
        return meant if nearest and nearest[0].score >= clarity else None

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
        max_new_tokens: int | None = None,
        clarity: float = 0.93,
        condition: str | None = None,
        emotion: str | None = None,
        emotion_scale: float = 1.0,
        strength: float = 0.6,
        num_neighbours: int | None = None,
        num_candidates: int | None = None,
        floor: float = 0.1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size: int = 512,
        outline: float = 0.0,
        callback_on_step_end: Callable[..., dict] | None = None,
        **generate_kwargs,
    ) -> PegsReply:
        """
        Answer the last message of a dialogue.

        > Parameters that control the text

        Args:
            messages (`list[dict]`): The dialogue in the chat format, the last message a user's. Of one that is too long, the oldest exchanges are not read.
            variant (`str`, *optional*): `"ret"`, `"gen"` or `"rag"`, defaults to the model's.
            seed (`int`, *optional*, defaults to 0): Same seed, same reply and picture.
            exclude (`Sequence[str]`, *optional*): Sticker ids not to send again.
            max_new_tokens (`int`, *optional*): Longest text, defaults to that of the given or the model's `generation_config`, else 64.
            **generate_kwargs: More arguments of `PegsModel.generate`; `past_key_values=model.new_cache()`, the same at each turn of a conversation, saves reading
                it again.

        > Parameters that control which sticker is meant

        Args:
            clarity (`float`, *optional*, defaults to 0.93): See [`read_prompt_embeds`]. What is clear is drawn from this sticker alone, unless `num_neighbours` is given.
                Above 1, only the retrieval tokens count, as in the paper.

        > Parameters that control what is drawn

        Args:
            condition (`str`, *optional*): What the decoder draws from: `"generation"`, the reply's generation tokens; `"caption"`, the caption of the nearest sticker,
                for the second candidate of the second nearest, and so on; `"pooled"`, the mean of the captions of the nearest `num_neighbours`, weighted as
                below; `"mixed"`, by turns `"generation"` and `"caption"`. Defaults to the decoder's `default_condition`, and without captions to `"generation"`.
            emotion (`str`, *optional*): Emotion to draw instead of the reply's own.
            emotion_scale (`float`, *optional*, defaults to 1.0): 0 for neutral, more than 1 to exaggerate.
            strength (`float`, *optional*, defaults to 0.6): How far `"rag"` goes from the retrieved sticker, in (0, 1].
            num_neighbours (`int`, *optional*): How many stickers, one unless given, `"rag"` draws over, mixed by a softmax of their similarities: the nearest ones, or from
                the one on whose caption is drawn.
            num_candidates (`int`, *optional*): Drawings to choose from, defaults to the decoder's `default_num_candidates`.
            floor (`float`, *optional*, defaults to 0.1): Share of the pack that a drawing must resemble less than it resembles the reply; below it the retrieved
                sticker is sent. 0 sends any drawing.

        > Parameters that control how it is drawn

        Args:
            num_inference_steps (`int`, *optional*): Denoising steps of a drawing, defaults to the decoder's.
            guidance_scale (`float`, *optional*): Classifier-free guidance of a drawing, defaults to the decoder's.
            size (`int`, *optional*, defaults to 512): Side of a drawn sticker in pixels.
            outline (`float`, *optional*, defaults to 0.0): Width of a white rim as a share of the side, around whatever is sent.
            callback_on_step_end (`Callable`, *optional*): See [`StickerPipeline.__call__`].

        Returns:
            [`PegsReply`].

        Raises:
            ValueError: If the variant, the condition or the emotion is unknown, or cannot be served by this model or without a decoder, or a number is out of range.
            TooLongError: If the last message alone is longer than the model can read.

        """
        variant = variant or self.model.config.variant
        condition = self.check_inputs(variant, condition, num_neighbours, num_candidates, strength, emotion)
        started = time.perf_counter()
        settings = generate_kwargs.get("generation_config", self.model.generation_config)
        if max_new_tokens is not None or settings.max_new_tokens is None:
            max_new_tokens = generate_kwargs["max_new_tokens"] = max_new_tokens or 64
        inputs = self.encode(messages, max_new_tokens or settings.max_new_tokens)
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(seed)  # transformers samples from the global generator only
            output = self.model.generate(**inputs, **generate_kwargs)
        new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        special = set(self.processor.tokenizer.all_special_ids)
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
            tokens={"prompt": inputs["input_ids"].shape[1], "text": sum(i not in special for i in new_ids.tolist())},
            was_cut=bool(output.sticker_logit.isnan()[0]),
        )
        started = time.perf_counter()
        if output.sticker_mask[0]:
            query = None
            meant = self.read_prompt_embeds(output.sticker_prompt_embeds, clarity, exclude)
            if output.sticker_queries is not None:
                query = output.sticker_queries[0] if meant is None else meant
                reply.retrieved = self.retrieve(query, max(5, num_neighbours or 1), exclude)
            if variant == "ret":
                self._send_retrieved(reply)
            else:
                with self._lock:  # a scheduler holds the state of one drawing
                    self._draw(
                        reply,
                        query,
                        output.sticker_prompt_embeds[:1],
                        self.plan(
                            condition,
                            reply.retrieved[: 1 if meant is not None and num_neighbours is None else None],
                            num_neighbours or 1,
                            num_candidates,
                        ),
                        floor,
                        emotion,
                        strength=strength,
                        emotion_scale=emotion_scale,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        callback_on_step_end=callback_on_step_end,
                    )
            if reply.sticker is not None:
                reply.sticker = finish(reply.sticker, None if reply.sticker_id else size, outline)
        reply.seconds["sticker"] = time.perf_counter() - started
        self._count(reply)
        return reply

    def encode(self, messages: list[dict], max_new_tokens: int) -> Any:
        """
        The model's inputs for a dialogue, without the oldest exchanges where there is else no room for `max_new_tokens` and a sticker; a system message stays.

        Raises:
            TooLongError: If there is no room for the last message.

        """
        first = int(messages[0]["role"] == "system")
        room = (
            self.model.config.text_config.max_position_embeddings - max_new_tokens - self.model.config.num_img_tokens
        )

        @functools.cache
        def without(exchanges: int) -> Any:
            return self.processor.apply_chat_template(
                [*messages[:first], *messages[first + 2 * exchanges :]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )

        def fits(exchanges: int) -> bool:
            return without(exchanges)["input_ids"].shape[1] <= room

        most = (len(messages) - first - 1) // 2
        fewest = 0 if fits(0) else bisect.bisect_left(range(most + 1), True, lo=1, key=fits)
        if fewest > most:
            length = without(most)["input_ids"].shape[1]
            raise TooLongError(f"The last message has {length} tokens, and the model can read {room}.")
        return without(fewest).to(self.model.device)

    def serves(self, variant: str) -> bool:
        """Whether this model, with or without a decoder, can act as `variant`."""
        try:
            self.check_inputs(variant)
        except ValueError:
            return False
        return True

    def check_inputs(
        self,
        variant: str,
        condition: str | None = None,
        num_neighbours: int | None = None,
        num_candidates: int | None = None,
        strength: float = 0.6,
        emotion: str | None = None,
    ) -> str:
        """
        Check the arguments of a call before anything is computed, and tell what is drawn from.

        Raises:
            ValueError: See [`PegsPipeline.__call__`].

        """
        self.model.config.check_variant(variant)
        if variant != "ret" and self.decoder is None:
            raise ValueError(f"`variant` {variant!r} draws stickers, but no sticker decoder was loaded.")
        if condition is not None and condition not in CONDITIONS:
            raise ValueError(f"`condition` must be one of {', '.join(CONDITIONS)}, got {condition!r}.")
        for name, number in (("num_neighbours", num_neighbours), ("num_candidates", num_candidates)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be in (0, 1], got {strength}.")
        if variant != "ret" and emotion is not None:
            self.decoder.emotion_states.index(emotion)
        if variant == "ret" or condition == "generation":
            return "generation"
        lacking = None
        if self.selector is None:
            lacking = "a model that retrieves; this one has no retrieval tokens"
        elif self._encode_captions is None and self.decoder.text_encoder is None:
            lacking = "`encode_captions`, or a sticker decoder with a text encoder"
        if lacking and condition:
            raise ValueError(f"`condition` {condition!r} needs {lacking}.")
        return "generation" if lacking else condition or self.decoder.config.default_condition

    def plan(
        self,
        condition: str,
        retrieved: Sequence[Retrieved],
        num_neighbours: int = 1,
        num_candidates: int | None = None,
    ) -> list[Candidate]:
        """What each candidate is drawn from; see [`PegsPipeline.__call__`]."""
        kinds = ("generation", "caption") if condition == "mixed" else (condition,)
        planned = []
        for number in range(num_candidates or self.decoder.config.default_num_candidates):
            kind = kinds[number % len(kinds)] if retrieved else "generation"
            first = number // len(kinds) % len(retrieved) if kind == "caption" else 0
            planned.append(Candidate(kind, tuple(retrieved[first : first + num_neighbours])))
        return planned

    def neighbour_weights(self, neighbours: Sequence[Retrieved]) -> torch.Tensor:
        """Softmax `(k,)` of the similarities of retrieved stickers, at the temperature they were learned with (eq. 6-7)."""
        scores = torch.tensor([neighbour.score for neighbour in neighbours])
        return (scores / self.model.config.retrieval_temperature).softmax(dim=0)

    @torch.no_grad()
    def condition_embeds(self, candidate: Candidate, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """What the decoder draws a candidate from `(1, L, D)`: the reply's own `prompt_embeds`, or captions of retrieved stickers."""
        if candidate.condition == "generation":
            return prompt_embeds
        nearest = candidate.neighbours[:1] if candidate.condition == "caption" else candidate.neighbours
        encode = self._encode_captions or self.decoder.encode_prompt
        states = encode([self.pack.by_id[neighbour.id].caption for neighbour in nearest]).to(prompt_embeds)
        return (self.neighbour_weights(nearest).to(states).view(-1, 1, 1) * states).sum(dim=0, keepdim=True)

    @torch.no_grad()
    def mix_latents(self, neighbours: Sequence[Retrieved]) -> torch.Tensor:
        """Weighted mean `(1, C, h, w)` of the decoder's latents of retrieved stickers."""
        latents = self.decoder.encode_image([self.pack.image(neighbour.id) for neighbour in neighbours])
        return (self.neighbour_weights(neighbours).to(latents).view(-1, 1, 1, 1) * latents).sum(dim=0, keepdim=True)

    def intended_emotion(self, retrieved: Sequence[Retrieved]) -> str | None:
        """The emotion that most of the weight of the retrieved stickers is on."""
        votes: Counter[str] = Counter()
        for neighbour, weight in zip(retrieved, self.neighbour_weights(retrieved).tolist(), strict=True):
            if neighbour.emotion:
                votes[neighbour.emotion] += weight
        return votes.most_common(1)[0][0] if votes else None

    @torch.no_grad()
    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Unit vectors `(N, e)` of pictures in the retrieval space (eq. 5)."""
        inputs = self.processor(["<IMG>"] * len(images), images, return_tensors="pt")
        return self.model.embed_stickers(inputs["pixel_values"].to(self.model.device)).float().cpu()

    def _draw(
        self,
        reply: PegsReply,
        query: torch.Tensor | None,
        prompt_embeds: torch.Tensor,
        planned: list[Candidate],
        floor: float,
        emotion: str | None,
        **decoder_kwargs,
    ) -> None:
        """Draw candidates, choose one, and fall back to retrieval where none may or should be sent."""
        over = None
        if reply.variant == "rag" and reply.retrieved:
            latents = {neighbours: self.mix_latents(neighbours) for neighbours in {c.neighbours for c in planned}}
            over = torch.cat([latents[candidate.neighbours] for candidate in planned])
        drawn = self.decoder(
            prompt_embeds=torch.cat([self.condition_embeds(candidate, prompt_embeds) for candidate in planned]),
            init_image=over,
            transparent=True,
            generator=[torch.Generator().manual_seed(reply.seed + i) for i in range(len(planned))],
            emotion=emotion,
            **decoder_kwargs,
        )
        allowed = [blocked is None for blocked in drawn.blocked]
        self.counts["blocked"] += allowed.count(False)
        if not any(allowed):
            reply.blocked = drawn.blocked[0]
            return self._send_retrieved(reply, f"The drawing was blocked ({reply.blocked})")
        best = allowed.index(True)
        if self.selector is not None and query is not None:
            intended = emotion or self.intended_emotion(reply.retrieved)
            choice = self.selector.choose(self.embed_images(drawn.images), query.float().cpu(), intended, allowed)
            best, reply.rank = choice.index, choice.rank
            if reply.rank < floor:
                self.counts["below_floor"] += 1
                return self._send_retrieved(
                    reply, f"The drawing resembles the reply more than {reply.rank:.0%} of the pack only"
                )
        reply.sticker = drawn.images[best]
        chosen = planned[best]
        source = "the captions of the nearest stickers"
        if chosen.condition == "generation":
            source = "the reply's own generation tokens"
        elif chosen.condition == "caption":
            source = f"the caption of {chosen.neighbours[0].id}"
        reply.why = f"Drawn from {source}"
        if over is not None:
            reply.why += f" over {chosen.neighbours[0].id}"
        reply.why += f"; the best of {len(planned)}." if len(planned) > 1 else "."
        return None

    def _send_retrieved(self, reply: PegsReply, because: str | None = None) -> None:
        if not reply.retrieved:
            reply.why = f"{because or 'The pack has no sticker left'}, and there is no sticker to retrieve instead."
            return
        best = reply.retrieved[0]
        sticker = self.pack.by_id[best.id]
        reply.sticker, reply.sticker_id = self.pack.image(best.id), best.id
        known = [best.emotion] if best.emotion else []
        reply.why = f"{best.id} ({', '.join([*known, f'similarity {best.score:.2f}'])})"
        if sticker.recommendation:
            reply.why += f": {sticker.recommendation}"
        if because is not None:
            reply.why = f"{because}; instead {reply.why}"

    def _count(self, reply: PegsReply) -> None:
        with self._lock:
            self.counts["replies"] += 1
            if reply.sticker is not None:
                self.counts.update(("stickers", "retrieved" if reply.sticker_id else "drawn"))


__all__ = ["CONDITIONS", "PegsPipeline", "PegsReply", "Retrieved", "TooLongError"]
