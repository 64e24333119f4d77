"""A sticker pack on disk: `pack.yaml`, `stickers.parquet`, `databases.parquet`, `embeddings.safetensors`."""

import hashlib
import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from dataset_builders.schema import Split, Sticker
from dataset_builders.stickers.split import split_of_database


@dataclass
class PackInfo:
    """What `pack.yaml` says; `attribution` must be shown wherever a sticker is."""

    name: str
    version: str
    licence: str
    attribution: str
    source: str


@dataclass
class StickerPack:
    """Stickers with their licence and, once split, their databases (`databases[id]` from 1 to N)."""

    info: PackInfo
    stickers: list[Sticker]
    databases: dict[str, int] = field(default_factory=dict)

    @cached_property
    def by_id(self) -> dict[str, Sticker]:
        """Stickers by id."""
        return {sticker.id: sticker for sticker in self.stickers}

    @property
    def num_databases(self) -> int:
        """Number of databases, 0 before the pack is split."""
        return max(self.databases.values(), default=0)

    def database(self, number: int) -> list[Sticker]:
        """Stickers of one database, in the pack's order."""
        return [sticker for sticker in self.stickers if self.databases.get(sticker.id) == number]

    def split(self, name: Split) -> list[Sticker]:
        """Stickers that a split of the dialogues may use."""
        return [s for s in self.stickers if name in split_of_database(self.databases[s.id], self.num_databases)]

    def image(self, sticker_id: str) -> Image.Image:
        """First frame of a sticker as an RGBA picture."""
        return Image.open(io.BytesIO(self.by_id[sticker_id].image)).convert("RGBA")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pack's files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"image": {"bytes": s.image, "path": s.image_path}, **s.model_dump(exclude={"image", "image_path"})}
            for s in self.stickers
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "stickers.parquet")
        if self.databases:
            assignment = [{"id": sticker_id, "database": number} for sticker_id, number in self.databases.items()]
            pq.write_table(pa.Table.from_pylist(assignment), folder / "databases.parquet")
        (folder / "pack.yaml").write_text(
            yaml.safe_dump(vars(self.info), sort_keys=False, allow_unicode=True), "utf-8"
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "StickerPack":
        """
        Read a pack.

        Raises:
            FileNotFoundError: If `folder` is not a pack, naming the missing file.

        """
        folder = Path(folder)
        for name in ("pack.yaml", "stickers.parquet"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a sticker pack: it has no {name}.")
        info = PackInfo(**yaml.safe_load((folder / "pack.yaml").read_text("utf-8")))
        stickers = []
        for row in pq.read_table(folder / "stickers.parquet").to_pylist():
            image = row.pop("image")
            stickers.append(Sticker(image=image["bytes"], image_path=image["path"], **row))
        databases = {}
        if (folder / "databases.parquet").is_file():
            table = pq.read_table(folder / "databases.parquet").to_pydict()
            databases = dict(zip(table["id"], table["database"], strict=True))
        return cls(info, stickers, databases)


def digest(image: Image.Image) -> str:
    """SHA-256 of a picture's RGBA pixels and size, in hexadecimal."""
    rgba = image.convert("RGBA")
    return hashlib.sha256(repr(rgba.size).encode() + rgba.tobytes()).hexdigest()
