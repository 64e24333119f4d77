"""What a metric family writes for a model: values with bootstrap intervals, and the figures of every turn that they come from."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import JsonValue, ValidationError
from scipy.stats import t as student

from dataset_builders.schema import Record
from dataset_builders.stickerconv.sessions import describe
from pegs.errors import InputError


ROUNDS = 1000  # of the bootstrap
LEVEL = 0.95

Family = Literal["text", "mm", "llm", "human"]
Columns = Mapping[str, np.ndarray]
Statistic = Callable[[Columns, np.ndarray], np.ndarray]
"""A metric of figures `(n,)` by name, under weights `(rounds, n)` of the turns: `(rounds,)`."""


class Metric(Record):
    """A metric's value, its 95 % interval, and how many turns it is of; `None` where there is nothing to measure."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int


class Result(Record):
    """
    One model's figures of one family.

    `turns` names the turns, `scores` holds their figures in that order. `settings` say with what it was measured (encoders, judge, file), `details` what else was found.
    """

    family: Family
    model: str
    settings: dict[str, JsonValue]
    metrics: dict[str, Metric]
    details: dict[str, JsonValue] = {}
    turns: tuple[str, ...]
    scores: dict[str, tuple[float | None, ...]]

    def columns(self, turns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Figures by name, of all turns or of some in their order; NaN where there is none."""
        place = {turn: row for row, turn in enumerate(self.turns)}
        rows = [place[turn] for turn in turns] if turns is not None else slice(None)
        return {name: np.array(values, float)[rows] for name, values in self.scores.items()}


def mean_of(column: str) -> Statistic:
    """The mean of a figure over the turns that have it."""

    def mean(columns: Columns, weights: np.ndarray) -> np.ndarray:
        known = ~np.isnan(columns[column])
        return divide(weights[:, known] @ columns[column][known], weights[:, known].sum(1))

    return mean


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def resample(turns: Sequence[str], rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """
    Bootstrap weights of turns named `session/turn`: whole sessions are drawn, because turns of one session are alike.

    Returns:
        `np.ndarray` of shape `(rounds, len(turns))`: How often each turn was drawn.

    """
    sessions, which = np.unique([turn.rpartition("/")[0] for turn in turns], return_inverse=True)
    count = len(sessions)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=rounds)
    return drawn[:, which].astype(float)


class _Used(dict[str, np.ndarray]):
    """Figures that keep the names of those a statistic used."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.names.add(name)
        return super().__getitem__(name)


def measure(columns: Columns, turns: Sequence[str], statistics: Mapping[str, Statistic]) -> dict[str, Metric]:
    """
    Values of metrics with their 95 % intervals, by bootstrap over sessions.

    Args:
        columns (`Mapping[str, np.ndarray]`): Figures `(n,)` of the turns.
        turns (`Sequence[str]`): Their names.
        statistics (`Mapping[str, Statistic]`): The metrics.

    Returns:
        `dict[str, Metric]`.

    """
    weights, once = resample(turns), np.ones((1, len(turns)))
    metrics = {}
    for name, statistic in statistics.items():
        used = _Used(columns)
        value = float(statistic(used, once)[0])
        known = [~np.isnan(columns[column]) for column in used.names]
        count = int(np.all(known, 0).sum()) if known else len(turns)
        if np.isnan(value):
            metrics[name] = Metric(value=None, n=count)
            continue
        low, high = interval(statistic(columns, weights))
        metrics[name] = Metric(value=value, low=low, high=high, n=count)
    return metrics


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


JUDGED = ("judge", "stickers_shown_as", "language")
HANGS_ON: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mmr", "mmr_precision", "mmr_recall", "mmr_f1", "f_mmr_0.8", "f_mmr_0.2", "id", "emotion_agreement"), ("tower",)),
    **dict.fromkeys(("bertscore_p", "bertscore_r", "bertscore"), ("bertscore_encoder", "bertscore_layer")),
    **dict.fromkeys(("emp_txt", "emp_mm", "con"), JUDGED),
    "rank": (*JUDGED, "candidates"),
}  # fmt: skip
"""Settings, and of ranks the models ranked, that must be the same where a metric's values are compared."""


def measured_alike(results: Iterable[Result], name: str) -> dict[str, list[Result]]:
    """
    Results that have a metric, in groups whose values can be compared.

    Args:
        results (`Iterable[Result]`): Of any models.
        name (`str`): The metric.

    Returns:
        `dict[str, list[Result]]`: By the settings that tell the groups apart (`tower mini`), empty of a single group.

    """
    having = [result for result in results if name in result.metrics and result.metrics[name].value is not None]
    settings = [{key: _setting(result, key) for key in HANGS_ON.get(name, ())} for result in having]
    differing = [key for key in HANGS_ON.get(name, ()) if len({told[key] for told in settings}) > 1]
    groups: dict[str, list[Result]] = {}
    for result, told in zip(having, settings, strict=True):
        groups.setdefault(", ".join(f"{key} {told[key]}" for key in differing), []).append(result)
    return groups


def _setting(result: Result, key: str) -> str:
    value = result.settings.get(key, result.details.get(key))
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)


class Difference(Record):
    """How much more a model has than another over the same turns; `p` is two-sided, by paired bootstrap over sessions; see [`compare`]."""

    value: float
    low: float
    high: float
    p: float


def compare(one: Result, other: Result, statistic: Statistic) -> Difference | None:
    """
    A metric's difference between two models over the turns that both have.

    Its p is of Student's t with the bootstrap's standard error and as many degrees of freedom as there are sessions but one: a share of the bootstrap's rounds could not fall low
    enough for the many differences of a table. A difference that is the same in every session has no such error: its p is that of the sign-flip test.

    Returns:
        [`Difference`], or `None` if they share no turn, or one has nothing to measure there.

    """
    shared = set(other.turns)
    turns = [turn for turn in one.turns if turn in shared]
    if not turns:
        return None
    weights = np.vstack([np.ones(len(turns)), resample(turns)])
    differences = statistic(one.columns(turns), weights) - statistic(other.columns(turns), weights)
    value, drawn = differences[0], differences[1:][~np.isnan(differences[1:])]
    if np.isnan(value) or not len(drawn):
        return None
    low, high = interval(drawn)
    return Difference(value=float(value), low=low, high=high, p=_p_value(value, drawn, turns))


def _p_value(value: float, drawn: np.ndarray, turns: Sequence[str]) -> float:
    freedom = len({turn.rpartition("/")[0] for turn in turns}) - 1
    if value == 0 or freedom == 0:
        return 1.0
    error = float(np.std(drawn))
    if error < 1e-9 * abs(value):  # but for rounding none
        return 2.0**-freedom
    return float(2 * student.sf(abs(value) / error, freedom))


def make_result(
    family: Family,
    model: str,
    turns: Sequence[str],
    columns: Columns,
    statistics: Mapping[str, Statistic],
    settings: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> Result:
    """A [`Result`] of figures; see [`measure`]."""
    scores = {
        name: tuple(None if np.isnan(value) else round(float(value), 7) for value in values)
        for name, values in columns.items()
    }
    metrics = measure(columns, turns, statistics)
    return Result(
        family=family, model=model, settings=settings, metrics=metrics, details=details or {}, turns=tuple(turns), scores=scores
    )  # fmt: skip


def make_folder(folder: Path, option: str = "--out") -> None:
    """
    Make a folder where there is none.

    Raises:
        InputError: If that cannot be, naming the option that asked for it.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {folder}: must be a folder ({error.strerror}).") from None


def result_files(folder: Path, family: Family, stems: Mapping[str, str], option: str = "--out") -> list[Path]:
    """
    Files `<stem>.<family>.json` for results, and the folder for them.

    Args:
        folder (`Path`): The folder.
        family (`str`): Of the results.
        stems (`Mapping[str, str]`): How each file begins, by what it is the result of.
        option (`str`, *optional*, defaults to `"--out"`): What names the folder.

    Raises:
        InputError: If two results would be in one file, or the folder cannot be made.

    """
    make_folder(folder, option)
    files: dict[Path, str] = {}
    for name, stem in stems.items():
        file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)}.{family}.json"
        if file in files:
            raise InputError(f"{name}: its results and those of {files[file]} would both be {file}; rename one.")
        files[file] = name
    return list(files)


def write_result(result: Result, file: Path) -> None:
    """Write a result into a file of [`result_files`]."""
    write_json(file, result.model_dump())


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all; its folder is made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
    partial.replace(file)


def read_result(path: Path) -> Result:
    """
    Read what [`write_result`] wrote.

    Raises:
        InputError: If it is not readable or no result, naming file and field.

    """
    try:
        result = Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from None
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)}") from None
    for name, values in result.scores.items():
        if len(values) != len(result.turns):
            raise InputError(f"{path}: scores.{name}: expected {len(result.turns)} values, got {len(values)}.")
    return result
