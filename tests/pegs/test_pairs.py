"""Image-text pairs as they come from the web."""

import io
import itertools
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pegs.training.pairs import clean_caption, read_pair, stream_pairs
from tests.fixtures import tiny


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, rows) -> str:
    with tarfile.open(path, "w") as tar:
        for number, (picture, caption) in enumerate(rows):
            for suffix, data in (("jpg", picture), ("json", json.dumps({"caption": caption}).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


ROWS = [(png("red"), "A Red, red SQUARE!"), (b"broken", "no picture"), (png("blue"), "..."), (png("gold"), "gold")]


def test_captions_are_cleaned():
    assert clean_caption("  Hello, WORLD! it\u0027s\nme ") == "hello world it s me"
    assert clean_caption("a " * 60) == " ".join(["a"] * 50)


def test_a_tar_is_streamed_again_and_again_without_what_cannot_be_read(tmp_path):
    name = write_tar(tmp_path / "00000.tar", ROWS)
    captions = [caption for _, caption in itertools.islice(stream_pairs([name], seed=0), 6)]
    assert sorted(captions[:2]) == sorted(captions[2:4]) == ["a red red square", "gold"]
    again = [caption for _, caption in itertools.islice(stream_pairs([name], seed=0), 6)]
    assert captions == again


def test_parquet_is_streamed(tmp_path):
    pictures = [{"bytes": picture, "path": None} for picture, _ in ROWS]
    pq.write_table(pa.table({"image": pictures, "TEXT": [text for _, text in ROWS]}), tmp_path / "a.parquet")
    pairs = dict((text, image) for image, text in itertools.islice(stream_pairs([str(tmp_path / "a.parquet")], 1), 2))
    assert set(pairs) == {"a red red square", "gold"} and pairs["gold"].mode == "RGB"


def test_what_is_no_pair_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be .tar or .parquet files, all of one kind, got a.zip"):
        next(stream_pairs(["a.zip"], 0))
    name = write_tar(tmp_path / "bad.tar", [(b"broken", "x"), (b"worse", "y")])
    with pytest.raises(ValueError, match="No pair could be read from"):
        next(stream_pairs([name], 0))


def test_a_row_without_its_picture_or_caption_is_left_out_and_a_table_without_such_columns_refused():
    assert read_pair({"image": None, "caption": "a cat"}) is None
    assert read_pair({"image": {"bytes": ROWS[0][0], "path": None}, "caption": None}) is None
    with pytest.raises(ValueError, match="A pair needs a picture .* got caption, colour"):
        read_pair({"colour": 1, "caption": "a cat"})
