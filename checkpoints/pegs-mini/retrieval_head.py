"""The retrieval space that replies and stickers share."""

import torch
from torch import nn
from torch.nn import functional as F


class RetrievalHead(nn.Module):
    """
    The projections `W_t` and `W_i` into the retrieval space (StickerConv, eq. 5).

    Args:
        text_dim (`int`): Hidden size d of the language model.
        image_dim (`int`): Size p of the vision encoder's pooled output.
        retrieval_dim (`int`): Size e of the retrieval space.

    """

    def __init__(self, text_dim: int, image_dim: int, retrieval_dim: int) -> None:
        super().__init__()
        self.text_projection = nn.Linear(text_dim, retrieval_dim, bias=False)
        self.image_projection = nn.Linear(image_dim, retrieval_dim, bias=False)

    def embed_text(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(B, e)` of the retrieval tokens' hidden states `(B, k, d)`, averaged over the k tokens."""
        return F.normalize(self.text_projection(hidden_states).mean(dim=1), dim=-1)

    def embed_image(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(B, e)` of the vision encoder's pooled output `(B, p)`."""
        return F.normalize(self.image_projection(pooled), dim=-1)


def info_nce_loss(
    text_embeds: torch.Tensor, image_embeds: torch.Tensor, positives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Symmetric InfoNCE (StickerConv, eq. 6-8) where a reply may have several right stickers and a sticker several right replies.

    A row with several positives takes the mean over them; with `positives` the identity this is eq. 8. Rows and columns without
    a positive serve as negatives only.

    Args:
        text_embeds (`torch.Tensor` of shape `(S, e)`): Replies, unit L2 norm.
        image_embeds (`torch.Tensor` of shape `(M, e)`): Stickers, unit L2 norm.
        positives (`torch.Tensor` of shape `(S, M)`, bool): Which sticker is right for which reply.
        temperature (`float`): tau.

    Returns:
        `torch.Tensor` of shape `()`: Mean loss in nats.

    """
    logits = text_embeds @ image_embeds.T / temperature  # (S, M)
    losses = []
    for scores, right in ((logits, positives), (logits.T, positives.T)):
        log_probs = scores.log_softmax(dim=-1)
        count = right.sum(dim=-1)
        per_row = -(log_probs * right).sum(dim=-1) / count.clamp(min=1)
        losses.append(per_row[count > 0].mean())
    return (losses[0] + losses[1]) / 2


__all__ = ["RetrievalHead", "info_nce_loss"]
