"""The report: the paper's Tables 1 to 5, 9 and 10 for any set of runs beside the paper's own, as Markdown, LaTeX and HTML with plots and replies."""

import base64
import io
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dataset_builders.stickers.pack import StickerPack
from pegs.errors import InputError
from pegs.evaluation import human, llm_judge, multimodal, text
from pegs.evaluation.agreement import LOWER_IS_BETTER, between_judges, table_10
from pegs.evaluation.llm_judge import sample_turns
from pegs.evaluation.multimodal import f_mmr
from pegs.evaluation.paper import PAPER
from pegs.evaluation.predict import Prediction, Predictions, Said, common_turns
from pegs.evaluation.results import (
    Difference,
    Result,
    Statistic,
    compare,
    make_folder,
    measured_alike,
    read_result,
    write_json,
)
from pegs.evaluation.templates import render_page


SIGNIFICANT = 0.05
THUMBNAIL = 160  # pixels
LAST_MESSAGES = 5  # of the context of an example
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F5F5F")  # Okabe and Ito

STATISTICS: dict[str, Statistic] = {**text.STATISTICS, **multimodal.STATISTICS, **llm_judge.STATISTICS, **human.STATISTICS}  # fmt: skip
NEITHER_IS_BETTER = frozenset({"frequency", "gold_frequency"})

# family, number, title, and its columns by metric
LAYOUT: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("text", "1", "Quality of the text", {"bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4", "dist_1": "Dist-1", "dist_2": "Dist-2", "dist_3": "Dist-3", "rouge_l": "ROU_L", "meteor": "MET", "cider": "CIDEr", "bertscore": "BERTS"}),
    ("mm", "2", "Multimodal metrics", {"frequency": "Freq", "mmr": "MMr", "f_mmr_0.8": "f-MMr (alpha 0.8)", "f_mmr_0.2": "f-MMr (alpha 0.2)"}),
    ("mm", "2b", "Multimodal metrics beyond the paper", {"mmr_f1": "MMr F1", "id": "ID", "recall_at_1": "R@1", "recall_at_5": "R@5", "recall_at_10": "R@10", "mrr": "MRR", "timing_ap": "Timing AP", "timing_agreement": "Timing agr.", "emotion_agreement": "Emotion agr."}),
    ("llm", "3", "LLM-based metrics", {"emp_txt": "EMP-txt", "emp_mm": "EMP-mm", "con": "CON", "rank": "Rank"}),
    ("human", "4", "Human evaluation", {key: key for key in ("StiGQ", "Et", "Es", "Con", "Flu", "Inf", "StiD")}),
)  # fmt: skip
NOTES = {
    "2": "The paper states alpha 0.8, but its printed f-MMr fits 0.2 and stands there; its column for 0.8 is computed here from its Freq and MMr (eq. 11).",
    "2b": "R@k and MRR: place of the reference's sticker in the session's database, after the reference's text. Timing AP: average precision of the model's odds of a sticker. Timing agreement: share of turns where both send a sticker or neither does; emotion agreement: of those where both do, the share with the same emotion. ID is one minus the mean similarity of the stickers sent.",
    "3": "EMP-txt is over the replies without a sticker, EMP-mm over those with one. Rank: lower is better.",
}
COUNTERPARTS = {"pegs-ret": "PEGS-Ret", "pegs-gen": "PEGS-Gen", "pegs-rag": "PEGS-RAG", "baseline-text": "Vicuna-text", "baseline-tool": "Vicuna-tool"}  # fmt: skip
BASELINES = ("baseline-text", "baseline-tool")
CLAIMS = {name: (family, title) for family, number, _, columns in LAYOUT if number in ("1", "2") for name, title in columns.items() if name not in NEITHER_IS_BETTER}  # fmt: skip
"""Metrics of Tables 1 and 2 in which one model can be better than another: family and title."""
UNTOLD = frozenset({"predictions", "sha256", "study"})  # settings that say where, not how
MATCHED = "95 % intervals by bootstrap over sessions."
DATASET_COLUMNS = {"sessions": "Number", "unique_stickers": "Unique Sticker", "turns": "Turn", "vicuna_tokens": "Token (Vicuna)", "gpt_tokens": "Token (GPT)"}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A value as printed, its interval, whether it is the best of its column, and its mark of significance."""

    text: str = "-"
    spread: str = ""
    is_best: bool = False
    mark: str = ""


@dataclass
class Table:
    """A table of ours beside the paper's rows; `families` of metrics that are plotted keep their values."""

    number: str
    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    paper: list[tuple[str, list[Cell]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plot: str = ""


@dataclass
class Report:
    """Everything that is printed; `differences` are of each metric and model from the reference model."""

    against: str
    tables: list[Table]
    examples: list[dict[str, Any]]
    differences: dict[str, dict[str, Difference]]
    settings: list[tuple[str, str]]
    attribution: str


def read_results(paths: Iterable[Path]) -> tuple[list[Result], dict[str, Any]]:
    """
    Read results, from files or folders.

    Args:
        paths (`Iterable[Path]`): Files `*.text.json`, `*.mm.json`, `*.llm.json`, `*.human.json`, or folders with such.

    Returns:
        `tuple[list[Result], dict]`: The results, and what a `raters.json` in a folder says (ICC).

    Raises:
        InputError: If there are none, one is wrong, or a model comes twice with the same family and judge.

    """
    files: list[Path] = []
    raters: dict[str, Any] = {}
    for path in paths:
        if path.is_dir():
            files += sorted(f for family in ("text", "mm", "llm", "human") for f in path.glob(f"*.{family}.json"))
            if (path / "raters.json").is_file():
                raters = _read_json(path / "raters.json")
        else:
            files.append(path)
    results: list[Result] = []
    seen: dict[tuple[str, str, str], Path] = {}
    for file in files:
        result = read_result(file)
        key = (result.family, result.model, str(result.settings.get("judge")))
        if key in seen:
            raise InputError(f"{file}: model: {result.model!r} is also in {seen[key]}.")
        seen[key] = file
        results.append(result)
    if not results:
        raise InputError(f"{', '.join(map(str, paths))}: no results there.")
    return results, raters


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: must be a JSON object.")
    return found


Key = TypeVar("Key", bound=Hashable)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """P values corrected for their number (Holm 1979)."""
    found, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        found[name] = running
    return found


def differences_from(
    results: Sequence[Result], against: str, columns: Mapping[str, str]
) -> dict[str, dict[str, Difference]]:
    """Differences of each model from the reference model, by model and metric, where both were measured alike; p is Holm-corrected over all of them."""
    reference = next((result for result in results if result.model == against), None)
    found: dict[str, dict[str, Difference]] = {}
    for result in results:
        if reference is None or result is reference:
            continue
        for name in columns:
            difference = _difference(result, reference, name)
            if difference is not None:
                found.setdefault(result.model, {})[name] = difference
    return corrected(found)


def corrected(found: dict[Key, dict[str, Difference]]) -> dict[Key, dict[str, Difference]]:
    """Differences by row and metric, p Holm-corrected over all of them."""
    p_values = holm({(row, name): d.p for row, several in found.items() for name, d in several.items()})
    return {
        row: {name: d.model_copy(update={"p": p_values[row, name]}) for name, d in several.items()}
        for row, several in found.items()
    }


def make_table(
    family: str, number: str, title: str, columns: dict[str, str], results: Sequence[Result], against: str
) -> tuple[Table, dict[str, dict[str, Difference]]] | None:
    """One of Tables 1 to 4 and its differences; `None` without results of its family."""
    own = [result for result in results if result.family == family]
    if not own:
        return None
    digits = 2 if family == "human" else 3
    differences = differences_from(own, against, columns)
    best = {name: _best(name, own) for name in columns}
    rows = []
    for result in own:
        cells = []
        for name in columns:
            metric = result.metrics.get(name)
            if metric is None or metric.value is None:
                cells.append(Cell())
                continue
            spread = "" if metric.low is None or metric.high is None else _spread(metric.low, metric.high, digits)
            p = differences.get(result.model, {}).get(name)
            mark = "*" if p is not None and p.p < SIGNIFICANT else ""
            cells.append(Cell(f"{metric.value:.{digits}f}", spread, metric.value == best[name], mark))
        rows.append((result.model, cells))
    printed = PAPER.get(family, {}) if number.isdigit() else {}
    paper = [(model, [_paper_cell(row, name, digits) for name in columns]) for model, row in printed.items()]
    sizes = sorted({len(result.turns) for result in own})
    notes = [f"{' and '.join(f'{size:,}' for size in sizes)} turns. {MATCHED}"]
    if differences:
        notes.append(f"* differs from {against} (p < {SIGNIFICANT}, paired bootstrap over sessions, Holm-corrected within the table).")  # fmt: skip
    if number in NOTES:
        notes.append(NOTES[number])
    notes += _not_compared(own, columns)
    table = Table(number, title, list(columns.values()), rows, paper, notes, draw_intervals(own, columns))
    return table, differences


def _spread(low: float, high: float, digits: int) -> str:
    """An interval without the zeros before the point, so that eleven fit beside each other."""
    bounds = (re.sub(r"^(-?)0\.", r"\1.", f"{bound:.{digits}f}") for bound in (low, high))
    return f"[{', '.join(bounds)}]"


def _best(name: str, results: Sequence[Result]) -> float | None:
    values = {m.value for r in results if (m := r.metrics.get(name)) is not None and m.value is not None}
    if len(values) < 2 or name in NEITHER_IS_BETTER or len(measured_alike(results, name)) > 1:
        return None
    return min(values) if name in LOWER_IS_BETTER else max(values)


def _not_compared(results: Sequence[Result], titles: Mapping[str, str]) -> list[str]:
    """Warnings of the metrics in which models were not measured alike."""
    found: dict[str, list[str]] = {}
    for name, title in titles.items():
        groups = measured_alike(results, name)
        if len(groups) > 1:
            told = "; ".join(f"{how} ({', '.join(result.model for result in alike)})" for how, alike in groups.items())
            found.setdefault(told, []).append(title)
    return [f"Warning: not compared in {', '.join(names)}, because the models were measured differently: {told}." for told, names in found.items()]  # fmt: skip


def _paper_value(row: Mapping[str, float], name: str) -> float | None:
    """A value of the paper; f-MMr with alpha 0.8 is computed, the printed one is that of 0.2."""
    if name == "f_mmr_0.8":
        return float(f_mmr(row["frequency"], row["mmr"], 0.8))
    return row.get("f_mmr" if name == "f_mmr_0.2" else name)


def _paper_cell(row: Mapping[str, float], name: str, digits: int) -> Cell:
    value = _paper_value(row, name)
    if value is None:
        return Cell()
    return Cell(f"({value:.{digits}f})" if name == "f_mmr_0.8" else f"{value:.{digits}f}")


def table_of_claims(results: Sequence[Result]) -> Table | None:
    """
    PEGS minus its baselines beside the same differences in the paper's Tables 1 and 2, and in plain words where they agree.

    Models are known by the names that `pegs evaluate predict` gives them; the paper's counterparts of the baselines are those of its own language model, Vicuna.

    Returns:
        [`Table`], or `None` without a PEGS and a baseline.

    """
    by_key: dict[tuple[str, str], Result] = {(result.family, result.model): result for result in results}
    found: dict[tuple[str, str], dict[str, Difference]] = {}
    for one, other in [(one, other) for one in COUNTERPARTS if one not in BASELINES for other in BASELINES]:
        for name, (family, _) in CLAIMS.items():
            if (family, one) in by_key and (family, other) in by_key:
                difference = _difference(by_key[family, one], by_key[family, other], name)
                if difference is not None:
                    found.setdefault((one, other), {})[name] = difference
    if not found:
        return None
    rows, paper, notes = [], [], []
    for (one, other), row in corrected(found).items():
        claimed = {name: _paper_difference(one, other, family, name) for name, (family, _) in CLAIMS.items()}
        rows.append((f"{one} - {other}", [_claim_cell(row.get(name), claimed[name]) for name in CLAIMS]))
        paper.append((f"{COUNTERPARTS[one]} - {COUNTERPARTS[other]}", [Cell() if d is None else Cell(f"{d:+.3f}") for d in claimed.values()]))  # fmt: skip
        notes.append(f"{one} against {other}: {_verdict(row, claimed)}.")
    notes.append(_how_they_differ(dict.fromkeys(model for pair in found for model in pair), by_key))
    notes += _not_compared([result for result in results if result.model in COUNTERPARTS], {name: title for name, (_, title) in CLAIMS.items()})  # fmt: skip
    notes.append(f"* differs from 0 (p < {SIGNIFICANT}, paired bootstrap over sessions, Holm-corrected within the table); in bold if in the paper's direction.")  # fmt: skip
    return Table("2c", "PEGS minus its baselines", [title for _, title in CLAIMS.values()], rows, paper, notes)


def _difference(one: Result, other: Result, name: str) -> Difference | None:
    if name not in STATISTICS or name not in one.metrics or name not in other.metrics:
        return None
    if len(measured_alike([one, other], name)) > 1:
        return None
    return compare(one, other, STATISTICS[name])


def _agrees(difference: Difference, claimed: float | None) -> bool:
    return claimed is not None and difference.value * claimed > 0


def _claim_cell(difference: Difference | None, claimed: float | None) -> Cell:
    if difference is None:
        return Cell()
    is_sure = difference.p < SIGNIFICANT
    return Cell(
        f"{difference.value:+.3f}",
        _spread(difference.low, difference.high, 3),
        is_sure and _agrees(difference, claimed),
        "*" if is_sure else "",
    )


def _verdict(row: Mapping[str, Difference], claimed: Mapping[str, float | None]) -> str:
    """In which metrics a model is to a baseline as in the paper, in which not, and in which nobody can say."""
    verdicts: dict[str, list[str]] = {"as in the paper": [], "the other way round": [], "too close to tell": []}
    for name, difference in row.items():
        if claimed[name]:
            sure = "as in the paper" if _agrees(difference, claimed[name]) else "the other way round"
            verdicts[sure if difference.p < SIGNIFICANT else "too close to tell"].append(CLAIMS[name][1])
    return "; ".join(f"{verdict} in {', '.join(names)}" for verdict, names in verdicts.items() if names)


def _paper_difference(one: str, other: str, family: str, metric: str) -> float | None:
    rows = [PAPER[family].get(COUNTERPARTS[model]) for model in (one, other)]
    if None in rows:
        return None
    values = [_paper_value(row, metric) for row in rows if row is not None]
    return None if None in values else round(values[0] - values[1], 4)  # type: ignore[operator]


def _how_they_differ(models: Iterable[str], by_key: Mapping[tuple[str, str], Result]) -> str:
    """Lengths and sticker rates, on which much of the metrics hangs."""
    said: dict[str, list[str]] = {"the references": []}
    for family, own, gold, told in (("text", "predicted_length", "reference_length", "{:.1f} tokens"), ("mm", "frequency", "gold_frequency", "stickers in {:.0%}")):  # fmt: skip
        for model in models:
            if (family, model) in by_key:
                columns = by_key[family, model].columns()
                said.setdefault(model, []).append(told.format(columns[own].mean()))
                reference = told.format(columns[gold].mean())
                if reference not in said["the references"]:
                    said["the references"].append(reference)
    return "What much of it hangs on: " + "; ".join(f"{who} {' and '.join(what)}" for who, what in said.items()) + "."


def table_5(statistics: Path) -> Table:
    """
    Statistics of a dataset (Table 5) from `pegs dataset stats`.

    Raises:
        InputError: If the file has no such table.

    """
    content = _read_json(statistics)
    splits = content.get("table_5")
    if not isinstance(splits, dict) or not all(isinstance(row, dict) for row in splits.values()):
        raise InputError(f"{statistics}: table_5: expected the splits of a dataset.")
    names = list(dict.fromkeys(name for row in splits.values() for name in row))
    rows = [(split, [Cell(f"{row[name]:,}" if name in row else "-") for name in names]) for split, row in splits.items()]  # fmt: skip
    columns = [name.replace("_", " ").capitalize() for name in names]
    theirs = [f"{split}: " + ", ".join(f"{title} {PAPER['dataset'][split][name]:,.0f}" for name, title in DATASET_COLUMNS.items()) for split in PAPER["dataset"]]  # fmt: skip
    return Table("5", "Statistics of the dataset", columns, rows, notes=[f"Paper, {row}." for row in theirs])


def table_9(icc: Mapping[str, Any]) -> Table:
    """Agreement of the human raters (Table 9), of one rater and of the mean of all, and the paper's, whose form is not told."""
    keys = list(PAPER["icc"]["ICC"])

    def cell(key: str, form: str) -> Cell:
        found = (icc.get(key) or {}).get(form)
        if not found or found["value"] is None:
            return Cell()
        has_interval = found["low"] is not None and found["high"] is not None
        return Cell(f"{found['value']:.3f}", _spread(found["low"], found["high"], 2) if has_interval else "")

    forms = {"ICC1": "ICC(1,1)", "ICC2": "ICC(2,1)", "ICC3": "ICC(3,1)", "ICC1k": "ICC(1,k)", "ICC2k": "ICC(2,k)", "ICC3k": "ICC(3,k)"}  # fmt: skip
    rows = [(title, [cell(key, form) for key in keys]) for form, title in forms.items()]
    paper = [("ICC", [Cell(f"{PAPER['icc']['ICC'][key]:.3f}") for key in keys])]
    return Table("9", "Agreement of the human raters", keys, rows, paper, ["95 % intervals. The paper does not say which form it prints."])  # fmt: skip


def table_10_of(results: Sequence[Result]) -> Table | None:
    """Correlation of automatic and human metrics over models (Table 10), of each judge and tower on its own; `None` where nothing can be correlated."""
    found = {name: row for name, row in table_10(results).items() if row is not None}
    if not found:
        return None
    titles = {"emp_txt": "EMP-txt", "emp_mm": "EMP-mm", "con": "CON", "rank": "Rank", "id": "ID", "f_mmr_0.8": "f-MMr (alpha 0.8)", "f_mmr_0.2": "f-MMr (alpha 0.2)"}  # fmt: skip
    columns = [titles[row["automatic"]] + name.removeprefix(row["automatic"]) for name, row in found.items()]
    rows = [
        (kind.capitalize(), [Cell(f"{row[kind]['value']:.2f}", _spread(row[kind]["low"], row[kind]["high"], 2)) for row in found.values()])
        for kind in ("spearman", "kendall")
    ]  # fmt: skip
    paper = [
        (kind, [Cell(f"{value:.2f}") if (value := row.get("f_mmr" if ours["automatic"] == "f_mmr_0.2" else ours["automatic"])) is not None else Cell() for ours in found.values()])
        for kind, row in PAPER["agreement"].items()
    ]  # fmt: skip
    notes = sorted({f"Warning: {row['warning']}." for row in found.values() if "warning" in row})
    notes.append("Intervals by bootstrap over models. The sign of Rank is turned: 1 means agreement.")
    return Table("10", "Correlation with human scores", columns, rows, paper, notes)


def judges_table(results: Sequence[Result]) -> Table | None:
    """Agreement of judges with each other; `None` with fewer than two."""
    rows = [
        (f"{row['model']}, {row['metric']}", [Cell(" / ".join(row["judges"])), Cell(str(row["turns"])), Cell("-" if row["spearman"] is None else f"{row['spearman']:.2f}"), Cell(f"{row['difference']:+.2f}")])
        for row in between_judges(results)
    ]  # fmt: skip
    return Table("3b", "Agreement of judges", ["Judges", "Turns", "Spearman", "Mean difference"], rows) if rows else None  # fmt: skip


def draw_intervals(results: Sequence[Result], columns: Mapping[str, str]) -> str:
    """Values and intervals of models, one panel a metric, as an SVG element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for name in columns if any((m := r.metrics.get(name)) and m.value is not None for r in results)]
    if not names:
        return ""
    across = min(4, len(names))
    down = -(-len(names) // across)
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pegs", "svg.fonttype": "none"}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure((11, down * (0.75 + 0.28 * len(results))), layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
        for name, panel in zip(names, panels, strict=False):
            for place, result in enumerate(results):
                metric = result.metrics.get(name)
                if metric is None or metric.value is None:
                    continue
                low, high = (metric.value if bound is None else bound for bound in (metric.low, metric.high))
                colour = COLOURS[place % len(COLOURS)]
                panel.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
                panel.plot([metric.value], [place], "o", color=colour, markersize=6)
            panel.set_title(columns[name], loc="left", fontsize=10)
            panel.set_yticks(range(len(results)), [result.model for result in results])
            panel.set_ylim(len(results) - 0.5, -0.5)
            panel.tick_params(length=0)
            panel.grid(axis="x", alpha=0.3)
        for panel in list(panels):  # the rest of the last row
            panel.axis("off")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def pick_examples(runs: Sequence[Predictions], pack: StickerPack, count: int, seed: int) -> list[dict[str, Any]]:
    """So many sampled turns with the end of their context, the reference and every model's reply; stickers as `data:` addresses."""
    if not runs or not count:
        return []
    by_key = [{row.key: row for row in run.rows} for run in runs]
    keys = common_turns(runs)
    lively = [key for key in keys if any(rows[key].predicted.sticker for rows in by_key)] or keys

    def show(run: Predictions, who: str, said: Said) -> dict[str, Any]:
        picture = thumbnail(run.image(said.sticker, pack)) if said.sticker else None
        return {"who": who, "text": said.text, "picture": picture, "alt": (said.sticker.description or "a drawn sticker") if said.sticker else ""}  # fmt: skip

    examples = []
    for key in sample_turns(lively, count, seed):
        first: Prediction = by_key[0][key]
        context = [show(runs[0], line.role, line) for line in first.context[-LAST_MESSAGES:]]
        replies = [show(run, run.model, rows[key].predicted) for run, rows in zip(runs, by_key, strict=True)]
        examples.append({"key": key, "context": context, "replies": [show(runs[0], "reference", first.reference), *replies]})  # fmt: skip
    return examples


def thumbnail(image: Image.Image) -> str:
    """A sticker as a small PNG in a `data:` address."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_report(
    results: Sequence[Result],
    raters: Mapping[str, Any],
    against: str = "",
    statistics: Path | None = None,
    runs: Sequence[Predictions] = (),
    pack: StickerPack | None = None,
    num_examples: int = 4,
    seed: int = 0,
) -> Report:
    """
    Put a report together; tables without figures are left out.

    Args:
        results (`Sequence[Result]`): Of any models and families.
        raters (`Mapping`): What `pegs evaluate human analyze` says of the raters; may be empty.
        against (`str`, *optional*): Model that the others are compared with, the first one if not given.
        statistics (`Path`, *optional*): A dataset's statistics, for Table 5.
        runs (`Sequence[Predictions]`, *optional*): Predictions to show examples of.
        pack ([`StickerPack`], *optional*): Their stickers.
        num_examples (`int`, *optional*, defaults to 4): How many examples.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.

    Returns:
        [`Report`].

    Raises:
        InputError: If no result is of the model to compare with.

    """
    models = list(dict.fromkeys(result.model for result in results))
    if against and against not in models:
        raise InputError(f"--against {against}: must be one of {', '.join(models)}.")
    against = against or models[0]
    tables: list[Table] = []
    differences: dict[str, dict[str, Difference]] = {}
    for family, number, title, columns in LAYOUT:
        judges = sorted({str(r.settings.get("judge")) for r in results if r.family == family})
        for judge in judges:  # one for all but the LLM-based family
            own = [r for r in results if r.family == family and str(r.settings.get("judge")) == judge]
            made = make_table(family, number, f"{title} by {judge}" if family == "llm" else title, columns, own, against)  # fmt: skip
            if made:
                tables.append(made[0])
                differences |= {f"{number} {model}{f' {judge}' if len(judges) > 1 else ''}": row for model, row in made[1].items()}  # fmt: skip
    more = [table_of_claims(results), judges_table(results), table_5(statistics) if statistics else None, table_9(raters["icc"]) if raters.get("icc") else None, table_10_of(results)]  # fmt: skip
    tables += [table for table in more if table is not None]
    examples = pick_examples(runs, pack, num_examples, seed) if pack is not None else []
    said: dict[tuple[str, str], list[str]] = {}
    for result in results:
        told = ", ".join(f"{key} {value}" for key, value in result.settings.items() if key not in UNTOLD)
        said.setdefault((result.family, told), []).append(result.model)
    settings = [(f"{family} of {', '.join(of)}", told) for (family, told), of in said.items()]
    return Report(against, tables, examples, differences, settings, pack.info.attribution if pack and examples else "")


def write_report(report: Report, folder: Path) -> list[Path]:
    """
    Write `report.md`, `report.tex`, `report.html` and `report.json` into a folder; the HTML needs no other file.

    Raises:
        InputError: If the folder cannot be made.

    """
    make_folder(folder)
    html = render_page("report", report=report)
    files = {"report.md": to_markdown(report), "report.tex": to_latex(report), "report.html": html}
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8")
    tables = [{"table": t.number, "title": t.title, "columns": t.columns, "rows": {name: [vars(c) for c in cells] for name, cells in t.rows}, "notes": t.notes} for t in report.tables]  # fmt: skip
    differences = {name: {metric: d.model_dump() for metric, d in row.items()} for name, row in report.differences.items()}  # fmt: skip
    write_json(folder / "report.json", {"against": report.against, "tables": tables, "differences": differences})
    return [folder / name for name in (*files, "report.json")]


def to_markdown(report: Report) -> str:
    """The tables, the paper's rows below ours."""
    parts = ["# Evaluation"]
    for table in report.tables:
        parts.append(f"## Table {table.number}: {table.title}")

        def line(name: str, cells: Iterable[str]) -> str:
            return "| " + " | ".join(part.replace("|", "\\|") for part in (name, *cells)) + " |"

        lines = [line("", table.columns), line("---", ["---:"] * len(table.columns))]
        for name, cells in table.rows:
            lines.append(line(name, (f"{f'**{c.text}**' if c.is_best else c.text}{c.mark} {c.spread}".strip() for c in cells)))  # fmt: skip
        lines += [line(f"*paper: {name}*", (f"*{c.text}*" for c in cells)) for name, cells in table.paper]
        parts += ["\n".join(lines), *table.notes]
    parts.append("## Measured with\n\n" + "\n".join(f"- {name}: {told}" for name, told in report.settings))
    return "\n\n".join(parts) + "\n"


LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"})  # fmt: skip


def _latex_cell(cell: Cell) -> str:
    text = cell.text.translate(LATEX)
    text = rf"\textbf{{{text}}}" if cell.is_best else text
    return f"{text}{cell.mark}" + (rf" {{\tiny {cell.spread}}}" if cell.spread else "")


def to_latex(report: Report) -> str:
    """The tables as `booktabs` floats, to be read in by a paper."""
    parts = [r"% needs \usepackage{booktabs,graphicx}"]
    for table in report.tables:
        rows = [" & ".join(["", *(title.translate(LATEX) for title in table.columns)]) + r" \\", r"\midrule"]
        for name, cells in table.rows:
            rows.append(" & ".join([name.translate(LATEX), *map(_latex_cell, cells)]) + r" \\")
        if table.paper:
            rows.append(r"\midrule")
        rows += [" & ".join([rf"\textit{{{name.translate(LATEX)} (paper)}}", *(c.text.translate(LATEX) for c in cells)]) + r" \\" for name, cells in table.paper]  # fmt: skip
        caption = " ".join([f"{table.title}.", *table.notes]).translate(LATEX)
        parts.append("\n".join([r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", *rows, r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", rf"\label{{tab:{table.number}}}", r"\end{table*}"]))  # fmt: skip
    return "\n\n".join(parts) + "\n"
