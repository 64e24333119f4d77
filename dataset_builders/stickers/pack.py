"""A sticker pack on disk: `pack.yaml`, `stickers.parquet`, `databases.parquet`, `embeddings.safetensors`."""

import io
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter, ValidationError

from dataset_builders.schema import Split, Sticker
from dataset_builders.stickers.images import BadImage, representative_frame
from dataset_builders.stickers.split import split_of_database


# what a damaged file of a pack may raise
UNREADABLE = (OSError, ValidationError, pa.ArrowException, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError, RecursionError)  # fmt: skip
ROWS_A_GROUP = 32  # a picture is read with its row group: small groups make single pictures cheap
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in ("emotion", "description", "emotion_description", "recommendation")),
        ("tags", pa.list_(pa.string())),
        ("animated", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        *((name, pa.string()) for name in ("sha256", "theme", "author", "licence", "annotated_by")),
    ]
)


def _hub_features(schema: pa.Schema) -> dict:
    """The columns as `datasets` declares them, so that the Hub shows the pictures and `load_dataset` decodes them."""
    features: dict = {}
    for field in schema:
        if field.name == "image":
            features[field.name] = {"_type": "Image"}
        elif pa.types.is_list(field.type):
            features[field.name] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        else:
            features[field.name] = {"dtype": str(field.type), "_type": "Value"}
    return features


SCHEMA = SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": _hub_features(SCHEMA)}})})


class PackError(ValueError):
    """A folder that is no pack, or a broken one."""


class PackInfo(BaseModel):
    """What `pack.yaml` says; `attribution` must be shown wherever a sticker is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    licence: str
    attribution: str
    source: str


class ParquetImages(Mapping[str, bytes]):
    """
    Encoded pictures by id, read from `stickers.parquet` when asked for; a [`PackError`] if that is damaged.

    Args:
        file (`Path`): The parquet file.
        ids (`list[str]`): Ids in the file's order.

    """

    def __init__(self, file: Path, ids: list[str]) -> None:
        self.file, self.parquet = file, pq.ParquetFile(file)
        self.rows = {sticker_id: row for row, sticker_id in enumerate(ids)}
        groups = (self.parquet.metadata.row_group(i).num_rows for i in range(self.parquet.num_row_groups))
        self.starts = [0]
        for rows in groups:
            self.starts.append(self.starts[-1] + rows)
        self.lock = threading.Lock()
        self.held: tuple[int, list[bytes]] = (-1, [])

    def __getitem__(self, sticker_id: str) -> bytes:
        row = self.rows[sticker_id]
        with self.lock:
            number, images = self.held
            if not (number >= 0 and self.starts[number] <= row < self.starts[number + 1]):
                number = next(i for i in range(len(self.starts)) if self.starts[i + 1] > row)
                try:
                    column = self.parquet.read_row_group(number, columns=["image.bytes"])["image"]
                except (OSError, pa.ArrowException) as error:
                    raise PackError(f"{self.file}: {first_line(error)}") from error
                images = [picture["bytes"] for picture in column.to_pylist()]
                self.held = number, images
            return images[row - self.starts[number]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class StickerPack:
    """
    Stickers with their pictures, their licence and, once the pack is split, their databases.

    Args:
        info ([`PackInfo`]): Name, version, licence, attribution, source.
        stickers (`list[Sticker]`): In order.
        images (`Mapping[str, bytes]`): Encoded picture of each id.
        databases (`dict[str, int]`, *optional*): Database of each id, from 1 to N.

    """

    def __init__(
        self,
        info: PackInfo,
        stickers: list[Sticker],
        images: Mapping[str, bytes],
        databases: dict[str, int] | None = None,
    ) -> None:
        self.info, self.stickers, self.images, self.databases = info, stickers, images, databases or {}

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
        """A sticker as an RGBA picture; of an animated one, the frame that represents it. Raises [`PackError`] if it cannot be read."""
        try:
            return representative_frame(self.images[sticker_id])
        except BadImage as error:
            raise PackError(f"the pack {self.info.name}: sticker {sticker_id}: {error}") from error

    def still(self, sticker_id: str) -> bytes:
        """A sticker as one encoded picture: its own bytes, or its representative frame as PNG if it is animated."""
        data = self.images[sticker_id]
        if not self.by_id[sticker_id].animated:
            return data
        buffer = io.BytesIO()
        self.image(sticker_id).save(buffer, "PNG")
        return buffer.getvalue()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the pack's files into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_stickers(folder, ((sticker, self.images[sticker.id]) for sticker in self.stickers))
        write_databases(folder, self.databases)
        write_info(folder, self.info)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "StickerPack":
        """
        Open a pack; pictures are read when they are asked for.

        Raises:
            FileNotFoundError: If `folder` is not a pack, naming the missing file.
            PackError: If a file of it is broken, naming the file and what is wrong.

        """
        folder = Path(folder)
        for name in ("pack.yaml", "stickers.parquet"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a sticker pack: it has no {name}.")
        file = folder / "pack.yaml"
        try:
            info = PackInfo.model_validate(yaml.safe_load(file.read_text("utf-8")))
            file = folder / "stickers.parquet"
            columns = [name if name != "image" else "image.path" for name in SCHEMA.names]
            table = pq.ParquetFile(file).read(columns=columns)
            rows = table.drop_columns("image").to_pylist()
            for row, image in zip(rows, table["image"].to_pylist(), strict=True):
                row["image_path"] = image["path"]
            stickers = TypeAdapter(list[Sticker]).validate_python(rows)
            file = folder / "databases.parquet"
            databases = read_databases(file, stickers) if file.is_file() else {}
        except UNREADABLE as error:
            raise PackError(f"{file}: {first_line(error)}") from error
        return cls(info, stickers, ParquetImages(folder / "stickers.parquet", [s.id for s in stickers]), databases)


def read_databases(file: Path, stickers: Sequence[Sticker]) -> dict[str, int]:
    """
    Database of each sticker of a pack.

    Raises:
        PackError: If a sticker is not there, or not once, or the databases are not 1 to N.

    """
    table = pq.read_table(file).to_pydict()
    databases = dict(zip(table["id"], table["database"], strict=True))
    databases = TypeAdapter(dict[str, PositiveInt]).validate_python(databases, strict=True)
    if Counter(table["id"]) != Counter(sticker.id for sticker in stickers):
        raise PackError(f"{file}: expected each sticker of the pack once, and no others.")
    if len(set(databases.values())) != max(databases.values(), default=0):
        raise PackError(f"{file}: expected databases 1 to {max(databases.values())}, and a sticker in each.")
    return databases


def first_line(error: Exception) -> str:
    """The first line of an error's message; of a `ValidationError`, the first field that is wrong, and how."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return str(error).splitlines()[0]


def write_stickers(folder: Path, stickers: Iterable[tuple[Sticker, bytes]]) -> int:
    """Write `stickers.parquet` row group by row group, whole or not at all; returns how many stickers it holds."""
    partial, count = folder / f"stickers.parquet.{os.getpid()}", 0
    try:
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            rows: list[dict] = []
            for sticker, image in stickers:
                row = sticker.model_dump()
                row["image"] = {"bytes": image, "path": row.pop("image_path")}
                rows.append(row)
                if len(rows) == ROWS_A_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    count += len(rows)
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        partial.replace(folder / "stickers.parquet")
    finally:
        partial.unlink(missing_ok=True)
    return count + len(rows)


def write_databases(folder: Path, databases: dict[str, int]) -> None:
    """Write `databases.parquet`; none for a pack that is not split."""
    if databases:
        table = pa.table({"id": list(databases), "database": list(databases.values())})
        pq.write_table(table, folder / "databases.parquet")
    else:
        (folder / "databases.parquet").unlink(missing_ok=True)


def write_info(folder: Path, info: PackInfo) -> None:
    """Write `pack.yaml`, last: a folder with it is a whole pack."""
    (folder / "pack.yaml").write_text(yaml.safe_dump(info.model_dump(), sort_keys=False, allow_unicode=True), "utf-8")
