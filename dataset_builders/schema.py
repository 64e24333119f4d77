"""The one source of truth for what a sticker, a profile, a turn and a session are."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field


Emotion = Literal["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
EMOTIONS: tuple[Emotion, ...] = get_args(Emotion)  # SER30K's labels, in its order

Intention = Literal["emotional expression", "enhancing empathy", "reaction intensity"]
Split = Literal["train", "validation", "test"]


class Record(BaseModel):
    """Base of all records: unknown keys are an error, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sticker(Record):
    """
    A sticker of a pack with the paper's knowledge about it (section 3.2, appendix B.1); the pack holds its picture.

    `image_path` is the picture's file name and `sha256` is of its decoded pixels. Until the pack is annotated, `emotion` is `None` and the texts
    are empty; `annotated_by` names who or what wrote them. `theme`, `author` and `licence` are the source's, where a sticker has its own.
    """

    id: str = Field(min_length=1)
    image_path: str
    emotion: Emotion | None = None
    description: str = ""
    emotion_description: str = ""
    recommendation: str = ""
    tags: tuple[str, ...] = ()
    animated: bool = False
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    sha256: str
    theme: str | None = None
    author: str | None = None
    licence: str | None = None
    annotated_by: str | None = None

    @property
    def caption(self) -> str:
        """
        Short name and emotion, the decoder's text condition (eq. 9: `c, [e]`).

        The short name leads the tags; a sticker without tags is named by its description.
        """
        name = self.tags[0] if self.tags else self.description
        return f"{name}, {self.emotion}" if self.emotion else name


class StickerUse(Record):
    """A sticker as sent in a turn: which one, with what query it was found, at which rank (0-based), and to what end; `None` is what a set from elsewhere does not tell."""

    id: str
    emotion: Emotion | None
    query: str | None
    rank: int | None = Field(ge=0)
    intention: Intention | None


class Message(Record):
    """What one side sends in a turn."""

    text: str = Field(min_length=1)
    sticker: StickerUse | None = None


class Turn(Record):
    """One exchange; `turn` counts from 1."""

    turn: int = Field(ge=1)
    user: Message
    system: Message


class Profile(Record):
    """Who the User is (section 3.1): `persona` and `situation` in the second person."""

    name: str
    emotion: Emotion
    persona: str
    situation: str


class Generator(Record):
    """Who wrote a session."""

    name: str
    model: str | None = None
    version: str
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)


class Usage(Record):
    """What a session cost."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


class Exchange(Record):
    """What the User says and the System's reply, with the id of its sticker."""

    user: str = Field(min_length=1)
    system: str = Field(min_length=1)
    sticker: str | None = None


class Opener(Record):
    """The first exchanges of a chat; `emotion` is the User's."""

    emotion: Emotion
    turns: tuple[Exchange, ...] = Field(min_length=1)


class Session(Record):
    """
    A dialogue session (section 3.7). `no_sticker` flags one that neither side sent a sticker in: it stays, so that rates are honest. What a set from elsewhere does
    not tell is `None`.
    """

    session_id: str
    split: Split
    database: int | None = Field(ge=1)
    profile: Profile | None
    turns: tuple[Turn, ...] = Field(min_length=1)
    ended_by: Literal["closure", "max_turns", "repetition"] | None
    no_sticker: bool = False
    generator: Generator
    usage: Usage = Usage()
