"""Opening pictures from anywhere: what is a sticker, what is none, and why."""

import hashlib
import importlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import defusedxml
import numpy as np
from defusedxml import ElementTree as defused
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError


SIDE = 512  # pixels; what Telegram and WhatsApp take, and more than any vision tower here sees
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MAX_FRAMES = 600
KEPT_FRAMES = 120  # of an animation that is written anew
MAX_DEPTH = 64  # of elements in an SVG; the renderer's stack ends at some 200
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif"}
KEPT_MODES = ("L", "LA", "P", "RGB", "RGBA")
URL = re.compile(r"url\(\s*['\"]?\s*([^)'\"]*)", re.IGNORECASE)
INSIDE = re.compile(r"#|data:image/(png|jpeg|webp|gif)[;,]", re.IGNORECASE)
SVG_START = re.compile(rb"^(\xef\xbb\xbf)?\s*(<\?xml|<!--|<!DOCTYPE svg|<svg[\s>])", re.IGNORECASE)


class BadImage(ValueError):
    """A file that cannot be a sticker; the message says why."""


@dataclass(frozen=True)
class Picture:
    """An accepted picture: its encoding, at most `SIDE` pixels a side, upright; `sha256` is of its decoded pixels."""

    data: bytes
    suffix: str
    width: int
    height: int
    animated: bool
    sha256: str


@contextmanager
def decoding() -> Iterator[None]:
    """Within it, whatever the decoder of a picture raises is a [`BadImage`]."""
    try:
        yield
    except (BadImage, ImportError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not a PNG, JPEG, WebP, GIF or SVG picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too many pixels: a decompression bomb") from error
    except Exception as error:  # decoders of broken files raise whatever their code trips over
        raise BadImage(
            f"broken or cut off ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def open_picture(data: bytes) -> Image.Image:
    """
    Open a picture in a format of stickers; Pillow has decoders of other formats that start programs (EPS: Ghostscript).

    Raises:
        BadImage: If it is in no such format, or has too many pixels.

    """
    with decoding():
        image = Image.open(io.BytesIO(data), formats=list(FORMATS))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS // 10**6} million")
        return image


def count_frames(image: Image.Image) -> int:
    """Frames of an animation, 1 of a still; the further pictures in a phone's JPEG (MPO) are no frames."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def read_picture(data: bytes, name: str = "", black_background: bool = False) -> Picture:
    """
    Check a picture and bring it into a pack's form.

    A picture that needs no change keeps its bytes; one that is too large, turned by EXIF, or in a mode that stickers do not use (CMYK, 16-bit) is
    written anew without loss. An SVG is rendered. Animations stay animations.

    Args:
        data (`bytes`): The file.
        name (`str`, *optional*): Its name; an ending `.svg` says what the bytes may not.
        black_background (`bool`, *optional*, defaults to `False`): Whether black that touches the border is background and becomes white
            (SER30K; appendix B.1).

    Returns:
        [`Picture`].

    Raises:
        BadImage: If it is no picture, a broken one, or too large.

    """
    if not data:
        raise BadImage("the file is empty")
    if len(data) > MAX_BYTES:
        raise BadImage(f"the file is larger than {MAX_BYTES >> 20} MiB")
    with decoding(), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if name.lower().endswith(".svg") or SVG_START.match(data[:200]):
            data = render_svg(data)
        image = open_picture(data)
        frames = count_frames(image)
        if frames > MAX_FRAMES:
            raise BadImage(f"{frames} frames are more than {MAX_FRAMES}")
        return _animation(image, data, frames) if frames > 1 else _still(image, data, black_background)


def _still(image: Image.Image, data: bytes, black_background: bool) -> Picture:
    keep = (
        max(image.size) <= SIDE
        and image.format in FORMATS
        and image.mode in KEPT_MODES
        and not image.getexif()  # it may turn the picture, or tell where it was taken
        and not black_background
    )
    fmt = image.format
    if image.format == "JPEG":
        image.draft(None, (2 * SIDE, 2 * SIDE))
    image.load()
    image = ImageOps.exif_transpose(_shrunk(image))
    image = _rgba(image)
    if black_background:
        image = whiten_background(image)
    if not keep:
        data, fmt = _encode_png(image), "PNG"
    return Picture(data, FORMATS[fmt or "PNG"], *image.size, False, digest(image))


def _shrunk(image: Image.Image) -> Image.Image:
    """`image` with no side above `SIDE`; a huge one is averaged strip by strip first, so that it is held only once."""
    if max(image.size) <= SIDE:
        return image
    factor = max(image.size) // (2 * SIDE)
    if factor > 1:
        rows = factor * 64
        strips = [
            _averageable(image.crop((0, top, image.width, min(top + rows, image.height)))).reduce(factor)
            for top in range(0, image.height, rows)
        ]
        small = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
        top = 0
        for strip in strips:
            small.paste(strip, (0, top))
            top += strip.height
    else:
        small = _averageable(image)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = small.convert("RGBA") if small.mode == "RGBa" else small
    small.info.update(image.info)  # EXIF may turn it
    return small


def _averageable(image: Image.Image) -> Image.Image:
    """`image` in a mode whose pixels can be averaged; colours of clear pixels must not bleed in."""
    if image.mode in ("P", "1"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert("RGBa") if image.mode in ("RGBA", "LA", "PA") else image


def _rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey
        scale = 65535 if image.mode.startswith("I") else 1.0
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.float32) / scale, 0, 1) * 255).astype(np.uint8))
    return image.convert("RGBA")


def _encode_png(image: Image.Image) -> bytes:
    opaque = image.getchannel("A").getextrema()[0] == 255
    buffer = io.BytesIO()
    (image.convert("RGB") if opaque else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _animation(image: Image.Image, data: bytes, frames: int) -> Picture:
    if max(image.size) > SIDE or image.getexif():
        step = -(-frames // KEPT_FRAMES)
        pictures: list[Image.Image] = []
        durations: list[int] = []
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            duration = frame.info.get("duration") or 100
            if number % step:
                durations[-1] += duration
            else:
                pictures.append(ImageOps.exif_transpose(_shrunk(frame.convert("RGBA"))))
                durations.append(duration)
        data = encode_animation(pictures, durations)
        image = Image.open(io.BytesIO(data), formats=["WEBP"])
    else:
        for frame in ImageSequence.Iterator(image):  # a broken frame is found here, not in somebody's chat
            frame.load()
    sampled = sample_frames(image)
    return Picture(data, FORMATS[image.format or "WEBP"], *image.size, True, digest(*sampled))


def encode_animation(frames: list[Image.Image], durations: list[int], quality: int = 85) -> bytes:
    """Frames (RGBA) and their durations in milliseconds as an animated WebP that repeats."""
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality, method=2
    )
    return buffer.getvalue()


def digest(*frames: Image.Image) -> str:
    """SHA-256 over the size and RGBA pixels of `frames`, in hexadecimal."""
    total = hashlib.sha256()
    for frame in frames:
        total.update(repr(frame.size).encode() + frame.convert("RGBA").tobytes())
    return total.hexdigest()


def sample_frames(image: Image.Image, count: int = 8) -> list[Image.Image]:
    """At most `count` frames of a picture as RGBA, evenly spaced; one of a still."""
    frames = count_frames(image)
    wanted = sorted({round(i * (frames - 1) / max(1, count - 1)) for i in range(count)}) if frames > 1 else [0]
    sampled = []
    for number in wanted:
        if frames > 1:
            image.seek(number)
        sampled.append(image.convert("RGBA"))
    return sampled


def representative_frame(data: bytes) -> Image.Image:
    """
    The frame that stands for a sticker: of an animation, the sampled frame nearest to the mean of all, the last of such (so not a blank start).

    Args:
        data (`bytes`): Encoded picture of a pack.

    Returns:
        `PIL.Image.Image`: RGBA.

    Raises:
        BadImage: If it cannot be read.

    """
    with decoding():
        frames = sample_frames(open_picture(data))
    if len(frames) == 1:
        return frames[0]
    white = Image.new("RGBA", frames[0].size, "white")
    small = np.stack(
        [np.asarray(Image.alpha_composite(white, f).convert("RGB").resize((32, 32)), np.float32) for f in frames]
    )
    distance = np.square(small - small.mean(axis=0)).sum(axis=(1, 2, 3))
    return frames[int(np.flatnonzero(distance <= distance.min() * 1.001)[-1])]


def whiten_background(image: Image.Image, threshold: int = 16) -> Image.Image:
    """
    Turn the near-black region that touches the border white (appendix B.1); black inside a drawing stays.

    Args:
        image (`PIL.Image.Image`): RGBA.
        threshold (`int`, *optional*, defaults to 16): Largest value of any channel that still counts as black, in `[0, 255]`.

    Returns:
        `PIL.Image.Image`: RGBA; unchanged if less than half of the border is black.

    """
    pixels = np.array(image)
    black = pixels[..., :3].max(axis=-1) <= threshold
    border = np.concatenate([black[0], black[-1], black[:, 0], black[:, -1]])
    if border.mean() < 0.5:
        return image
    from scipy import ndimage  # half a second to import

    regions, _ = ndimage.label(black)
    touching = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    pixels[np.isin(regions, touching[touching > 0])] = 255
    return Image.fromarray(pixels)


def render_svg(data: bytes) -> bytes:
    """
    Draw an SVG that refers to nothing outside itself, `SIDE` pixels on its longer side.

    Raises:
        BadImage: If it has a script, an outside reference, an entity or a picture inside, is nested too deeply, or is no SVG.

    """
    try:
        root = defused.fromstring(data)
    except defusedxml.DefusedXmlException as error:
        raise BadImage("the SVG declares entities") from error
    except ElementTree.ParseError as error:
        raise BadImage(f"broken SVG ({error})") from error
    if root.tag.rpartition("}")[2] != "svg":
        raise BadImage(f"not an SVG: its root is <{root.tag.rpartition('}')[2]}>")
    for element in root.iter():
        tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
        if tag in ("script", "foreignObject", "handler", "image", "feImage", "feTurbulence"):  # the last take any time
            raise BadImage(f"the SVG has a <{tag}>")
        for key, value in element.attrib.items():
            key = key.rpartition("}")[2]
            if key.startswith("on"):
                raise BadImage(f"the SVG has a script ({key})")
            if key == "href" and not INSIDE.match(value.strip()):
                raise BadImage(f"the SVG refers outside itself ({value[:60]})")
        for text in (*element.attrib.values(), element.text or ""):
            if "@import" in text.lower() or not all(INSIDE.match(target.strip()) for target in URL.findall(text)):
                raise BadImage("the SVG refers outside itself (url)")
    _check_depth(root)
    resvg = importlib.import_module("resvg_py")
    size = {"width": SIDE, "height": SIDE, "dpi": 96}  # the renderer keeps the ratio inside of both sides
    try:
        return bytes(resvg.svg_to_bytes(svg_string=data.decode("utf-8-sig"), **size))
    except (ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise BadImage(f"broken SVG ({str(error).splitlines()[0]})") from error


def _check_depth(root: ElementTree.Element) -> None:
    """Stop at more than `MAX_DEPTH` levels, what an element draws by reference (`<use>`, a pattern) being a level below it: the renderer recurses into each."""
    named = {f"#{element.get('id')}": element for element in root.iter()}
    level = {root}
    for _ in range(MAX_DEPTH):
        targets = {target.strip() for element in level for target in _drawn_by(element)}
        level = {part for element in level for part in element} | {named[t] for t in targets if t in named}
        if not level:
            return
    raise BadImage(f"the SVG is nested more than {MAX_DEPTH} deep, or refers to itself")


def _drawn_by(element: ElementTree.Element) -> list[str]:
    """The references of an element that are drawn with it."""
    uses = isinstance(element.tag, str) and element.tag.rpartition("}")[2] in ("use", "feImage")
    hrefs = [value for key, value in element.attrib.items() if uses and key.rpartition("}")[2] == "href"]
    return hrefs + URL.findall(" ".join(element.attrib.values()))
