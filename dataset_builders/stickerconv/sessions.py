"""Dialogue sessions as JSON Lines, and StickerConv-mini, the sessions that ship with the project."""

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from dataset_builders.schema import Session, Split


class SessionError(ValueError):
    """A session that is not as the schema says; the message names file, line and field."""


def read_sessions(path: str | os.PathLike) -> list[Session]:
    """
    Read sessions from a JSON Lines file.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `list[Session]`: In the file's order.

    Raises:
        SessionError: On the first line that is no session.

    """
    return parse_sessions(Path(path).read_text("utf-8").splitlines(), str(path))


def parse_sessions(lines: Iterable[str], name: str) -> list[Session]:
    """Sessions of JSON lines; `name` stands for the file in errors."""
    sessions = []
    for number, line in enumerate(lines, start=1):
        try:
            sessions.append(Session.model_validate(json.loads(line)))
        except json.JSONDecodeError as error:
            raise SessionError(f"{name}:{number}: not JSON ({error}).") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise SessionError(f"{name}:{number}: {field}: {first['msg']}.") from None
    return sessions


def load_mini(split: Split | None = None) -> list[Session]:
    """StickerConv-mini: sessions written by the project's authors, all of them or one split's."""
    file = resources.files("dataset_builders.stickerconv").joinpath("mini.jsonl")
    sessions = parse_sessions(file.read_text("utf-8").splitlines(), "mini.jsonl")
    return [session for session in sessions if split in (None, session.split)]
