"""What the columns are: `datasets` features derived from the schema, and the rows that go into them."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from datasets import ClassLabel, Features, Image, List, Value
from pydantic import BaseModel

from dataset_builders.schema import EMOTIONS, Emotion, Message, Session, Sticker
from dataset_builders.stickers.pack import StickerPack


SCALARS = {str: "string", int: "int32", float: "float64", bool: "bool"}
EMOTION_INDEX: dict[str | None, int | None] = {None: None, **{name: index for index, name in enumerate(EMOTIONS)}}


def features_of(kind: Any) -> Any:
    """
    The feature that holds a type of the schema: records become structs, the seven emotions a `ClassLabel`, other words strings.

    Raises:
        TypeError: If there is none.

    """
    if kind == Emotion:
        return ClassLabel(names=list(EMOTIONS))
    if get_origin(kind) is Literal:
        return Value("string")
    if get_origin(kind) in (Union, UnionType):
        return features_of(next(one for one in get_args(kind) if one is not type(None)))
    if get_origin(kind) is tuple:
        return List(features_of(get_args(kind)[0]))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: features_of(field.annotation) for name, field in kind.model_fields.items()}
    if kind in SCALARS:
        return Value(SCALARS[kind])
    raise TypeError(f"no feature for {kind!r}.")


SESSIONS = Features(features_of(Session))
_PART = {"type": Value("string"), "text": Value("string"), "sticker_id": Value("string")}
TURNS = Features(
    {
        **{name: SESSIONS[name] for name in ("session_id", "database")},
        "turn": Value("int32"),
        **{name: SESSIONS["profile"][name] for name in ("emotion", "persona", "situation")},
        "messages": List({"role": Value("string"), "content": List(_PART)}),
        "response": features_of(Message),
    }
)
STICKERS = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "database": Value("int32"),
        **{name: feature for name, feature in features_of(Sticker).items() if name not in ("id", "image_path")},
    }
)
FEATURES = {"mini": SESSIONS, "sessions": SESSIONS, "turns": TURNS, "stickers": STICKERS}


def session_row(session: Session) -> dict:
    """A session as a row of `sessions`; emotions are class numbers."""
    return encode_emotions(session.model_dump())


def encode_emotions(row: dict) -> dict:
    """Put class numbers in place of a session's emotions, in place."""
    row["profile"]["emotion"] = EMOTION_INDEX[row["profile"]["emotion"]]
    for turn in row["turns"]:
        for role in ("user", "system"):
            sticker = turn[role]["sticker"]
            if sticker is not None:
                sticker["emotion"] = EMOTION_INDEX[sticker["emotion"]]
    return row


def turn_rows(row: dict) -> Iterator[dict]:
    """
    The rows of `turns` that a row of `sessions` holds: for every System turn all messages before it, and its own.

    `messages` is in the multimodal chat format; an image part names its sticker, whose picture is in `stickers`.
    """
    profile, messages = row["profile"], []
    for turn in row["turns"]:
        messages.append(_chat_message("user", turn["user"]))
        yield {
            "session_id": row["session_id"],
            "database": row["database"],
            "turn": turn["turn"],
            "emotion": profile["emotion"],
            "persona": profile["persona"],
            "situation": profile["situation"],
            "messages": messages.copy(),
            "response": turn["system"],
        }
        messages.append(_chat_message("assistant", turn["system"]))


def _chat_message(role: str, message: dict) -> dict:
    content = [{"type": "text", "text": message["text"], "sticker_id": None}] if message["text"] else []
    if message["sticker"] is not None:
        content.append({"type": "image", "text": None, "sticker_id": message["sticker"]["id"]})
    return {"role": role, "content": content}


def sticker_row(sticker: Sticker, image: bytes, database: int | None) -> dict:
    """A sticker as a row of `stickers`."""
    row = sticker.model_dump(exclude={"image_path"})
    row["emotion"] = EMOTION_INDEX[sticker.emotion]
    return row | {"image": {"bytes": image, "path": sticker.image_path}, "database": database}


def pack_rows(pack: StickerPack) -> Iterator[tuple[bool, dict]]:
    """The rows of a pack's stickers, each with whether it is kept for the test split."""
    tests = {sticker.id for sticker in pack.split("test")} if pack.databases else set()
    for sticker in pack.stickers:
        yield sticker.id in tests, sticker_row(sticker, pack.images[sticker.id], pack.databases.get(sticker.id))
