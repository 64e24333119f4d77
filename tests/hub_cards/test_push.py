"""Up to a Hub and down again, in fresh processes, on a loopback Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
for name in ("modeling_pegs", "pipelines", "dataset_builders", "hub_cards", "pegs"):
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


def test_a_pack_goes_up_and_is_read_without_our_code(hub, pack, tmp_path):
    url = run(hub, tmp_path / "up", PUSH, pack, "tester/openmoji").stdout
    assert "/datasets/tester/openmoji/commit/" in url
    files = hub.files("datasets", "tester/openmoji")
    assert set(files) >= {"README.md", "pack.yaml", "stickers.parquet", "databases.parquet", "assets/sheet.png"}
    card = files["README.md"].decode()
    assert "license: cc-by-sa-4.0" in card and "556 stickers" in card and "OpenMoji (https://openmoji.org)" in card
    code = (
        "from datasets import load_dataset, Image\n"
        "d = load_dataset('tester/openmoji', 'stickers', split='train')\n"
        "assert d.features['image'] == Image() and len(d) == 556\n"
        "print(d[0]['image'].size, d[0]['emotion'], len(load_dataset('tester/openmoji', 'databases', split='train')))\n"
        "print({row['image'].mode for row in load_dataset('tester/openmoji', split='train', streaming=True)})\n"
    )
    done = run(hub, tmp_path / "down", code, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["(64, 64) anger 556", "{'RGBA'}"]


def test_a_pack_is_opened_by_its_hub_id(hub, pack, tmp_path):
    run(hub, tmp_path / "up", PUSH, pack, "tester/again")
    code = (
        "from pegs.assemble import load_pack; p = load_pack('tester/again'); print(len(p.stickers), p.num_databases)"
    )
    assert run(hub, tmp_path / "down", code).stdout.split() == ["556", "10"]


def test_a_closed_licence_is_not_published(hub, pack, tmp_path):
    closed = StickerPack.load(pack)
    closed.info = closed.info.model_copy(update={"licence": "all rights reserved"})
    closed.save(tmp_path / "closed")
    done = run(hub, tmp_path / "up", PUSH, tmp_path / "closed", "tester/closed", check=False)
    assert "LicenceError" in done.stderr and ("datasets", "tester/closed") not in hub.repos
