import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipelines.finishing import add_outline, cut_out, finish, save_sticker, upscale


def disc(size=64, radius=20, color="gold", hidden="blue"):
    """An antialiased disc; its clear pixels hide another colour."""
    mask = Image.new("L", (size * 8, size * 8))
    center = size * 4
    ImageDraw.Draw(mask).circle((center, center), radius * 8, fill=255)
    image = Image.new("RGB", (size, size), hidden)
    image.paste(
        color, (0, 0, size, size), mask.resize((size, size), Image.Resampling.BOX).point(lambda v: 255 * (v > 0))
    )
    image.putalpha(mask.resize((size, size), Image.Resampling.BOX))
    return image


def test_upscaling_keeps_hidden_colours_hidden_and_the_rim_thin():
    large = np.asarray(upscale(disc(), 256)).astype(int)
    assert large.shape == (256, 256, 4)
    shown = large[..., 3] > 0
    assert np.abs(large[shown][:, :3] - (255, 215, 0)).max() <= 8  # gold everywhere, no blue fringe
    row = large[128, :128, 3]
    assert ((row > 10) & (row < 245)).sum() <= 3
    naive = np.asarray(disc().resize((256, 256), Image.Resampling.LANCZOS)).astype(int)[128, :128, 3]
    assert ((naive > 10) & (naive < 245)).sum() > 3
    assert (large[..., 3] > 127).sum() == pytest.approx(np.pi * 80**2, rel=0.02)


def test_upscaling_makes_no_halos():
    """A dark line between two colours stays between the values around it."""
    image = Image.new("RGBA", (32, 32), (200, 60, 40, 255))
    ImageDraw.Draw(image).line((16, 0, 16, 31), fill=(0, 0, 0, 255), width=2)
    large = np.asarray(upscale(image, 128)).astype(int)
    plain = np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)).astype(int)
    assert (large[..., :3].max(axis=(0, 1)) <= plain.max(axis=(0, 1))).all()
    contrast = [np.abs(np.diff(picture[64, :, 0])).max() for picture in (large[..., :3], plain)]
    assert contrast[0] > contrast[1]


def test_an_outline_is_as_wide_as_asked_and_goes_around():
    image = disc(radius=20)
    outlined = np.asarray(add_outline(image, 4))
    alpha = outlined[32, :, 3]
    assert (alpha > 127).sum() == pytest.approx(2 * 24, abs=1)
    assert (outlined[32, 9:11, :3] >= 250).all()
    inner = np.asarray(image)[..., 3] == 255
    assert (outlined[inner] == np.asarray(image)[inner]).all()


def test_a_drawing_that_fills_its_picture_gets_room_for_the_outline():
    outlined = np.asarray(add_outline(disc(radius=32), 4))
    assert outlined.shape == (64, 64, 4)
    row = outlined[32].astype(int)
    assert (row[1:3] >= 250).all() and (row[-3:-1] >= 250).all()
    assert ((row[:, 2] < 127) & (row[:, 3] > 127)).sum() == pytest.approx(56, abs=2)  # gold


def test_a_tall_sticker_keeps_its_shape_under_an_outline():
    image = Image.new("RGBA", (100, 200))
    image.paste("red", (10, 10, 90, 190))
    outlined = add_outline(image, 4)
    assert outlined.size == (100, 200)
    red = Image.fromarray((np.asarray(outlined)[..., 1] < 128).astype(np.uint8) * 255).getbbox()
    assert red == (10, 10, 90, 190)
    image.paste("red", (0, 0, 100, 200))
    left, top, right, bottom = add_outline(image, 4).getchannel("A").getbbox()
    assert (right - left) / (bottom - top) == pytest.approx(0.5, abs=0.06) and left + right == 100


def test_nothing_to_outline():
    clear = Image.new("RGBA", (8, 8))
    assert add_outline(clear, 2).tobytes() == clear.tobytes()


def test_cutting_out_takes_the_ground_and_leaves_white_inside():
    image = disc(radius=24, color="red")
    ImageDraw.Draw(image).circle((32, 32), 8, fill="white")
    white = Image.new("RGBA", image.size, "white")
    cut = np.asarray(cut_out(Image.alpha_composite(white, image).convert("RGB"))).astype(int)
    true = np.asarray(image)[..., 3].astype(int)
    assert (cut[true == 0][:, 3] == 0).all()
    assert (cut[32, 32] == 255).all()
    assert np.abs(cut[..., 3] - true).max() <= 40  # the soft edge too
    edge = (cut[..., 3] > 60) & (true < 255)
    assert (cut[edge][:, 0] > 200).all() and (cut[edge][:, 1] < 60).all()  # red, not pink


def test_finish_is_nothing_unless_asked():
    image = disc()
    assert finish(image) is image
    assert finish(image, 96, 0.05).size == (96, 96)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_files_keep_every_pixel(tmp_path, suffix):
    image = disc()
    save_sticker(image, tmp_path / f"sticker{suffix}")
    again = Image.open(tmp_path / f"sticker{suffix}")
    assert again.mode == "RGBA" and again.tobytes() == image.tobytes()


def test_formats_without_transparency_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.webp"):
        save_sticker(disc(), tmp_path / "sticker.jpg")
