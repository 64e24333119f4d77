"""What the columns are: `datasets` features derived from the schema, and the rows that go into them."""

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, Image, List, Value
from pydantic import BaseModel

from dataset_builders.schema import EMOTIONS, Emotion, Message, Opener, Session, Sticker
from dataset_builders.stickers.pack import StickerPack


SCALARS = {str: "string", int: "int64", float: "float64", bool: "bool"}
EMOTION_INDEX: dict[str | None, int | None] = {None: None, **{name: index for index, name in enumerate(EMOTIONS)}}


EMOTION_NAME = {index: name for name, index in EMOTION_INDEX.items()}


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
        "turn": Value("int64"),
        **{name: SESSIONS["profile"][name] for name in ("emotion", "persona", "situation")},
        "messages": List({"role": Value("string"), "content": List(_PART)}),
        "response": features_of(Message),
    }
)
STICKERS = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "database": Value("int64"),
        **{name: feature for name, feature in features_of(Sticker).items() if name not in ("id", "image_path")},
    }
)
FEATURES = {
    "mini": SESSIONS,
    "openers": Features(features_of(Opener)),
    "sessions": SESSIONS,
    "turns": TURNS,
    "stickers": STICKERS,
}


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


def turns_table(sessions: pa.Table) -> pa.Table:
    """
    What [`turn_rows`] gives for all rows of a table of `sessions`.

    A message is in the rows of all turns after it; here it is made once and its place is repeated, which takes a third of the time of making rows.
    """
    turns = pc.list_flatten(sessions["turns"]).combine_chunks()
    session = pc.list_parent_indices(sessions["turns"]).combine_chunks().to_numpy()
    first = np.searchsorted(session, session)  # turn that each turn's session begins with
    lengths = 2 * (np.arange(len(turns)) - first) + 1
    ends = lengths.cumsum()
    places = np.arange(ends[-1]) - np.repeat(ends - lengths - 2 * first, lengths)
    columns = {name: sessions[name].take(pa.array(session)) for name in ("session_id", "database", "profile")}
    profile = columns.pop("profile").combine_chunks()
    columns |= {name: profile.field(name) for name in ("emotion", "persona", "situation")}
    columns |= {"turn": turns.field("turn"), "response": turns.field("system")}
    columns["messages"] = _lists(lengths, _chat_messages(turns).take(pa.array(places)))
    schema = TURNS.arrow_schema
    return pa.table([columns[name] for name in schema.names], schema.names).cast(schema)


def _chat_messages(turns: pa.StructArray) -> pa.StructArray:
    """The messages of turns, User's and System's by turns, in the chat format."""
    order = np.arange(2 * len(turns)).reshape(2, -1).T.ravel()
    sides = pa.concat_arrays([turns.field("user"), turns.field("system")]).take(pa.array(order))
    text, sticker = sides.field("text"), pc.struct_field(sides, ["sticker", "id"])
    has = np.stack([pc.not_equal(text, "").to_numpy(False), sticker.is_valid().to_numpy(False)], axis=1)
    part = np.flatnonzero(has)  # even ones are texts, odd ones stickers
    message, is_image = pa.array(part // 2), pa.array(part % 2 == 1)
    texts, stickers = pc.if_else(is_image, None, text.take(message)), pc.if_else(is_image, sticker.take(message), None)
    content = pa.StructArray.from_arrays([pc.if_else(is_image, "image", "text"), texts, stickers], list(_PART))
    roles = pa.array(["user", "assistant"] * len(turns))
    return pa.StructArray.from_arrays([roles, _lists(has.sum(axis=1), content)], ["role", "content"])


def _lists(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), values)


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
