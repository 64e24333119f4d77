"""Agreement of metrics: the paper's Table 10 from its own Tables 2 to 4, correlations by hand, and warnings."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from pegs.errors import InputError
from pegs.evaluation.agreement import PAIRS, _spearman_p, between_judges, correlate, parse_pair, table_10, values_of
from pegs.evaluation.paper import PAPER
from pegs.evaluation.results import make_result, mean_of


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
    found = table_10(paper_values(), {name: pairs[name] for name in ("emp_txt", "emp_mm", "con", "rank", "f_mmr")})
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


def test_pairs_of_the_command():
    assert parse_pair("cider:Con+Inf") == ("cider", ("Con", "Inf"))
    for bad in ("cider", "cider:", ":Et", "cider:Et+"):
        with pytest.raises(InputError, match="must be AUTOMATIC:HUMAN"):
            parse_pair(bad)
