"""How good drawn stickers are: their emotion, whether the caption is recognised, how they differ, and how near they are to the training art."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickers.pack import StickerPack
from dataset_builders.stickers.sheet import contact_sheet
from pegs.assemble import embed_pictures
from pegs.evaluation.multimodal import vote_of_nearest
from pipelines.pipeline_pegs import PegsPipeline


CHOICES, FOUND = 100, 10
BATCH = 16
FOOTER = "Drawn by the mini decoder, trained on OpenMoji (CC BY-SA 4.0)"


@dataclass
class DrawingJudge:
    """
    Judges drawings by PEGS' vision tower, which the decoder was not trained with.

    Args:
        pegs ([`PegsPipeline`]): Its model embeds pictures in the space of captions.
        vectors (`torch.Tensor` of shape `(n, e)`): Of the pictures of the pack's training stickers.
        emotions (`list[str]`): Theirs.

    """

    pegs: PegsPipeline
    vectors: torch.Tensor
    emotions: list[str]

    @classmethod
    def of(cls, pegs: PegsPipeline, pack: StickerPack) -> "DrawingJudge":
        """A judge that knows the training stickers of an annotated pack."""
        train = pack.split("train")
        vectors = embed_pictures(pegs.model, pegs.processor, pack, train)
        return cls(pegs, vectors, [str(sticker.emotion) for sticker in train])

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors `(N, e)` of pictures."""
        return torch.cat([self.pegs.embed_images(list(images[i : i + 32])) for i in range(0, len(images), 32)])

    def name_emotions(self, vectors: torch.Tensor) -> list[str]:
        """Emotions of pictures by the vote of the nearest training stickers, from the pictures' vectors `(N, e)`."""
        return [str(vote_of_nearest(row, self.emotions)) for row in (vectors @ self.vectors.T).numpy()]


def rank_captions(pictures: torch.Tensor, captions: torch.Tensor) -> list[int]:
    """
    Rank, from 1, of each picture's own caption among its own and the next 99.

    Args:
        pictures (`torch.Tensor` of shape `(N, e)`): Vectors of pictures.
        captions (`torch.Tensor` of shape `(N, e)`): Vectors of their captions, in the same order.

    Returns:
        `list[int]`: `N` ranks.

    """
    among = min(CHOICES, len(captions))
    order = torch.arange(len(captions))
    scores = (pictures @ captions.T)[order.unsqueeze(1), (order.unsqueeze(1) + torch.arange(among)) % len(captions)]
    return (1 + (scores[:, 1:] > scores[:, :1]).sum(dim=1)).tolist()


def to_pixels(images: Sequence[Image.Image], size: int = 64) -> torch.Tensor:
    """RGBA pictures as rows `(N, size * size * 4)` in `[0, 1]`, colours weighted by alpha."""
    rows = []
    for image in images:
        small = image.convert("RGBa").resize((size, size), Image.Resampling.BOX)
        rows.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float() / 255)
    return torch.stack(rows)


def nearest_distance(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Root mean square difference `(N,)` of each row of `images` `(N, P)` to the nearest of `others` `(M, P)`."""
    return torch.cdist(images, others).amin(dim=1) / images.shape[1] ** 0.5


def measure_drawings(
    judge: DrawingJudge,
    images: Sequence[Image.Image],
    meant: Sequence[str],
    captions: torch.Tensor,
    training: torch.Tensor,
) -> dict[str, float]:
    """
    Figures of a set of drawings.

    Args:
        judge ([`DrawingJudge`]): Names emotions and embeds.
        images (`Sequence[PIL.Image.Image]`): RGBA drawings.
        meant (`Sequence[str]`): The emotion each should show.
        captions (`torch.Tensor` of shape `(N, e)`): Vectors of what each should show, in the judge's space.
        training (`torch.Tensor` of shape `(M, P)`): Training pictures, see [`to_pixels`].

    Returns:
        `dict[str, float]`: `emotion_agreement`, `caption_recall_at_10` among 100, `diversity` (mean cosine distance of pairs), `nearest_training_rms`
        (median; 0 would be a copy).

    """
    vectors = judge.embed(images)
    said, ranks = judge.name_emotions(vectors), rank_captions(vectors, captions)
    others = len(vectors) * (len(vectors) - 1)
    return {
        "emotion_agreement": round(sum(a == b for a, b in zip(said, meant, strict=True)) / len(meant), 3),
        "caption_recall_at_10": round(sum(rank <= FOUND for rank in ranks) / len(ranks), 3),
        "diversity": round(1 - ((vectors @ vectors.T).sum() - len(vectors)).item() / others, 3),
        "nearest_training_rms": round(nearest_distance(to_pixels(images), training).median().item(), 3),
    }


def choose_evenly(stickers: Sequence[Sticker], each: int) -> list[Sticker]:
    """The first `each` stickers of every emotion, in the order of the emotions."""
    return [s for emotion in EMOTIONS for s in [s for s in stickers if s.emotion == emotion][:each]]


def draw_all(decoder: Any, states: torch.Tensor, seed: int, **settings: Any) -> list[Image.Image]:
    """One sticker for each of `states` `(N, L, D)`, sticker `i` from seed `seed + i`; tensors among the settings have a row a sticker."""
    images: list[Image.Image] = []
    for start in range(0, len(states), BATCH):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(states))[part]]
        own = {name: value[part] if torch.is_tensor(value) else value for name, value in settings.items()}
        images += decoder(prompt_embeds=states[part], generator=generators, **own).images
    return images


def save_sheet(images: list[Image.Image], labels: list[str], columns: int, file: Path) -> None:
    """A contact sheet for a card, in 256 colours, which makes it a quarter as large."""
    sheet = contact_sheet(images, labels, columns=columns, footer=FOOTER)
    file.parent.mkdir(exist_ok=True)
    sheet.quantize(colors=256, method=Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
