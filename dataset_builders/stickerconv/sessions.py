"""Dialogue sessions as JSON Lines, and StickerConv-mini, the sessions that ship with the project."""

import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from dataset_builders.schema import Opener, Session, Split


MINI = Path(str(resources.files("dataset_builders.stickerconv").joinpath("mini.jsonl")))
OPENERS = MINI.with_name("openers.jsonl")
RUN_FILE = "sessions.jsonl"  # of the folder of a run


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
    return parse_sessions(Path(path).read_bytes().split(b"\n"), str(path))


def parse_sessions(lines: Iterable[str | bytes], name: str) -> list[Session]:
    """Sessions of JSON lines; `name` stands for the file in errors."""
    sessions = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                sessions.append(parse_session(line))
            except SessionError as error:
                raise SessionError(f"{name}:{number}: {error}") from None
    return sessions


def parse_session(line: str | bytes) -> Session:
    """
    One session of JSON.

    Raises:
        SessionError: If it is none, naming the field.

    """
    try:
        session = Session.model_validate_json(line)
    except ValidationError as error:
        raise SessionError(describe(error)) from None
    for name in ("database", "profile", "ended_by"):
        if getattr(session, name) is None:
            raise SessionError(f"{name}: must be told.")
    for position, turn in enumerate(session.turns, start=1):
        if turn.turn != position:
            raise SessionError(
                f"turns.{position - 1}.turn: expected {position}, got {turn.turn}: the roles do not alternate."
            )
    return session


def describe(error: ValidationError) -> str:
    """The first thing that is wrong, with its field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"not JSON ({first['ctx']['error']})."
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}."


def load_mini(split: Split | None = None) -> list[Session]:
    """StickerConv-mini: sessions written by the project's authors, all of them or one split's."""
    return [session for session in read_sessions(MINI) if split in (None, session.split)]


def load_openers() -> list[Opener]:
    """What people say first, with plain and warm replies: written by the project's authors for training, beside StickerConv-mini."""
    return [Opener.model_validate_json(line) for line in OPENERS.read_bytes().splitlines()]
