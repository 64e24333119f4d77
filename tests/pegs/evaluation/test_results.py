"""Intervals and paired differences: coverage, sessions as units, and files."""

import numpy as np
import pytest

from pegs.errors import InputError
from pegs.evaluation import multimodal
from pegs.evaluation.results import (
    compare,
    make_result,
    mean_of,
    measure,
    read_result,
    resample,
    result_files,
    write_result,
)
from pegs.evaluation.text import STATISTICS, text_columns
from tests.pegs.evaluation import make


def turns(sessions, each=1):
    return [f"s{s}/{t}" for s in range(sessions) for t in range(1, each + 1)]


def result(model, values, each=1):
    names = turns(len(values) // each, each)
    return make_result("text", model, names, {"x": np.array(values, float)}, {"x": mean_of("x")}, {})


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        metric = measure({"x": rng.normal(0.5, 1, 60)}, turns(60), {"x": mean_of("x")})["x"]
        held += metric.low <= 0.5 <= metric.high
    assert 0.90 <= held / 200 <= 0.99


def test_turns_of_a_session_are_drawn_together():
    weights = resample(turns(5, 3), rounds=50).reshape(50, 5, 3)
    assert (weights == weights[:, :, :1]).all() and (weights[:, :, 0].sum(1) == 5).all()
    values = np.repeat(np.arange(20.0), 10)  # ten equal turns a session: they are worth one
    clustered = measure({"x": values}, turns(20, 10), {"x": mean_of("x")})["x"]
    alone = measure({"x": np.arange(20.0)}, turns(20), {"x": mean_of("x")})["x"]
    assert clustered.high - clustered.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_missing_figures_are_left_out_and_counted():
    metric = measure({"x": np.array([1.0, np.nan, 3.0])}, turns(3), {"x": mean_of("x")})["x"]
    assert metric.value == 2 and metric.n == 2
    empty = measure({"x": np.full(3, np.nan)}, turns(3), {"x": mean_of("x")})["x"]
    assert empty.value is None and empty.low is None and empty.n == 0


def test_a_metric_counts_the_turns_that_have_all_figures_it_uses():
    columns = {"sticker_logit": np.array([1.0, np.nan, -1.0, 0.5]), "gold_frequency": np.array([1.0, 0.0, 0.0, 1.0]), "frequency": np.ones(4), "mmr": np.array([0.5, 0.5, np.nan, np.nan])}  # fmt: skip
    statistics = {name: multimodal.STATISTICS[name] for name in ("timing_ap", "f_mmr_0.8", "gold_frequency")}
    found = measure(columns, turns(4), statistics)
    assert {name: metric.n for name, metric in found.items()} == {"timing_ap": 3, "f_mmr_0.8": 2, "gold_frequency": 4}
    without = measure({**columns, "sticker_logit": np.full(4, np.nan)}, turns(4), statistics)["timing_ap"]
    assert without.value is None and without.n == 0


def test_paired_differences_see_what_intervals_hide():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 80)
    one, other = result("a", base + 0.3 + rng.normal(0, 0.2, 80)), result("b", base)
    assert one.metrics["x"].low < other.metrics["x"].value < one.metrics["x"].high  # the intervals overlap
    difference = compare(one, other, mean_of("x"))
    assert difference.p < 0.01 and difference.low < 0.3 < difference.high
    assert compare(other, one, mean_of("x")).value == pytest.approx(-difference.value)
    assert compare(one, one, mean_of("x")).p == 1.0
    false_alarms = sum(compare(result("a", rng.normal(size=40)), result("b", rng.normal(size=40)), mean_of("x")).p < 0.05 for _ in range(100))  # fmt: skip
    assert false_alarms <= 12


def test_a_plain_difference_survives_the_correction_for_a_whole_table():
    """Table 1 of seven models asks 66 questions: p must be able to fall below 0.05 / 66."""
    rng = np.random.default_rng(0)
    one, other = result("a", rng.normal(1, 0.5, 54)), result("b", rng.normal(0, 0.5, 54))
    assert compare(one, other, mean_of("x")).p < 0.05 / 100
    few = compare(result("a", [1.0, 2.0, 2.5]), result("b", [0.0, 0.5, 2.0]), mean_of("x"))
    assert few.p > 0.05  # three sessions do not settle anything
    assert compare(result("a", [1.0]), result("b", [0.0]), mean_of("x")).p == 1.0
    for sessions in (2, 9):  # the same in each: as if signs were flipped, and not 0
        one, other = result("a", [0.3] * sessions), result("b", [0.1] * sessions)
        assert compare(one, other, mean_of("x")).p == 2.0 ** (1 - sessions)


def test_corpus_bleu_of_resampled_turns_is_that_of_the_drawn_corpus():
    pairs = [("a b c d e", "a b c d e"), ("one two three four", "one two four"), ("x y z", "x y w")]
    columns = text_columns(*zip(*pairs, strict=True), with_meteor=False)
    drawn = text_columns(*zip(pairs[0], pairs[0], pairs[2], strict=True), with_meteor=False)
    weights = np.array([[2.0, 0.0, 1.0]])
    assert STATISTICS["bleu_2"](columns, weights)[0] == pytest.approx(STATISTICS["bleu_2"](drawn, np.ones((1, 3)))[0])


def test_models_without_a_shared_turn_are_not_compared():
    other = result("b", [1, 2]).model_copy(update={"turns": ("q/1", "r/1")})
    assert compare(result("a", [1, 2]), other, mean_of("x")) is None


def test_files_come_back_and_wrong_ones_are_named(tmp_path):
    made = result("a/b c", [1, np.nan, 3])
    [file] = result_files(tmp_path, "text", {made.model: made.model})
    write_result(made, file)
    assert file.name == "a-b-c.text.json" and read_result(file) == made
    file.write_text(file.read_text().replace('"n": 2', '"n": "many"'))
    with pytest.raises(InputError, match=r"a-b-c.text.json: metrics.x.n: Input should be a valid integer"):
        read_result(file)
    short = made.model_copy(update={"scores": {"x": (1.0,)}})
    with pytest.raises(InputError, match=r"scores.x: expected 3 values, got 1"):
        write_result(short, file)
        read_result(file)
    with pytest.raises(InputError, match="No such file"):
        read_result(tmp_path / "none.json")


def test_two_results_never_share_a_file(tmp_path):
    with pytest.raises(InputError, match=r"^a b: its results and those of a/b would both be .*a-b.human.json"):
        result_files(tmp_path, "human", {"a/b": "a/b", "a b": "a b"})
    for model in ("one", "two"):
        make.make_run(tmp_path / model, model).path.rename(tmp_path / model / "test.jsonl")
    files = [tmp_path / model / "test.jsonl" for model in ("one", "two")]
    for command in (("text",), ("mm",), ("llm", "--llm", "http://127.0.0.1:1", "--model", "judge")):
        done = make.pegs(*command, *files, "--out", tmp_path / "results")
        assert done.returncode == 2 and f"would both be {tmp_path}/results/test.{command[0]}.json" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not list((tmp_path / "results").iterdir())
