"""Batches of dialogues for PEGS."""

from collections.abc import Sequence

import torch
from transformers import BatchFeature

from modeling_pegs import PegsConfig, PegsProcessor
from pegs.training.targets import StickerTargets


class DataCollatorForPegs:
    """
    Turns dialogues into a training batch: labels on what the assistant says, ends with and sends, and the targets of its stickers.

    Args:
        processor ([`PegsProcessor`]): The model's processor.
        config ([`PegsConfig`]): The model's configuration.
        targets ([`StickerTargets`]): Caption states and vision features of the stickers.
        max_length (`int`): Longest sequence. A longer dialogue loses its oldest turns, whole; nothing is cut within a message.
        roles (`Sequence[str]`): Whose messages are learnt.
        opening (`str`): What opens a message in the chat template.
        end_token (`str`): What closes a message.

    """

    def __init__(
        self,
        processor: PegsProcessor,
        config: PegsConfig,
        targets: StickerTargets,
        max_length: int,
        roles: Sequence[str] = ("assistant",),
        opening: str = "<|im_start|>{role}\n",
        end_token: str = "<|im_end|>",
    ) -> None:
        self.processor, self.config, self.targets, self.max_length = processor, config, targets, max_length
        encode = processor.tokenizer.encode
        self.openings = [encode(opening.format(role=role), add_special_tokens=False) for role in roles]
        self.end_id = processor.tokenizer.convert_tokens_to_ids(end_token)

    def __call__(self, features: list[dict]) -> BatchFeature:
        """
        Collate dialogues.

        Args:
            features (`list[dict]`): `messages` in the chat format, where an image part also holds `sticker_id`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask`, `labels` `(B, T)`, padded on the right; `pixel_values` `(N, 3, H, W)`; and if
            the assistants send `S` stickers, `retrieval_features` `(M, p)`, `retrieval_positives` `(S, M)` and `target_prompt_embeds` `(S, L, D)`.

        """
        dialogues = [self.shorten(feature["messages"]) for feature in features]
        batch = self.processor.apply_chat_template(dialogues, tokenize=True, return_tensors="pt", padding_side="right")
        batch["labels"] = torch.stack(
            [
                self.make_labels(ids, mask)
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
        )
        sent = [
            part["sticker_id"]
            for messages in dialogues
            for message in messages
            if message["role"] == "assistant"
            for part in message["content"]
            if part["type"] == "image"
        ]
        if sent:
            if self.config.num_retrieval_tokens:
                batch["retrieval_features"] = self.targets.vision_features
                batch["retrieval_positives"] = self.targets.positives(sent)
            if self.config.num_generation_tokens:
                batch["target_prompt_embeds"] = self.targets.prompt_embeds(sent)
        return batch

    def shorten(self, messages: list[dict]) -> list[dict]:
        """
        Drop the oldest exchanges until a dialogue fits.

        Raises:
            ValueError: If its last exchange alone is longer than `max_length`.

        """
        while len(self.processor.apply_chat_template(messages, tokenize=True)["input_ids"][0]) > self.max_length:
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
