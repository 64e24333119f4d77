"""Agreement of metrics: the paper's Table 10 from its own Tables 2 to 4, correlations by hand, and warnings."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from pegs.errors import InputError
from pegs.evaluation.agreement import PAIRS, _spearman_p, between_judges, correlate, parse_pair, table_10, values_of
from pegs.evaluation.paper import PAPER
from pegs.evaluation.results import make_result, mean_of, result_files, write_result
from tests.pegs.evaluation import make


def paper_values():
    values = {}
    for family in ("mm", "llm", "human"):
        for model, row in PAPER[family].items():
            if model in PAPER["human"]:
                values.setdefault(model, {}).update(row)
    return values


def test_table_10_from_the_papers_own_tables():
    """EMP-txt, CON and Rank come out of the printed means of Tables 3 and 4; EMP-mm (0.40 for 0.70) and f-MMr (0.56 for 0.90) do not."""
    pairs = {**PAIRS, "f_mmr": PAIRS["f_mmr_0.2"]}
    found = {
        name: correlate(paper_values(), name, pairs[name]) for name in ("emp_txt", "emp_mm", "con", "rank", "f_mmr")
    }
    printed = PAPER["agreement"]
    for name in ("emp_txt", "con", "rank"):
        assert found[name]["spearman"]["value"] == pytest.approx(printed["Spearman"][name], abs=0.005)
        assert found[name]["kendall"]["value"] == pytest.approx(printed["Kendall"][name], abs=0.005)
    assert found["emp_mm"]["spearman"]["value"] == pytest.approx(0.40, abs=0.005)
    assert found["f_mmr"]["spearman"]["value"] == pytest.approx(0.564, abs=0.005)
    assert all(row["spearman"]["p"] > 0.05 and "5 models" in row["warning"] for row in found.values())


def test_perfect_agreement_of_few_models_is_warned_about():
    values = {f"m{n}": {"rank": 5.0 - n, "Et": float(n), "Es": float(n)} for n in range(5)}
    found = correlate(values, "rank", ("Et", "Es"))
    assert found["spearman"]["value"] == found["kendall"]["value"] == pytest.approx(1)  # a low rank is good
    assert found["spearman"]["p"] == pytest.approx(2 / 120) and "5 models are too few" in found["warning"]
    assert "0.017" in found["warning"]


def test_many_models_are_not_warned_about_and_intervals_hold_the_value():
    rng = np.random.default_rng(0)
    values = {f"m{n}": {"cider": n + rng.normal(0, 4), "Inf": float(n)} for n in range(20)}
    found = correlate(values, "cider", ("Inf",))
    assert "warning" not in found and found["models"] == 20
    for name in ("spearman", "kendall"):
        assert -1 < found[name]["low"] < found[name]["value"] < found[name]["high"] <= 1


def test_models_without_a_metric_are_left_out():
    values = {"a": {"id": 1.0, "StiD": 1.0}, "b": {"id": 2.0}, "c": {"StiD": 3.0}, "d": {"id": 4.0, "StiD": 4.0}}
    assert correlate(values, "id", ("StiD",)) is None
    values["e"] = {"id": 5.0, "StiD": 2.0, "Et": 9.0}
    assert correlate(values, "id", ("StiD",))["models"] == 3
    assert correlate({k: {"id": 1.0, "StiD": n} for n, k in enumerate("abc")}, "id", ("StiD",)) is None


@pytest.mark.parametrize("ties", [False, True])
def test_the_exact_p_equals_its_definition(ties):
    from itertools import permutations

    one, other = np.array([1, 2, 3, 4, 5.0]), np.array([2, 1, 3, 3 if ties else 4, 5.0])
    expected = np.mean([abs(spearmanr(one, p).statistic) >= abs(spearmanr(one, other).statistic) - 1e-9 for p in permutations(other)])  # fmt: skip
    assert _spearman_p(one, other) == pytest.approx(expected)


def test_judges_are_compared_turn_by_turn():
    turns = [f"s{n}/1" for n in range(6)]

    def result(judge, values, model="m"):
        return make_result("llm", model, turns, {"con": np.array(values, float)}, {"con": mean_of("con")}, {"judge": judge})  # fmt: skip

    one, two = result("a", [1, 2, 3, 4, 5, np.nan]), result("b", [2, 3, 4, 5, 5, 5])
    [row] = between_judges([one, two, result("b", [1] * 6, "other"), result("a", [1] * 6)])[:1]
    assert row["judges"] == ["a", "b"] and row["turns"] == 5 and row["difference"] == pytest.approx(-0.8)
    assert row["spearman"] == pytest.approx(spearmanr([1, 2, 3, 4, 5], [2, 3, 4, 5, 5]).statistic)


def test_values_are_of_all_families():
    made = [make_result(family, "m", ["s/1"], {name: np.array([0.5])}, {name: mean_of(name)}, {}) for family, name in (("mm", "mmr"), ("text", "cider"))]  # fmt: skip
    assert values_of(made) == {"m": {"mmr": 0.5, "cider": 0.5}}


def of_one_value(family, model, metric, value, **settings):
    return make_result(family, model, ["s/1"], {metric: np.array([float(value)])}, {metric: mean_of(metric)}, settings)


def test_each_judge_and_tower_is_correlated_on_its_own():
    """Judge b, who turns everything round, has judged three of four models; the fourth's MMr is of another tower."""
    scores = dict(enumerate("wxyz"))
    humans = [of_one_value("human", model, "Con", n) for n, model in scores.items()]
    one = [of_one_value("llm", model, "con", n, judge="a") for n, model in scores.items()]
    other = [of_one_value("llm", model, "con", 4 - n, judge="b") for n, model in scores.items() if n < 3]
    towers = [of_one_value("mm", model, "mmr", n if n < 3 else -1, tower="clip" if n < 3 else "mini") for n, model in scores.items()]  # fmt: skip
    for order in (one + other, other + one):
        found = table_10([*humans, *order, *towers], {"con": ("Con",), "mmr": ("Con",), "cider": ("Con",)})
        by_a, by_b = found["con (judge a)"], found["con (judge b)"]
        assert (by_a["spearman"]["value"], by_a["models"]) == (pytest.approx(1), 4)
        assert (by_b["spearman"]["value"], by_b["models"]) == (pytest.approx(-1), 3)
        assert found["mmr (tower clip)"]["models"] == 3 and found["mmr (tower mini)"] is None
        assert found["cider"] is None and len(found) == 5
    assert list(table_10([*humans, *one], {"con": ("Con",)})) == ["con"]


def test_the_command_names_judges(tmp_path):
    for judge, turn in (("a", 1), ("b", -1)):
        results = [of_one_value("llm", model, "con", turn * n, judge=judge) for n, model in enumerate("xyz")]
        for result, file in zip(results, result_files(tmp_path / judge, "llm", dict(zip("xyz", "xyz", strict=True))), strict=True):  # fmt: skip
            write_result(result, file)
    for n, file in enumerate(result_files(tmp_path / "a", "human", dict(zip("xyz", "xyz", strict=True)))):
        write_result(of_one_value("human", "xyz"[n], "Con", n), file)
    done = make.pegs("agreement", tmp_path / "b", tmp_path / "a", "--pair", "con:Con", "--pair", "cider:Con")
    assert done.returncode == 0, done.stderr
    assert "con (judge a) with Con: spearman 1.00" in done.stdout
    assert "con (judge b) with Con: spearman -1.00" in done.stdout
    assert "cider: fewer than three models have it" in done.stdout


def test_pairs_of_the_command():
    assert parse_pair("cider:Con+Inf") == ("cider", ("Con", "Inf"))
    for bad in ("cider", "cider:", ":Et", "cider:Et+"):
        with pytest.raises(InputError, match="must be AUTOMATIC:HUMAN"):
            parse_pair(bad)
