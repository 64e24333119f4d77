"""Replies of a model to many contexts at once, with what it asks for as their stickers: what the figures of a model card are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pegs.training.calibrate import batches_of_like_length
from pipelines.pipeline_pegs import PegsPipeline


@dataclass
class WrittenReply:
    """
    A reply before its sticker is retrieved or drawn.

    Args:
        text (`str`): What is said.
        sends (`bool`): Whether a sticker follows.
        logit (`float`): The model's own log-odds of one; NaN for a reply that was cut.
        query (`torch.Tensor` of shape `(e,)`): What is retrieved by; zeros without a sticker.
        prompt_embeds (`torch.Tensor` of shape `(L, D)`): What is drawn from; zeros without a sticker.

    """

    text: str
    sends: bool
    logit: float
    query: torch.Tensor
    prompt_embeds: torch.Tensor


def write_replies(
    pipeline: PegsPipeline, contexts: Sequence[list[dict]], seed: int = 0, batch_size: int = 16, **generate_kwargs: Any
) -> list[WrittenReply]:
    """
    Answer contexts, those of like length together.

    Args:
        pipeline ([`PegsPipeline`]): Its model has both retrieval and generation tokens.
        contexts (`Sequence[list[dict]]`): Messages in the chat format, each list ending with a user's.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling.
        batch_size (`int`, *optional*, defaults to 16): Replies a batch.
        **generate_kwargs: More arguments of [`PegsModel.generate`].

    Returns:
        `list[WrittenReply]`: In the order of `contexts`.

    """
    model, processor = pipeline.model, pipeline.processor
    written: dict[int, WrittenReply] = {}
    for number, rows in enumerate(batches_of_like_length(processor, list(contexts), batch_size)):
        inputs = processor.apply_chat_template(
            [contexts[row] for row in rows], add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ).to(model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed + number)  # noqa: TID251  transformers samples from the global generator only
            output = model.generate(**inputs, max_new_tokens=64, **generate_kwargs)
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        for place, row in enumerate(rows):
            written[row] = WrittenReply(
                text=processor.decode(new_ids[place], skip_special_tokens=True).strip(),
                sends=bool(output.sticker_mask[place]),
                logit=float(output.sticker_logit[place]),
                query=output.sticker_queries[place],
                prompt_embeds=output.sticker_prompt_embeds[place],
            )
    return [written[row] for row in range(len(contexts))]
