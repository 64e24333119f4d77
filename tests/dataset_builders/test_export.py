import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset_builders.schema import Sticker
from dataset_builders.stickers.build import build_from_source
from dataset_builders.stickers.export import LicenceError, check_licence, emoji_of, export_telegram, export_whatsapp
from dataset_builders.stickers.pack import StickerPack


def noise(side, seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (side, side // 2, 4), dtype=np.uint8))


def disc(shift):
    y, x = np.mgrid[:300, :200]
    pixels = np.zeros((300, 200, 4), np.uint8)
    pixels[(x - 60 - shift) ** 2 + (y - 150) ** 2 < 3000] = (200, 40, 90, 255)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "in").mkdir()
    for i in range(34):
        noise(512, i).save(folder / "in" / f"{i:02}.png") if i < 2 else disc(i).save(folder / "in" / f"{i:02}.png")
    for i in range(3):
        frames = [disc(i + 4 * j) for j in range(50)]
        frames[0].save(folder / "in" / f"m{i}.webp", save_all=True, append_images=frames[1:], duration=100, loop=0)
    info = {"name": "discs", "licence": "CC BY-SA 4.0", "attribution": "Discs by Ana"}
    build_from_source(str(folder / "in"), folder / "pack", info)
    return StickerPack.load(folder / "pack")


def members(file):
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_whatsapp(pack, tmp_path):
    done = export_whatsapp(pack, tmp_path)
    assert done.stickers == 37 and not done.skipped and len(done.files) == 3
    kinds = []
    for file in done.files:
        inside = members(file)
        stickers = {name: data for name, data in inside.items() if name.endswith(".webp")}
        assert 3 <= len(stickers) <= 30
        animated = set()
        for name, data in stickers.items():
            image = Image.open(io.BytesIO(data))
            assert image.format == "WEBP" and image.size == (512, 512), name
            animated.add(image.n_frames > 1)
            assert len(data) <= (500 if image.n_frames > 1 else 100) * 1024, name
        assert len(animated) == 1
        kinds.append(animated.pop())
        tray = Image.open(io.BytesIO(inside["tray.png"]))
        assert tray.size == (96, 96) and len(inside["tray.png"]) <= 50 * 1024
        assert b"Discs by Ana" in inside["ATTRIBUTION.txt"] and b"CC BY-SA 4.0" in inside["ATTRIBUTION.txt"]
        assert set(json.loads(inside["emoji.txt"])) == set(stickers) and inside["title.txt"].startswith(b"discs")
    assert sorted(kinds) == [False, False, True]


def test_whatsapp_archives_come_back_as_packs(pack, tmp_path):
    done = export_whatsapp(pack, tmp_path)
    result = build_from_source(str(done.files[-1]), tmp_path / "again")
    again = StickerPack.load(tmp_path / "again")
    assert result.stickers == 3 and not result.skipped and all(s.animated for s in again.stickers)
    assert again.info.attribution == "Discs by Ana"


def test_stickers_that_cannot_be_read_are_told(pack, tmp_path):
    still, moving = pack.stickers[0].id, pack.stickers[-1].id
    bitmap = io.BytesIO()
    Image.new("RGB", (9, 9)).save(bitmap, "BMP")
    done = export_whatsapp(
        StickerPack(pack.info, pack.stickers[:5], {**pack.images, still: bitmap.getvalue()}), tmp_path
    )
    assert done.stickers == 4 and [name for name, _ in done.skipped] == [still]
    done = export_telegram(StickerPack(pack.info, pack.stickers[-1:], {moving: bitmap.getvalue()}), tmp_path)
    assert done.skipped == [(moving, "not a PNG, JPEG, WebP, GIF or SVG picture")]


@pytest.mark.parametrize("export", [export_telegram, export_whatsapp])
def test_a_packs_name_leads_nowhere(pack, tmp_path, export):
    named = StickerPack(pack.info.model_copy(update={"name": "../../My escaped"}), pack.stickers[2:5], pack.images)
    done = export(named, tmp_path / "deep" / "er" / "out")
    (file,) = done.files
    assert file.parent == tmp_path / "deep" / "er" / "out" and file.name.startswith("my-escaped-")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize("export", [export_telegram, export_whatsapp])
def test_an_id_leads_nowhere(pack, tmp_path, export):
    ids = ("../../evil", "/evil", "C:\\evil")
    stickers = [sticker.model_copy(update={"id": name}) for sticker, name in zip(pack.stickers[2:5], ids, strict=True)]
    images = {name: pack.images[sticker.id] for sticker, name in zip(pack.stickers[2:5], ids, strict=True)}
    (file,) = export(StickerPack(pack.info, stickers, images), tmp_path).files
    assert {name for name in members(file) if name.endswith(".webp")} == {"evil.webp", "evil-2.webp", "c-evil.webp"}


def test_telegram(pack, tmp_path):
    av = pytest.importorskip("av")
    done = export_telegram(pack, tmp_path)
    assert done.stickers == 37 and len(done.files) == 1
    inside = members(done.files[0])
    emoji = json.loads(inside["emoji.json"])
    assert len(emoji) == 37 and set(emoji) < set(inside) and "ATTRIBUTION.txt" in inside
    for name in emoji:
        if name.endswith(".webp"):
            assert max(Image.open(io.BytesIO(inside[name])).size) == 512 and len(inside[name]) <= 512 * 1024
        else:
            assert len(inside[name]) <= 256 * 1024
            with av.open(io.BytesIO(inside[name])) as video:
                stream = video.streams.video[0]
                assert (stream.codec_context.name, max(stream.width, stream.height)) in {("vp9", 512), ("libvpx-vp9", 512)}  # fmt: skip
                assert video.duration / av.time_base <= 3.05 and not video.streams.audio
    assert sum(name.endswith(".webm") for name in emoji) == 3


@pytest.mark.parametrize("licence", ["CC0-1.0", "CC-BY-SA-4.0", "cc by 4.0", "MIT", "Apache-2.0", "CC-BY-NC-SA-4.0"])
def test_free_licences(pack, licence):
    check_licence(StickerPack(pack.info.model_copy(update={"licence": licence}), pack.stickers, pack.images), False)


@pytest.mark.parametrize(
    "licence", ["unknown", "", "all rights reserved", "CC-BY-ND-4.0", "CC BY-NC-ND 4.0", "mitigated"]
)
def test_other_licences_need_a_word(pack, licence, tmp_path):
    closed = StickerPack(pack.info.model_copy(update={"licence": licence}), pack.stickers, pack.images)
    for export in (export_telegram, export_whatsapp):
        with pytest.raises(LicenceError, match="the licence of the pack is"):
            export(closed, tmp_path)
    assert not list(tmp_path.iterdir())
    check_licence(closed, True)


def test_one_closed_sticker_closes_the_pack(pack):
    stickers = [pack.stickers[0].model_copy(update={"licence": "© Kim"}), *pack.stickers[1:]]
    with pytest.raises(LicenceError, match=f"sticker {stickers[0].id} is '© Kim'"):
        check_licence(StickerPack(pack.info, stickers, pack.images), False)


def test_emoji_are_named_by_tags_or_felt():
    fields = {"image_path": "x", "width": 1, "height": 1, "sha256": "0"}
    assert emoji_of(Sticker(id="a", tags=("my cat", "red heart"), **fields)) == "❤️"
    assert emoji_of(Sticker(id="a", emotion="sadness", tags=("my cat",), **fields)) == "😢"
    assert emoji_of(Sticker(id="a", **fields)) == "🙂"
