"""From a drawing to a sticker that can be sent: cut out, larger, with a white rim, as a file."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from torch.nn import functional as F


FORMATS = {".png": {"optimize": True}, ".webp": {"lossless": True, "exact": True, "method": 6}}


def upscale(image: Image.Image, size: int) -> Image.Image:
    """
    Enlarge a sticker and keep its edges clean.

    Colours are interpolated where they are opaque only, so that what lies hidden in clear pixels never shows as a fringe, and the soft edges that
    enlarging makes are steepened again: the rim to about 1.5 pixels, inner lines by an unsharp mask.

    Args:
        image (`PIL.Image.Image`): Square, RGB or RGBA.
        size (`int`): Side of the result in pixels; a smaller picture than `image` is only resampled.

    Returns:
        `PIL.Image.Image`: RGBA.

    """
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)  # premultiplied
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((size, size), Image.Resampling.LANCZOS))
        for plane in np.moveaxis(pixels, -1, 0)
    ]
    alpha = planes[3]
    color = np.stack(planes[:3], axis=-1) / np.maximum(alpha, 1e-3)[..., None]
    factor = size / image.width
    if factor > 1:
        alpha = (alpha - 0.5) * max(1.0, factor / 1.5) + 0.5
    enlarged = to_image(color, alpha)
    if factor <= 1:
        return enlarged
    soft = enlarged.convert("RGB")
    sharp = soft.filter(ImageFilter.UnsharpMask(radius=0.6 * factor, percent=150, threshold=0))
    sharp = ImageChops.lighter(sharp, soft.filter(ImageFilter.MinFilter(3)))  # no halos: nothing beyond
    sharp = ImageChops.darker(sharp, soft.filter(ImageFilter.MaxFilter(3)))  # what is near by
    sharp.putalpha(enlarged.getchannel("A"))
    return sharp


def add_outline(image: Image.Image, width: int, color: str = "white") -> Image.Image:
    """
    Put a rim of one colour around a sticker, as messengers' stickers have it.

    Args:
        image (`PIL.Image.Image`): The sticker.
        width (`int`): Of the rim in pixels; a drawing that leaves no room for it is made smaller.
        color (`str`, *optional*, defaults to `"white"`): Any colour that PIL knows.

    Returns:
        `PIL.Image.Image`: RGBA, of the same size.

    """
    image = image.convert("RGBA")
    if width < 1 or image.getchannel("A").getbbox() is None:
        return image
    left, top, right, bottom = image.getchannel("A").getbbox()
    if min(left, top, image.width - right, image.height - bottom) < width:
        room = (image.width - 2 * width, image.height - 2 * width)
        inner = ImageOps.contain(image, room, Image.Resampling.LANCZOS)
        image = Image.new("RGBA", image.size)
        image.paste(inner, ((image.width - inner.width) // 2, (image.height - inner.height) // 2))
    alpha = torch.from_numpy(np.asarray(image.getchannel("A"), dtype=np.float32) / 255)
    solid = ((alpha - 0.25) * 2).clamp(0, 1)  # faint specks get no rim
    reach = torch.arange(-width, width + 1.0)
    disc = (width + 0.5 - torch.hypot(*torch.meshgrid(reach, reach, indexing="ij"))).clamp(0, 1)
    grown = F.conv2d(solid[None, None], disc[None, None], padding=width)[0, 0].clamp(0, 1)
    rim = Image.new("RGBA", image.size, color)
    rim.putalpha(Image.fromarray((grown.numpy() * 255).round().astype(np.uint8)))
    return Image.alpha_composite(rim, image)


def cut_out(image: Image.Image, tolerance: int = 24) -> Image.Image:
    """
    Make the white ground of an opaque drawing transparent: what is nearly white and reaches the border, never white inside the drawing.

    Args:
        image (`PIL.Image.Image`): RGB on white, as decoders without alpha draw stickers.
        tolerance (`int`, *optional*, defaults to 24): How far below 255 the darkest channel of the ground may be.

    Returns:
        `PIL.Image.Image`: RGBA; at the edge, the white is taken out of the mixed colours.

    """
    rgb = image.convert("RGB")
    darkest = ImageChops.darker(ImageChops.darker(*rgb.split()[:2]), rgb.getchannel("B"))
    framed = Image.new("L", (rgb.width + 2, rgb.height + 2), 255)
    framed.paste(darkest.point(lambda value: 255 if value >= 255 - tolerance else 0), (1, 1))
    ImageDraw.floodfill(framed, (0, 0), 128)
    ground = framed.crop((1, 1, rgb.width + 1, rgb.height + 1)).point(lambda value: 255 if value == 128 else 0)
    band = (
        np.asarray(ground.filter(ImageFilter.MaxFilter(5))) > 0
    )  # the ground and two pixels beyond: there colours are mixed
    ink = 1 - np.asarray(rgb, dtype=np.float32) / 255
    inside = rgb.filter(ImageFilter.MinFilter(5))  # the colour that is mixed with white is the darkest one near by
    full = 1 - np.asarray(inside, dtype=np.float32) / 255
    channel = full.argmax(axis=-1)[..., None]
    mixed = np.take_along_axis(ink, channel, -1) / np.maximum(np.take_along_axis(full, channel, -1), 1 / 255)
    alpha = np.where(band, mixed[..., 0].clip(0, 1), 1.0)
    alpha = np.where(np.asarray(ground) > 0, 0.0, alpha)
    color = 1 - ink / np.maximum(alpha, 1 / 255)[..., None]
    return to_image(color, alpha)


def to_image(color: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """RGBA picture of colours `(H, W, 3)` and alpha `(H, W)`, both clipped to [0, 1]; clear pixels are white."""
    alpha = alpha.clip(0, 1)[..., None]
    color = np.where(alpha > 0, color.clip(0, 1), 1.0)
    return Image.fromarray((np.concatenate([color, alpha], axis=-1) * 255).round().astype(np.uint8), "RGBA")


def finish(image: Image.Image, size: int | None = None, outline: float = 0.0) -> Image.Image:
    """
    Bring a drawing into the form in which it is sent.

    Args:
        image (`PIL.Image.Image`): RGBA, square where a `size` is given.
        size (`int`, *optional*): Side in pixels, defaults to the drawing's own.
        outline (`float`, *optional*, defaults to 0.0): Width of a white rim as a share of the picture's; 0.03 looks like a messenger's.

    Returns:
        `PIL.Image.Image`.

    """
    if size is not None and size != image.width:
        image = upscale(image, size)
    return add_outline(image, math.ceil(outline * image.width)) if outline else image


def save_sticker(image: Image.Image, path: str | os.PathLike) -> None:
    """
    Write a sticker with its transparency, as PNG or lossless WebP.

    Args:
        image (`PIL.Image.Image`): The sticker.
        path (`str` or `os.PathLike`): File ending in `.png` or `.webp`.

    Raises:
        ValueError: If the ending is another one: other formats lose the transparency.

    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"`path` must end in {' or '.join(FORMATS)}, got {str(path)!r}.")
    image.save(path, **FORMATS[suffix])


__all__ = ["add_outline", "cut_out", "finish", "save_sticker", "to_image", "upscale"]
