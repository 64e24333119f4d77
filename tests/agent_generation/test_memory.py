import numpy as np

from agent_generation.memory import MemoryStream


AXES = np.eye(4, dtype=np.float32)


def stream_of(*entries):
    stream = MemoryStream()
    for text, turn, axis, importance in entries:
        stream.observe(text, turn, AXES[axis])
        stream.rate([importance])
    return stream


def test_recency_relevance_and_importance_each_decide_when_the_others_are_equal():
    by_time = stream_of(("old", 1, 0, 5), ("newer", 3, 0, 5))
    assert by_time.recall(AXES[0], 9, k=1) == ["newer"]
    by_relevance = stream_of(("off", 1, 1, 5), ("on", 1, 0, 5))
    assert by_relevance.recall(AXES[0], 9, k=1) == ["on"]
    by_importance = stream_of(("trifle", 1, 0, 1), ("grave", 1, 0, 10))
    assert by_importance.recall(AXES[0], 9, k=1) == ["grave"]


def test_what_was_recalled_stays_fresh():
    stream = stream_of(("a", 1, 0, 5), ("b", 1, 1, 5), ("c", 1, 2, 5))
    assert stream.recall(AXES[1], 8, k=1) == ["b"]
    assert stream.recall(AXES[3], 20, k=1) == ["b"]


def test_what_is_still_in_view_is_not_recalled_but_insights_are():
    stream = stream_of(("turn 1", 1, 0, 5), ("turn 3", 3, 0, 5))
    assert stream.recall(AXES[0], 4) == []
    assert stream.recall(AXES[0], 5) == ["turn 1"]
    stream.understand("insight", 4, AXES[0], 7)
    assert stream.recall(AXES[0], 5) == ["turn 1", "insight"]


def test_six_turns_reach_the_threshold_and_an_insight_starts_anew():
    stream = MemoryStream()
    reflected = []
    for turn in range(1, 7):
        stream.observe("said", turn, AXES[0])
        stream.observe("heard", turn, AXES[1])
        if turn % 2 == 0:
            stream.rate([4] * 4)
            if stream.must_reflect:
                stream.understand("so it is", turn, AXES[2], 6)
                reflected.append(turn)
    assert reflected == [4]


def test_ratings_wait_for_those_that_failed():
    stream = MemoryStream()
    stream.observe("a", 1, AXES[0])
    stream.observe("b", 2, AXES[0])
    assert [memory.weight for memory in stream.unrated()] == [5, 5]
    stream.rate([1, 9])
    assert not stream.unrated() and stream.unreflected == 10
