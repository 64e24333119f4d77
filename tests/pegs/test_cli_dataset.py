"""`pegs dataset`, `pegs push` and `pegs card` as their users call them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_builders.stickerconv.sessions import MINI
from dataset_builders.stickers import openmoji


PEGS = str(Path(sys.executable).with_name("pegs"))
LINES = MINI.read_text("utf-8").split("\n")


def pegs(*args):
    return subprocess.run([PEGS, *map(str, args)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A pack, a run with a bad line, and a dataset built from the mini sessions."""
    folder = tmp_path_factory.mktemp("work")
    openmoji.build_pack(size=32).save(folder / "pack")
    (folder / "run").mkdir()
    (folder / "run" / "sessions.jsonl").write_text("\n".join([LINES[0], '{"session_id": 3}', LINES[1]]), "utf-8")
    for name, file, text in (("broken", "dataset.yaml", "a: ["), ("own", "README.md", "Mine.")):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    built = pegs("dataset", "build", "mini", "--stickers", folder / "pack", "--out", folder / "stickerconv", "--json")
    assert built.returncode == 0, built.stderr
    rows = json.loads(built.stdout)["rows"]
    assert rows["sessions"].keys() == {"train", "validation", "test"} and sum(rows["stickers"].values()) == 556
    assert rows["turns"]["train"] > 3 * rows["sessions"]["train"]
    shutil.copytree(folder / "stickerconv", folder / "damaged")
    with (folder / "damaged" / "sessions" / "train-00000-of-00001.parquet").open("r+b") as file:
        file.seek(4)
        file.write(bytes(60))
    return folder


def test_a_bad_row_is_told_and_left_out_on_demand(work, tmp_path):
    command = ("dataset", "build", work / "run", "--stickers", work / "pack", "--out", tmp_path / "out")
    refused = pegs(*command)
    assert refused.returncode == 2 and refused.stdout == "" and not (tmp_path / "out").exists()
    assert refused.stderr.strip().splitlines()[0].startswith(f"pegs: {work}/run/sessions.jsonl:2: ")
    done = pegs(*command, "--skip-bad", "--licence", "CC0-1.0")
    assert done.returncode == 0 and "left out" in done.stderr and "sessions.jsonl:2: " in done.stderr
    assert done.stdout.splitlines() == ["sessions: 2 train", f"turns: {sum(len(json.loads(line)['turns']) for line in LINES[:2])} train", "stickers: 446 train, 110 test"]  # fmt: skip


def test_stats_tell_table_5_and_fill_the_card(work):
    done = pegs("dataset", "stats", work / "stickerconv", "--json")
    assert done.returncode == 0, done.stderr
    statistics = json.loads(done.stdout)
    assert statistics == json.loads((work / "stickerconv" / "statistics.json").read_text("utf-8"))
    assert statistics["tokenizer"] == "pegs-mini"
    assert all(row["words"] < row["tokens"] < 2 * row["words"] for row in statistics["table_5"].values())
    card = (work / "stickerconv" / "README.md").read_text("utf-8")
    train = statistics["table_5"]["train"]
    assert f"| train | {train['sessions']:,} | {train['unique_stickers']:,} | {train['turns']:,} |" in card
    for name in statistics["figures"]:
        assert f"](assets/{name}.png)" in card and (work / "stickerconv" / "assets" / f"{name}.svg").is_file()
    assert "cc-by-sa-4.0" in card and "OpenMoji" in card and "manipulate" in card
    done = pegs("card", work / "stickerconv", "--id", "ines/sc", "--json")
    assert json.loads(done.stdout) == {"card": str(work / "stickerconv" / "README.md")}
    assert 'load_dataset("ines/sc", "turns"' in (work / "stickerconv" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("dataset", "build", "{tmp}/none", "--out", "{tmp}/x"), "{tmp}/none: no such folder or file."),
        (("dataset", "build", "mini", "--stickers", "{tmp}", "--out", "{tmp}/x"), "{tmp} is not a sticker pack: it has no pack.yaml."),
        (("dataset", "build", "mini", "--out", "{work}/pack"), "{work}/pack: holds something else than a dataset"),
        (("dataset", "build", "mini", "--stickers", "./typo", "--out", "{tmp}/x"), "typo is not a sticker pack: it has no pack.yaml."),
        (("dataset", "build", "mini", "--out", "{work}/run/sessions.jsonl/x"), "--out {work}/run/sessions.jsonl/x: {work}/run/sessions.jsonl is a file, not a folder."),
        (("dataset", "build", "mini", "--images", "{tmp}/typo", "--out", "{tmp}/x"), "--images {tmp}/typo: no such folder."),
        (("dataset", "stats", "{tmp}"), "{tmp}: no dataset, it has no dataset.yaml"),
        (("dataset", "stats", "{work}/damaged"), "{work}/damaged/sessions/train-00000-of-00001.parquet: "),
        (("dataset", "stats", "{work}/stickerconv", "--tokenizer", "{tmp}"), "--tokenizer {tmp}: "),
        (("dataset", "push", "{work}/pack", "ines/x"), "{work}/pack: no dataset, it has no dataset.yaml"),
        (("dataset", "push", "{work}/stickerconv", "no good/name"), "no good/name"),
        (("push", "{tmp}", "ines/x"), "{tmp}: expected one of dataset.yaml, pack.yaml"),
        (("push", "{work}/broken", "ines/x"), "{work}/broken/dataset.yaml: not YAML (while parsing a flow node)."),
        (("card", "{work}/own", "--space", "ines/pegs"), "{work}/own/README.md: somebody wrote this card"),
        (("card", "{work}/pack"), "{work}/pack: the card of a pack is written with it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(work, tmp_path, args, said):
    done = pegs(*(arg.format(tmp=tmp_path, work=work) for arg in args))
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and said.format(tmp=tmp_path, work=work) in done.stderr


def test_a_push_without_a_network_is_one_line(work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = pegs("push", work / "pack", "ines/x")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("pegs: ines/x: ") and "HF_HUB_OFFLINE" in line


def test_a_space_is_written(tmp_path):
    done = pegs("card", tmp_path / "space", "--space", "ines/pegs", "--variant", "rag")
    assert done.returncode == 0 and done.stdout.strip() == f"{tmp_path}/space/README.md"
    assert {file.name for file in (tmp_path / "space").iterdir()} == {"app.py", "README.md", "requirements.txt"}
