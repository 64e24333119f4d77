"""Sticker packs for messengers: Telegram's and WhatsApp's limits, attribution and licence with them."""

import importlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

from dataset_builders.schema import Sticker
from dataset_builders.stickers.images import SIDE, BadImage, decoding, encode_animation, open_picture
from dataset_builders.stickers.ingest import unique_id
from dataset_builders.stickers.pack import PackError, StickerPack


# Licences under which anyone may pass on the pictures in another format, by SPDX id without the version.
FREE = re.compile(
    r"^(cc0|cc-by|cc-by-sa|cc-by-nc|cc-by-nc-sa|public-?domain|pddl|mit|apache|bsd|isc|unlicense|ofl|gpl|lgpl)\b(?!-nd|-nc-nd)",
    re.IGNORECASE,
)
EMOJI = {
    "anger": "😠",
    "disgust": "🤢",
    "fear": "😨",
    "happiness": "😊",
    "neutral": "😐",
    "sadness": "😢",
    "surprise": "😮",
    None: "🙂",
}
TELEGRAM_STILL, TELEGRAM_VIDEO, TELEGRAM_SET = 512 * 1024, 256 * 1024, 120
WHATSAPP_STILL, WHATSAPP_ANIMATED, WHATSAPP_TRAY = 100 * 1024, 500 * 1024, 50 * 1024
WHATSAPP_PACK = (3, 30)


class LicenceError(ValueError):
    """A pack whose licence does not let others pass it on."""


@dataclass(frozen=True)
class Exported:
    """What was written: archives, stickers, and those that are broken or that no quality brings under the limit."""

    files: list[Path]
    stickers: int
    skipped: list[tuple[str, str]]


def check_licence(pack: StickerPack, have_rights: bool) -> None:
    """
    Stop unless the licence of the pack, and of each sticker with its own, is a known free one.

    Raises:
        LicenceError: Naming the licence and what it covers.

    """
    if have_rights:
        return
    licences = {"the pack": pack.info.licence, **{f"sticker {s.id}": s.licence for s in pack.stickers if s.licence}}
    for what, licence in licences.items():
        if not FREE.match(licence.strip().replace(" ", "-")):
            raise LicenceError(f"the licence of {what} is {licence!r}, which does not say that it may be passed on")


def emoji_of(sticker: Sticker) -> str:
    """An emoji for a sticker: the one its tags name, else its emotion's."""
    emoji = importlib.import_module("emoji")
    for tag in sticker.tags:
        found = emoji.emojize(f":{tag.replace(' ', '_')}:", language="alias")
        if emoji.is_emoji(found):
            return found
    return EMOJI[sticker.emotion]


def fit_square(image: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture (RGBA) scaled so that its longer side is `side` pixels, on a clear square."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def still_webp(image: Image.Image, limit: int) -> bytes | None:
    """A picture as WebP of at most `limit` bytes: lossless if that fits, else with less quality, then less detail; `None` if nothing fits."""
    for detail in (1, 2, 4):
        if detail > 1:
            image = image.reduce(detail).resize(image.size, Image.Resampling.BICUBIC)
        for quality in (100, 95, 85, 70, 50, 30):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", method=4, quality=quality, lossless=quality == 100)
            if buffer.tell() <= limit:
                return buffer.getvalue()
    return None


def frames_of(data: bytes, longest: float) -> tuple[list[Image.Image], list[int]]:
    """Frames (RGBA, square) and durations (ms) of an animation, sped up to at most `longest` seconds."""
    frames, durations = [], []
    with decoding():
        for frame in ImageSequence.Iterator(open_picture(data)):
            frames.append(fit_square(frame.convert("RGBA")))
            durations.append(int(frame.info.get("duration") or 100))
    factor = min(1.0, 1000 * longest / sum(durations))
    return frames, [max(8, int(duration * factor)) for duration in durations]


def animated_webp(data: bytes, limit: int, longest: float = 10.0) -> bytes | None:
    """An animation as square WebP of at most `limit` bytes; `None` if neither quality nor fewer frames does."""
    frames, durations = frames_of(data, longest)
    for step in (1, 2, 4):
        for quality in (80, 50, 20):
            merged = [sum(durations[i : i + step]) for i in range(0, len(durations), step)]
            encoded = encode_animation(frames[::step], merged, quality)
            if len(encoded) <= limit:
                return encoded
    return None


def video_webm(data: bytes, limit: int = TELEGRAM_VIDEO) -> bytes | None:
    """An animation as Telegram's video sticker: VP9 with alpha, 512 px, 30 frames a second, at most 3 s; `None` if it does not fit."""
    av = importlib.import_module("av")
    frames, durations = frames_of(data, 3.0)
    ends = [sum(durations[: i + 1]) for i in range(len(durations))]
    shown = [
        next(i for i, end in enumerate(ends) if end > tick * 1000 / 30)
        for tick in range(int(ends[-1] * 30 / 1000) or 1)
    ]
    for rate in (600, 300, 150, 60):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="webm") as container:
            stream = container.add_stream("libvpx-vp9", rate=30, options={"deadline": "good", "cpu-used": "4"})
            stream.width = stream.height = SIDE
            stream.pix_fmt, stream.bit_rate = "yuva420p", rate * 1000
            for number in shown[:90]:
                frame = av.VideoFrame.from_image(frames[number]).reformat(format="yuva420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if buffer.tell() <= limit:
            return buffer.getvalue()
    return None


def _encode_all(
    pack: StickerPack,
    skipped: list[tuple[str, str]],
    still: Callable[[Image.Image], bytes | None],
    moving: Callable[[bytes], bytes | None],
    on_file: Callable[[int], object],
) -> Iterator[tuple[Sticker, bytes]]:
    for number, sticker in enumerate(pack.stickers, start=1):
        encoded, reason = None, "larger than the messenger takes at any quality"
        try:
            if sticker.animated:
                encoded = moving(pack.images[sticker.id])
            else:
                encoded = still(fit_square(pack.image(sticker.id)))
        except (BadImage, PackError) as error:
            reason = str(error)
        on_file(number)
        if encoded is None:
            skipped.append((sticker.id, reason))
        else:
            yield sticker, encoded


def export_telegram(
    pack: StickerPack, folder: Path, have_rights: bool = False, on_file: Callable[[int], object] = lambda count: None
) -> Exported:
    """
    Write zips of at most 120 stickers: 512 px WebP for stills, WebM for animated ones, `emoji.json` and `ATTRIBUTION.txt`.

    Telegram's @Stickers bot takes the files and their emoji.

    Raises:
        LicenceError: See [`check_licence`].

    """
    check_licence(pack, have_rights)
    skipped: list[tuple[str, str]] = []
    encoded = _encode_all(pack, skipped, lambda image: still_webp(image, TELEGRAM_STILL), video_webm, on_file)
    files: list[Path] = []
    count = 0
    for number, part in enumerate(_parts(encoded, TELEGRAM_SET), start=1):
        stems = zip(file_stems(part), part, strict=True)
        names = {f"{stem}.{'webm' if s.animated else 'webp'}": emoji_of(s) for stem, (s, _) in stems}
        members = dict(zip(names, (data for _, data in part), strict=True))
        members["emoji.json"] = json.dumps(names, ensure_ascii=False, indent=1).encode()
        files.append(_write_zip(folder / f"{file_stem(pack)}-telegram-{number}.zip", members, pack))
        count += len(part)
    return Exported(files, count, skipped)


def export_whatsapp(
    pack: StickerPack, folder: Path, have_rights: bool = False, on_file: Callable[[int], object] = lambda count: None
) -> Exported:
    """
    Write `.wastickers` archives of 3 to 30 stickers: 512 x 512 WebP under 100 KB (animated: 500 KB), tray icon, title and author.

    WhatsApp does not mix stills and animated stickers in a pack, so they go into different archives.

    Raises:
        LicenceError: See [`check_licence`].

    """
    check_licence(pack, have_rights)
    skipped: list[tuple[str, str]] = []
    groups: dict[bool, list[tuple[Sticker, bytes]]] = {False: [], True: []}
    for sticker, data in _encode_all(
        pack,
        skipped,
        lambda image: still_webp(image, WHATSAPP_STILL),
        lambda data: animated_webp(data, WHATSAPP_ANIMATED),
        on_file,
    ):
        groups[sticker.animated].append((sticker, data))
    files: list[Path] = []
    count = 0
    for group in groups.values():
        packs = -(-len(group) // WHATSAPP_PACK[1])
        for part in _parts(iter(group), -(-len(group) // max(1, packs))):  # 32 stickers are 16 and 16, not 30 and 2
            if len(part) < WHATSAPP_PACK[0]:
                skipped += [(s.id, f"a WhatsApp pack has at least {WHATSAPP_PACK[0]} stickers") for s, _ in part]
                continue
            title = f"{pack.info.name} {len(files) + 1}"
            tray = io.BytesIO()
            fit_square(pack.image(part[0][0].id), 96).quantize(128).save(tray, "PNG", optimize=True)
            members = {f"{stem}.webp": data for stem, (_, data) in zip(file_stems(part), part, strict=True)}
            emojis = {name: emoji_of(s) for name, (s, _) in zip(members, part, strict=True)}
            members |= {
                "tray.png": tray.getvalue(),
                "title.txt": title.encode(),
                "author.txt": (pack.info.attribution or pack.info.name)[:128].encode(),
                "emoji.txt": json.dumps(emojis, ensure_ascii=False).encode(),
            }
            files.append(_write_zip(folder / f"{file_stem(pack)}-{len(files) + 1}.wastickers", members, pack))
            count += len(part)
    return Exported(files, count, skipped)


def _parts(items: Iterator[tuple[Sticker, bytes]], size: int) -> Iterator[list[tuple[Sticker, bytes]]]:
    part: list[tuple[Sticker, bytes]] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def file_stems(part: list[tuple[Sticker, bytes]]) -> list[str]:
    """Ids as names of files in an archive, each once: a pack comes from anywhere, and an id may be a path."""
    taken: set[str] = set()
    return [unique_id(sticker.id, taken) for sticker, _ in part]


def file_stem(pack: StickerPack) -> str:
    """A pack's name as that of a file: a pack comes from anywhere, and its name may be a path."""
    return unique_id(pack.info.name, set())


def _write_zip(file: Path, members: dict[str, bytes], pack: StickerPack) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    info = pack.info
    members = members | {
        "ATTRIBUTION.txt": f"{info.attribution}\nLicence: {info.licence}\nSource: {info.source}\n".encode()
    }
    with zipfile.ZipFile(partial, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return partial.replace(file)
