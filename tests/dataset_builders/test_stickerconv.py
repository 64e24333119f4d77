"""The dataset: its rows, where they come from, and what is refused."""

import json
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Image, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from dataset_builders.schema import EMOTIONS, Session
from dataset_builders.stickerconv.build import DatasetFolder, build_dataset
from dataset_builders.stickerconv.features import FEATURES
from dataset_builders.stickerconv.formats import normalise_label
from dataset_builders.stickerconv.inputs import SplitCheck
from dataset_builders.stickerconv.sessions import MINI, SessionError, load_mini
from dataset_builders.stickerconv.sources import Source, find_sources, read_lines, split_into_shards, split_of_file
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack, write_databases
from pegs.training.dialogues import session_messages


disable_progress_bars()


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    openmoji.build_pack(size=32).save(folder)
    return folder


@pytest.fixture(scope="module")
def built(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "stickerconv"
    build_dataset(["mini"], folder, stickers=str(pack))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """An empty cache and an empty working directory."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def names(value):
    """A row with the emotions' names in place of their numbers."""
    if isinstance(value, dict):
        return {
            key: EMOTIONS[item] if key == "emotion" and isinstance(item, int) else names(item)
            for key, item in value.items()
        }
    return [names(item) for item in value] if isinstance(value, list) else value


def test_the_columns_are_the_schemas():
    sessions = FEATURES["sessions"]
    assert list(sessions) == list(Session.model_fields)
    assert sessions["profile"]["emotion"] == ClassLabel(names=list(EMOTIONS))
    assert sessions["turns"].feature["system"]["sticker"]["emotion"].names == list(EMOTIONS)
    assert FEATURES["stickers"]["image"] == Image() and FEATURES["stickers"]["emotion"].names == list(EMOTIONS)


def test_mini_loads_by_name_in_an_empty_folder():
    splits = load_dataset("stickerconv")
    for split, rows in splits.items():
        assert [Session.model_validate(names(row)) for row in rows] == load_mini(split)
    assert set(splits) == {"train", "validation", "test"}


def test_a_folder_that_is_no_built_dataset_does_not_take_the_name():
    Path("stickerconv").mkdir()
    Path("stickerconv", "README.md").write_text("# Code of StickerConv")
    Path("stickerconv", "app.py").write_text("x")
    assert load_dataset("stickerconv", split="test").num_rows == len(load_mini("test"))


def test_streams_and_processes_give_the_same_rows():
    plain = load_dataset("stickerconv", "turns", split="train")
    stream = load_dataset("stickerconv", "turns", split="train", streaming=True)
    assert stream.num_shards > 1 and list(stream) == list(plain)
    shared = load_dataset("stickerconv", "turns", split="train", num_proc=2, download_mode="force_redownload")
    assert shared.to_list() == plain.to_list()


def test_a_turn_has_all_that_was_said_before(pack):
    sessions = {session.session_id: session for session in load_mini("test")}
    stickers = StickerPack.load(pack)
    rows = load_dataset("stickerconv", "turns", split="test").to_list()
    assert len(rows) == sum(len(session.turns) for session in sessions.values())
    for row in rows:
        session = sessions[row["session_id"]]
        messages = session_messages(session, stickers)[: 2 * row["turn"] - 1]
        kept = [{"role": m["role"], "content": [(p["type"], p.get("text"), p.get("sticker_id")) for p in m["content"]]} for m in messages]  # fmt: skip
        found = [{"role": m["role"], "content": [(p["type"], p["text"], p["sticker_id"]) for p in m["content"]]} for m in row["messages"]]  # fmt: skip
        assert found == kept and found[-1]["role"] == "user"
        said = session.turns[row["turn"] - 1].system
        assert names(row["response"]) == said.model_dump()


def test_stickers_are_stored_once_and_whole(built, pack):
    source = StickerPack.load(pack)
    rows = load_dataset("stickerconv", "stickers", stickers=str(pack), split="train+test").cast_column("image", Image(decode=False))  # fmt: skip
    files = [pq.read_table(file) for file in sorted((built / "stickers").glob("*.parquet"))]
    for found in (rows.to_list(), [row for table in reversed(files) for row in table.to_pylist()]):
        assert sorted(row["id"] for row in found) == sorted(sticker.id for sticker in source.stickers)
        assert all(row["image"]["bytes"] == source.images[row["id"]] for row in found)
        assert all(row["database"] == source.databases[row["id"]] for row in found)
    held_out = {row["id"] for row in pq.read_table(built / "stickers" / "test-00000-of-00001.parquet").to_pylist()}
    assert held_out == {sticker.id for sticker in source.split("test")}


def test_a_built_folder_needs_no_builder(built, monkeypatch):
    monkeypatch.chdir(built.parent)
    for config in ("sessions", "turns"):
        assert load_dataset("stickerconv", config)["test"].to_list() == load_dataset(str(built), config, split="test").to_list()  # fmt: skip
    rows = load_dataset("stickerconv", split="validation")  # the folder comes before the shipped sessions
    assert rows.features == FEATURES["sessions"]
    assert [Session.model_validate(names(row)) for row in rows] == load_mini("validation")


def test_a_run_folder_is_read_where_it_lies(tmp_path, pack):
    lines = MINI.read_bytes().split(b"\n")[:3]
    (tmp_path / "sessions.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "journal.sqlite3").write_bytes(b"not ours")
    for source in ({"data_dir": str(tmp_path)}, {"data_files": [str(tmp_path / "sessions.jsonl")]}):
        rows = load_dataset("stickerconv", "sessions", split="train", stickers=str(pack), **source)
        assert rows["session_id"][:] == [json.loads(line)["session_id"] for line in lines]
    (tmp_path / "more.jsonl").write_bytes(
        next(line for line in MINI.read_bytes().split(b"\n")[3:] if b'"split": "train"' in line)
    )
    both = {"data_files": [str(tmp_path / name) for name in ("sessions.jsonl", "more.jsonl")], "num_proc": 2}
    assert load_dataset("stickerconv", "sessions", split="train", stickers=str(pack), **both).num_rows == 4
    assert load_dataset("stickerconv", "stickers", split="train+test", stickers=str(pack), **both).num_rows == 556
    with pytest.raises(ValueError, match="`mini` ships with the project"):
        load_dataset("stickerconv", "mini", data_dir=str(tmp_path))


def test_a_bad_row_of_a_run_folder_is_named_or_left_out(tmp_path, pack):
    (tmp_path / "sessions.jsonl").write_text(f"{json.dumps(SESSIONS[0])}\n{{broken\n{json.dumps(SESSIONS[1])}\n")
    with pytest.raises(DatasetGenerationError) as error:
        load_dataset("stickerconv", "turns", data_dir=str(tmp_path), stickers=str(pack))
    assert f"{tmp_path}/sessions.jsonl:2: not JSON" in str(error.value.__cause__)
    rows = load_dataset("stickerconv", "sessions", data_dir=str(tmp_path), stickers=str(pack), skip_bad=True)
    assert {split: part.num_rows for split, part in rows.items()} == {"train": 2}


def test_a_pack_that_was_split_again_is_read_again(tmp_path, pack):
    copy = StickerPack.load(pack)
    copy.save(tmp_path)
    options = {"stickers": str(tmp_path), "split": "train+test"}
    before = load_dataset("stickerconv", "stickers", **options)["database"][:]
    write_databases(tmp_path, {sticker_id: 11 - number for sticker_id, number in copy.databases.items()})
    after = load_dataset("stickerconv", "stickers", **options)
    assert max(before) == 10 and len(before) == len(after)
    assert dict(zip(after["id"], after["database"], strict=True)) == StickerPack.load(tmp_path).databases


def change(session: dict, path: str, value: object) -> dict:
    """`session` with the value at a path like `turns.0.system.text` changed, or left out if it is `...`."""
    session = json.loads(json.dumps(session))
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    place = session
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return session


def sticker(name: str) -> dict:
    return {"id": name, "emotion": "sadness", "query": "q", "rank": 0, "intention": "enhancing empathy"}


SESSIONS = [json.loads(line) for line in MINI.read_text("utf-8").split("\n")[:3]]  # of database 1
BAD = {
    "{broken": "not JSON (",
    json.dumps(change(SESSIONS[1], "turns.0.system", ...)): "turns.0.system: Field required.",
    json.dumps(change(SESSIONS[1], "turns.1.turn", 5)): "turns.1.turn: expected 2, got 5: the roles do not alternate.",
    json.dumps(change(SESSIONS[1], "turns.0.user.text", "")): "turns.0.user.text: String should have at least 1",
    json.dumps(change(SESSIONS[1], "turns.0.user.sticker", sticker("no-such"))): "turns.0.user.sticker.id: unknown sticker 'no-such'.",
    json.dumps(change(SESSIONS[1], "split", "test")): "split: database 1 of 10 is not for test.",
    json.dumps(change(SESSIONS[1], "database", 11)): "database: expected 1 to 10, got 11.",
    json.dumps(change(SESSIONS[1], "generator.seed", 2**63)): "generator.seed: Input should be less than 9223372036854775808.",
    json.dumps(change(SESSIONS[1], "profile.emotion", "Joy")): "profile.emotion: Input should be 'anger', 'disgust'",
    json.dumps(SESSIONS[0]): "session_id: 'mini-01-01' was there before.",
}  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD.items(), ids=[said[:30] for said in BAD.values()])
def test_a_bad_row_is_named_and_left_out_only_on_demand(line, said, tmp_path, pack):
    file = tmp_path / "sessions.jsonl"
    file.write_text("\n".join([json.dumps(SESSIONS[0]), "", line, json.dumps(SESSIONS[2])]), "utf-8")
    with pytest.raises(SessionError) as error:
        build_dataset([tmp_path], tmp_path / "out", stickers=str(pack))
    assert str(error.value).startswith(f"{file}:3: {said}") and not (tmp_path / "out").exists()
    info, bad = build_dataset([tmp_path], tmp_path / "out", stickers=str(pack), skip_bad=True)
    assert [text.startswith(f"{file}:3: {said}") for text in bad] == [True]
    assert info.sizes["sessions"]["train"].rows == 2 and info.left_out == 1
    assert not list(tmp_path.glob(".out*"))


def test_a_seed_may_have_64_bits(tmp_path, pack):
    (tmp_path / "sessions.jsonl").write_text(json.dumps(change(SESSIONS[0], "generator.seed", 2**63 - 1)))
    build_dataset([tmp_path], tmp_path / "out", stickers=str(pack))
    assert load_dataset(str(tmp_path / "out"), split="train")[0]["generator"]["seed"] == 2**63 - 1


def test_a_sticker_of_another_database_is_refused(tmp_path, pack):
    other = next(iter(StickerPack.load(pack).database(2))).id
    (tmp_path / "sessions.jsonl").write_text(json.dumps(change(SESSIONS[0], "turns.0.user.sticker", sticker(other))))
    with pytest.raises(SessionError, match=f":1: turns.0.user.sticker.id: '{other}' is not of database 1."):
        build_dataset([tmp_path], tmp_path / "out", stickers=str(pack))


def test_a_leak_fails_the_build_whatever_is_skipped(tmp_path, pack):
    unsplit = StickerPack.load(pack)
    StickerPack(unsplit.info, unsplit.stickers, unsplit.images).save(tmp_path / "unsplit")
    used = SESSIONS[0]["turns"][1]["system"]["sticker"]["id"]
    leaking = change(change(SESSIONS[1], "split", "test"), "turns.0.user.sticker", sticker(used))
    (tmp_path / "sessions.jsonl").write_text("\n".join(map(json.dumps, (SESSIONS[0], leaking))))
    with pytest.raises(SessionError, match=rf"stickers of the test split are used in training, e.g. .*{used}"):
        build_dataset([tmp_path], tmp_path / "out", stickers=str(tmp_path / "unsplit"), skip_bad=True)
    assert not (tmp_path / "out").exists()
    run = {"data_dir": str(tmp_path), "stickers": str(tmp_path / "unsplit")}
    with pytest.raises(SessionError, match="stickers of the test split are used in training"):
        load_dataset("stickerconv", "turns", **run)
    assert load_dataset("stickerconv", "stickers", **run).num_rows == {"train": 556}
    check = SplitCheck()
    check.used["train"], check.used["test"] = {"a"}, {"b"}
    check.check()


def test_a_folder_with_something_else_is_not_touched(built, pack, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SessionError, match="holds something else than a dataset"):
        build_dataset(["mini"], tmp_path, stickers=str(pack))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (built / "notes.txt").write_text("mine")
    before = (built / "turns" / "test-00000-of-00001.parquet").read_bytes()
    build_dataset(["mini"], built, stickers=str(pack))
    assert (built / "notes.txt").exists() and (built / "turns" / "test-00000-of-00001.parquet").read_bytes() == before


def released_line(*images: str | None) -> str:
    stickers = [
        i and {"image": f"/data/SER30K/Images/{i}", "description": "a cat", "emotion": "negative, sadness, maybe humor", "recommendation": "r"}
        for i in images
    ]  # fmt: skip
    turns = [
        {"turn": n, "user_message": "I lost my cat.", "system_message": "Oh no.", "user_sticker": None, "system_sticker": sticker}
        for n, sticker in enumerate(stickers, 1)
    ]  # fmt: skip
    return json.dumps({"conversation": turns, "user_persona": "You are kind.", "user_status": "Your cat is gone."})


@pytest.mark.parametrize("with_pictures", [True, False])
def test_the_released_stickerconv(tmp_path, pack, with_pictures):
    data, ser30k = tmp_path / "released", tmp_path / "SER30K"
    data.mkdir()
    (ser30k / "Images" / "pepe-7").mkdir(parents=True)
    picture = StickerPack.load(pack).images["parrot"]
    (ser30k / "Images" / "pepe-7" / "sticker_18.png").write_bytes(picture)
    (data / "train.json").write_text(
        "\n".join([released_line("pepe-7/sticker_18.png", None), released_line("cats/1.jpg")])
    )
    (data / "test.json").write_text(released_line("dogs/2.jpg"))
    info, _ = build_dataset([data], tmp_path / "out", images=str(ser30k) if with_pictures else None)
    assert {split: size.rows for split, size in info.sizes["turns"].items()} == {"train": 3, "test": 1}
    assert info.licences["the dialogues"] == "apache-2.0" and ("the stickers" in info.licences) == with_pictures
    session = names(load_dataset(str(tmp_path / "out"), split="train")[0])
    assert session["session_id"] == "train-1" and session["profile"]["situation"] == "Your cat is gone."
    assert session["profile"]["emotion"] is None and session["ended_by"] is None and session["no_sticker"] is False
    assert session["turns"][0]["system"]["sticker"] == {"id": "pepe-7-sticker-18", "emotion": "sadness", "query": None, "rank": None, "intention": None}  # fmt: skip
    rows = load_dataset(str(tmp_path / "out"), "stickers", split="train").cast_column("image", Image(decode=False))
    stickers = {row["id"]: row for row in rows}
    direct = load_dataset("stickerconv", "stickers", data_files=[str(data / "train.json")], images=str(ser30k) if with_pictures else None)  # fmt: skip
    assert direct["train"].cast_column("image", Image(decode=False)).to_list() == list(rows) and set(direct) == {
        "train"
    }
    assert stickers["cats-1"]["image"] is None and stickers["cats-1"]["description"] == "a cat"
    found = stickers["pepe-7-sticker-18"]
    assert (found["image"] or {}).get("bytes") == (picture if with_pictures else None)
    assert found["width"] == (32 if with_pictures else None) and found["theme"] == "pepe-7"


@pytest.fixture
def released(tmp_path):
    """Calls a build of released dialogues about one picture, with an SER30K tree that holds none that can be taken."""
    (tmp_path / "SER30K" / "Images" / "t").mkdir(parents=True)
    Pillow.new("RGB", (8, 8)).save(tmp_path / "SER30K" / "private.png")
    (tmp_path / "SER30K" / "Images" / "t" / "link.png").symlink_to("../../private.png")
    Pillow.new("RGB", (8, 8)).save(tmp_path / "SER30K" / "Images" / "t" / "odd.png", "TIFF")
    (tmp_path / "SER30K" / "Images" / "t" / "cut.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + bytes([0, 0, 0, 5]) + b"IHDR" + bytes(9)
    )

    def build(image, images=tmp_path / "SER30K", out=tmp_path / "out"):
        (tmp_path / "train.json").write_text(json.dumps({"conversation": [{"user_message": "hi", "system_message": image, "user_sticker": {"image": image}}]}))  # fmt: skip
        return build_dataset([tmp_path / "train.json"], out, images=str(images))

    return build


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("../private.png", "train.json: ../private.png: a picture outside "),
        ("t/odd.png", "train.json: .*/SER30K/Images/t/odd.png: no picture "),
        ("t/cut.png", "train.json: .*/SER30K/Images/t/cut.png: no picture "),
    ],
)
def test_only_pictures_inside_of_images_are_taken(released, image, said, tmp_path):
    with pytest.raises(SessionError, match=said):
        released(image)
    assert not (tmp_path / "out").exists()


def test_a_link_in_images_is_followed(released, tmp_path):
    """As in the Hub's cache, where each file is one."""
    released("t/link.png")
    row = pq.read_table(next((tmp_path / "out" / "stickers").glob("*.parquet"))).to_pylist()[0]
    assert row["image"]["bytes"] == (tmp_path / "SER30K" / "private.png").read_bytes()


def test_a_folder_of_images_that_is_not_there_is_named(released, tmp_path):
    with pytest.raises(SessionError, match="--images .*typo: no such folder"):
        released("t/1.png", images=tmp_path / "typo")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def cut_short(monkeypatch):
    """Calls a build that ends at a move of a file, the first is 1; if it is killed, it does not even clean up."""
    rename = Path.rename

    def cut(build, move, killed):
        moves = count(1)

        def ends(self, target):
            if next(moves) == move:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", ends)
            if killed:
                patch.setattr("dataset_builders.stickerconv.build._clear", lambda built: None)
            build()

    return cut


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("move", [1, 2, 4, 6, 7, 9, 10, 11])
def test_a_build_that_is_cut_short_leaves_the_one_before(released, cut_short, killed, move, tmp_path):
    out = tmp_path / "out"
    released("t/1.png")
    (out / "README.md").write_text(f"{(out / 'README.md').read_text().partition('<!--')[0]}Mine.")
    before = files_in(out)
    cut_short(lambda: released("t/2.png"), move, killed)
    if killed:
        assert list(out.glob(".pegs-build.*/old"))
        with pytest.raises(SessionError, match="no such folder"):
            released("t/2.png", images=tmp_path / "typo")
    assert files_in(out) == before
    released("t/2.png")
    assert "Mine." in (out / "README.md").read_text() and not list(out.glob(".*"))
    assert load_dataset(str(out), "turns", split="train")[0]["response"]["text"] == "t/2.png"


@pytest.mark.parametrize("move", [1, 3, 6])
def test_a_first_build_that_is_killed_is_begun_anew(released, cut_short, move, tmp_path):
    cut_short(lambda: released("t/1.png"), move, killed=True)
    released("t/1.png")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sessions", "turns", "stickers", "README.md", "dataset.yaml"}  # fmt: skip


def test_a_build_writes_inside_its_folder_alone(tmp_path, pack):
    """The folder may be a disk of its own."""
    (tmp_path / "disk").mkdir()
    beside = lambda rows: [path.name for path in tmp_path.iterdir()] == ["disk"] or pytest.fail("written beside")  # noqa: E731
    build_dataset(["mini"], tmp_path / "disk", stickers=str(pack), on_row=beside)


def test_what_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "c_test.json").write_text('{"dialogue 1": ' + "[" * 100_000)
    with pytest.raises(SessionError, match="c_test.json: not JSON .maximum recursion depth"):
        build_dataset([tmp_path / "c_test.json"], tmp_path / "out")
    (tmp_path / "dataset.yaml").write_text("[" * 3000)
    with pytest.raises(SessionError, match="dataset.yaml: not YAML .maximum recursion depth"):
        DatasetFolder.load(tmp_path)


def test_mod(tmp_path):
    def say(speaker: int, text: str | None, **more):
        return {"speaker_id": f"[speaker{speaker}]"} | ({"txt": text} if text else {}) | more

    dialogues = {
        "dialogue 1": [say(1, "hi", emotion_id=5, img_id="030"), say(2, None, img_id="107"), say(1, "bye")],
        "dialogue 2": [say(1, "hi"), say(1, "anybody?"), say(2, "no")],
    }
    (tmp_path / "c_train.json").write_text(json.dumps(dialogues, indent=1))
    with pytest.raises(
        SessionError, match=r"c_train.json: dialogue 2: 1: \[speaker1\] speaks again: the roles do not"
    ):
        build_dataset([tmp_path / "c_train.json"], tmp_path / "out")
    info, bad = build_dataset([tmp_path / "c_train.json"], tmp_path / "out", skip_bad=True)
    assert len(bad) == 1 and info.language == "zh" and "not to be distributed" in info.licences["the dialogues"]
    (turn,) = load_dataset(str(tmp_path / "out"), "turns", split="train")
    assert [part["sticker_id"] for part in turn["messages"][0]["content"]] == [None, "mod-030"]
    assert turn["response"]["text"] == "" and turn["response"]["sticker"]["id"] == "mod-107"


@pytest.mark.parametrize(
    ("label", "emotion"),
    [("Joy", "happiness"), ("  SADNESS ", "sadness"), (1, "anger"), ("7", "surprise"), (9, None), ("mixed feelings", None), (None, None), ("mostly negative, angry", "anger")],
)  # fmt: skip
def test_labels_are_normalised(label, emotion):
    assert normalise_label(label) == emotion


def test_sources_are_told_apart(tmp_path):
    assert find_sources(["mini"]) == [Source(MINI, "sessions")]
    (tmp_path / "train.json").write_text(released_line("a/b.jpg"))
    with pytest.raises(SessionError, match="expected one format, found released and sessions"):
        find_sources(["mini", tmp_path])
    with pytest.raises(SessionError, match="no-such: no such folder or file."):
        find_sources([tmp_path / "no-such"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SessionError, match="has neither a sessions.jsonl"):
        find_sources([tmp_path / "empty"])
    with pytest.raises(SessionError, match="expected a name that tells the split"):
        split_of_file(Path("data.json"))
    with pytest.raises(SessionError, match=r"no dataset, it has no dataset.yaml"):
        DatasetFolder.load(tmp_path)


@given(st.lists(st.text(alphabet="ab\u2028é", max_size=5), max_size=12), st.integers(1, 9))
def test_every_line_is_in_one_shard(tmp_path_factory, lines, parts):
    file = tmp_path_factory.mktemp("lines") / "f.jsonl"
    file.write_text("\n".join(lines), "utf-8")
    shards = split_into_shards([Source(file, "sessions")], parts)
    found = [(number, line.decode().rstrip("\n")) for shard in shards for number, line in read_lines(shard)]
    assert found == [(number, line) for number, line in enumerate(lines, 1) if line.encode().strip()]
