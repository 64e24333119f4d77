"""Sticker packs exported from messengers (Telegram, Signal, WhatsApp) as a source: WebP, animated WebP, `.tgs`, `.webm`."""

import gzip
import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from PIL import Image
from pydantic import BaseModel, ValidationError

from dataset_builders.stickers.folder import Listing, SourceError, find_pictures, read_json
from dataset_builders.stickers.images import KEPT_FRAMES, SIDE, BadImage, encode_animation, open_picture
from dataset_builders.stickers.ingest import Found
from dataset_builders.stickers.pack import first_line


NOTES = ("title.txt", "author.txt", "emoji.txt", "emoji.json", "contents.json")
MAX_LOTTIE = 16 * 2**20
TRAY = 96  # pixels a side of a tray icon, at most


class NotedSticker(BaseModel):
    """What `contents.json` says of a sticker."""

    image_file: str = ""
    emojis: list[str] | None = None


class NotedPack(BaseModel):
    """What `contents.json` says of a pack."""

    name: str | None = None
    publisher: str | None = None
    tray_image_file: str | None = None
    stickers: list[NotedSticker] | None = None


class Contents(BaseModel):
    """WhatsApp's `contents.json`; what is not needed is ignored."""

    sticker_packs: list[NotedPack]


def is_export(listing: Listing) -> bool:
    """Whether a folder or zip looks like a messenger's pack: with one of its notes, or vector or video stickers."""
    names = [PurePosixPath(path).name.lower() for path in listing.files]
    return any(name in NOTES or name.endswith((".tgs", ".webm")) for name in names)


def export_title(listing: Listing) -> tuple[str | None, str | None]:
    """Title and author of a pack, where its notes give them."""
    first = next(iter(_contents(listing)), NotedPack())
    return (
        listing.note("title.txt") or first.name or None,
        listing.note("author.txt") or first.publisher or None,
    )


def find_export(listing: Listing) -> Iterator[Found]:
    """
    Stickers of a messenger's pack: their author, and the names of their emoji as tags.

    Raises:
        SourceError: If `contents.json`, `emoji.txt` or `emoji.json` is broken.

    """
    _, author = export_title(listing)
    emoji_of, trays = _emoji(listing)
    for item in find_pictures(listing, ignored=(*NOTES, *trays)):
        path = PurePosixPath(item.name)
        fields = {**item.fields, "author": author, "tags": emoji_of.get(path.name) or emoji_of.get(path.stem) or ()}
        match path.suffix.lower():
            case ".tgs":
                yield Found(item.name, _converted(item.read, render_tgs), fields)
            case ".webm":
                yield Found(item.name, _converted(item.read, render_video), fields)
            case _:
                yield Found(item.name, item.read, fields)


def _contents(listing: Listing) -> list[NotedPack]:
    text = listing.note("contents.json")
    if text is None:
        return []
    try:
        return Contents.model_validate(read_json(text, "contents.json")).sticker_packs
    except ValidationError as error:
        raise SourceError(f"contents.json: {first_line(error)}") from error


def _emoji(listing: Listing) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Names of the emoji of each file (by name or stem), and the tray icons."""
    found: dict[str, tuple[str, ...]] = {}
    packs = _contents(listing)
    for pack in packs:
        for sticker in pack.stickers or ():
            found[sticker.image_file] = emoji_names("".join(sticker.emojis or ()))
    name = "emoji.txt" if listing.note("emoji.txt") else "emoji.json"
    if text := listing.note(name):
        table = read_json(text, name)
        if not isinstance(table, dict):
            raise SourceError(f"{name}: expected an object of file name to emoji")
        found |= {str(name): emoji_names(str(value)) for name, value in table.items()}
    trays = [pack.tray_image_file.lower() for pack in packs if pack.tray_image_file]
    if packs or listing.note("title.txt"):  # a `.wastickers` file has its tray icon as the only PNG
        pictures = [p for p in listing.files if p.lower().endswith(".png")]
        webp = [p for p in listing.files if p.lower().endswith(".webp")]
        if len(pictures) == 1 and webp and _is_tray(listing.files[pictures[0]]):
            trays.append(PurePosixPath(pictures[0]).name.lower())
    return found, trays


def _is_tray(read: Callable[[], bytes]) -> bool:
    try:
        return max(open_picture(read()).size) <= TRAY
    except BadImage:  # told with the stickers
        return False


def emoji_names(text: str) -> tuple[str, ...]:
    """English names of the emoji in `text`, each once."""
    emoji = importlib.import_module("emoji")
    names = (emoji.demojize(match["emoji"]).strip(":").replace("_", " ") for match in emoji.emoji_list(text))
    return tuple(dict.fromkeys(names))


def _converted(read: Callable[[], bytes], convert: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: convert(read())


def render_tgs(data: bytes) -> bytes:
    """
    Draw a Telegram vector animation (gzipped Lottie) as an animated WebP.

    Raises:
        BadImage: If it is broken or too long, or `rlottie-python` is not installed.

    """
    try:
        rlottie = importlib.import_module("rlottie_python")
    except ModuleNotFoundError as error:
        raise BadImage("a .tgs sticker needs the package rlottie-python") from error
    try:
        with gzip.open(io.BytesIO(data)) as file:
            text = file.read(MAX_LOTTIE + 1)
        if len(text) > MAX_LOTTIE:
            raise BadImage("the animation is too large")
        animation = rlottie.LottieAnimation.from_data(text.decode("utf-8"))
        count, rate = animation.lottie_animation_get_totalframe(), animation.lottie_animation_get_framerate()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BadImage(f"broken .tgs ({error})") from error
    if not 0 < count <= 1000 or rate <= 0:
        raise BadImage(f"broken .tgs ({count} frames at {rate} a second)")
    step = -(-count // KEPT_FRAMES)
    frames = [
        animation.render_pillow_frame(frame_num=number, width=SIDE, height=SIDE) for number in range(0, count, step)
    ]
    return encode_animation(frames, [round(1000 * step / rate)] * len(frames))


def render_video(data: bytes) -> bytes:
    """
    Turn a Telegram video sticker (WebM, VP9 with alpha) into an animated WebP.

    Raises:
        BadImage: If it is broken or longer than ten seconds, or `av` is not installed.

    """
    try:
        av = importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise BadImage("a .webm sticker needs the package av") from error
    try:
        with av.open(io.BytesIO(data), format="webm") as container:
            stream = container.streams.video[0]
            if container.duration is not None and container.duration > 10 * av.time_base:
                raise BadImage("longer than ten seconds")
            decoder = av.CodecContext.create("libvpx-vp9", "r") if stream.codec_context.name == "vp9" else None
            frames = []
            for packet in container.demux(stream):  # libvpx keeps the alpha that the built-in decoder drops
                for frame in (decoder or stream).decode(packet):
                    has_alpha = "a" in frame.format.name
                    picture = Image.fromarray(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_image()
                    picture.thumbnail((SIDE, SIDE))
                    frames.append(picture.convert("RGBA"))
                    if len(frames) > 10 * 60:
                        raise BadImage("more than 600 frames")
            rate = float(stream.average_rate or 30)
    except (av.FFmpegError, IndexError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"broken .webm ({error})") from error
    if not frames:
        raise BadImage("broken .webm (no frames)")
    step = -(-len(frames) // KEPT_FRAMES)
    kept = frames[::step]
    return encode_animation(kept, [round(1000 * step / rate)] * len(kept))
