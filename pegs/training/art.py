"""Sticker art as tensors: what the decoder and the vision tower are trained on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset_builders.stickers import openmoji
from dataset_builders.stickers.pack import StickerPack


KINDS = {"cat": "cat face", "person": "person", "woman": "person", "man": "person", "heart": "heart", "face": "face"}
ANIMALS = ("dragon", "monkey", "mouse", "pig", "rabbit", "tiger")


@dataclass
class Drawing:
    """One drawing of the training art: `pixels` is uint8 RGBA `(size, size, 4)`, `caption` what it shows."""

    hexcode: str
    caption: str | None
    pixels: np.ndarray
    sticker_id: str | None = None


def load_art(pack: StickerPack, size: int) -> list[Drawing]:
    """
    Every OpenMoji drawing at `size` px that is not in one of the pack's test databases, in hexcode order.

    A drawing of the pack is captioned by its annotation, any other by its CLDR name; OpenMoji's own extras have no caption.
    """
    by_hexcode = {Path(sticker.image_path).stem: sticker for sticker in pack.stickers}
    held_out = {sticker.id for sticker in pack.split("test")}
    art = []
    for hexcode in openmoji.list_hexcodes():
        sticker = by_hexcode.get(hexcode)
        if sticker is not None and sticker.id in held_out:
            continue
        caption = sticker.caption if sticker else openmoji.cldr_name(hexcode)
        pixels = np.asarray(openmoji.render(hexcode, size))
        art.append(Drawing(hexcode, caption, pixels, sticker.id if sticker else None))
    return art


def general_caption(caption: str) -> str | None:
    """
    An annotated caption without what is particular, `"weary face, sadness"` as `"face, sadness"`, or `None` where it is of no kind that has many faces.

    Captions of one thing under several emotions are rare: of these a decoder learns what an emotion looks like.
    """
    name, _, emotion = caption.rpartition(", ")
    words = name.split()
    if not words or words[0] in ANIMALS:
        return None
    kinds = [kind for word, kind in KINDS.items() if word in words]
    return f"{kinds[0]}, {emotion}" if kinds else None


def to_rgba_tensor(pixels: np.ndarray | Image.Image) -> torch.Tensor:
    """
    RGBA picture to a decoder tensor: colour laid on white plus the alpha channel, both in `[-1, 1]`.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 4)`, uint8, or RGBA `PIL.Image.Image`): The picture.

    Returns:
        `torch.Tensor` of shape `(4, height, width)`.

    """
    array = torch.from_numpy(np.array(pixels, dtype=np.float32)) / 255
    alpha = array[..., 3:]
    color = array[..., :3] * alpha + (1 - alpha)
    return torch.cat([color, alpha], dim=-1).permute(2, 0, 1) * 2 - 1


class ArtCrops(Dataset):
    """
    Random crops of `crop` px, for training the autoencoder; an index maps to one fixed random draw.

    In half of them red, green and blue change places: yellow is most of OpenMoji, and an autoencoder that sees little green and violet paints them yellow.
    """

    def __init__(self, art: list[Drawing], crop: int, length: int, seed: int) -> None:
        self.pictures = [to_rgba_tensor(drawing.pixels) for drawing in art]
        self.crop, self.length, self.seed = crop, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, index))
        picture = self.pictures[rng.integers(len(self.pictures))]
        if rng.random() < 0.5:
            picture = picture.flip(-1)
        if rng.random() < 0.5:
            picture = picture[[*rng.permutation(3), 3]]
        room = picture.shape[-1] - self.crop
        top, left = (rng.integers(room + 1) for _ in range(2))
        return picture[:, top : top + self.crop, left : left + self.crop]
