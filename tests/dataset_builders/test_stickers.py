from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack
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


def test_a_drawing_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match="'ABCDEF'"):
        openmoji.render("ABCDEF", 16)
