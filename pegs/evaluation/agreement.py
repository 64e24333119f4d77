"""Agreement (appendix D.3, Table 10): of automatic metrics with human ones over models, and of judges with each other over turns."""

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from math import factorial
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from pegs.errors import InputError
from pegs.evaluation.results import ROUNDS, Result, interval, measured_alike


PAIRS: dict[str, tuple[str, ...]] = {
    "emp_txt": ("Et",),
    "emp_mm": ("Es",),
    "con": ("Con",),
    "rank": ("StiGQ", "Et", "Es", "Con", "Flu", "Inf", "StiD"),
    "id": ("StiD",),
    "f_mmr_0.8": ("Con", "Flu", "Inf", "StiD"),
    "f_mmr_0.2": ("Con", "Flu", "Inf", "StiD"),
}
"""Which human metrics' mean the paper sets against which automatic metric; there f-MMr is one, here one of each alpha."""
LOWER_IS_BETTER = frozenset({"rank"})
FEW_MODELS = 10  # below, an interval over models says next to nothing
EXACT = 7  # models up to which all orders are tried for p

Values = Mapping[str, Mapping[str, float]]


def values_of(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Values of all metrics by model, of all families."""
    values: dict[str, dict[str, float]] = {}
    for result in results:
        own = values.setdefault(result.model, {})
        own |= {name: metric.value for name, metric in result.metrics.items() if metric.value is not None}
    return values


def correlate(values: Values, automatic: str, human: Sequence[str]) -> dict[str, Any] | None:
    """
    Correlation of an automatic metric with the mean of human ones over the models that have both.

    A human metric that a model lacks (sticker quality of one that draws none) is left out of its mean. For a metric where less is better the sign is turned, so that 1 always
    means agreement.

    Args:
        values (`Mapping`): Values by model and metric.
        automatic (`str`): Name of a metric.
        human (`Sequence[str]`): Names of human metrics.

    Returns:
        `dict`: `spearman` and `kendall`, each with `value`, `low` and `high` (bootstrap over models), and `p` of Spearman (exact for few models); `models`, `automatic`, `human`; and a
        `warning` where there are too few models. `None` for fewer than three models or values that are all the same.

    """
    sign = -1.0 if automatic in LOWER_IS_BETTER else 1.0
    pairs = [
        (sign * own[automatic], float(np.mean([own[name] for name in human if name in own])))
        for own in values.values()
        if automatic in own and any(name in own for name in human)
    ]
    if len(pairs) < 3:
        return None
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.integers(0, len(pairs), (ROUNDS, len(pairs))), 1)
    drawn = drawn[(np.ptp(one[drawn], 1) > 0) & (np.ptp(other[drawn], 1) > 0)]
    different, which = np.unique(drawn, axis=0, return_inverse=True)  # of few models few draws differ
    found: dict[str, Any] = {"models": len(pairs), "automatic": automatic, "human": list(human)}
    for name, function in (("spearman", spearmanr), ("kendall", kendalltau)):
        low, high = interval(
            np.array([function(one[rows], other[rows]).statistic for rows in different])[which.ravel()]
        )
        found[name] = {"value": float(function(one, other).statistic), "low": low, "high": high}
    found["spearman"]["p"] = _spearman_p(one, other)
    if len(pairs) < FEW_MODELS:
        least = f" (with {len(pairs)}, even perfect agreement has p = {2 / factorial(len(pairs)):.2g})" if len(pairs) <= EXACT else ""  # fmt: skip
        found["warning"] = f"{len(pairs)} models are too few to tell agreement from chance{least}"
    return found


def _spearman_p(one: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p: over all orders of few models, else scipy's."""
    if len(one) > EXACT:
        return float(spearmanr(one, other).pvalue)
    observed = abs(spearmanr(one, other).statistic)
    ranks = [np.argsort(np.argsort(side)) for side in (one, other)]
    if len(set(one)) < len(one) or len(set(other)) < len(other):
        others = [abs(spearmanr(one, order).statistic) for order in permutations(other)]
    else:  # without ties the correlation is one of the ranks' squared distances
        count = len(one)
        scale = 6 / (count * (count**2 - 1))
        others = [
            abs(1 - scale * float(((ranks[0] - np.array(order)) ** 2).sum())) for order in permutations(ranks[1])
        ]
    return float(np.mean(np.array(others) >= observed - 1e-9))


def table_10(
    results: Sequence[Result], pairs: Mapping[str, Sequence[str]] = PAIRS
) -> dict[str, dict[str, Any] | None]:
    """
    Correlations of each pair (Table 10), by the automatic metric's name; see [`correlate`].

    Where models were not all measured alike (by two judges, by two towers), each way of measuring is correlated on its own and named: `con (judge gpt-5)`.
    """
    humans = [result for result in results if result.family == "human"]
    found = {}
    for automatic, human in pairs.items():
        for told, alike in (measured_alike(results, automatic) or {"": []}).items():
            name = f"{automatic} ({told})" if told else automatic
            found[name] = correlate(values_of([*alike, *humans]), automatic, human)
    return found


def parse_pair(text: str) -> tuple[str, tuple[str, ...]]:
    """
    A pair as the command takes it: `bleu_4:Et` or `cider:Con+Inf`.

    Raises:
        InputError: If it is none.

    """
    automatic, colon, human = text.partition(":")
    if not (automatic and colon and all(human.split("+"))):
        raise InputError(f"--pair {text}: must be AUTOMATIC:HUMAN, several human metrics joined by +.")
    return automatic, tuple(human.split("+"))


def between_judges(results: Sequence[Result]) -> list[dict[str, Any]]:
    """
    Agreement of judges: of every two judges of the same model, Spearman's correlation of their scores over the turns that both scored.

    Returns:
        `list[dict]`: `model`, `judges`, `metric`, `turns`, `spearman`, and the mean `difference`.

    """
    rows = []
    for one, other in combinations([result for result in results if result.family == "llm"], 2):
        if one.model != other.model or one.settings.get("judge") == other.settings.get("judge"):
            continue
        turns = [turn for turn in one.turns if turn in set(other.turns)]
        mine, yours = one.columns(turns), other.columns(turns)
        for metric in mine:
            known = ~np.isnan(mine[metric]) & ~np.isnan(yours.get(metric, np.full(len(turns), np.nan)))
            if known.sum() < 3:
                continue
            a, b = mine[metric][known], yours[metric][known]
            varied = np.ptp(a) > 0 and np.ptp(b) > 0
            rows.append(
                {
                    "model": one.model,
                    "judges": [one.settings["judge"], other.settings["judge"]],
                    "metric": metric,
                    "turns": int(known.sum()),
                    "spearman": float(spearmanr(a, b).statistic) if varied else None,
                    "difference": float((a - b).mean()),
                }
            )
    return rows
