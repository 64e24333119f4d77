"""The files that dialogues come from: told apart by their format, cut into shards, read line by line."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from dataset_builders.schema import Split
from dataset_builders.stickerconv.sessions import MINI, RUN_FILE, SessionError


Format = Literal["sessions", "released", "mod"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_NAMES: dict[str, Split] = {"train": "train", "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}  # fmt: skip
SPLIT_OF_LINE = re.compile(rb'"split":\s*"(train|validation|test)"')
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file of dialogues."""

    file: Path
    format: Format


@dataclass(frozen=True)
class Shard:
    """The dialogues of a source that begin in its bytes `start` to `stop`."""

    source: Source
    start: int
    stop: int


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """
    The files that are meant by run folders, files, folders of released files, and the word `mini`.

    Raises:
        SessionError: If there is none, or they are of several formats.

    """
    files = [file for path in paths for file in _files_of(path)]
    sources = [Source(file, format_of(file)) for file in files]
    formats = sorted({source.format for source in sources})
    if len(formats) > 1:
        raise SessionError(
            f"{', '.join(map(str, paths))}: expected one format, found {' and '.join(formats)}; build each for itself."
        )
    return sources


def _files_of(path: str | Path) -> list[Path]:
    if str(path) == "mini":
        return [MINI]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SessionError(f"{path}: no such folder or file.")
    if (path / RUN_FILE).is_file():
        return [path / RUN_FILE]
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if not files:
        raise SessionError(f"{path}: has neither a {RUN_FILE} of a run nor released .json or .jsonl files.")
    return files


def format_of(file: Path) -> Format:
    """What is in a file, told by its first line: the key `conversation` is StickerConv's release, `dialogue 1` is MOD."""
    with file.open("rb") as stream:
        head = stream.readline() + stream.readline()
    if re.match(rb'\s*\{\s*"dialogue ', head):
        return "mod"
    return "released" if b'"conversation"' in head else "sessions"


def splits_in(sources: Iterable[Source]) -> list[Split]:
    """The splits that there are rows for, in the usual order; sessions are looked through until all are found."""
    found: set[str] = set()
    for source in sources:
        if source.format != "sessions":
            found.add(split_of_file(source.file))
            continue
        for _, line in read_lines(Shard(source, 0, source.file.stat().st_size)):
            if match := SPLIT_OF_LINE.search(line):
                found.add(match[1].decode())
            if found >= set(SPLITS):
                break
    return [split for split in SPLITS if split in found]


def split_of_file(file: Path) -> Split:
    """
    The split that a file's name tells.

    Raises:
        SessionError: If it tells none.

    """
    for word in re.split(r"[\W_]+", file.stem.lower()):
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    raise SessionError(f"{file}: expected a name that tells the split: train, validation or test.")


def split_into_shards(sources: Iterable[Source], parts: int) -> list[Shard]:
    """Every source cut into at most `parts` of equal size, in order; MOD, which is one object a file, is not cut."""
    shards = []
    for source in sources:
        size = source.file.stat().st_size
        count = 1 if source.format == "mod" else parts
        bounds = [size * part // count for part in range(count + 1)]
        shards += [Shard(source, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if start < stop]
    return shards


def read_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and text of the lines that begin in a shard; empty ones are left out."""
    with shard.source.file.open("rb") as stream:
        number = _count_lines(stream, shard.start) + 1
        stream.seek(max(0, shard.start - 1))
        if shard.start and stream.readline() != b"\n":
            number += 1  # this line began in the shard before
        offset = stream.tell()
        while offset < shard.stop and (line := stream.readline()):
            if line.strip():
                yield number, line
            offset, number = offset + len(line), number + 1


def _count_lines(stream: BinaryIO, stop: int) -> int:
    count = 0
    while stop > 0 and (chunk := stream.read(min(CHUNK, stop))):
        count, stop = count + chunk.count(b"\n"), stop - len(chunk)
    return count
