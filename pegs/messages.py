"""Reading `MESSAGES.json`: a dialogue in the Hugging Face multimodal chat format."""

import json
import os
from pathlib import Path

from modeling_pegs.processing_pegs import StickerImageError, load_sticker
from pegs.errors import InputError


MAX_CHARACTERS = 8000  # of one message; the language model's context is 2,048 tokens or more


def read_messages(path: str | os.PathLike) -> list[dict]:
    """
    Read and check a dialogue.

    Args:
        path (`str` or `os.PathLike`): JSON file; its image paths are relative to it.

    Returns:
        `list[dict]`: Messages that alternate between `user` and `assistant` and end with a user's, every picture loaded.

    Raises:
        InputError: If anything is not as the format says; the message names file, message and field.

    """
    path = Path(path)
    try:
        messages = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}).") from None
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{path}: must be a list with at least one message.")
    return [_read_message(path, number, message, len(messages)) for number, message in enumerate(messages)]


def find_fault(texts: list[str], has_picture: bool) -> str | None:
    """Why a message of these texts, and maybe pictures, cannot be read; `None` if it can."""
    length = sum(map(len, texts))
    if length > MAX_CHARACTERS:
        return f"has {length:,} characters, more than {MAX_CHARACTERS:,}"
    return None if has_picture or any(text.strip() for text in texts) else "is empty"


def _read_message(path: Path, number: int, message: object, count: int) -> dict:
    where = f"{path}: message {number + 1}"
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise InputError(f"{where}: must be an object with `role` and `content`.")
    role = ("user", "assistant")[number % 2]
    if message["role"] != role:
        raise InputError(
            f"{where}: `role` must be {role!r} (roles alternate, a user begins), got {message['role']!r}."
        )
    if number == count - 1 and role != "user":
        raise InputError(f"{where}: the last message must be a user's.")
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}: `content` must be a text or a list of parts.")
    parts = [_read_part(path, f"{where}, part {i + 1}", part) for i, part in enumerate(content)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if fault := find_fault(texts, has_picture=len(texts) < len(parts)):
        raise InputError(f"{where}: {fault}.")
    return {"role": role, "content": parts}


def _read_part(path: Path, where: str, part: object) -> dict:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "path": str(name)}:
            try:
                return {"type": "image", "image": load_sticker(path.parent / name)}
            except StickerImageError as error:
                raise InputError(f"{where}: {error}") from None
    raise InputError(f'{where}: must be {{"type": "text", "text": ...}} or {{"type": "image", "path": ...}}.')
