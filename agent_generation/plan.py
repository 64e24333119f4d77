"""Plan module (section 3.4): intention, query, retrieve, select - each step a typed answer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, create_model

from agent_generation.llm import Form
from dataset_builders.schema import Emotion, Intention, Sticker


class FreeIntention(Form):
    """Whether to send a sticker now, and to what end."""

    intention: Literal[Intention, "none"]


class DueIntention(Form):
    """To what end; that one is sent is decided."""

    intention: Intention


class Query(Form):
    """What the sticker should show and feel like."""

    query: str = Field(min_length=3, max_length=120)
    emotion: Emotion


class FreePlan(FreeIntention, Query):
    """Intention and query in one answer."""


class DuePlan(DueIntention, Query):
    """Intention and query in one answer, with a sticker due."""


@lru_cache
def choice_form(count: int) -> type[Form]:
    """The form of a choice among `count` candidates, numbered from 1: no other number is a valid answer."""
    choice: Any = (Literal[tuple(range(1, count + 1))], ...)
    return create_model("Choice", __base__=Form, choice=choice)


def candidates(stickers: Sequence[Sticker]) -> list[dict]:
    """What the agent is told of the stickers that it may choose from."""
    keys = ("emotion", "description", "emotion_description", "recommendation")
    return [{key: getattr(sticker, key) for key in keys} for sticker in stickers]
