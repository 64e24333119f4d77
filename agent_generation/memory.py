"""Memory module (section 3.3, after Generative Agents, arXiv 2304.03442): what an agent has observed, and what it made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, create_model

from agent_generation.llm import Form, Request
from agent_generation.prompts import ask


DECAY = 0.9  # of recency, a turn
REFLECT_AT = 30  # importance observed since the last reflection; two turns of two messages each bring about 20
UNRATED = 5
RECALLED = 4  # memories that come to mind at once
VIEW = 3  # turns of the dialogue that an agent has before its eyes; older ones it must recall

Rating = Literal[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@dataclass
class Memory:
    """Something observed or understood: its text, in which turn, and how much it matters (1 to 10)."""

    text: str
    turn: int
    importance: int | None = None
    insight: bool = False
    recalled: int = 0  # the turn in which it was last recalled

    @property
    def weight(self) -> int:
        """Its importance; a middling one until it is rated."""
        return UNRATED if self.importance is None else self.importance


@dataclass
class MemoryStream:
    """Long-term memory of one agent in one session."""

    memories: list[Memory] = field(default_factory=list)
    unreflected: int = 0

    def observe(self, text: str, turn: int) -> None:
        """Remember something that happened; it is rated later."""
        self.memories.append(Memory(text, turn, recalled=turn))

    def understand(self, text: str, turn: int, importance: int) -> None:
        """Remember an insight; reflection starts anew."""
        self.memories.append(Memory(text, turn, importance, True, turn))
        self.unreflected = 0

    def unrated(self) -> list[Memory]:
        """What has no importance yet."""
        return [memory for memory in self.memories if memory.importance is None]

    def rate(self, ratings: Sequence[int]) -> None:
        """Give the unrated memories their importance, in their order; what was rated counts towards the next reflection."""
        for memory, rating in zip(self.unrated(), ratings, strict=True):
            memory.importance = rating
            self.unreflected += rating

    @property
    def must_reflect(self) -> bool:
        """Whether enough has happened since the last reflection."""
        return self.unreflected >= REFLECT_AT

    def candidates(self, turn: int) -> list[Memory]:
        """What may come to mind: all insights, and what happened before the last `VIEW` turns."""
        return [memory for memory in self.memories if memory.insight or memory.turn < turn - VIEW]

    def recall(self, turn: int, relevance: np.ndarray | None = None, k: int = RECALLED) -> list[str]:
        """
        What comes to mind: the sum of recency, relevance and importance, each scaled to `[0, 1]` over the candidates.

        Args:
            turn (`int`): Now.
            relevance (`np.ndarray` of shape `(n,)`, *optional*): Cosine similarity of each candidate to what was just observed; not needed where there are
                at most `k` candidates, which all come to mind.
            k (`int`, *optional*, defaults to 4): How many at most.

        Returns:
            `list[str]`: Oldest first.

        """
        candidates = self.candidates(turn)
        best = list(range(len(candidates)))
        if len(candidates) > k:
            assert relevance is not None
            recency = np.array([DECAY ** (turn - memory.recalled) for memory in candidates])
            importance = np.array([memory.weight for memory in candidates], float)
            score = scale(recency) + scale(relevance) + scale(importance)
            best = sorted(np.argsort(-score, kind="stable")[:k])
        for number in best:
            candidates[number].recalled = turn
        return [candidates[number].text for number in best]


def scale(values: np.ndarray) -> np.ndarray:
    """Min-max scaling to `[0, 1]`; zeros where all are alike."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span else np.zeros(len(values))


class Insight(Form):
    """Something understood, and how much it matters."""

    text: str = Field(min_length=1, max_length=200)
    importance: Rating


class Reflection(Form):
    """What an agent makes of its latest memories; `self_image` joins its traits."""

    insights: list[Insight] = Field(min_length=1, max_length=3)
    self_image: str = Field(min_length=1, max_length=300)


def rate_request(stream: MemoryStream, who: dict, language: str) -> Request:
    """Asks how much the unrated memories matter to this agent: one rating from 1 to 10 each."""
    memories = [memory.text for memory in stream.unrated()]
    return Request([ask("importance", language, who=who, memories=memories)], "memory", ratings_form(len(memories)))


def reflect_request(stream: MemoryStream, who: dict, language: str) -> Request:
    """Asks what the latest memories, twelve at most, tell this agent about the other and about itself."""
    memories = [memory.text for memory in stream.memories[-12:]]
    return Request([ask("reflect", language, who=who, memories=memories)], "memory", Reflection)


@lru_cache
def ratings_form(count: int) -> type[Form]:
    """The form of `count` ratings."""
    ratings: Any = (list[Rating], Field(min_length=count, max_length=count))
    return create_model("Importance", __base__=Form, ratings=ratings)
