"""A folder or zip of pictures as a sticker source, with what sticker exports put beside them."""

import json
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers.images import MAX_BYTES, BadImage
from dataset_builders.stickers.ingest import Found


NOTES = re.compile(
    r"(^|/)(pack\.yaml|licen[cs]e[^/]*|readme[^/]*|attribution[^/]*|notice[^/]*|\.[^/]*|__macosx/.*|thumbs\.db)$", re.I
)
MAX_NOTE = 4 * 2**20
# what a damaged zip, or a member of it, may raise
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class SourceError(ValueError):
    """A source that cannot be read at all; the message names it."""


@dataclass(frozen=True)
class Listing:
    """
    Files of a folder or zip, by path relative to it.

    Args:
        files (`dict[str, Callable[[], bytes]]`): Readers; one raises [`BadImage`] if its file must not be read.

    """

    files: dict[str, Callable[[], bytes]]

    def note(self, name: str) -> str | None:
        """Text of a small file beside the pictures (`title.txt`, `contents.json` ...), `None` if there is none."""
        for path, read in self.files.items():
            if PurePosixPath(path).name.lower() == name:
                data = read()
                return data.decode("utf-8", "replace").strip() if len(data) <= MAX_NOTE else None
        return None


def list_source(source: Path) -> Listing:
    """
    Files of a folder or a zip (`.zip`, `.wastickers`, `.stickerpack`), sorted by path; nothing is unpacked to disk.

    Raises:
        SourceError: If `source` is neither, or its table of contents is broken.

    """
    if source.is_dir():
        root = source.resolve()
        paths = sorted(path for path in source.rglob("*") if path.is_symlink() or path.is_file())
        return Listing({path.relative_to(source).as_posix(): _file_reader(path, root) for path in paths})
    if not source.is_file():
        raise SourceError("no such folder or file")
    if not zipfile.is_zipfile(source):
        raise SourceError("neither a folder nor a zip")
    try:
        archive = zipfile.ZipFile(source)
    except UNREADABLE as error:
        raise SourceError(f"a broken zip ({error})") from error
    entries = sorted((entry for entry in archive.infolist() if not entry.is_dir()), key=lambda entry: entry.filename)
    return Listing({entry.filename: _member_reader(archive, entry) for entry in entries})


def _file_reader(path: Path, root: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise BadImage("a link that leads outside the folder")
        try:
            if path.stat().st_size > MAX_BYTES:
                raise BadImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error

    return read


def _member_reader(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or entry.filename.startswith(("/", "\\")) or ":" in parts[0]:
            raise BadImage("a path that leads outside the zip")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise BadImage("a link, not a file")
        if entry.flag_bits & 1:
            raise BadImage("encrypted")
        if entry.file_size > MAX_BYTES:
            raise BadImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
        try:
            with archive.open(entry) as file:
                data = file.read(MAX_BYTES + 1)  # the header's size may lie
        except UNREADABLE as error:
            raise BadImage(f"cannot be read ({error})") from error
        if len(data) > MAX_BYTES:
            raise BadImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
        return data

    return read


def find_pictures(listing: Listing, ignored: tuple[str, ...] = ()) -> Iterator[Found]:
    """
    Every file of a listing that may be a picture; its folder is its theme, and a folder or file named after an emotion gives that.

    Args:
        listing ([`Listing`]): The files.
        ignored (`tuple[str, ...]`, *optional*): Names of files that are no stickers (a tray icon, a list of emoji).

    """
    for name, read in listing.files.items():
        path = PurePosixPath(name)
        if NOTES.search(name) or path.name.lower() in ignored:
            continue
        fields: dict = {}
        if len(path.parts) > 1:
            fields["theme"] = path.parts[-2]
        emotion = next((part.lower() for part in path.parts[:-1] if part.lower() in EMOTIONS), None)
        if emotion:
            fields["emotion"] = emotion
        yield Found(name, read, fields)


def read_json(text: str | bytes, name: str) -> object:
    """
    Parse a note.

    Raises:
        SourceError: If it is no JSON, naming the file.

    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{name}: not JSON ({error})") from error
