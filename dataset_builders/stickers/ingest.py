"""Taking pictures of any source into a pack: the good go in, the bad are listed with the reason, nothing is written outside the pack."""

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dataset_builders.schema import Sticker
from dataset_builders.stickers.images import BadImage, read_picture
from dataset_builders.stickers.pack import PackInfo, write_databases, write_info, write_stickers


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """
    A file that a source offers.

    Args:
        name (`str`): Its path inside the source.
        read (`Callable[[], bytes]`): Gives its content; raises [`BadImage`] if it may not be read.
        fields (`dict`): What the source knows of it, as fields of [`Sticker`].

    """

    name: str
    read: Callable[[], bytes]
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A file that did not become a sticker, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Ingested:
    """What became of a source."""

    info: PackInfo
    stickers: int
    skipped: list[Skipped]


def ingest(
    found: Iterable[Found],
    folder: Path,
    info: PackInfo,
    black_background: bool = False,
    on_file: Callable[[int], object] = lambda count: None,
) -> Ingested:
    """
    Write a pack from the files of a source, one at a time. Nothing is written before the first of them has become a sticker.

    Args:
        found (`Iterable[Found]`): The files.
        folder (`Path`): Folder of the pack; made if needed.
        info ([`PackInfo`]): Goes into `pack.yaml`.
        black_background (`bool`, *optional*, defaults to `False`): See [`read_picture`].
        on_file (`Callable`, *optional*): Called after every file with the number of files so far.

    Returns:
        [`Ingested`].

    Raises:
        BadImage: If not one file became a sticker.

    """
    skipped: list[Skipped] = []
    accepted = _accepted(found, skipped, black_background, on_file)
    first = next(accepted, None)
    if first is None:
        why = f": {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise BadImage(f"no picture that can be a sticker, {len(skipped)} refused{why}")
    folder.mkdir(parents=True, exist_ok=True)
    count = write_stickers(folder, chain([first], accepted))
    write_databases(folder, {})
    write_info(folder, info)
    return Ingested(info, count, skipped)


def _accepted(
    found: Iterable[Found], skipped: list[Skipped], black_background: bool, on_file: Callable[[int], object]
) -> Iterator[tuple[Sticker, bytes]]:
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for number, item in enumerate(found, start=1):
        try:
            picture = read_picture(item.read(), item.name, black_background)
            if picture.sha256 in seen:
                raise BadImage(f"the same picture as {seen[picture.sha256]}")
        except BadImage as error:
            skipped.append(Skipped(item.name, str(error)))
        else:
            seen[picture.sha256] = item.name
            sticker_id = unique_id(item.fields.get("id") or item.name, ids)
            values = {
                **item.fields,
                "id": sticker_id,
                "image_path": f"{sticker_id}{picture.suffix}",
                "animated": picture.animated,
                "width": picture.width,
                "height": picture.height,
                "sha256": picture.sha256,
            }
            yield Sticker(**values), picture.data
        on_file(number)


def unique_id(name: str, taken: set[str]) -> str:
    """
    An id made from a file's path: its letters and digits joined by hyphens, at most 80 characters, numbered if it is taken.

    Args:
        name (`str`): Path or name; its ending is left out.
        taken (`set[str]`): Ids so far; the new one is added.

    Returns:
        `str`.

    """
    stem = re.sub(r"\.\w{1,5}$", "", name)
    plain = unicodedata.normalize("NFKC", stem).lower()
    slug = re.sub(r"[\W_]+", "-", plain).strip("-")[:80] or "sticker"
    candidate, number = slug, 1
    while candidate in taken:
        number += 1
        candidate = f"{slug}-{number}"
    taken.add(candidate)
    return candidate
