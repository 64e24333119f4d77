"""Reading dialogues row by row from run folders and files, each row checked against the stickers that it may use."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataset_builders.stickerconv.features import pack_rows, session_row
from dataset_builders.stickerconv.formats import (
    ReleasedSticker,
    mod_row,
    parse_released,
    picture_id,
    released_row,
    released_sticker_row,
)
from dataset_builders.stickerconv.sessions import SessionError, parse_session
from dataset_builders.stickerconv.sources import Shard, Source, read_lines, split_into_shards, split_of_file
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack
from dataset_builders.stickers.split import split_databases, split_of_database


ROLES = ("user", "system")
OPENMOJI_DATABASES = 10


@dataclass(frozen=True)
class KnownStickers:
    """The database of each sticker that there is, and how many databases; 0 if the pack is not split."""

    databases: Mapping[str, int | None]
    count: int


def known_stickers(pack: StickerPack) -> KnownStickers:
    """What is known of a pack's stickers."""
    return KnownStickers({s.id: pack.databases.get(s.id) for s in pack.stickers}, pack.num_databases)


def known_openmoji() -> KnownStickers:
    """What is known of the `openmoji` pack's stickers, without drawing it."""
    emotions = {row["id"]: row["emotion"] for row in openmoji.load_annotations()}
    return KnownStickers(split_databases(emotions, OPENMOJI_DATABASES), OPENMOJI_DATABASES)


def read_rows(shards: Iterable[Shard], known: KnownStickers | None, bad: list[str] | None = None) -> Iterator[dict]:
    """
    Rows of `sessions`, in order.

    Args:
        shards (`Iterable[Shard]`): Where they are.
        known ([`KnownStickers`], *optional*): The stickers that may be used; without it, any.
        bad (`list[str]`, *optional*): Gets what is wrong with the rows that are left out.

    Raises:
        SessionError: On the first row that is wrong, naming file and line, unless `bad` is given.

    """
    seen: set[str] = set()
    for shard in shards:
        for where, make in _items(shard):
            try:
                row = make()
                if row["session_id"] in seen:
                    raise SessionError(f"session_id: {row['session_id']!r} was there before.")
                if known is not None:
                    check_stickers(row, known)
            except SessionError as error:
                if bad is None:
                    raise SessionError(f"{where}: {error}") from None
                bad.append(f"{where}: {error}")
            else:
                seen.add(row["session_id"])
                yield row


def _items(shard: Shard) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Where each dialogue is, and what makes its row."""
    file = shard.source.file
    if shard.source.format == "sessions":
        for number, line in read_lines(shard):
            yield f"{file}:{number}", partial(_session_row, line)
        return
    split = split_of_file(file)
    if shard.source.format == "released":
        for number, line in read_lines(shard):
            yield f"{file}:{number}", partial(released_row, line, f"{file.stem}-{number}", split)
        return
    try:
        dialogues = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{file}: not JSON ({error}).") from None
    for name, dialogue in dialogues.items():
        yield f"{file}: {name}", partial(mod_row, dialogue, f"{file.stem}-{name}", split)


def _session_row(line: bytes) -> dict:
    return session_row(parse_session(line))


def check_stickers(row: dict, known: KnownStickers) -> None:
    """
    See that a session's stickers exist and are of its database, and that its split may use that database (appendix A).

    Raises:
        SessionError: If not.

    """
    database, databases, count = row["database"], known.databases, known.count
    if count and not 1 <= database <= count:
        raise SessionError(f"database: expected 1 to {count}, got {database}.")
    if count and row["split"] not in split_of_database(database, count):
        raise SessionError(f"split: database {database} of {count} is not for {row['split']}.")
    for position, turn in enumerate(row["turns"]):
        for role in ROLES:
            sticker = turn[role]["sticker"]
            if sticker is not None and sticker["id"] not in databases:
                raise SessionError(f"turns.{position}.{role}.sticker.id: unknown sticker {sticker['id']!r}.")
            if count and sticker is not None and databases[sticker["id"]] != database:
                raise SessionError(
                    f"turns.{position}.{role}.sticker.id: {sticker['id']!r} is not of database {database}."
                )


def open_pack(stickers: str) -> StickerPack:
    """The pack `openmoji`, or the one in a folder."""
    return openmoji.cached_pack() if stickers == "openmoji" else StickerPack.load(stickers)


def sticker_rows(
    sources: Sequence[Source], pack: StickerPack | None, images: str | Path | None
) -> Iterator[tuple[bool, dict]]:
    """
    Rows of `stickers` that belong to dialogues: the whole pack for sessions, for released ones what they refer to.

    Args:
        sources (`Sequence[Source]`): Of one format.
        pack ([`StickerPack`], *optional*): The sessions' pack; released dialogues have none.
        images (`str` or `Path`, *optional*): An SER30K tree, for the released StickerConv.

    Yields:
        `tuple[bool, dict]`: Whether it is kept for the test split, and the row.

    Raises:
        SessionError: If `images` is no folder, or a picture of it is broken or elsewhere.

    """
    if images and not Path(images).is_dir():
        raise SessionError(f"--images {images}: no such folder.")
    if pack is not None:
        return pack_rows(pack)
    return _released_stickers(sources, Path(images) if images else None)


def _released_stickers(sources: Sequence[Source], images: Path | None) -> Iterator[tuple[bool, dict]]:
    seen: set[str] = set()
    for source in sources:
        is_test = split_of_file(source.file) == "test"
        for sticker in _released_uses(source):
            sticker_id = picture_id(sticker.image)
            if sticker_id not in seen:
                seen.add(sticker_id)
                try:
                    row = released_sticker_row(sticker, images)
                except SessionError as error:
                    raise SessionError(f"{source.file}: {error}") from None
                yield is_test, row


def _released_uses(source: Source) -> Iterator[ReleasedSticker]:
    if source.format == "mod":
        for row in read_rows(split_into_shards([source], 1), None, bad=[]):
            yield from (ReleasedSticker(image=sticker_id) for sticker_id in used_stickers(row))
        return
    for shard in split_into_shards([source], 1):
        for _, line in read_lines(shard):
            try:
                session = parse_released(line)
            except SessionError:
                continue  # told by `read_rows`
            for turn in session.conversation:
                yield from (sticker for sticker in (turn.user_sticker, turn.system_sticker) if sticker is not None)


def used_stickers(row: dict) -> Iterator[str]:
    """Ids of the stickers in a row of `sessions`, as often as they are sent."""
    return (turn[role]["sticker"]["id"] for turn in row["turns"] for role in ROLES if turn[role]["sticker"])


class SplitCheck:
    """
    Which splits use which stickers; test stickers must not be seen in training (appendix A).

    Args:
        rows (`Iterable[dict]`, *optional*): Rows of `sessions` to begin with.

    """

    def __init__(self, rows: Iterable[dict] = ()) -> None:
        self.used: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """Take note of a row's stickers."""
        self.used[row["split"]].update(used_stickers(row))

    def check(self) -> None:
        """
        See that nothing leaks.

        Raises:
            SessionError: If a sticker of the test split is used elsewhere.

        """
        leaked = sorted(self.used["test"] & (self.used["train"] | self.used["validation"]))
        if leaked:
            raise SessionError(
                f"{len(leaked)} stickers of the test split are used in training, e.g. {', '.join(leaked[:3])}."
            )
