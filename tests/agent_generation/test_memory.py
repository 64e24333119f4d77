import numpy as np
import pytest

from agent_generation.memory import MemoryStream


def stream_of(*entries):
    stream = MemoryStream()
    for text, turn, importance in entries:
        stream.observe(text, turn)
        stream.rate([importance])
    return stream


def test_recency_relevance_and_importance_each_decide_when_the_others_are_equal():
    same, second = np.zeros(2), np.array([0.0, 1.0])
    assert stream_of(("old", 1, 5), ("newer", 3, 5)).recall(9, same, k=1) == ["newer"]
    assert stream_of(("off", 1, 5), ("on", 1, 5)).recall(9, second, k=1) == ["on"]
    assert stream_of(("trifle", 1, 1), ("grave", 1, 10)).recall(9, same, k=1) == ["grave"]


def test_what_was_recalled_stays_fresh():
    stream = stream_of(("a", 1, 5), ("b", 1, 5), ("c", 1, 5))
    assert stream.recall(8, np.array([0.0, 1.0, 0.0]), k=1) == ["b"]
    assert stream.recall(20, np.zeros(3), k=1) == ["b"]


def test_what_is_still_in_view_is_not_recalled_but_insights_are():
    stream = stream_of(("turn 1", 1, 5), ("turn 3", 3, 5))
    assert stream.recall(4) == []
    assert stream.recall(5) == ["turn 1"]
    stream.understand("insight", 4, 7)
    assert stream.recall(5) == ["turn 1", "insight"]


def test_vectors_are_needed_only_where_not_all_can_come_to_mind():
    stream = stream_of(("a", 1, 5), ("b", 1, 5))
    assert stream.recall(8, k=2) == ["a", "b"]
    with pytest.raises(AssertionError):
        stream.recall(8, k=1)


def test_six_turns_reach_the_threshold_and_an_insight_starts_anew():
    stream = MemoryStream()
    reflected = []
    for turn in range(1, 7):
        stream.observe("said", turn)
        stream.observe("heard", turn)
        if turn % 2 == 0:
            stream.rate([4] * 4)
            if stream.must_reflect:
                stream.understand("so it is", turn, 6)
                reflected.append(turn)
    assert reflected == [4]


def test_ratings_wait_for_those_that_failed():
    stream = MemoryStream()
    stream.observe("a", 1)
    stream.observe("b", 2)
    assert [memory.weight for memory in stream.unrated()] == [5, 5]
    stream.rate([1, 9])
    assert not stream.unrated() and stream.unreflected == 10
