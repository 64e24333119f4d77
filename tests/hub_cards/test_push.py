"""Up to a Hub and down again, in fresh processes, on a loopback Hub."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_builders.stickerconv.build import build_dataset
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack
from tests.fixtures.hub import Hub


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    openmoji.build_pack(size=64).save(folder)
    return folder


ALONE = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
for name in ("modeling_pegs", "pipelines", "dataset_builders", "agent_generation", "hub_cards", "pegs"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} can be imported here, so this proves nothing")
"""  # at the head of a script that must not need this package


def run(hub, home, code, *args, check=True, cwd=None):
    """Run Python with that Hub and an empty cache; without `cwd` the project is importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment(home)
    env |= {"PYTHONPATH": str(ROOT)} if cwd is None else {}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, cwd=cwd or ROOT, timeout=300
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


PUSH = "import sys; from pathlib import Path; from hub_cards.push import push_sticker_pack as p; print(p(Path(sys.argv[1]), sys.argv[2]))"


DOWN = """
import hashlib, json
from datasets import Image, load_dataset
rows = load_dataset("tester/openmoji", "stickers", split="train")
assert rows.features["image"] == Image() and rows[0]["image"].size == (64, 64) and rows[0]["emotion"] == "anger"
stream = load_dataset("tester/openmoji", split="train", streaming=True)
found = [{row["id"]: hashlib.sha256(row["image"]["bytes"]).hexdigest() for row in some.cast_column("image", Image(decode=False))} for some in (rows, stream)]
databases = load_dataset("tester/openmoji", "databases", split="train")
print(json.dumps([*found, dict(zip(databases["id"], databases["database"]))]))
"""


def test_a_pack_goes_up_and_is_read_without_our_code(hub, pack, tmp_path):
    url = run(hub, tmp_path / "up", PUSH, pack, "tester/openmoji").stdout
    assert "/datasets/tester/openmoji/commit/" in url
    files = hub.files("datasets", "tester/openmoji")
    assert set(files) >= {"README.md", "pack.yaml", "stickers.parquet", "databases.parquet", "assets/sheet.png"}
    card = files["README.md"].decode()
    assert "license: cc-by-sa-4.0" in card and "556 stickers" in card and "OpenMoji (https://openmoji.org)" in card
    assert "Limits and ethics" in card and "manipulate" in card and "NSFW" in card
    done = run(hub, tmp_path / "down", ALONE + DOWN, cwd=tmp_path)
    source = StickerPack.load(pack)
    pictures = {sticker.id: hashlib.sha256(source.images[sticker.id]).hexdigest() for sticker in source.stickers}
    assert json.loads(done.stdout.splitlines()[-1]) == [pictures, pictures, source.databases]


def test_a_card_that_somebody_wrote_goes_up_as_it_is(hub, pack, tmp_path):
    built, mine = tmp_path / "built", "---\nlicense: cc-by-sa-4.0\n---\nWritten by Ines."
    StickerPack.load(pack).save(tmp_path / "pack")
    build_dataset(["mini"], built, stickers=str(pack))
    for folder, repo in ((tmp_path / "pack", "tester/own-pack"), (built, "tester/own-dataset")):
        (folder / "README.md").write_text(mine)
        run(hub, tmp_path / "up", PUSH.replace("push_sticker_pack as p", "push_folder as p"), folder, repo)
        assert hub.files("datasets", repo)["README.md"].decode() == mine == (folder / "README.md").read_text()


def test_a_push_that_changes_nothing_makes_no_commit_and_keeps_its_tag(hub, pack, tmp_path):
    tagged = PUSH.replace("push_sticker_pack as p", "push_folder as p").replace("argv[2])", "argv[2], tag='v1')")
    commits = {run(hub, tmp_path / "up", tagged, pack, "tester/twice").stdout for _ in range(2)}
    assert len(commits) == 1 and len(hub.repos["datasets", "tester/twice"]) == 2  # the first made the repository
    changed = StickerPack.load(pack)
    changed.info = changed.info.model_copy(update={"version": "another"})
    changed.save(tmp_path / "changed")
    moved = run(hub, tmp_path / "up", tagged, tmp_path / "changed", "tester/twice", check=False)
    assert "409" in moved.stderr, "a tag that names another commit must not be taken for this one"


def test_a_pack_is_opened_by_its_hub_id(hub, pack, tmp_path):
    run(hub, tmp_path / "up", PUSH, pack, "tester/again")
    code = "from pegs.places import load_pack; p = load_pack('tester/again'); print(len(p.stickers), p.num_databases)"
    assert run(hub, tmp_path / "down", code).stdout.split() == ["556", "10"]


def test_a_closed_licence_is_not_published(hub, pack, tmp_path):
    closed = StickerPack.load(pack)
    closed.info = closed.info.model_copy(update={"licence": "all rights reserved"})
    closed.save(tmp_path / "closed")
    done = run(hub, tmp_path / "up", PUSH, tmp_path / "closed", "tester/closed", check=False)
    assert "LicenceError" in done.stderr and ("datasets", "tester/closed") not in hub.repos


def test_a_pack_that_goes_up_again_leaves_nothing_there_that_it_lacks(hub, pack, tmp_path):
    run(hub, tmp_path / "up", PUSH, pack, "tester/changed")
    changed = StickerPack.load(pack)
    StickerPack(changed.info, changed.stickers, changed.images).save(tmp_path / "changed")
    run(hub, tmp_path / "up", PUSH, tmp_path / "changed", "tester/changed")
    files = set(hub.files("datasets", "tester/changed"))
    assert files == {".gitattributes", "README.md", "assets/sheet.png", "pack.yaml", "stickers.parquet"}
    assert len(hub.repos["datasets", "tester/changed"]) == 3


FIND = """
import numpy as np
from pegs.agent_tools import load_toolbox

class Encoder:
    name = "made up"
    def __call__(self, texts):
        print("embedded")
        return np.ones((len(texts), 4), np.float32)

for _ in range(2):
    load_toolbox("tester/found", Encoder())
"""


def test_vectors_of_a_pack_from_the_hub_are_kept_out_of_its_cache(hub, pack, tmp_path):
    run(hub, tmp_path / "up", PUSH, pack, "tester/found")
    home = tmp_path / "down"
    assert run(hub, home, FIND).stdout.split() == ["embedded"] * 3  # a pack's 2,224 texts, once
    (kept,) = home.rglob("embeddings.safetensors")
    assert kept.is_relative_to(home / "stickerconv" / "vectors")


AGAIN = """
from pathlib import Path
from hub_cards.checkpoints import CardOptions
from hub_cards.push import push_folder
for repo, licence in (("tester/one", "bsd-3-clause"), ("tester/one", ""), ("tester/two", "mit")):
    print(push_folder(Path(sys.argv[1]), repo, options=CardOptions(licence)))
"""


def test_a_push_makes_our_own_card_anew_for_its_address_and_options(hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    urls = run(hub, tmp_path / "up", f"import sys{AGAIN}", folder).stdout.split()
    assert urls[0] == urls[1], "nothing was told anew"
    cards = [hub.files("models", f"tester/{name}")["README.md"].decode() for name in ("one", "two")]
    for card, repo, licence in zip(cards, ("tester/one", "tester/two"), ("bsd-3-clause", "mit"), strict=True):
        assert f'from_pretrained("{repo}"' in card and f"\nlicense: {licence}\n" in card
