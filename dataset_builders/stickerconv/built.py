"""A built dataset, read back as what training and evaluation take: sessions, and the pack that they use."""

from collections import ChainMap
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import ValidationError

from dataset_builders.schema import Session, Split, Sticker
from dataset_builders.stickerconv.build import DatasetFolder
from dataset_builders.stickerconv.features import EMOTION_NAME, STICKERS
from dataset_builders.stickerconv.inputs import ROLES
from dataset_builders.stickerconv.sessions import SessionError, describe
from dataset_builders.stickerconv.statistics import read_split
from dataset_builders.stickers.pack import UNREADABLE, PackError, PackInfo, ParquetImages, StickerPack, first_line


def read_built_sessions(folder: Path, split: Split) -> list[Session]:
    """
    The sessions of a split of a built dataset. What a released set does not tell of them is `None`.

    Args:
        folder (`Path`): The dataset.
        split (`str`): `train`, `validation` or `test`.

    Raises:
        SessionError: If `folder` is none, or a row of it is no session.

    """
    DatasetFolder.load(folder)
    return [_session(row, folder) for row in read_split(folder, split)]


def _session(row: dict, folder: Path) -> Session:
    profile = row["profile"]
    profile["emotion"] = EMOTION_NAME[profile["emotion"]]
    if profile["name"] is None or profile["emotion"] is None:
        row["profile"] = None
    for sticker in filter(None, (turn[role]["sticker"] for turn in row["turns"] for role in ROLES)):
        sticker["emotion"] = EMOTION_NAME[sticker["emotion"]]
    if row["usage"] is None:
        del row["usage"]
    try:
        return Session.model_validate(row)
    except ValidationError as error:
        raise SessionError(f"{folder}: {row['session_id']}: {describe(error)}") from None


def load_built_pack(folder: Path) -> StickerPack:
    """
    The stickers of a built dataset as a pack: those that it has the pictures of. Where they are of no databases, the first of five holds what training may use, and
    the fifth what only the test split does.

    Args:
        folder (`Path`): The dataset.

    Raises:
        SessionError: If `folder` is none.
        PackError: If a file of it is damaged, or it has no pictures.

    """
    info = DatasetFolder.load(folder)
    columns = ["image.path" if name == "image" else name for name in STICKERS]
    stickers: list[Sticker] = []
    images: list[ParquetImages] = []
    databases: dict[str, int] = {}
    for split, number in (("train", 1), ("test", 5)):
        for file in sorted((folder / "stickers").glob(f"{split}-*.parquet")):
            try:
                rows = pq.ParquetFile(file).read(columns=columns).to_pylist()
                images.append(ParquetImages(file, [row["id"] for row in rows]))
                for row in filter(lambda row: row["sha256"] is not None, rows):
                    databases[row["id"]] = row.pop("database") or number
                    row["image_path"] = row.pop("image")["path"]
                    row["emotion"] = EMOTION_NAME[row["emotion"]]
                    given = {name: value for name, value in row.items() if value is not None}
                    stickers.append(Sticker.model_validate(given))
            except UNREADABLE as error:
                raise PackError(f"{file}: {first_line(error)}") from error
    if not stickers:
        raise PackError(f"{folder}: has no pictures; build it with `--images SER30K`.")
    if set(databases.values()) == {1}:
        databases = {}
    about = PackInfo(
        name=info.name,
        version="1",
        licence=info.licences.get("the stickers", "unknown"),
        attribution="; ".join(info.attribution),
        source=", ".join(info.sources),
    )
    return StickerPack(about, stickers, ChainMap(*images), databases)  # type: ignore[arg-type]
