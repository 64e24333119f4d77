"""The training data of the language stages, all as dialogues in the chat format."""

from dataset_builders.schema import Opener, Session, Sticker
from dataset_builders.stickers.pack import PackError, StickerPack


def session_messages(session: Session, pack: StickerPack | None = None) -> list[dict]:
    """A session as chat messages; an image part holds the encoded picture and its `sticker_id`. Without a pack, without its stickers."""
    messages = []
    for turn in session.turns:
        for role, message in (("user", turn.user), ("assistant", turn.system)):
            sticker_id = None if message.sticker is None else message.sticker.id
            messages.append({"role": role, "content": _parts(message.text, sticker_id, pack)})
    return messages


def opener_messages(opener: Opener, pack: StickerPack | None = None) -> list[dict]:
    """An opener as chat messages like a session's."""
    messages = []
    for turn in opener.turns:
        messages.append({"role": "user", "content": _parts(turn.user, None, pack)})
        messages.append({"role": "assistant", "content": _parts(turn.system, turn.sticker, pack)})
    return messages


def sent_stickers(messages: list[dict]) -> list[str]:
    """Ids of the stickers that the assistant sends, in order."""
    return [
        part["sticker_id"]
        for message in messages
        if message["role"] == "assistant"
        for part in message["content"]
        if part["type"] == "image"
    ]


def turn_contexts(session: Session, pack: StickerPack) -> list[list[dict]]:
    """For every System turn, all messages before it (section 6)."""
    messages = session_messages(session, pack)
    return [messages[: 2 * turn.turn - 1] for turn in session.turns]


def _parts(text: str, sticker_id: str | None, pack: StickerPack | None) -> list[dict]:
    parts = [{"type": "text", "text": text}]
    if pack is not None and sticker_id is not None:
        parts.append(image_part(sticker_id, pack))
    return parts


def image_part(sticker_id: str, pack: StickerPack) -> dict:
    """An image part of the chat format; a [`PackError`] if the pack has no such sticker."""
    if sticker_id not in pack.by_id:
        raise PackError(f"sticker {sticker_id!r} is not in the pack {pack.info.name}.")
    return {"type": "image", "image": pack.still(sticker_id), "sticker_id": sticker_id}


def caption_messages(image: dict, caption: str) -> list[dict]:
    """Perception (appendix C.1): the user sends a picture, the assistant says what it is."""
    return [
        {"role": "user", "content": [image]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def request_messages(image: dict, caption: str) -> list[dict]:
    """Sticker output (appendix C.1 and C.2): the user writes what a picture is, the assistant sends it."""
    return [
        {"role": "user", "content": [{"type": "text", "text": caption}]},
        {"role": "assistant", "content": [image]},
    ]


def caption_dialogues(stickers: list[Sticker], pack: StickerPack) -> list[list[dict]]:
    """[`caption_messages`] of stickers, named with their emotion."""
    return [caption_messages(image_part(sticker.id, pack), sticker.caption) for sticker in stickers]


def request_dialogues(stickers: list[Sticker], pack: StickerPack) -> list[list[dict]]:
    """[`request_messages`] for stickers, asked for with their emotion (appendix C.2)."""
    return [request_messages(image_part(sticker.id, pack), sticker.caption) for sticker in stickers]
