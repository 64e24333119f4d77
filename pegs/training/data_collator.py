"""Batches of dialogues for PEGS."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import AttentionInterface, AttentionMaskInterface, BatchFeature
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_pegs import PegsConfig, PegsProcessor
from modeling_pegs.processing_pegs import load_sticker
from pegs.training.targets import PairTargets, StickerTargets, VisionFeatures


class DataCollatorForPegs:
    """
    Turns dialogues into a training batch: labels on what the assistant says, ends with and sends, and the targets of its stickers.

    Args:
        processor ([`PegsProcessor`]): The model's processor.
        config ([`PegsConfig`]): The model's configuration.
        targets ([`StickerTargets`] or [`PairTargets`], *optional*): Caption states and vision features of the stickers that are sent; none are added without.
        max_length (`int`): Longest sequence. A longer dialogue loses its oldest turns, whole; nothing is cut within a message.
        roles (`Sequence[str]`): Whose messages are learnt.
        vision ([`VisionFeatures`], *optional*): What the frozen vision tower sees, instead of the pictures.
        negatives (`str`): `"pack"` contrasts a reply with all stickers of `targets`, `"batch"` with those of the effective batch (see [`contrast`]).
        packed (`bool`): Whether dialogues follow each other in one row, each with positions from 0, instead of a padded row each. Needs
            the attention `"dialogues"` or one that knows packed rows itself (FlashAttention).

    """

    def __init__(
        self,
        processor: PegsProcessor,
        config: PegsConfig,
        targets: StickerTargets | PairTargets | None,
        max_length: int,
        roles: Sequence[str] = ("assistant",),
        vision: VisionFeatures | None = None,
        negatives: str = "pack",
        packed: bool = False,
    ) -> None:
        self.processor, self.config, self.targets, self.max_length = processor, config, targets, max_length
        self.vision, self.negatives, self.packed = vision, negatives, packed
        self.openings = find_openings(processor, roles)
        self.end_id = processor.tokenizer.eos_token_id

    def __call__(self, features: list[dict]) -> BatchFeature:
        """
        Collate dialogues.

        Args:
            features (`list[dict]`): `messages` in the chat format, where an image part also holds `sticker_id`.

        Returns:
            `BatchFeature`: `input_ids`, `labels` `(B, T)` with `attention_mask`, padded on the right, or if packed `(1, T)` with `position_ids`;
            `pixel_values` `(N, 3, H, W)` or `vision_states` `(N, P, p)`; and if the assistants send `S` stickers, `target_prompt_embeds` `(S, L, D)` and,
            against the pack, `retrieval_features` `(M, p)` and `retrieval_positives` `(S, M)`, against the effective batch `sticker_ids` `(S,)` with
            `retrieval_features` `(S, p)` or `sent_images` `(S,)`.

        """
        dialogues = [self.shorten(feature["messages"]) for feature in features]
        rows = [torch.tensor(self.encode(messages)) for messages in dialogues]
        labels = [self.make_labels(ids, torch.ones_like(ids)) for ids in rows]
        batch = self.join(rows, labels)
        images = [
            (part, message["role"] == "assistant")
            for messages in dialogues
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]
        if images and self.vision is None:
            pictures = [load_sticker(part["image"]) for part, _ in images]
            batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        elif images:
            batch["vision_states"] = self.vision.states([part["sticker_id"] for part, _ in images])
        sent = {position: part["sticker_id"] for position, (part, is_sent) in enumerate(images) if is_sent}
        if sent and self.targets is not None:
            self.add_targets(batch, list(sent), list(sent.values()))
        return batch

    def add_targets(self, batch: BatchFeature, positions: list[int], sent: list[str]) -> None:
        """Add what the stickers `sent`, which are the pictures at `positions`, should have been."""
        if self.config.num_generation_tokens and self.config.generation_loss_weight:
            batch["target_prompt_embeds"] = self.targets.prompt_embeds(sent)
        if not (self.config.num_retrieval_tokens and self.config.retrieval_loss_weight):
            return
        if self.negatives == "pack":
            batch["retrieval_features"] = self.targets.vision_features
            batch["retrieval_positives"] = self.targets.positives(sent)
            return
        batch["sticker_ids"] = torch.tensor([_number(sticker_id) for sticker_id in sent])
        if self.vision is None:
            batch["sent_images"] = torch.tensor(positions)
        else:
            batch["retrieval_features"] = self.vision.pooled(sent)

    def join(self, rows: list[torch.Tensor], labels: list[torch.Tensor]) -> BatchFeature:
        """One row of all, or a padded row each."""
        if self.packed:
            positions = torch.cat([torch.arange(len(ids)) for ids in rows])
            return BatchFeature(
                {
                    "input_ids": torch.cat(rows)[None],
                    "labels": torch.cat(labels)[None],
                    "position_ids": positions[None],
                }
            )
        pad = torch.nn.utils.rnn.pad_sequence
        pad_id = self.processor.tokenizer.pad_token_id
        return BatchFeature(
            {
                "input_ids": pad(rows, batch_first=True, padding_value=self.end_id if pad_id is None else pad_id),
                "attention_mask": pad([torch.ones_like(ids) for ids in rows], batch_first=True),
                "labels": pad(labels, batch_first=True, padding_value=-100),
            }
        )

    def encode(self, messages: list[dict]) -> list[int]:
        """Ids of a dialogue."""
        token, count = self.processor.image_token, self.processor.num_query_tokens
        text = self.processor.apply_chat_template(messages, tokenize=False)
        text = text.replace(token, f"<Img>{token * count}</Img>")
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def shorten(self, messages: list[dict]) -> list[dict]:
        """
        Drop the oldest exchanges until a dialogue fits.

        Raises:
            ValueError: If its last exchange alone is longer than `max_length`.

        """
        while len(self.encode(messages)) > self.max_length:
            if len(messages) <= 2:
                raise ValueError(f"An exchange is longer than max_length {self.max_length}: {str(messages)[:200]}")
            messages = messages[2:]
        return messages

    def make_labels(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Labels of one sequence: text, [IMG] tokens and end token of the learnt roles; -100 elsewhere, and on perceived stickers.

        Args:
            input_ids (`torch.Tensor` of shape `(T,)`): Ids.
            attention_mask (`torch.Tensor` of shape `(T,)`): 0 on padding.

        Returns:
            `torch.Tensor` of shape `(T,)`.

        """
        labels = torch.full_like(input_ids, -100)
        ids, length = input_ids.tolist(), int(attention_mask.sum())
        position = 0
        while position < length:
            opening = next((o for o in self.openings if ids[position : position + len(o)] == o), None)
            if opening is None:
                position += 1
                continue
            start = position + len(opening)
            end = ids.index(self.end_id, start) + 1
            labels[start:end] = input_ids[start:end]
            position = end
        first = self.config.first_new_token_id
        labels[(input_ids >= first) & (input_ids < first + 3)] = -100  # <Img>, </Img>, <IMG>
        return labels


def find_openings(processor: PegsProcessor, roles: Sequence[str]) -> list[list[int]]:
    """What opens a message of each role in the processor's chat template, as ids."""

    def write(*said: str, **kwargs) -> str:
        messages = [
            {"role": ("user", "assistant")[turn % 2], "content": [{"type": "text", "text": text}]}
            for turn, text in enumerate(said)
        ]
        return processor.apply_chat_template(messages, **kwargs)

    encode, openings = processor.tokenizer.encode, []
    for role in roles:
        said = ("a",) if role == "assistant" else ("a", "b")
        before = write(*said)
        if role == "assistant":
            opening = write(*said, add_generation_prompt=True)[len(before) :]
        else:
            opening = write(*said, "~")[len(before) :].split("~")[0].rstrip(" ")
        context = encode("x", add_special_tokens=False)  # some tokenizers begin a text otherwise than they go on
        openings.append(encode(f"x{opening}", add_special_tokens=False)[len(context) :])
    return openings


def _number(sticker_id: str) -> int:
    """A number for an id that is the same in every process."""
    return int.from_bytes(hashlib.sha256(sticker_id.encode()).digest()[:8], "big", signed=True)


def attend_within_dialogues(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention `(1, T, heads, head size)` of dialogues that follow each other in one row, each on its own.

    The fused kernel needs no mask then, which is what makes long rows cheap where there is no FlashAttention for packed rows. What is not packed, as
    in generation, is attended to as by `"sdpa"`.
    """
    is_packed = position_ids is not None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    starts = (position_ids[0] == 0).nonzero().flatten().tolist() if is_packed else []
    if len(starts) < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts], dim=1), None


AttentionInterface.register("dialogues", attend_within_dialogues)
AttentionMaskInterface.register("dialogues", sdpa_mask)
