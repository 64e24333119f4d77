from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dataset_builders.schema import EMOTIONS
from pegs.evaluation.drawing import (
    DrawingJudge,
    choose_evenly,
    measure_drawings,
    nearest_distance,
    rank_captions,
    to_pixels,
)


def square(color, size=64):
    return Image.new("RGBA", (size, size), color)


def judge_of(vectors_of):
    """A judge for whom a picture is where its colour says."""
    pegs = SimpleNamespace(
        embed_images=lambda images: torch.stack([vectors_of[i.getpixel((0, 0))[:3]] for i in images])
    )
    axes = torch.eye(3)
    return DrawingJudge(pegs, axes.repeat_interleave(5, 0), ["anger"] * 5 + ["fear"] * 5 + ["sadness"] * 5)


def test_the_own_caption_has_rank_1_where_it_is_nearest():
    axes = torch.eye(4)
    assert rank_captions(axes, axes) == [1, 1, 1, 1]
    assert rank_captions(axes[[1, 0, 2, 3]], axes) == [2, 2, 1, 1]


def test_only_a_hundred_captions_are_compared():
    captions = torch.nn.functional.normalize(torch.randn(120, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert max(rank_captions(-captions, captions)) == 100


def test_a_copy_is_at_distance_0_and_what_is_transparent_has_no_colour():
    red, blue, nothing = square((255, 0, 0, 255)), square((0, 0, 255, 255)), square((255, 0, 0, 0))
    rows = to_pixels([red, blue, nothing])
    assert nearest_distance(rows, rows).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert nearest_distance(rows[:1], rows[1:2]).item() == pytest.approx((2 / 4) ** 0.5, abs=1e-4)
    assert nearest_distance(rows[2:], to_pixels([square((0, 0, 0, 0), 128)])).item() == pytest.approx(0, abs=1e-4)


def test_figures_of_drawings():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    judge = judge_of(dict(zip(colors, torch.eye(3), strict=True)))
    images = [square((*color, 255)) for color in colors]
    figures = measure_drawings(judge, images, ["anger", "fear", "anger"], torch.eye(3), to_pixels(images[:1]))
    assert figures["emotion_agreement"] == round(2 / 3, 3)
    assert figures["caption_recall_at_10"] == 1.0  # three captions only
    assert figures["diversity"] == 1.0
    assert figures["nearest_training_rms"] == round((2 / 4) ** 0.5, 3)


def test_stickers_are_chosen_evenly():
    stickers = [
        SimpleNamespace(emotion=emotion, number=number) for number in range(3) for emotion in reversed(EMOTIONS)
    ]
    chosen = choose_evenly(stickers, 2)
    assert [sticker.emotion for sticker in chosen] == [emotion for emotion in EMOTIONS for _ in range(2)]
    assert {sticker.number for sticker in chosen} == {0, 1}
