"""A pack from somebody's pictures to a messenger, as its user does it; no endpoint, the embedded model annotates."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack
from pegs.cli_stickers import stickers_build
from pegs.errors import InputError


PEGS = str(Path(sys.executable).with_name("pegs"))


def stickers(*args):
    return subprocess.run([PEGS, "stickers", *map(str, args)], capture_output=True, text=True, timeout=300)


def result(*args):
    done = stickers(*args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Drawings without their texts, as a stranger's pictures would come."""
    folder = tmp_path_factory.mktemp("stickers")
    wanted = [row for row in openmoji.load_annotations() if row["emotion"] in ("anger", "happiness")][::8]
    with zipfile.ZipFile(folder / "mine.zip", "w") as archive:
        for row in wanted:
            archive.write(openmoji.svg_folder() / f"{row['hexcode']}.svg", f"{row['name']}.svg")
        archive.writestr("notes.png", b"no picture")
    built = result(
        "build",
        folder / "mine.zip",
        "--out",
        folder / "pack",
        "--licence",
        "CC-BY-SA-4.0",
        "--attribution",
        "OpenMoji",
    )
    assert built["stickers"] == len(wanted) and built["name"] == "mine" and built["licence"] == "CC-BY-SA-4.0"
    assert built["skipped"] == [{"file": "notes.png", "reason": "not a PNG, JPEG, WebP, GIF or SVG picture"}]
    early = stickers("split", "--pack", folder / "pack", "--databases", 2)
    assert early.returncode == 2 and "have no emotion; annotate the pack first" in early.stderr
    annotated = result("annotate", "--pack", folder / "pack")
    assert annotated["annotated"] == len(wanted)
    return folder / "pack"


def test_the_embedded_model_annotates_what_it_has_seen(pack):
    truth = {row["name"].replace(" ", "-").lower(): row["emotion"] for row in openmoji.load_annotations()}
    made = StickerPack.load(pack).stickers
    assert all(s.annotated_by == "local" and s.emotion in EMOTIONS and s.recommendation for s in made)
    known = [s for s in made if s.id in truth]
    assert len(known) > 10 and sum(s.emotion == truth[s.id] for s in known) >= 0.6 * len(known)


def test_split_search_export_and_show(pack, tmp_path):
    count = len(StickerPack.load(pack).stickers)
    assert result("split", "--pack", pack, "--databases", 4)["stickers"] == count
    split = StickerPack.load(pack)
    sizes = [len(split.database(number)) for number in (1, 2, 3, 4)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count
    hits = result("search", "angry", "--pack", pack, "-k", 3)["hits"]
    assert len(hits) == 3 and set(hits[0]) == {"id", "score", "matched", "emotion", "description"}
    assert result("search", "angry", "--pack", pack, "--emotion", "happiness")["hits"][0]["emotion"] == "happiness"
    shown = stickers("search", "angry", "--pack", pack, "-k", 2)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 2
    exported = result("export", "--pack", pack, "--to", "whatsapp", "--out", tmp_path / "out")
    assert exported["stickers"] == count and all(Path(file).is_file() for file in exported["files"])
    sheet = str(tmp_path / "sheet.png")
    assert result("show", "--stickers", pack, "--out", sheet) == {"stickers": count, "out": sheet}


@pytest.fixture(scope="module")
def bitmaps(pack):
    """A pack with pictures in a format that stickers do not have."""
    good, bitmap = StickerPack.load(pack), io.BytesIO()
    Image.new("RGB", (9, 9)).save(bitmap, "BMP")
    folder = pack.parent / "bitmaps"
    StickerPack(good.info, good.stickers, dict.fromkeys(good.by_id, bitmap.getvalue())).save(folder)
    return folder


@pytest.mark.parametrize("source", ["openmoji", "{tmp}"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, source):
    (tmp_path / "a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>')
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"^resvg_py is not installed: pip install 'stickerconv\[chat,stickers\]'.$"):
        stickers_build(source.format(tmp=tmp_path), tmp_path / "pack")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("build", "{tmp}/none", "--out", "{tmp}/x"), "{tmp}/none: no such folder or file"),
        (("build", "{notes}", "--out", "{tmp}/x"), "{notes}: contents.json: sticker_packs.0.name: Input should be a valid string"),
        (("search", "hi", "--pack", "{tmp}"), "{tmp} is not a sticker pack: it has no pack.yaml."),
        (("search", "hi", "--pack", "{pack}", "--emotion", "glee"), "--emotion glee: must be one of anger,"),
        (("search", "hi", "--pack", "{pack}", "--encoder", "{pack}"), "--encoder {pack}: "),
        (("build", "{pack}", "--out", "{pack}/pack.yaml"), "--out {pack}/pack.yaml: {pack}/pack.yaml is a file, not a folder."),
        (("build", "openmoji", "--out", "{pack}/pack.yaml/x"), "--out {pack}/pack.yaml/x: {pack}/pack.yaml is a file, not a folder."),
        (("show", "--stickers", "{pack}", "--out", "{tmp}/sheet"), "--out {tmp}/sheet: expected a PNG file"),
        (("show", "--stickers", "{pack}", "--out", "{tmp}/none/sheet.png"), "--out {tmp}/none/sheet.png: expected a PNG file"),
        (("show", "--stickers", "../typo", "--out", "{tmp}/x.png"), "--stickers ../typo: ../typo is not a sticker pack"),
        (("show", "--stickers", "a--b/c", "--out", "{tmp}/x.png"), "--stickers a--b/c: Cannot have -- or .. in repo_id"),
        (("split", "--pack", "{pack}", "--databases", "0"), "--databases 0: must be from 1 to"),
        (("filter", "--pack", "{pack}", "--out", "{pack}/pack.yaml", "--llm", "http://127.0.0.1:9/v1", "--model", "m"), "--out {pack}/pack.yaml: {pack}/pack.yaml is a file, not a folder."),
        (("annotate", "--pack", "{pack}", "--out", "{pack}/pack.yaml"), "--out {pack}/pack.yaml: {pack}/pack.yaml is a file, not a folder."),
        (("show", "--stickers", "{bitmaps}", "--out", "{tmp}/x.png"), "the pack mine: sticker "),
        (("annotate", "--pack", "{pack}", "--llm", "http://127.0.0.1:9/v1"), "--model is needed with --llm"),
        (("annotate", "--pack", "{pack}", "--llm", "http://127.0.0.1:9/v1", "--model", "m", "--budget-usd", "1"), "--budget-usd needs --price-in"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(pack, bitmaps, tmp_path, args, said):
    places = {"tmp": tmp_path, "pack": pack, "bitmaps": bitmaps, "notes": pack.parent / "notes"}
    places["notes"].mkdir(exist_ok=True)
    (places["notes"] / "contents.json").write_text('{"sticker_packs": [{"name": 7}]}')
    done = stickers(*(arg.format(**places) for arg in args))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and said.format(**places) in done.stderr


def test_a_closed_licence_needs_a_word(pack, tmp_path):
    closed = StickerPack.load(pack)
    closed.info = closed.info.model_copy(update={"licence": "unknown"})
    closed.save(tmp_path / "closed")
    command = ("export", "--pack", tmp_path / "closed", "--to", "whatsapp", "--out", tmp_path / "out")
    refused = stickers(*command)
    assert refused.returncode == 2 and "--i-have-rights" in refused.stderr and not (tmp_path / "out").exists()
    assert stickers(*command, "--i-have-rights").returncode == 0
