"""Public sticker dialogue sets in their released formats, as rows of `sessions`; what a set does not tell is `None`."""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dataset_builders.schema import EMOTIONS, Emotion, Session, Split
from dataset_builders.stickerconv.features import EMOTION_INDEX, STICKERS
from dataset_builders.stickerconv.sessions import SessionError, describe
from dataset_builders.stickers.images import digest, open_picture
from dataset_builders.stickers.ingest import unique_id


LABELS: dict[Emotion, str] = {
    "anger": "anger angry annoyance annoyed frustration frustrated mad rage irritation irritated",
    "disgust": "disgust disgusted disgusting contempt aversion",
    "fear": "fear fearful afraid scared anxiety anxious worry worried nervous",
    "happiness": "happiness happy joy joyful love loving excitement excited delight amusement amused gratitude grateful pride proud hope hopeful",
    "neutral": "neutral calm content contentment",
    "sadness": "sadness sad grief sorrow disappointment disappointed loneliness lonely guilt guilty",
    "surprise": "surprise surprised surprising shock shocked amazement astonishment",
}
EMOTION_OF_WORD = {word: emotion for emotion, words in LABELS.items() for word in words.split()}


class Released(BaseModel):
    """Base of released records: what is not needed is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ReleasedSticker(Released):
    """A sticker as Agent4SC's first release writes it: its picture's path in SER30K, and what was said of it."""

    image: str
    description: str = ""
    emotion: str = ""
    recommendation: str = ""
    origin_anno: str | int | None = None


class ReleasedTurn(Released):
    """An exchange of the released StickerConv."""

    user_message: str = Field(min_length=1)
    system_message: str = Field(min_length=1)
    user_sticker: ReleasedSticker | None = None
    system_sticker: ReleasedSticker | None = None


class ReleasedSession(Released):
    """A line of the released StickerConv."""

    conversation: tuple[ReleasedTurn, ...] = Field(min_length=1)
    user_persona: str = ""
    user_status: str = ""


class ModUtterance(Released):
    """An utterance of MOD (DSTC10 track 1); its text or its meme may be missing."""

    speaker_id: str
    txt: str = ""
    img_id: str | None = None


MOD_DIALOGUE = TypeAdapter(list[ModUtterance])


def normalise_label(label: str | int | None) -> Emotion | None:
    """
    One of the seven emotions for what a set calls one, `None` if it names none.

    Args:
        label (`str`, `int` or `None`): A word in any case, a sentence (its first known word counts), or SER30K's number, from 1.

    """
    if isinstance(label, int) or (label is not None and label.strip().isdigit()):
        return EMOTIONS[int(label) - 1] if 1 <= int(label) <= len(EMOTIONS) else None
    words = re.findall(r"[a-z]+", (label or "").lower())
    return next((EMOTION_OF_WORD[word] for word in words if word in EMOTION_OF_WORD), None)


def picture_path(image: str) -> str:
    """`theme/file` of a picture's path, whatever folder it was in: SER30K's `Images/<theme>/<file>`."""
    return "/".join(Path(image.replace("\\", "/")).parts[-2:])


def picture_id(image: str) -> str:
    """Id of a picture: the one that a pack built from the same tree gives it."""
    return unique_id(picture_path(image), set())


def released_row(line: bytes, name: str, split: Split) -> dict:
    """
    A line of the released StickerConv as a row.

    Raises:
        SessionError: If it is none, naming the field.

    """
    session = parse_released(line)
    turns = [
        {
            "turn": number,
            "user": {"text": turn.user_message, "sticker": _released_use(turn.user_sticker)},
            "system": {"text": turn.system_message, "sticker": _released_use(turn.system_sticker)},
        }
        for number, turn in enumerate(session.conversation, start=1)
    ]
    return _row(name, split, turns, "StickerConv", session.user_persona, session.user_status)


def parse_released(line: bytes) -> ReleasedSession:
    """A line of the released StickerConv; raises [`SessionError`]."""
    try:
        return ReleasedSession.model_validate_json(line)
    except ValidationError as error:
        raise SessionError(describe(error)) from None


def _released_use(sticker: ReleasedSticker | None) -> dict | None:
    return _use(picture_id(sticker.image), emotion_of(sticker)) if sticker is not None else None


def emotion_of(sticker: ReleasedSticker) -> Emotion | None:
    """The annotators' label where there is one, else what the sentence about the emotion says first."""
    return normalise_label(sticker.origin_anno) or normalise_label(sticker.emotion)


def released_sticker_row(sticker: ReleasedSticker, images: Path | None) -> dict:
    """
    A sticker of a released session as a row of `stickers`, with its picture if `images` (SER30K, or its folder of themes) has it.

    Raises:
        SessionError: If the picture is broken, or outside `images`.

    """
    name = picture_path(sticker.image)
    row = dict.fromkeys(STICKERS) | {
        "id": picture_id(sticker.image),
        "emotion": EMOTION_INDEX[emotion_of(sticker)],
        "description": sticker.description,
        "emotion_description": sticker.emotion,
        "recommendation": sticker.recommendation,
        "theme": name.rpartition("/")[0] or None,
        "annotated_by": "StickerConv" if sticker.description else None,
    }
    for root in (images / "Images", images) if images else ():
        if (file := root / name).is_file():
            if not Path(os.path.normpath(file)).is_relative_to(
                os.path.normpath(root)
            ):  # the user's own links may lead out
                raise SessionError(f"{sticker.image}: a picture outside {images}.")
            return row | _picture(file)
    return row


def _picture(file: Path) -> dict:
    data = file.read_bytes()
    try:
        image = open_picture(data).convert("RGBA")
    except Exception as error:  # decoders of broken files raise whatever their code trips over
        raise SessionError(f"{file}: no picture ({error}).") from None
    size = {"width": image.width, "height": image.height, "sha256": digest(image), "animated": False}
    return {"image": {"bytes": data, "path": file.name}, **size}


def mod_row(dialogue: object, name: str, split: Split) -> dict:
    """
    A dialogue of MOD as a row: who speaks first is the User. A last utterance without an answer is left out.

    Raises:
        SessionError: If it is none, a speaker speaks twice in a row, or nobody answers.

    """
    try:
        utterances = MOD_DIALOGUE.validate_python(dialogue)
    except ValidationError as error:
        raise SessionError(describe(error)) from None
    messages = [{"text": u.txt, "sticker": _use(f"mod-{u.img_id}", None) if u.img_id else None} for u in utterances]
    for position, (one, next_one) in enumerate(zip(utterances, utterances[1:], strict=False), start=1):
        if one.speaker_id == next_one.speaker_id:
            raise SessionError(f"{position}: {one.speaker_id} speaks again: the roles do not alternate.")
    pairs = zip(messages[::2], messages[1::2], strict=False)
    turns = [{"turn": number, "user": user, "system": system} for number, (user, system) in enumerate(pairs, start=1)]
    if not turns:
        raise SessionError("expected at least two utterances.")
    return _row(name, split, turns, "MOD", "", "")


def _use(sticker_id: str, emotion: str | None) -> dict:
    return {"id": sticker_id, "emotion": EMOTION_INDEX[emotion], "query": None, "rank": None, "intention": None}


def _row(name: str, split: Split, turns: list[dict], generator: str, persona: str, situation: str) -> dict:
    return dict.fromkeys(Session.model_fields) | {
        "session_id": name,
        "split": split,
        "profile": {"name": None, "emotion": None, "persona": persona, "situation": situation},
        "turns": turns,
        "no_sticker": not any(turn[role]["sticker"] for turn in turns for role in ("user", "system")),
        "generator": {"name": generator, "model": None, "version": "released", "seed": None},
    }
