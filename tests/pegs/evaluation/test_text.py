"""Text metrics against the reference implementations on 50 pairs (scores of theirs in `fixtures/references.json`), and by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_generation.manager import tokens
from dataset_builders.stickerconv.statistics import words_of
from pegs.errors import InputError
from pegs.evaluation import text
from tests.pegs.evaluation.references import FIXTURES, read_pairs


REFERENCES = json.loads((FIXTURES / "references.json").read_text())


def has_wordnet() -> bool:
    try:
        return bool(text.wordnet())
    except InputError:
        return False


HAS_WORDNET = has_wordnet()


@pytest.fixture(scope="module")
def columns():
    return text.text_columns(*read_pairs(), text.BertScorer(), HAS_WORDNET)


def test_bleu_equals_nltk(columns):
    found = [text.STATISTICS[f"bleu_{n}"](columns, np.ones((1, 50)))[0] for n in range(1, 5)]
    assert found == pytest.approx(REFERENCES["bleu"], abs=1e-6)
    assert found[0] > found[1] > found[2] > found[3] > 0


@pytest.mark.parametrize(
    "name",
    ["rouge_l", "cider", pytest.param("meteor", marks=pytest.mark.skipif(not HAS_WORDNET, reason="no WordNet"))],
)
def test_scores_of_pairs_equal_the_reference(columns, name):
    assert columns[name] == pytest.approx(REFERENCES[name], abs=1e-6)
    assert len(set(columns[name])) > 30  # the fixture tells pairs apart


def test_bertscore_equals_bert_score(columns):
    found = np.stack([columns[name] for name in ("bertscore_p", "bertscore_r", "bertscore")], 1)
    assert found == pytest.approx(np.array(REFERENCES["bertscore"]), abs=1e-5)


def test_the_identical_pair_is_perfect(columns):
    row = 15
    assert columns["rouge_l"][row] == columns["bertscore"][row] == pytest.approx(1)
    assert columns["cider"][row] == pytest.approx(10)


def test_tokens_are_those_of_nltk_at_sentence_ends():
    assert text.tokenize("Oh no. It's 3.5 km, isn't it?  Bye!") == [
        "Oh", "no", ".", "It", "'s", "3.5", "km", ",", "is", "n't", "it", "?", "Bye", "!",
    ]  # fmt: skip


def test_chinese_is_split_by_character():
    said, gold = "我很难过，你的狗叫Max吗？", "你的狗叫Max吗？我很难过。"
    assert text.tokenize(said) == ["我", "很", "难", "过", "，", "你", "的", "狗", "叫", "Max", "吗", "？"]
    columns = text.text_columns([gold, gold], [gold, said], with_meteor=HAS_WORDNET)
    same, moved = text.STATISTICS["bleu_4"](columns, np.eye(2))
    assert same == pytest.approx(1) and 0.3 < moved < 0.9
    assert columns["rouge_l"] == pytest.approx([1, 6 / 10])  # the longest they share: 你的狗叫 Max 吗
    assert columns["dist_1"] == pytest.approx([1, 1]) and text.distinct("哈哈哈", 1) == pytest.approx(1 / 3)
    assert text.corpus_distinct(["我很好", "我不好"], 1) == pytest.approx(4 / 6)
    assert text.cider(["我很好", "你去哪里"], ["我很好", "你去那里"])[1] > 1
    if HAS_WORDNET:
        assert columns["meteor"][0] > 0.99 and 0.5 < columns["meteor"][1] < 1


def test_table_5_and_the_agents_split_chinese_the_same_way():
    assert words_of("我爱you很多2, Don't") == ["我", "爱", "you", "很", "多", "don't"]
    assert tokens("我爱you很多2, Don't") == ("我", "爱", "you", "很", "多", "2", "don", "t")


def test_distinct_is_within_a_reply_and_over_the_corpus():
    assert text.distinct("no no No never", 1) == 0.5
    assert text.distinct("no no no", 2) == 0.5 and text.distinct("no", 2) == 0.0
    assert text.corpus_distinct(["so it is", "so it was"], 1) == pytest.approx(4 / 6)
    assert text.corpus_distinct([], 1) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4))
def test_every_text_has_finite_scores(pairs):
    columns = text.text_columns(*zip(*pairs, strict=True), with_meteor=HAS_WORDNET)
    for name, values in columns.items():
        assert np.isfinite(values).all(), name
        if name in ("rouge_l", "meteor", "dist_1"):
            assert (values >= 0).all() and (values <= 1).all(), name
    scores = [text.STATISTICS[f"bleu_{n}"](columns, np.ones((1, len(pairs))))[0] for n in (1, 4)]
    assert all(0 <= score <= 1 + 1e-9 for score in scores)


def test_a_layer_that_the_encoder_lacks_is_told():
    with pytest.raises(InputError, match="--bertscore-layer 7: must be from 0 to 6"):
        text.BertScorer(layer=7)


def test_without_wordnet_it_is_told_what_to_install(monkeypatch, tmp_path):
    text.wordnet.cache_clear()
    monkeypatch.setattr(text, "WORDNET_FOLDER", tmp_path / "none")
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(InputError, match="apt-get install wordnet-base"):
        text.wordnet()
    text.wordnet.cache_clear()
