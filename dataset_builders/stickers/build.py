"""From a source, whatever it is, to a pack."""

from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError

from dataset_builders.stickers import exports, folder, openmoji, ser30k
from dataset_builders.stickers.ingest import Found, Ingested, ingest
from dataset_builders.stickers.pack import PackInfo, first_line


UNKNOWN_LICENCE = "unknown"


def build_from_source(
    source: str,
    out: Path,
    changes: dict[str, str] | None = None,
    on_file: Callable[[int], object] = lambda count: None,
) -> Ingested:
    """
    Build a pack.

    Args:
        source (`str`): `openmoji` (556 annotated drawings), `openmoji-all` (every drawing but flags and skin tones), an SER30K tree, a messenger's
            export, or a folder or zip of pictures.
        out (`Path`): Folder of the pack.
        changes (`dict[str, str]`, *optional*): Fields of [`PackInfo`] to set (`name`, `licence`, `attribution`); they win over the `pack.yaml` that
            a folder may hold.
        on_file (`Callable`, *optional*): Called after every file with the number of files so far.

    Returns:
        [`Ingested`].

    Raises:
        SourceError: If the source cannot be read.
        BadImage: If it has no picture that can be a sticker.

    """
    changes = changes or {}
    if source == "openmoji":
        pack = openmoji.build_pack()
        pack.info = pack.info.model_copy(update=changes)
        pack.save(out)
        return Ingested(pack.info, len(pack.stickers), [])
    if source == "openmoji-all":
        info = openmoji.INFO.model_copy(update={"name": source} | changes)
        return ingest(openmoji.find_drawings(), out, info, on_file=on_file)
    path = Path(source)
    if ser30k.is_ser30k(path):
        return ingest(ser30k.find_ser30k(path), out, ser30k.INFO.model_copy(update=changes), True, on_file)
    listing = folder.list_source(path)
    fields = {
        "name": path.stem,
        "version": "1",
        "licence": UNKNOWN_LICENCE,
        "attribution": "",
        "source": path.name,
        **_own_info(listing),
    }
    found: Iterator[Found] = folder.find_pictures(listing)
    if exports.is_export(listing):
        title, author = exports.export_title(listing)
        fields |= {"name": title or fields["name"], "attribution": author or fields["attribution"]}
        found = exports.find_export(listing)
    return ingest(found, out, PackInfo(**(fields | changes)), on_file=on_file)


def _own_info(listing: folder.Listing) -> dict:
    text = listing.note("pack.yaml")
    if text is None:
        return {}
    try:
        content = yaml.safe_load(text)
        return PackInfo.model_validate(content).model_dump()
    except (yaml.YAMLError, ValidationError, RecursionError) as error:
        raise folder.SourceError(f"pack.yaml: {first_line(error)}") from error
