"""InfoNCE over a whole effective batch: every process, every accumulation step, with gradients to both sides (eq. 6-8)."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from modeling_pegs.retrieval_head import info_nce_loss


@dataclass(frozen=True)
class Contrast:
    """InfoNCE of an effective batch, and its gradients by this process's replies `(S, e)` and stickers `(S, e)`."""

    loss: torch.Tensor
    text_gradients: torch.Tensor
    image_gradients: torch.Tensor


def contrast(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    sticker_ids: torch.Tensor,
    temperature: float,
    accelerator: Accelerator,
) -> Contrast | None:
    """
    InfoNCE of all processes' replies and stickers, and its gradients by those of this one.

    The gradients stand in for the loss when the same replies are computed again with a graph, a few at a time (GradCache, arXiv:2101.06983): the
    result is that of one big batch. A sticker that occurs several times is one sticker with several right replies.

    Args:
        text_embeds (`torch.Tensor` of shape `(S, e)`): Replies, unit L2 norm; `S` may differ between processes and be 0.
        image_embeds (`torch.Tensor` of shape `(S, e)`): The sticker of each, unit L2 norm.
        sticker_ids (`torch.Tensor` of shape `(S,)`): Which sticker that is, the same number in every process.
        temperature (`float`): tau.
        accelerator (`Accelerator`): Knows the other processes.

    Returns:
        [`Contrast`] or `None`: `None` if nobody sends a sticker.

    """
    sizes = accelerator.gather(torch.tensor([len(sticker_ids)], device=accelerator.device)).tolist()
    if not sum(sizes):
        return None

    def everyone(rows: torch.Tensor) -> torch.Tensor:
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = accelerator.gather(padded).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    texts = everyone(text_embeds.detach().float()).requires_grad_()
    images = everyone(image_embeds.detach().float()).requires_grad_()
    loss = contrastive_loss(texts, images, everyone(sticker_ids), temperature)
    gradients = torch.autograd.grad(loss, (texts, images))
    start = sum(sizes[: accelerator.process_index])
    own = slice(start, start + len(sticker_ids))
    return Contrast(loss.detach(), gradients[0][own], gradients[1][own])


def contrastive_loss(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, sticker_ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """InfoNCE of replies `(S, e)` and their stickers `(S, e)`, where rows with the same id `(S,)` are one sticker."""
    unique, which = sticker_ids.unique(return_inverse=True)
    rows = torch.arange(len(sticker_ids), device=which.device)
    first = torch.full_like(unique, len(rows)).scatter_reduce(0, which, rows, "amin")
    positives = which.unsqueeze(1) == torch.arange(len(unique), device=which.device)
    return info_nce_loss(text_embeds, image_embeds[first], positives, temperature)
