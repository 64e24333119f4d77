import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import PackError, StickerPack
from dataset_builders.stickers.split import split_databases, split_of_database


@given(st.lists(st.sampled_from(EMOTIONS), min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 5))
def test_databases_are_balanced_by_emotion_and_size(emotions, num_databases, seed):
    by_id = {f"sticker-{i}": emotion for i, emotion in enumerate(emotions)}
    if num_databases > len(by_id):
        with pytest.raises(ValueError, match="num_databases"):
            split_databases(by_id, num_databases, seed)
        return
    databases = split_databases(by_id, num_databases, seed)
    assert set(databases) == set(by_id)
    sizes = Counter(databases.values())
    assert max(sizes.values()) - min(sizes[d] for d in range(1, num_databases + 1)) <= 1
    for emotion in EMOTIONS:
        counts = Counter(databases[i] for i in by_id if by_id[i] == emotion)
        per_database = [counts[d] for d in range(1, num_databases + 1)]
        assert max(per_database) - min(per_database) <= 1


@pytest.mark.parametrize(("number", "count", "splits"), [(8, 10, ("train", "validation")), (9, 10, ("test",)), (80, 100, ("train", "validation")), (81, 100, ("test",))])  # fmt: skip
def test_the_last_fifth_of_the_databases_is_for_test(number, count, splits):
    assert split_of_database(number, count) == splits


@pytest.fixture(scope="module")
def pack():
    return openmoji.build_pack(size=64)


def test_the_openmoji_pack_is_large_and_feels_everything(pack):
    counts = Counter(sticker.emotion for sticker in pack.stickers)
    assert len(pack.stickers) >= 400 and all(counts[emotion] >= 25 for emotion in EMOTIONS)
    assert pack.num_databases == 10
    assert "CC BY-SA 4.0" in pack.info.attribution and pack.info.licence == "CC-BY-SA-4.0"


def test_annotations_are_written_not_templated(pack):
    for field in ("description", "emotion_description", "recommendation"):
        texts = [getattr(sticker, field) for sticker in pack.stickers]
        assert len(set(texts)) == len(texts), field
        assert min(len(text.split()) for text in texts) >= 3
        if field != "description":  # seventy-four of the drawings simply are yellow faces
            openings = Counter(" ".join(text.lower().split()[:3]) for text in texts)
            assert openings.most_common(1)[0][1] <= 0.01 * len(texts), (field, openings.most_common(3))


def test_stickers_have_alpha_and_are_all_different(pack):
    assert len({sticker.sha256 for sticker in pack.stickers}) == len(pack.stickers)
    for sticker in pack.stickers[::40]:
        alpha = pack.image(sticker.id).getchannel("A").getextrema()
        assert alpha == (0, 255), sticker.id


def test_test_stickers_are_no_training_stickers(pack):
    train, test = ({s.id for s in pack.split(name)} for name in ("train", "test"))
    assert train and test and not train & test and len(train | test) == len(pack.stickers)


def test_save_and_load(pack, tmp_path):
    pack.save(tmp_path)
    again = StickerPack.load(tmp_path)
    assert (again.info, again.stickers, again.databases) == (pack.info, pack.stickers, pack.databases)
    with pytest.raises(FileNotFoundError, match="has no pack.yaml"):
        StickerPack.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("ids", "numbers", "said"),
    [
        ("ab", [1, 2], "expected each sticker of the pack once"),
        ("abb", [1, 2, 1], "expected each sticker of the pack once"),
        ("abcc", [1, 2, 1, 2], "expected each sticker of the pack once"),
        ("abcd", [1, 2, 1, 2], "expected each sticker of the pack once"),
        ("abc", [0, 1, 2], "a: Input should be greater than 0"),
        ("abc", [1.0, 1.0, 2.0], "a: Input should be a valid integer"),
        ("abc", [1, None, 2], "b: Input should be a valid integer"),
        ("abc", [1, 3, 3], "expected databases 1 to 3, and a sticker in each"),
    ],
)
def test_databases_that_do_not_fit_the_stickers_are_named(pack, tmp_path, ids, numbers, said):
    stickers = [sticker.model_copy(update={"id": name}) for sticker, name in zip(pack.stickers, "abc", strict=False)]
    StickerPack(pack.info, stickers, dict.fromkeys("abc", b"x")).save(tmp_path)
    pq.write_table(pa.table({"id": list(ids), "database": numbers}), tmp_path / "databases.parquet")
    with pytest.raises(PackError, match=f"databases.parquet: {said}"):
        StickerPack.load(tmp_path)


def damage(file, start):
    data = bytearray(file.read_bytes())
    data[start : start + 60] = bytes(60)
    file.write_bytes(data)


def test_a_damaged_page_is_named(pack, tmp_path):
    pack.save(tmp_path)
    file = tmp_path / "stickers.parquet"
    column = pq.ParquetFile(file).metadata.row_group(0).column(1)
    damage(file, column.dictionary_page_offset or column.data_page_offset)
    damaged = StickerPack.load(tmp_path)
    with pytest.raises(PackError, match="stickers.parquet: "):
        damaged.image(pack.stickers[0].id)
    assert damaged.image(pack.stickers[-1].id).size == (64, 64)
    damage(file, 4)
    with pytest.raises(PackError, match="stickers.parquet: "):
        StickerPack.load(tmp_path)


@pytest.mark.parametrize("fmt", ["BMP", "EPS"])
def test_a_pack_has_no_pictures_in_other_formats(pack, fmt):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, fmt)
    sticker = pack.stickers[0]
    broken = StickerPack(pack.info, [sticker], {sticker.id: buffer.getvalue()})
    with pytest.raises(PackError, match=f"the pack openmoji: sticker {sticker.id}: not a PNG, JPEG, WebP, GIF"):
        broken.image(sticker.id)


def test_a_drawing_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="'ABCDEF'"):
        openmoji.render("ABCDEF", 16)
