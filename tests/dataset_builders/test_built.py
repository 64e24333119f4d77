"""A built dataset read back as sessions and a pack."""

import json

import pytest
from PIL import Image

from dataset_builders.stickerconv.build import build_dataset
from dataset_builders.stickerconv.built import load_built_pack, read_built_sessions
from dataset_builders.stickerconv.sessions import SessionError, load_mini
from dataset_builders.stickers.build import build_from_source
from dataset_builders.stickers.openmoji import cached_pack
from dataset_builders.stickers.pack import PackError, StickerPack
from tests.dataset_builders.test_stickerconv import released_line


def test_what_was_built_of_sessions_is_what_they_were(tmp_path):
    build_dataset(["mini"], tmp_path / "mini")
    for split in ("train", "validation", "test"):
        assert read_built_sessions(tmp_path / "mini", split) == load_mini(split)
    pack, again = cached_pack(), load_built_pack(tmp_path / "mini")
    assert again.databases == pack.databases
    assert again.by_id == pack.by_id
    assert all(again.images[s.id] == pack.images[s.id] for s in (pack.stickers[0], pack.split("test")[-1]))
    assert (again.info.licence, again.info.attribution) == (pack.info.licence, pack.info.attribution)


@pytest.fixture
def released(tmp_path):
    """A folder of released dialogues, and an SER30K tree with their pictures."""
    data, ser30k = tmp_path / "released", tmp_path / "SER30K"
    data.mkdir()
    (data / "train.json").write_text(
        "\n".join([released_line("pepe-7/sticker_18.png", None), released_line("cats/1.jpg")])
    )
    (data / "test.json").write_text(released_line("dogs/2.jpg"))
    for number, name in enumerate(("pepe-7/sticker_18.png", "cats/1.jpg", "dogs/2.jpg")):
        (ser30k / "Images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (10, 60 * number, 90)).save(ser30k / "Images" / name)
    (ser30k / "Annotations").mkdir()
    (ser30k / "Annotations" / "train.json").write_text("[]")
    return data, ser30k


def test_the_released_set_with_its_pictures(released, tmp_path):
    data, ser30k = released
    build_dataset([data], tmp_path / "set", images=str(ser30k))
    sessions = [s for split in ("train", "validation", "test") for s in read_built_sessions(tmp_path / "set", split)]
    assert [session.split for session in sessions] == ["train", "train", "test"]
    assert {(s.database, s.profile, s.ended_by) for s in sessions} == {(None, None, None)}
    pack = load_built_pack(tmp_path / "set")
    used = [m.sticker.id for s in sessions for t in s.turns for m in (t.user, t.system) if m.sticker]
    assert set(used) == set(pack.by_id)
    assert [s.theme for s in pack.split("test")] == ["dogs"] and len(pack.split("train")) == 2
    assert all(sticker.emotion and sticker.caption.endswith(sticker.emotion) for sticker in pack.stickers)
    assert pack.image(used[0]).size == (30, 20)
    build_from_source(str(ser30k), tmp_path / "pack")
    assert set(StickerPack.load(tmp_path / "pack").by_id) == set(pack.by_id)
    assert "other" in pack.info.licence and "SER30K" in pack.info.attribution


def test_what_cannot_be_read_is_named(released, tmp_path):
    with pytest.raises(SessionError, match="no dataset"):
        load_built_pack(tmp_path)
    build_dataset([released[0]], tmp_path / "set")
    with pytest.raises(PackError, match="has no pictures; build it with `--images SER30K`"):
        load_built_pack(tmp_path / "set")
    (tmp_path / "set" / "stickers" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(PackError, match="train-00000-of-00001.parquet: "):
        load_built_pack(tmp_path / "set")
    line = json.loads(released_line("cats/1.jpg"))
    (tmp_path / "mod").mkdir()
    (tmp_path / "mod" / "c_train.json").write_text(
        json.dumps({"dialogue 1": [{"speaker_id": "a", "txt": ""}, {"speaker_id": "b", "txt": line["user_persona"]}]})
    )
    build_dataset([tmp_path / "mod"], tmp_path / "memes")
    with pytest.raises(SessionError, match="turns.0.user.text"):
        read_built_sessions(tmp_path / "memes", "train")
