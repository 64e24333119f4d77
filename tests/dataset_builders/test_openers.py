"""The openers: plain, warm, all different, and with stickers that training may send."""

import re
from collections import Counter

import pytest
from datasets import load_dataset

import dataset_builders  # noqa: F401  registers the builder
from dataset_builders.schema import EMOTIONS, Opener
from dataset_builders.stickerconv.sessions import load_mini, load_openers
from dataset_builders.stickers import openmoji
from pegs.training.dialogues import opener_messages, sent_stickers
from tests.pegs.test_stage_configs import make_pack


@pytest.fixture(scope="module")
def openers():
    return load_openers()


@pytest.fixture(scope="module")
def replies(openers):
    return [turn for opener in openers for turn in opener.turns]


def test_there_are_many_of_every_emotion(openers, replies):
    felt = Counter(opener.emotion for opener in openers)
    assert set(felt) == set(EMOTIONS) and min(felt.values()) >= 100 and len(openers) >= 1500
    assert max(len(opener.turns) for opener in openers) <= 3
    assert 0.5 <= sum(turn.sticker is not None for turn in replies) / len(replies) <= 0.7


def test_replies_are_short_and_no_two_alike(replies):
    assert all(3 <= len(turn.system.split()) <= 24 for turn in replies)
    plain = [re.sub(r"\W+", " ", turn.system.lower()).strip() for turn in replies]
    assert len(set(plain)) == len(plain)
    openings = Counter(" ".join(text.split()[:2]) for text in plain)
    assert openings.most_common(1)[0][1] <= 0.08 * len(plain), openings.most_common(3)


def test_stickers_are_of_training_databases(replies):
    rows = openmoji.load_annotations()
    database_of = openmoji.split_databases({row["id"]: row["emotion"] for row in rows}, 10)
    used = {turn.sticker for turn in replies if turn.sticker}
    held_out = {m.sticker.id for s in load_mini("test") for t in s.turns for m in (t.user, t.system) if m.sticker}
    assert used <= set(database_of) and not used & held_out and len(used) >= 250
    assert {database_of[sticker] for sticker in used} <= set(range(1, 9))


def test_messages_with_and_without_stickers(openers):
    opener = next(opener for opener in openers if len(opener.turns) > 1 and opener.turns[0].sticker)
    pack = make_pack()
    opener = opener.model_copy(
        update={"turns": tuple(t.model_copy(update={"sticker": pack.stickers[0].id}) for t in opener.turns)}
    )
    messages = opener_messages(opener, pack)
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(opener.turns)
    assert messages[1]["content"][0] == {"type": "text", "text": opener.turns[0].system}
    assert sent_stickers(messages) == [pack.stickers[0].id] * len(opener.turns)
    assert not sent_stickers(opener_messages(opener))


def test_they_load_as_a_dataset(openers, tmp_path):
    rows = load_dataset("stickerconv", "openers", split="train", cache_dir=str(tmp_path))
    name = rows.features["emotion"].int2str
    assert [Opener.model_validate({**row, "emotion": name(row["emotion"])}) for row in rows] == openers
