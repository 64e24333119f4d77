import pytest
import torch
from torch.nn import functional as F

from pipelines.selector import StickerSelector


E = F.normalize(torch.eye(4), dim=-1)
EMBEDS = torch.cat([E, -E])
EMOTIONS = ["anger", "anger", "sadness", "sadness", None, None, None, None]


def unit(*values):
    return F.normalize(torch.tensor(values), dim=0)


def test_the_drawing_nearest_to_the_reply_is_chosen():
    drawings = torch.stack([unit(1.0, 0, 1, 0), unit(1.0, 0, 0, 0), unit(0, 1.0, 0, 0)])
    choice = StickerSelector(EMBEDS, EMOTIONS).choose(drawings, E[0], None, [True] * 3)
    assert choice.index == 1 and choice.scores == pytest.approx([0.5**0.5, 1.0, 0.0])
    assert choice.rank == 7 / 8  # all of the pack but the one that it is


def test_the_intended_emotion_decides_between_equals():
    drawings = torch.stack([unit(1.0, 1, 0, 0.3), unit(1.0, 0, 1, 0.3)])  # anger, and half sadness
    selector = StickerSelector(EMBEDS, EMOTIONS)
    assert selector.choose(drawings, E[3], "anger", [True] * 2).index == 0
    assert selector.choose(drawings, E[3], "sadness", [True] * 2).index == 1
    by_text = StickerSelector(EMBEDS, EMOTIONS, emotion_weight=0.0)
    nearer = torch.stack([drawings[0], unit(1.0, 0, 1, 0.4)])
    assert by_text.choose(nearer, E[3], "anger", [True] * 2).index == 1


def test_what_may_not_be_sent_is_not_chosen():
    drawings = torch.stack([unit(1.0, 0, 0, 0), unit(0, 1.0, 0, 0)])
    choice = StickerSelector(EMBEDS, EMOTIONS).choose(drawings, E[0], "anger", [False, True])
    assert choice.index == 1 and choice.scores[0] == -torch.inf
    assert choice.rank == 1 / 8  # of all the pack only what lies opposite to it


def test_a_pack_without_emotions_is_judged_by_text_alone():
    selector = StickerSelector(EMBEDS, [None] * 8)
    assert selector.choose(torch.stack([E[1], E[0]]), E[0], "anger", [True] * 2).index == 1
