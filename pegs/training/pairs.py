"""Image-text pairs for pre-training (appendix C.1): streamed from WebDataset tars or parquet files, LAION style."""

import logging
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Image as ImageColumn
from datasets import IterableDataset, load_dataset
from PIL import Image

from modeling_pegs.processing_pegs import StickerImageError, load_sticker
from pegs.training.stages import ConfigError, reading


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image")
CAPTION_COLUMNS = ("caption", "text", "txt", "TEXT")
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
MAX_WORDS = 50
SHUFFLE_BUFFER = 1000


def clean_caption(caption: str) -> str:
    """Lower case, without punctuation, at most 50 words: what captions of the web are brought to."""
    return " ".join(PUNCTUATION.sub(" ", caption.lower()).split()[:MAX_WORDS])


def read_pair(row: dict[str, Any]) -> tuple[Image.Image, str] | None:
    """
    Picture and cleaned caption of a row: of WebDataset, whose `json` member may hold the caption, or of parquet.

    Returns:
        `tuple[PIL.Image.Image, str]` or `None`: `None` if the row has no caption, or a picture that cannot be read.

    Raises:
        ConfigError: If the row has no column of a known name.

    """
    fields = {**row, **(row.get("json") or {})}
    if not all(any(name in fields for name in names) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS)):
        raise ConfigError(
            f"A pair needs a picture ({', '.join(IMAGE_COLUMNS)}) and a caption ({', '.join(CAPTION_COLUMNS)}), got {', '.join(sorted(fields))}."
        )
    picture = next((fields[name] for name in IMAGE_COLUMNS if fields.get(name) is not None), None)
    caption = next((fields[name] for name in CAPTION_COLUMNS if fields.get(name) is not None), None)
    if picture is None or caption is None:
        return None
    text = clean_caption(caption.decode("utf-8", "replace") if isinstance(caption, bytes) else str(caption))
    if not text:
        return None
    try:
        return load_sticker(picture["bytes"] if picture["bytes"] is not None else picture["path"]), text
    except StickerImageError as error:
        logger.debug("left out: %s", error)
        return None


def stream_pairs(files: list[str], seed: int) -> Iterator[tuple[Image.Image, str]]:
    """
    Shuffled pairs, again and again.

    Args:
        files (`list[str]`): Tars or parquet files; names, patterns or URLs.
        seed (`int`): Seed of the order, within a buffer of 1,000.

    Yields:
        `tuple[PIL.Image.Image, str]`: A picture and its caption.

    Raises:
        ConfigError: If the files are neither tars nor parquet, or no pair in them can be read.

    """
    suffixes = {Path(name).suffix for name in files}
    kinds = {".tar": "webdataset", ".parquet": "parquet"}
    if len(suffixes) != 1 or not suffixes <= set(kinds):
        raise ConfigError(f"`pairs` must be .tar or .parquet files, all of one kind, got {', '.join(files)}.")
    with reading("pairs"):
        rows: IterableDataset = load_dataset(kinds[suffixes.pop()], data_files=files, split="train", streaming=True)
    for name in set(rows.column_names or ()) & set(IMAGE_COLUMNS):
        rows = rows.cast_column(name, ImageColumn(decode=False))
    epoch = 0
    while True:
        count = 0
        for row in rows.shuffle(seed=seed + epoch, buffer_size=SHUFFLE_BUFFER):
            pair = read_pair(row)
            if pair is not None:
                count += 1
                yield pair
        if not count:
            raise ConfigError(f"No pair could be read from {', '.join(files)}.")
        epoch += 1
