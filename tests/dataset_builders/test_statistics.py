"""Statistics against numbers counted by hand, and the figures."""

from xml.etree import ElementTree

import pytest
from PIL import Image

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.build import build_dataset
from dataset_builders.stickerconv.emotion_words import EMOTION_OF, WORDS
from dataset_builders.stickerconv.features import encode_emotions
from dataset_builders.stickerconv.figures import draw_figures
from dataset_builders.stickerconv.statistics import Tally, Variety, compute_statistics, words_of
from dataset_builders.stickers import openmoji


def row(name: str, split: str, turns: list[tuple], emotion: str = "fear") -> dict:
    """A row of `sessions`; a turn is the User's text and sticker, then the System's; a sticker is id and emotion."""

    def message(text, sticker):
        use = sticker and {"id": sticker[0], "emotion": sticker[1], "query": "so happy", "rank": 0, "intention": None}
        return {"text": text, "sticker": use}

    made = [{"turn": n, "user": message(*turn[:2]), "system": message(*turn[2:])} for n, turn in enumerate(turns, 1)]
    return encode_emotions(
        {
            "session_id": name,
            "split": split,
            "profile": {"name": "A", "emotion": emotion, "persona": "You are A.", "situation": f"Sad news, {name}."},
            "turns": made,
            "ended_by": "closure",
            "generator": {"name": "hand", "model": None},
        }
    )


@pytest.fixture
def statistics():
    rows = [
        row("one", "train", [("I am scared", ("cat", "fear"), "That is a lot", None), ("yes", None, "That is it", ("sun", "happiness"))]),
        row("two", "train", [("Hello there", None, "Oh", None)], "anger"),
        row("two", "test", [("Hello there", None, "Oh", None)], "anger"),
        row("three", "test", [("Hm", None, "Well now", ("sun", "happiness"))], "anger"),
    ]  # fmt: skip
    tally = Tally(count_tokens=lambda texts: 10 * len(texts))
    for one in rows:
        tally.add(one)
    return tally.result()


def test_table_5(statistics):
    assert statistics["table_5"] == {
        "train": {"unique_stickers": 2, "sessions": 2, "turns": 3, "stickers": 2, "words": 14, "tokens": 60},
        "test": {"unique_stickers": 1, "sessions": 2, "turns": 2, "stickers": 1, "words": 6, "tokens": 40},
    }
    everything = statistics["all"]
    assert (everything["sessions"], everything["turns"], everything["stickers"]) == (4, 5, 3)
    assert (everything["unique_stickers"], everything["sessions_without_sticker"]) == (2, 2)
    assert (everything["turns_per_session"], everything["stickers_per_session"]) == (1.25, 0.75)


def test_emotions_and_words(statistics):
    assert statistics["sticker_emotions"] == {"user": {"fear": 1}, "system": {"happiness": 2}}
    assert statistics["profile_emotions"] == {"anger": 3, "fear": 1}
    assert statistics["emotion_words"] == {"sad": 4, "happy": 3, "scared": 1}


def test_rates(statistics):
    rates = statistics["sticker_rate"]
    assert rates["all"]["all"] == {"turns": 5, "user": 0.2, "system": 0.4}
    assert rates["by_turn"] == {"1": {"turns": 4, "user": 0.25, "system": 0.25}, "2": {"turns": 1, "user": 0.0, "system": 1.0}}  # fmt: skip
    assert rates["by_position"]["last"] == {"turns": 1, "user": 0.0, "system": 1.0}
    assert rates["by_emotion"] == {"anger": {"turns": 3, "user": 0.0, "system": 0.3333}, "fear": {"turns": 2, "user": 0.5, "system": 0.5}}  # fmt: skip


def test_duplicates_and_leaks(statistics):
    assert statistics["duplicate_sessions"] == 1
    assert statistics["leaks"] == {"stickers": 1, "profiles": 1, "texts": 2}
    assert statistics["variety"]["user"]["repeated_texts"] == 1
    assert statistics["variety"]["sessions_whose_system_turns_start_alike"] == 0.25


def test_variety():
    variety = Variety()
    for text in ("a b a b", "a b c"):
        variety.add(text, words_of(text))
    found = variety.result()
    assert (found["distinct_1"], found["distinct_2"], found["distinct_3"]) == (round(3 / 7, 4), round(3 / 5, 4), 1.0)
    assert (found["commonest_opening"], found["commonest_opening_share"], found["words_per_text"]) == ("a b", 1.0, 3.5)


def test_the_words_of_feeling_have_one_emotion_each():
    assert set(WORDS) == set(EMOTIONS)
    assert sum(len(set(words.split())) for words in WORDS.values()) == len(EMOTION_OF)


def test_mini_is_counted_and_drawn(tmp_path):
    openmoji.build_pack(size=32).save(tmp_path / "pack")
    info, _ = build_dataset(["mini"], tmp_path / "out", stickers=str(tmp_path / "pack"))
    statistics = compute_statistics(tmp_path / "out")
    for split, size in info.sizes["sessions"].items():
        assert statistics["table_5"][split]["sessions"] == size.rows
        assert statistics["table_5"][split]["turns"] == info.sizes["turns"][split].rows
    assert statistics["leaks"] == {"stickers": 0, "profiles": 0, "texts": 0} and not statistics["duplicate_sessions"]
    assert len(statistics["emotion_words"]) == 200
    assert draw_figures(statistics, tmp_path / "assets") == ["sticker_emotions", "profile_emotions", "emotion_words"]
    for name in ("sticker_emotions", "profile_emotions", "emotion_words"):
        with Image.open(tmp_path / "assets" / f"{name}.png") as picture:
            assert picture.width == 1200 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
        assert ElementTree.parse(tmp_path / "assets" / f"{name}.svg").getroot().tag.endswith("svg")
    before = (tmp_path / "assets" / "emotion_words.svg").read_bytes()
    draw_figures(statistics, tmp_path / "assets")
    assert (tmp_path / "assets" / "emotion_words.svg").read_bytes() == before


def test_what_is_not_told_is_not_drawn(tmp_path):
    empty = {"sticker_emotions": {"user": {"not told": 3}, "system": {}}, "profile_emotions": {"not told": 3}, "emotion_words": {}}  # fmt: skip
    assert draw_figures(empty, tmp_path) == []


def test_what_is_empty_is_neither_repeated_nor_leaked():
    tally = Tally()
    for split in ("train", "test"):
        one = row(
            split, split, [(f"Hi {split}", None, "", ("cat", "fear")), ("", None, "", None), ("", None, "123", None)]
        )
        one["profile"].update(persona="", situation="")
        tally.add(one)
        tally.add(row(f"silent {split}", split, [("", ("sun", "fear"), "", None)]))
    found = tally.result()
    assert found["leaks"] == {"stickers": 2, "profiles": 0, "texts": 1} and found["duplicate_sessions"] == 0
    assert found["all"]["profiles"] == 2 and found["variety"]["sessions_whose_system_turns_start_alike"] == 0
    assert found["variety"]["user"]["repeated_texts"] == 0 and found["variety"]["system"]["commonest_opening"] == ""
    assert found["variety"]["user"]["words_per_text"] == 2
