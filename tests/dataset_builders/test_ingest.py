import gzip
import io
import json
import random
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dataset_builders.stickers.build import build_from_source
from dataset_builders.stickers.exports import emoji_names, render_tgs
from dataset_builders.stickers.folder import SourceError
from dataset_builders.stickers.images import (
    SIDE,
    BadImage,
    encode_animation,
    read_picture,
    render_svg,
    representative_frame,
    whiten_background,
)
from dataset_builders.stickers.ingest import unique_id
from dataset_builders.stickers.pack import PackError, StickerPack


ROOT = Path(__file__).parents[2]


def drawing(width, height, seed, mode="RGBA"):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 4), dtype=np.uint8)
    return Image.fromarray(small).convert(mode).resize((width, height))


def encoded(image, fmt, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


def svg(inside):
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 20 10">{inside}</svg>'.encode()


def make_mixed(folder):
    """142 files: 128 pictures that can be stickers, 14 that cannot; returns why each of these cannot."""
    sizes = [1, 2, 16, 96, 511, 512, 513, 1000, 2000, 8000]
    for i in range(100):
        size = sizes[i % len(sizes)] if i < 30 else random.Random(i).choice(sizes[:8])
        fmt, mode = [("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGBA"), ("PNG", "P"), ("GIF", "P")][i % 5]
        height = max(1, size // (1 + i % 3))
        (folder / f"{i:03}.{fmt.lower()}").write_bytes(encoded(drawing(size, height, i, mode), fmt))
    for i in range(100, 110):
        (folder / f"{i}.svg").write_bytes(svg(f'<rect width="{i - 95}" height="9" fill="#{i}"/>'))
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encoded(drawing(60, 20, 200, "RGB"), "JPEG", exif=exif))
    (folder / "cmyk.jpg").write_bytes(encoded(drawing(64, 64, 201, "RGB").convert("CMYK"), "JPEG"))
    wide = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    (folder / "sixteen.png").write_bytes(encoded(wide, "PNG"))
    (folder / "really_a_png.jpg").write_bytes(encoded(drawing(50, 50, 202), "PNG"))
    for i in range(14):
        frames = [drawing(20 + 60 * i, 30 + 40 * i, 300 + 10 * i + j) for j in range(5)]
        fmt = ["GIF", "WEBP", "PNG"][i % 3]
        data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], duration=80, loop=0)
        (folder / f"moving_{i}.{fmt.lower()}").write_bytes(data)
    good = encoded(drawing(300, 300, 400), "PNG")
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "PNG")
    bad = {
        "cut.png": (good[: len(good) // 2], "broken or cut off"),
        "cut.jpg": (encoded(drawing(300, 300, 401, "RGB"), "JPEG")[:400], "broken or cut off"),
        "cut.webp": (encoded(drawing(300, 300, 402), "WEBP")[:60], "broken|not a PNG"),
        "cut.gif": (encoded(drawing(300, 300, 403, "P"), "GIF")[:1000], "broken or cut off"),
        "empty.png": (b"", "empty"),
        "text.png": (b"this is a letter, no picture", "not a PNG"),
        "bomb.png": (bomb.getvalue(), "pixels|bomb"),
        "outside.svg": (svg('<use xlink:href="file:///etc/passwd" width="9" height="9"/>'), "outside itself"),
        "style.svg": (svg('<rect width="9" height="9" style="fill:url(https://x.org/a.svg#b)"/>'), "outside itself"),
        "script.svg": (svg("<script>alert(1)</script>"), "<script>"),
        "slow.svg": (svg('<filter id="f"><feTurbulence numOctaves="100000000"/></filter>'), "<feTurbulence>"),
        "picture.svg": (svg('<image href="data:image/png;base64,AAAA"/>'), "<image>"),
        "entity.svg": (b'<!DOCTYPE svg [<!ENTITY a "aaaa">]>' + svg("<text>&a;</text>"), "entities"),
        "again.png": ((folder / "000.png").read_bytes(), "same picture as 000.png"),
    }
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    assert len(list(folder.iterdir())) == 142
    return {name: reason for name, (_, reason) in bad.items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "in").mkdir()
    reasons = make_mixed(folder / "in")
    return folder / "in", reasons


def test_142_mixed_files(mixed, tmp_path):
    folder, reasons = mixed
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = build_from_source(str(folder), tmp_path / "pack")
    assert {s.file for s in result.skipped} == set(reasons)
    for skipped in result.skipped:
        assert any(part in skipped.reason for part in reasons[skipped.file].split("|")), skipped
    assert result.stickers == 128 and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"pack"}
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {"pack.yaml", "stickers.parquet"}
    pack = StickerPack.load(tmp_path / "pack")
    for sticker in pack.stickers:
        image = pack.image(sticker.id)
        assert image.mode == "RGBA" and image.size == (sticker.width, sticker.height) and max(image.size) <= SIDE
        assert Image.open(io.BytesIO(pack.images[sticker.id])).format in ("PNG", "JPEG", "WEBP", "GIF")
    assert sum(s.animated for s in pack.stickers) == 14
    assert pack.by_id["turned"].width == 20 and pack.by_id["turned"].height == 60
    assert pack.by_id["100"].width == 512 and pack.by_id["100"].height == 256  # an SVG, twice as wide as high
    low, high = pack.image("sixteen").getchannel("R").getextrema()
    assert low == 0 and high == 255
    assert pack.info.licence == "unknown" and pack.info.name == "in"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_low(mixed, tmp_path):
    code = (
        "import re, sys; from pathlib import Path; from dataset_builders.stickers.build import build_from_source;"
        "build_from_source(sys.argv[1], Path(sys.argv[2]));"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed[0]), str(tmp_path / "pack")], capture_output=True, text=True, cwd=ROOT
    )
    assert int(done.stdout) < 1024 * 1024, done.stderr  # KiB


def test_a_zip_cannot_write_or_read_outside(tmp_path):
    good = encoded(drawing(40, 40, 1), "PNG")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("cats/one.png", good)
        archive.writestr("../escape.png", encoded(drawing(40, 40, 2), "PNG"))
        archive.writestr("/absolute.png", encoded(drawing(40, 40, 3), "PNG"))
        archive.writestr("C:\\windows.png", encoded(drawing(40, 40, 4), "PNG"))
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("huge.png", bytes(40 * 2**20), zipfile.ZIP_DEFLATED)
    result = build_from_source(str(tmp_path / "pack.zip"), tmp_path / "deep" / "pack")
    assert result.stickers == 1 and {s.file: s.reason.split(",")[0] for s in result.skipped} == {
        "../escape.png": "a path that leads outside the zip",
        "/absolute.png": "a path that leads outside the zip",
        "C:\\windows.png": "a path that leads outside the zip",
        "link.png": "a link",
        "huge.png": "the file is larger than 32 MiB",
    }
    pack = StickerPack.load(tmp_path / "deep" / "pack")
    assert pack.stickers[0].theme == "cats" and pack.images[pack.stickers[0].id] == good
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_left_out(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("good.png", encoded(drawing(40, 40, 1), "PNG"))
        archive.writestr("torn.png", " ".join(str(i * i) for i in range(5000)).encode(), method)
        start = archive.getinfo("torn.png").header_offset + 30 + len("torn.png")
    content = bytearray((tmp_path / "pack.zip").read_bytes())
    content[start + 9 : start + 200] = bytes(byte ^ 0x5A for byte in content[start + 9 : start + 200])
    (tmp_path / "pack.zip").write_bytes(content)
    result = build_from_source(str(tmp_path / "pack.zip"), tmp_path / "pack")
    assert result.stickers == 1 and [(s.file, s.reason.split(" (")[0]) for s in result.skipped] == [
        ("torn.png", "cannot be read")
    ]


def nested(depth):
    return svg("<g>" * depth + '<rect width="9" height="9"/>' + "</g>" * depth)


def used(depth):
    """An SVG whose groups each draw the next by reference."""
    groups = "".join(f'<g id="g{i}"><use xlink:href="#g{i + 1}"/></g>' for i in range(depth))
    return svg(f'<defs>{groups}<g id="g{depth}"/></defs><use xlink:href="#g0"/><rect width="9" height="9"/>')


def patterned(depth):
    """An SVG whose patterns each are filled with the next."""
    patterns = "".join(
        f'<pattern id="p{i}" width="1" height="1"><rect width="5" height="5" fill="url(#p{i + 1})"/></pattern>'
        for i in range(depth)
    )
    return svg(f'<defs>{patterns}<pattern id="p{depth}"/></defs><rect width="9" height="9" fill="url(#p0)"/>')


@pytest.mark.parametrize("make", [nested, used, patterned])
def test_an_svg_that_is_nested_too_deeply_is_refused_before_it_is_drawn(make):
    assert read_picture(make(20)).width == 512
    with pytest.raises(BadImage, match="nested more than 64 deep"):
        read_picture(make(300))


@pytest.mark.parametrize(
    "data",
    [
        b'<?xml version="1.0" encoding="x-foo"?>' + svg("<g/>"),
        b'<?xml version="1.0" encoding="shift_jis"?>' + svg("<g/>"),
    ],
)
def test_an_svg_that_cannot_be_read_is_a_bad_picture(data):
    with pytest.raises(BadImage, match="broken or cut off"):
        read_picture(data)


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ('width="10" height="20"', (256, 512)),
        ('width="1" height="1000000000"', (1, 512)),
        ('width="10"', (512, 256)),
        ('width="20%" height="1e2"', (21, 512)),
    ],
)
def test_an_svg_is_drawn_within_512_pixels_whatever_its_sides(sides, size):
    data = svg('<rect width="9" height="9"/>').replace(b"<svg", b"<svg " + sides.encode())
    assert Image.open(io.BytesIO(render_svg(data))).size == size


def test_of_a_phones_jpeg_with_two_pictures_the_first_is_a_still():
    first, second = drawing(60, 40, 1, "RGB"), drawing(60, 40, 2, "RGB")
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    picture = read_picture(data)
    assert (picture.suffix, picture.width, picture.height, picture.animated) == (".png", 60, 40, False)
    seen = np.asarray(representative_frame(data))
    assert (np.asarray(representative_frame(picture.data)) == seen).all()
    assert np.abs(seen[..., :3] - np.asarray(first, np.int16)).mean() < 10


@pytest.mark.parametrize("fmt", ["WEBP", "PNG"])
def test_an_animation_does_not_tell_where_it_was_taken(fmt):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "at home"
    frames = [drawing(60, 20, i) for i in range(3)]
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], duration=80, exif=exif)
    picture = read_picture(data)
    assert b"at home" in data and b"at home" not in picture.data
    assert picture.animated and (picture.width, picture.height) == (20, 60)


@pytest.mark.parametrize("error", [IndexError, TypeError, struct.error])
def test_whatever_a_decoder_raises_the_picture_is_bad(monkeypatch, error):
    def trip(self):
        raise error("tripped")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", trip)
    with pytest.raises(BadImage, match=r"broken or cut off \(tripped\)"):
        read_picture(encoded(drawing(20, 20, 1), "PNG"))


def test_a_zip_with_a_broken_table_of_contents_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("good.png", encoded(drawing(40, 40, 1), "PNG"))
        start = archive.fp.tell()
    content = bytearray((tmp_path / "pack.zip").read_bytes())
    content[start : start + 4] = b"PK??"
    (tmp_path / "pack.zip").write_bytes(content)
    with pytest.raises(SourceError, match=r"a broken zip \(Bad magic number"):
        build_from_source(str(tmp_path / "pack.zip"), tmp_path / "pack")


def test_a_link_out_of_a_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(drawing(9, 9, 1), "PNG"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadImage, match="link.png: a link that leads outside"):
        build_from_source(str(tmp_path / "in"), tmp_path / "pack")
    assert not (tmp_path / "pack" / "pack.yaml").exists()


def test_sources_that_are_none(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        build_from_source(str(tmp_path / "nowhere"), tmp_path / "pack")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(SourceError, match="neither a folder nor a zip"):
        build_from_source(str(tmp_path / "a.txt"), tmp_path / "pack")


def make_ser30k(root):
    (root / "Images" / "01-panda").mkdir(parents=True)
    (root / "Annotations" / "image-level").mkdir(parents=True)
    rows = []
    for i in range(4):
        picture = Image.new("RGB", (64, 64))  # a white disc with a black eye, on black
        pixels = np.zeros((64, 64, 3), np.uint8)
        y, x = np.mgrid[:64, :64]
        pixels[(x - 32) ** 2 + (y - 32) ** 2 < 600] = 255 - i
        pixels[(x - 32) ** 2 + (y - 32) ** 2 < 20] = 0
        picture = Image.fromarray(pixels)
        picture.save(root / "Images" / "01-panda" / f"sticker_{i}.jpg", quality=95)
        rows.append({"topic": "01-panda", "file_name": f"sticker_{i}.jpg", "anno": i + 1, "text": "HI" if i else ""})
    (root / "Annotations" / "image-level" / "train.json").write_text(
        '{"annotations": ' + str(rows[:3]).replace("'", '"') + "}"
    )
    return rows


def test_ser30k(tmp_path):
    make_ser30k(tmp_path / "ser")
    result = build_from_source(str(tmp_path / "ser"), tmp_path / "pack")
    assert result.stickers == 4 and not result.skipped
    pack = StickerPack.load(tmp_path / "pack")
    assert [s.emotion for s in pack.stickers] == ["anger", "disgust", "fear", None]
    assert {s.theme for s in pack.stickers} == {"01-panda"} and pack.stickers[1].tags == ("HI",)
    pixels = np.asarray(pack.image(pack.stickers[0].id).convert("RGB"))
    assert pixels[0, 0].min() > 240 and pixels[32, 32].max() < 40  # the ground is white, the eye is still black
    file = tmp_path / "ser" / "Annotations" / "image-level" / "train.json"
    file.write_text('{"annotations": [{"topic": "a", "file_name": "b", "anno": 9}]}')
    with pytest.raises(SourceError, match=r"train.json: row 1: anno"):
        build_from_source(str(tmp_path / "ser"), tmp_path / "pack2")
    file.write_bytes('{"annotations": [{"text": "é"}]}'.encode("latin-1"))
    with pytest.raises(SourceError, match="train.json: not JSON .*can't decode byte"):
        build_from_source(str(tmp_path / "ser"), tmp_path / "pack2")


def test_a_dark_drawing_keeps_its_ground():
    image = Image.new("RGBA", (10, 10), (200, 30, 30, 255))
    assert whiten_background(image) is image


def lottie():
    shape = {
        "ty": "gr",
        "it": [
            {"ty": "el", "p": {"a": 0, "k": [0, 0]}, "s": {"a": 0, "k": [200, 200]}},
            {"ty": "fl", "c": {"a": 0, "k": [1, 0, 0, 1]}, "o": {"a": 0, "k": 100}},
            {
                "ty": "tr",
                "p": {"a": 0, "k": [0, 0]},
                "a": {"a": 0, "k": [0, 0]},
                "s": {"a": 0, "k": [100, 100]},
                "r": {"a": 0, "k": 0},
                "o": {"a": 0, "k": 100},
            },
        ],
    }
    ease = {"i": {"x": 1, "y": 1}, "o": {"x": 0, "y": 0}}
    moves = {"a": 1, "k": [{"t": 0, "s": [100, 256, 0], "e": [400, 256, 0], **ease}, {"t": 30, "s": [400, 256, 0]}]}
    layer = {
        "ty": 4,
        "ip": 0,
        "op": 30,
        "st": 0,
        "ks": {
            "p": moves,
            "a": {"a": 0, "k": [0, 0, 0]},
            "s": {"a": 0, "k": [100, 100, 100]},
            "r": {"a": 0, "k": 0},
            "o": {"a": 0, "k": 100},
        },
        "shapes": [shape],
    }
    animation = {"v": "5.5.2", "fr": 30, "ip": 0, "op": 30, "w": 512, "h": 512, "layers": [layer]}
    return gzip.compress(json.dumps(animation).encode())


def webm():
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuva420p"
        for i in range(6):
            picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            picture.paste((255, 0, 0, 255), (i * 8, 10, i * 8 + 16, 50))
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgba").reformat(format="yuva420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_messenger_exports(tmp_path):
    pytest.importorskip("rlottie_python")
    frames = [drawing(512, 512, i) for i in range(3)]
    with zipfile.ZipFile(tmp_path / "mine.wastickers", "w") as archive:
        archive.writestr("title.txt", "My cats")
        archive.writestr("author.txt", "Ines")
        archive.writestr("emoji.txt", '{"still": "😢", "vector": "🎉😀"}')
        archive.writestr("tray.png", encoded(drawing(96, 96, 9), "PNG"))
        archive.writestr("still.webp", encoded(drawing(512, 512, 5), "WEBP"))
        archive.writestr("moving.webp", encode_animation(frames, [90] * 3))
        archive.writestr("vector.tgs", lottie())
        archive.writestr("video.webm", webm())
        archive.writestr("broken.tgs", b"no gzip")
        archive.writestr("broken.webm", b"no video")
    result = build_from_source(str(tmp_path / "mine.wastickers"), tmp_path / "pack")
    pack = StickerPack.load(tmp_path / "pack")
    assert set(pack.by_id) == {"still", "moving", "vector", "video"}
    assert {s.file: s.reason.split("(")[0].strip() for s in result.skipped} == {
        "broken.tgs": "broken .tgs",
        "broken.webm": "broken .webm",
    }
    assert {s.id for s in pack.stickers if s.animated} == {"moving", "vector", "video"}
    assert (pack.info.name, pack.info.attribution) == ("My cats", "Ines")
    assert pack.by_id["still"].tags == ("crying face",) and pack.by_id["vector"].author == "Ines"
    for name in ("vector", "video"):
        alpha = pack.image(name).getchannel("A").getextrema()
        assert alpha[0] < 20 and alpha[1] > 235, name


@pytest.mark.parametrize(("side", "ids"), [(96, {"cat"}), (97, {"cat", "dog"})])
def test_only_a_small_png_is_taken_for_the_tray_icon(tmp_path, side, ids):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "title.txt").write_text("Pets")
    (tmp_path / "in" / "cat.webp").write_bytes(encoded(drawing(512, 512, 5), "WEBP"))
    (tmp_path / "in" / "dog.png").write_bytes(encoded(drawing(side, 20, 6), "PNG"))
    build_from_source(str(tmp_path / "in"), tmp_path / "pack")
    assert set(StickerPack.load(tmp_path / "pack").by_id) == ids


def test_a_damaged_vector_sticker_is_a_bad_picture():
    pytest.importorskip("rlottie_python")
    data = bytearray(lottie())
    data[12:40] = bytes(byte ^ 0x5A for byte in data[12:40])
    with pytest.raises(BadImage, match="broken .tgs"):
        render_tgs(bytes(data))


def test_whatsapp_contents(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.webp").write_bytes(encoded(drawing(512, 512, 5), "WEBP"))
    (tmp_path / "in" / "contents.json").write_text(
        '{"sticker_packs": [{"name": "Pond", "publisher": "Ana", "tray_image_file": "t.png",'
        ' "stickers": [{"image_file": "1.webp", "emojis": ["🐸"]}]}]}'
    )
    build_from_source(str(tmp_path / "in"), tmp_path / "pack", {"licence": "CC-BY-4.0"})
    pack = StickerPack.load(tmp_path / "pack")
    assert (pack.info.name, pack.info.licence) == ("Pond", "CC-BY-4.0")
    assert pack.stickers[0].tags == ("frog",) == emoji_names("🐸🐸")


def test_a_blank_start_does_not_stand_for_an_animation():
    blank = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    body = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    data = encode_animation([blank, body, body.rotate(30), body], [50] * 4)
    assert representative_frame(data).getpixel((16, 16))[:3] > (200, 0, 0)


def test_ids_are_unique_and_plain():
    taken = set()
    names = ["Cats/Happy Cat!.png", "cats_happy-cat.webp", "猫.png", "../..", "x" * 200]
    assert [unique_id(name, taken) for name in names] == [
        "cats-happy-cat", "cats-happy-cat-2", "猫", "sticker", "x" * 80
    ]  # fmt: skip


def test_a_picture_without_change_keeps_its_bytes():
    data = encoded(drawing(100, 80, 7), "WEBP", lossless=True)
    assert read_picture(data).data == data
    with pytest.raises(BadImage, match="the file is empty"):
        read_picture(b"")


def test_broken_packs_are_named(tmp_path):
    build_from_source("openmoji", tmp_path / "pack")
    (tmp_path / "pack" / "pack.yaml").write_text("name: x\n")
    with pytest.raises(PackError, match="pack.yaml: version: Field required"):
        StickerPack.load(tmp_path / "pack")
    (tmp_path / "pack" / "stickers.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PackError, match="pack.yaml|stickers.parquet"):
        StickerPack.load(tmp_path / "pack")


def test_a_source_without_a_picture_leaves_the_pack_that_is_there(tmp_path):
    for name in ("cats", "typo"):
        (tmp_path / name).mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(encoded(drawing(9, 9, 1), "PNG"))
    (tmp_path / "typo" / "notes.png").write_text("x")
    build_from_source(str(tmp_path / "cats"), tmp_path / "pack")
    before = {file.name: file.read_bytes() for file in (tmp_path / "pack").iterdir()}
    for out in ("pack", "new"):
        with pytest.raises(BadImage, match="no picture that can be a sticker, 1 refused: notes.png"):
            build_from_source(str(tmp_path / "typo"), tmp_path / out)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pack").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("contents.json", '{"sticker_packs": [{"stickers": ["a.png"]}]}', "contents.json: sticker_packs.0.stickers.0: "),
        ("contents.json", '{"sticker_packs": [{"name": 7}]}', "contents.json: sticker_packs.0.name: Input should be a valid string"),
        ("contents.json", '{"packs": []}', "contents.json: sticker_packs: Field required"),
        ("contents.json", "[" * 100_000, "contents.json: not JSON .maximum recursion depth exceeded"),
        ("emoji.json", "[]", "emoji.json: expected an object of file name to emoji"),
        ("emoji.json", "{", "emoji.json: not JSON"),
        ("pack.yaml", "[" * 3000, "pack.yaml: maximum recursion depth exceeded"),
        ("pack.yaml", "name: cats\nversion: 1\nlicence: MIT\nattribution: me\nsource: me\n", "pack.yaml: version: Input should be a valid string"),
        ("pack.yaml", "cats", "pack.yaml: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_note_of_a_source_is_named_by_its_field(tmp_path, file, text, said):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(drawing(9, 9, 1), "PNG"))
    (tmp_path / "in" / file).write_text(text)
    with pytest.raises(SourceError, match=f"^{said}") as error:
        build_from_source(str(tmp_path / "in"), tmp_path / "pack")
    assert "\n" not in str(error.value)
