"""Choosing among drawings: the one that agrees best with what the reply wanted to show and to convey."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Choice:
    """
    What a [`StickerSelector`] chose.

    Args:
        index (`int`): Number of the best drawing.
        rank (`float`): Share of the pack's stickers that it resembles less than it resembles the reply, in [0, 1].
        scores (`list[float]`): What the drawings were ranked by, in their order; minus infinity where one was out of the question.

    """

    index: int
    rank: float
    scores: list[float]


class StickerSelector:
    """
    Ranks drawings in the retrieval space (eq. 5), where replies and pictures lie together.

    A drawing scores by its similarity to the reply, plus the probability of the intended emotion: a softmax over its similarities to the emotions' prototypes,
    which are the mean vectors of the pack's stickers. How good the best one is, is told by a rank and not by a similarity, because what similarity is good
    differs from model to model.

    Args:
        embeds (`torch.Tensor` of shape `(M, e)`): Unit vectors of a pack's stickers.
        emotions (`Sequence[str | None]` of length M): Their emotions, `None` where there is no annotation.
        emotion_weight (`float`, *optional*, defaults to 0.5): Weight of the emotion's probability.
        temperature (`float`, *optional*, defaults to 0.05): Of the softmax.

    """

    def __init__(
        self,
        embeds: torch.Tensor,
        emotions: Sequence[str | None],
        emotion_weight: float = 0.5,
        temperature: float = 0.05,
    ) -> None:
        self.embeds = embeds
        self.emotions = sorted({emotion for emotion in emotions if emotion})
        self.emotion_weight, self.temperature = emotion_weight, temperature
        members = [[i for i, emotion in enumerate(emotions) if emotion == name] for name in self.emotions]
        self.prototypes = (
            F.normalize(torch.stack([embeds[rows].mean(dim=0) for rows in members]), dim=-1) if members else None
        )

    def emotion_probabilities(self, vectors: torch.Tensor) -> torch.Tensor:
        """Probability `(N, len(emotions))` of each emotion for unit vectors `(N, e)`."""
        return (vectors @ self.prototypes.to(vectors).T / self.temperature).softmax(dim=-1)

    def choose(
        self, drawings: torch.Tensor, query: torch.Tensor, emotion: str | None, allowed: Sequence[bool]
    ) -> Choice:
        """
        Choose a drawing.

        Args:
            drawings (`torch.Tensor` of shape `(N, e)`): Unit vectors of the drawings.
            query (`torch.Tensor` of shape `(e,)`): Unit vector of the reply.
            emotion (`str`, *optional*): The emotion to convey; one that the pack does not have counts nothing.
            allowed (`Sequence[bool]` of length N): Which drawings may be chosen, at least one.

        Returns:
            [`Choice`].

        """
        agreement = drawings @ query.to(drawings)
        scores = agreement.clone()
        if emotion in self.emotions:
            scores += self.emotion_weight * self.emotion_probabilities(drawings)[:, self.emotions.index(emotion)]
        scores[~torch.tensor(allowed)] = -torch.inf
        best = int(scores.argmax())
        resembled_less = self.embeds.to(drawings) @ drawings[best] < agreement[best]
        return Choice(best, resembled_less.float().mean().item(), scores.tolist())


__all__ = ["Choice", "StickerSelector"]
