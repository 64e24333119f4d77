import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_generation.action import clean_message, cut_message
from agent_generation.manager import StickerQuota, find_problem, rouge_l, tokens


def sends(rate, turns, rng, willing, failing=0.0):
    quota, sent = StickerQuota(rate, 6, rng), []
    for turn in range(1, turns + 1):
        mode = quota.mode(turn)
        wants = mode == "due" or (mode == "free" and rng.random() < willing)
        if wants and rng.random() >= failing:
            quota.sent += 1
            sent.append(turn)
    return sent


@pytest.mark.parametrize("rate", [0.0, 0.09, 0.31, 0.35, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("willing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("turns", [4, 6])
def test_the_rate_is_kept_whatever_the_model_would_like(rate, willing, turns):
    rng = random.Random(f"{rate}{willing}{turns}")
    count = sum(len(sends(rate, turns, rng, willing)) for _ in range(4000))
    assert abs(count / (4000 * turns) - rate) < 0.01


def test_what_was_rejected_is_made_up_for():
    rng = random.Random(0)
    count = sum(len(sends(0.35, 6, rng, 0.5, failing=0.3)) for _ in range(4000))
    assert abs(count / 24000 - 0.35) < 0.05
    assert count > sum(0.7 * len(sends(0.35, 6, rng, 0.5)) for _ in range(4000))


def test_stickers_are_spread_over_the_turns():
    rng = random.Random(1)
    turns = [turn for _ in range(4000) for turn in sends(0.6, 6, rng, willing=1.0)]
    shares = [turns.count(turn) / 4000 for turn in range(1, 7)]
    assert all(0.45 < share < 0.75 for share in shares)


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 12), st.integers(0, 2**31), st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_quota_never_owes_more_than_it_can_send(rate, max_turns, seed, answers):
    quota = StickerQuota(rate, max_turns, random.Random(seed))
    for turn in range(1, max_turns + 1):
        mode = quota.mode(turn)
        quota.sent += mode == "due" or (mode == "free" and answers[turn - 1])
    assert quota.owed(max_turns) == 0


def test_near_repetition_is_seen_in_both_languages():
    earlier = ["I really miss my dog so much today.", "今天我真的特别想念我的小狗"]
    assert find_problem("i really miss my dog SO much today", earlier) == "repeats"
    assert find_problem("I really do miss my old dog so much today!", earlier) == "repeats"
    assert find_problem("今天我真的很想念我的小狗", earlier) == "repeats"
    assert find_problem("What was his favourite place to sleep?", earlier) is None
    assert find_problem("他最喜欢在哪里睡觉？", earlier) is None
    assert find_problem("word " * 200, earlier) == "too_long" and find_problem("…!", earlier) == "empty"


def test_any_earlier_message_of_either_side_counts():
    earlier = [f"user message number {n} about topic {n * n}" for n in range(5)] + ["How long did you live with her?"]
    for said in (earlier[0], earlier[2].upper(), "So how long did you live with her?"):
        assert find_problem(said, earlier) == "repeats"


@settings(deadline=None)
@given(st.text(), st.text())
def test_rouge_l_is_a_symmetric_share(first, second):
    a, b = tokens(first), tokens(second)
    assert 0 <= rouge_l(a, b) <= 1 and rouge_l(a, b) == rouge_l(b, a)
    assert rouge_l(a, a) == (1.0 if a else 0.0)


def test_rouge_l_equals_the_reference():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    pairs = [("the cat sat on the mat", "on the mat the cat sat"), ("a b c d", "a c d e f"), ("one", "two")]
    for first, second in pairs:
        assert rouge_l(tokens(first), tokens(second)) == pytest.approx(scorer.score(first, second)["rougeL"].fmeasure)


def test_only_the_speakers_own_name_is_taken_off():
    assert clean_message("Ines: my dog died\n\nyesterday", ["Ines"]) == "my dog died yesterday"
    assert clean_message("**Ines**: hi", ["Ines"]) == "hi"
    assert clean_message("One thing: he was fourteen", ["Ines"]) == "One thing: he was fourteen"
    assert clean_message("Companion: hello", ["Ines"]) == "Companion: hello"
    assert clean_message('"I know."', ["Ines"]) == "I know."
    assert clean_message('"Yes" and "no"', ["Ines"]) == '"Yes" and "no"'


def test_a_message_pretends_no_sticker():
    assert clean_message("I know. [sends a sticker: a hug (sadness)] Tell me.", ["Ines"]) == "I know. Tell me."
    assert clean_message("[with a sticker: crying cat]", ["Ines"]) == ""
    assert clean_message("好的。【表情包：拥抱】", ["Ines"]) == "好的。"
    assert clean_message("I sent him a sticker [again] today", ["Ines"]) == "I sent him a sticker [again] today"


def test_a_long_message_is_cut_at_a_sentence_or_a_word():
    assert cut_message("First one. Second one is longer. Third", 34) == "First one. Second one is longer."
    assert cut_message("第一句话。第二句话很长很长。", 8) == "第一句话。"
    assert cut_message("no end at all in this long line", 12) == "no end at"
