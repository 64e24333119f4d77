"""Manager agent (section 3.6, appendix B.2): sticker use and its consistency, message quality, and when to end."""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from pydantic import Field
from rapidfuzz.distance import LCSseq

from agent_generation.llm import Form
from dataset_builders.schema import Sticker
from dataset_builders.stickerconv.statistics import split_chinese


BLOCK = 2  # turns between two reviews of the dialogue
REPEATED = 0.7  # ROUGE-L F of a message with an earlier one
LONGEST = 400  # characters of a message
CONSISTENT = 0.12  # cosine of what is said and a sticker; 78 % of the stickers in StickerConv-mini's dialogues reach it, 53 % of others


class StickerReview(Form):
    """Whether a sticker is consistent with the dialogue."""

    reason: str = Field(max_length=200)
    consistent: Literal["yes", "no"]


class DialogueReview(Form):
    """Whether the dialogue has come to its end, and what to do better if not."""

    ended: Literal["yes", "no"]
    advice: str = Field(max_length=200)


def about_sticker(sticker: Sticker) -> str:
    """What a sticker shows, means and is good for, as one text."""
    return f"{sticker.description} {sticker.emotion_description} {sticker.recommendation}"


class StickerQuota:
    """
    Keeps one side's share of turns with a sticker, whatever the model would like.

    In every block of two turns a number of stickers is due that makes the expected share exact at the end of each block: the running total is
    `floor(rate * turns + phase)` with a random phase. What was rejected or failed is made up for later. The agent has its say in *when*: where one
    of two turns is due, and the first of them was drawn, it may decline and send with the second.

    Args:
        rate (`float`): Share of turns with a sticker, 0 to 1.
        max_turns (`int`): Turns of the session at most.
        rng (`random.Random`): The session's.

    """

    def __init__(self, rate: float, max_turns: int, rng: random.Random) -> None:
        self.rate, self.max_turns, self.phase, self.sent = rate, max_turns, rng.random(), 0
        self.offered = [rng.random() < 0.5 for _ in range(max_turns)]

    def owed(self, turn: int) -> int:
        """How many stickers are due by the end of a turn and were not sent."""
        return int(self.rate * turn + self.phase) - self.sent

    def mode(self, turn: int) -> Literal["no", "free", "due"]:
        """Whether a sticker may not, may, or must be sent in a turn (from 1)."""
        last = min(turn + (-turn % BLOCK), self.max_turns)
        owed, left = self.owed(last), last - turn + 1
        if owed <= 0:
            return "no"
        if owed >= left:
            return "due"
        return "free" if self.offered[turn - 1] else "no"


@lru_cache(maxsize=4096)
def tokens(text: str) -> tuple[str, ...]:
    """Words, or characters in Chinese, of a text in lower case."""
    return tuple(re.findall(r"[^\W_]+", split_chinese(text.lower())))


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L F of two token sequences, without stemming."""
    if not first or not second:
        return 0.0
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def find_problem(
    message: str, earlier: Sequence[str], longest: int = LONGEST
) -> Literal["empty", "repeats", "too_long"] | None:
    """
    What speaks against sending a message.

    Args:
        message (`str`): The message.
        earlier (`Sequence[str]`): All earlier messages of both sides.
        longest (`int`, *optional*): Characters at most.

    """
    said = tokens(message)
    if not said:
        return "empty"
    if any(rouge_l(said, tokens(other)) >= REPEATED for other in earlier):
        return "repeats"
    return "too_long" if len(message) > longest else None
