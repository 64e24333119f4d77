"""The commands `pegs evaluate`: one function a verb, no logic."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pegs.cli_stickers import (
    BudgetOption,
    ConcurrencyOption,
    DeviceOption,
    ExtraBodyOption,
    HostOption,
    JsonOption,
    LanguageOption,
    LlmModelOption,
    PriceInOption,
    PriceOutOption,
    RevisionOption,
    StickersOption,
)
from pegs.errors import InputError


if TYPE_CHECKING:
    from pegs.evaluation.results import Result


evaluate_app = typer.Typer(help="The paper's metrics and tables.", no_args_is_help=True)

PredictionsArgument = Annotated[
    list[Path], typer.Argument(metavar="PREDICTIONS...", help="Files of `pegs evaluate predict`, one a model.")
]
ResultsOption = Annotated[Path, typer.Option("--out", help="Folder for one JSON file a model.")]


@contextmanager
def told(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show progress on a terminal, and name the extra that is missing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            row = bar.add_task(label, total=total)
            yield lambda done: bar.update(row, completed=done)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'stickerconv[eval]'.") from error


def show(results: "list[Result]", files: list[Path], as_json: bool, more: dict | None = None) -> None:
    """Print the metrics of results, each with its 95 % interval; `more` goes into the JSON object."""
    if as_json:
        rows = [{"model": r.model, "file": str(file), **r.model_dump(include={"metrics", "settings", "details"})} for r, file in zip(results, files, strict=True)]  # fmt: skip
        typer.echo(json.dumps({"results": rows, **(more or {})}, ensure_ascii=False))
        return
    for result, file in zip(results, files, strict=True):
        typer.echo(f"{result.model} ({file})")
        for name, metric in result.metrics.items():
            spread = f"  [{metric.low:.4f}, {metric.high:.4f}]" if metric.low is not None else ""
            typer.echo(f"  {name:<14} {'-' if metric.value is None else f'{metric.value:.4f}'}{spread}")


@evaluate_app.command(
    "predict", epilog="Example: pegs evaluate predict --sessions mini --variant ret --out predictions/pegs-ret.jsonl"
)
def evaluate_predict(
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file; an unfinished one is finished.")],
    sessions: Annotated[
        str,
        typer.Option(
            help="mini, a JSON Lines file of sessions, a run's folder, or a built dataset's folder or Hub id."
        ),
    ] = "mini",
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Split to answer.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many sessions; 0 for all.")] = 0,
    model: Annotated[
        str,
        typer.Option(help="Folder or Hub id of a PEGS checkpoint.", show_default="the embedded mini model"),
    ] = "",
    revision: RevisionOption = None,
    variant: Annotated[
        Literal["ret", "gen", "rag", "text", "tool", "minilm", "random"],
        typer.Option(help="Retrieved, drawn, or both; or a baseline."),
    ] = "ret",
    baseline: Annotated[
        Path | None, typer.Option(help="Adapter of the baseline that --variant text or tool names.")
    ] = None,
    replies: Annotated[
        Path | None,
        typer.Option(
            help="Predictions whose words are kept: minilm and random choose other stickers, gen and rag draw them (of the same checkpoint)."
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Name of the model in all tables.", show_default="pegs-VARIANT or baseline-VARIANT")
    ] = "",
    stickers: StickersOption = "openmoji",
    batch_size: Annotated[int, typer.Option(min=1, help="Turns at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Same seed, same replies.")] = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Answer every System turn of a split with all earlier turns as context; run it again to go on after a kill."""
    from pegs.evaluation.predict import (
        PegsPredictor,
        Predictor,
        digest_weights,
        read_predictions,
        run_predictions,
        system_turns,
    )

    if (variant in ("text", "tool")) != (baseline is not None):
        raise InputError("--baseline and one of --variant text and --variant tool go together.")
    if variant in ("minilm", "random") and replies is None:
        raise InputError(f"--variant {variant} needs --replies.")
    if variant in ("text", "tool") and replies is not None:
        raise InputError(f"--replies does not go with --variant {variant}.")
    from pegs.places import DEFAULT_MODEL, load_pack, load_sessions

    chosen = load_sessions(sessions, split)[: limit or None]
    if not chosen:
        raise InputError(f"--sessions {sessions}: no session is of the split {split!r}.")
    repeated = read_predictions(replies) if replies is not None else None
    from pegs.assemble import load_pipeline, move, resolve_checkpoint

    pack = load_pack(stickers)
    turns = list(system_turns(chosen, pack))
    made_by: dict[str, str] = {"variant": variant}
    if baseline is not None:
        made_by["baseline"] = digest_weights(baseline)
    if repeated is not None:
        made_by["replies"] = repeated.sha256
    if variant in ("ret", "gen", "rag"):
        made_by["model"] = digest_weights(resolve_checkpoint(model or DEFAULT_MODEL, revision))
        if repeated is not None:
            repeated.check_words(made_by["model"], pack, seed)
    elif variant == "tool":
        folder = resolve_checkpoint(model or DEFAULT_MODEL, revision)
        made_by["decoder"] = " ".join(digest_weights(folder / part) for part in ("unet", "vae", "scheduler"))
    predictor: Predictor
    if repeated is not None and variant in ("minilm", "random"):
        from dataset_builders.stickers.encoder import TextEncoder
        from pegs.evaluation.baselines import StickerChooser

        predictor = StickerChooser(repeated, pack, name or f"baseline-{variant}", TextEncoder() if variant == "minilm" else None)  # fmt: skip
    elif baseline is not None:
        from pegs.adapters import load_adapted
        from pegs.evaluation.baselines import BaselinePredictor

        language_model, tokenizer = load_adapted(baseline, "--baseline")
        decoder, length = None, 0
        if variant == "tool":
            pipeline = load_pipeline(model or DEFAULT_MODEL, stickers, device=device, revision=revision)
            decoder, length = pipeline.decoder, pipeline.model.config.prompt_length
        move(language_model, device)
        predictor = BaselinePredictor(language_model, tokenizer, pack, name or f"baseline-{variant}", decoder, length)
    else:
        pipeline = load_pipeline(model or DEFAULT_MODEL, stickers, variant, device, revision)
        predictor = PegsPredictor(pipeline, variant, name or f"pegs-{variant}", repeated)
    with told("predicting", len(turns)) as on_row:
        run = run_predictions(predictor, turns, pack, out, seed, batch_size, on_row, made_by)
    sent = sum(row.predicted.sticker is not None for row in run.rows)
    summary = {"predictions": str(out), "model": run.model, "turns": len(run.rows), "stickers": sent}
    typer.echo(json.dumps(summary) if as_json else f"{len(run.rows)} turns, {sent} with a sticker, in {out}")


@evaluate_app.command("text", epilog="Example: pegs evaluate text predictions/*.jsonl --out results")
def evaluate_texts(
    predictions: PredictionsArgument,
    out: ResultsOption = Path("results"),
    meteor: Annotated[bool, typer.Option(help="Compute METEOR, which needs WordNet.")] = True,
    bertscore: Annotated[bool, typer.Option(help="Compute BERTScore, the slow one.")] = True,
    bertscore_encoder: Annotated[
        str, typer.Option(help="Encoder: folder or Hub id.", show_default="the packaged all-MiniLM-L6-v2")
    ] = "",
    bertscore_layer: Annotated[int, typer.Option(help="Which of its hidden states.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """BLEU-1..4, Dist-1..3, ROUGE-L, METEOR, CIDEr and BERTScore (section 5.1)."""
    from pegs.evaluation.predict import read_all
    from pegs.evaluation.results import result_files, write_result

    runs = read_all(predictions)
    files = result_files(out, "text", {str(run.path): run.path.stem for run in runs})
    with told("scoring", len(runs)) as on_run:
        from pegs.evaluation.text import BertScorer, evaluate_text

        scorer = BertScorer(bertscore_encoder, bertscore_layer) if bertscore else None
        results = []
        for number, (run, file) in enumerate(zip(runs, files, strict=True), start=1):
            results.append(evaluate_text(run, scorer, meteor))
            write_result(results[-1], file)
            on_run(number)
    show(results, files, as_json)


@evaluate_app.command("mm", epilog="Example: pegs evaluate mm predictions/*.jsonl --tower mini --out results")
def evaluate_mm(
    predictions: PredictionsArgument,
    out: ResultsOption = Path("results"),
    tower: Annotated[
        str,
        typer.Option(
            help="CLIP: folder or Hub id; or mini.", show_default="CLIP ViT-B/32 where it can be reached, else mini"
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="Checkpoint of the mini tower.", show_default="the embedded mini model")
    ] = "",
    stickers: StickersOption = "openmoji",
    as_json: JsonOption = False,
) -> None:
    """Frequency, MMr, f-MMr at alpha 0.8 and 0.2, sticker diversity, retrieval, timing, emotion (section 5.2)."""
    from pegs.evaluation.predict import read_all
    from pegs.evaluation.results import result_files, write_result

    runs = read_all(predictions)
    files = result_files(out, "mm", {str(run.path): run.path.stem for run in runs})
    with told("scoring", len(runs)) as on_run:
        from pegs.evaluation.multimodal import Embedded, EmotionVote, evaluate_multimodal, open_tower
        from pegs.places import DEFAULT_MODEL, load_pack

        pack, opened = load_pack(stickers), open_tower(tower, model or str(DEFAULT_MODEL))
        embedded, vote = Embedded(runs, pack, opened), EmotionVote(pack, opened)
        results = []
        for number, (run, file) in enumerate(zip(runs, files, strict=True), start=1):
            results.append(evaluate_multimodal(run, embedded, vote))
            write_result(results[-1], file)
            on_run(number)
    show(results, files, as_json)


@evaluate_app.command(
    "llm",
    epilog="Example: OPENAI_API_KEY=... pegs evaluate llm predictions/*.jsonl --llm https://api.openai.com/v1 --model gpt-5-mini --turns 100",
)
def evaluate_llm(
    predictions: PredictionsArgument,
    llm: Annotated[str, typer.Option(help="Address of an OpenAI-compatible endpoint.")],
    model: LlmModelOption,
    extra_body: ExtraBodyOption = "",
    out: ResultsOption = Path("results"),
    turns: Annotated[int, typer.Option(min=0, help="So many sampled turns, the same of all models; 0 for all.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    show_stickers: Annotated[
        Literal["descriptions", "images"],
        typer.Option(help="In words (drawn ones are described by the judge first), or as pictures."),
    ] = "descriptions",
    stickers: StickersOption = "openmoji",
    language: LanguageOption = "en",
    concurrency: ConcurrencyOption = 16,
    budget_usd: BudgetOption = None,
    price_in: PriceInOption = 0.0,
    price_out: PriceOutOption = 0.0,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say what it would cost, and ask nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Empathy, consistency and rank by a judge (section 5.3); run it again to go on, every answer is kept."""
    from agent_generation.engine import Prices
    from pegs.endpoint import Endpoint, parse_extra_body
    from pegs.evaluation import llm_judge
    from pegs.evaluation.predict import common_turns, read_all
    from pegs.evaluation.results import result_files, write_result
    from pegs.places import load_pack

    runs = read_all(predictions)
    keys = llm_judge.sample_turns(common_turns(runs), turns, seed)
    trial = llm_judge.Trial(tuple(run.only(keys) for run in runs), load_pack(stickers), show_stickers, language)
    prices, extra = Prices(price_in, price_out), parse_extra_body(extra_body)
    if estimate:
        expected = llm_judge.estimate(trial, prices)
        typer.echo(
            json.dumps(expected) if as_json else "\n".join(f"{key}: {value}" for key, value in expected.items())
        )
        return
    files = result_files(out, "llm", {str(run.path): run.path.stem for run in runs})
    with Console(stderr=True).status("asking") as status:
        results, cost = llm_judge.run_judge(
            trial,
            Endpoint(llm, model, concurrency, budget_usd, prices, language, extra),
            out,
            lambda stage, total, done: status.update(f"{stage}: {done.tasks} of {total}, {done.cost_usd:.4f} USD"),
        )
    for result, file in zip(results, files, strict=True):
        write_result(result, file)
    show(results, files, as_json, {"cost": cost})
    if not as_json:
        typer.echo(f"position bias: {json.dumps(results[0].details['position_bias'])}")
        for result in results:
            typer.echo(f"{result.model}: not scored {json.dumps(result.details['replies_not_scored'])}, unusable answers {json.dumps(result.details['unusable_answers'])}")  # fmt: skip


human_app = typer.Typer(help="The questionnaire of section 5.4.", no_args_is_help=True)
evaluate_app.add_typer(human_app, name="human")
StudyOption = Annotated[Path, typer.Option("--study", help="Folder of the questionnaire.")]


@human_app.command(
    "serve", epilog="Example: pegs evaluate human serve predictions/*.jsonl --study study --raters 5 --sessions 100"
)
def human_serve(
    study: StudyOption,
    predictions: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PREDICTIONS...", help="One file a model; not needed to go on with a study."),
    ] = None,
    raters: Annotated[
        int | None,
        typer.Option(min=1, help="How many raters; more than before adds some.", show_default="5 in a new study"),
    ] = None,
    sessions: Annotated[
        int | None, typer.Option(min=1, help="How many sampled sessions.", show_default="100 in a new study")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sample and of the orders.", show_default="0 in a new study")
    ] = None,
    stickers: StickersOption = "openmoji",
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7861,
    address: Annotated[
        str, typer.Option(help="How raters reach this machine, for their links.", show_default="http://HOST:PORT")
    ] = "",
) -> None:
    """Serve the questionnaire and print each rater's secret link; models are anonymous and shuffled for each rater."""
    from pegs.evaluation.human import begin_study
    from pegs.evaluation.predict import read_all
    from pegs.places import load_pack

    with told("preparing", 1):
        from pegs.evaluation.questionnaire import make_app
        from pegs.web import address_of, listen, serve_app

        opened = begin_study(study, read_all(predictions or []), load_pack(stickers), raters, sessions, seed)
    listening = listen(host, port)
    for rater, token in opened.links():
        typer.echo(f"rater {rater}: {address.rstrip('/') or address_of(host, port)}/r/{token}")
    serve_app(make_app(opened), listening)  # addresses hold the raters' keys, and are not logged


@human_app.command("export", epilog="Example: pegs evaluate human export --study study > ratings.csv")
def human_export(study: StudyOption) -> None:
    """Write all answers as CSV to standard output; the links are not in it."""
    from pegs.evaluation.human import Study, export_ratings

    typer.echo(export_ratings(Study(study)), nl=False)


@human_app.command("analyze", epilog="Example: pegs evaluate human analyze --study study --out results")
def human_analyze(
    study: StudyOption,
    out: ResultsOption = Path("results"),
    without: Annotated[list[int] | None, typer.Option(help="Leave a rater out; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Scores of each model (Table 4), agreement of the raters by ICC (Table 9), and raters to look at."""
    from pegs.evaluation.human import Study, analyze
    from pegs.evaluation.results import result_files, write_json, write_result

    with told("analysing", 1):
        found = analyze(Study(study), without or [])
    files = result_files(out, "human", {result.model: result.model for result in found.results})
    for result, file in zip(found.results, files, strict=True):
        write_result(result, file)
    write_json(out / "raters.json", {"icc": found.icc, "raters": found.raters, "without": without or []})
    show(found.results, files, as_json, {"icc": found.icc, "raters": found.raters})
    if as_json:
        return
    for metric, forms in found.icc.items():
        typer.echo(f"ICC {metric}: " + (", ".join(f"{name} {forms[name]['value']:.3f}" for name in forms if name.startswith("ICC")) if forms else "too few scores"))  # fmt: skip
    for rater, row in found.raters.items():
        typer.echo(f"rater {rater}: {row['answers']} answers, {row['checks_passed']} of {row['checks']} checks passed{''.join(f', {flag}' for flag in row['flags'])}")  # fmt: skip


ResultsArgument = Annotated[
    list[Path], typer.Argument(metavar="RESULTS...", help="Folders or files that the other commands wrote.")
]


@evaluate_app.command("agreement", epilog="Example: pegs evaluate agreement results --pair cider:Con+Inf")
def evaluate_agreement(
    results: ResultsArgument,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="AUTOMATIC:HUMAN; may be repeated.", show_default="the pairs of Table 10"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Spearman and Kendall of automatic with human metrics over models (Table 10), and of judges with each other."""
    from pegs.evaluation.agreement import PAIRS, between_judges, parse_pair, table_10
    from pegs.evaluation.report import read_results

    read, _ = read_results(results)
    pairs = dict(parse_pair(text) for text in pair) if pair else PAIRS
    found, judges = table_10(read, pairs), between_judges(read)
    if as_json:
        typer.echo(json.dumps({"agreement": found, "judges": judges}, ensure_ascii=False))
        return
    for name, row in found.items():
        if row is None:
            typer.echo(f"{name}: fewer than three models have it and its human metrics, or all are the same")
            continue
        shown = (f"{kind} {row[kind]['value']:.2f} [{row[kind]['low']:.2f}, {row[kind]['high']:.2f}]" for kind in ("spearman", "kendall"))  # fmt: skip
        typer.echo(f"{name} with {'+'.join(row['human'])}: {', '.join(shown)}, p {row['spearman']['p']:.3f}")
    for warning in sorted({row["warning"] for row in found.values() if row and "warning" in row}):
        typer.echo(f"warning: {warning}", err=True)
    for row in judges:
        typer.echo(f"{row['model']}, {row['metric']}, {' / '.join(row['judges'])}: spearman {row['spearman']}, mean difference {row['difference']:+.2f}")  # fmt: skip


@evaluate_app.command(
    "report",
    epilog="Example: pegs evaluate report results --predictions predictions --against vicuna-tool --out report",
)
def evaluate_report(
    results: ResultsArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("report"),
    against: Annotated[
        str, typer.Option(help="Model that the others are compared with.", show_default="the first")
    ] = "",
    predictions: Annotated[
        Path | None, typer.Option(help="Predictions to show replies of: a file, or a folder of them.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many turns to show.")] = 4,
    dataset: Annotated[Path | None, typer.Option(help="statistics.json of a dataset, for Table 5.")] = None,
    stickers: StickersOption = "openmoji",
    seed: Annotated[int, typer.Option(help="Seed of the shown turns.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Tables 1-5, 9 and 10 beside the paper's, with intervals and significance, as Markdown, LaTeX and HTML."""
    from pegs.evaluation.predict import read_all
    from pegs.places import load_pack

    with told("reporting", 1):
        from pegs.evaluation.report import make_report, read_results, write_report

        read, raters = read_results(results)
        files = sorted(predictions.glob("*.jsonl")) if predictions and predictions.is_dir() else [predictions] if predictions else []  # fmt: skip
        pack = load_pack(stickers) if files else None
        report = make_report(read, raters, against, dataset, read_all(files), pack, examples, seed)
        written = write_report(report, out)
    tables = [table.number for table in report.tables]
    summary = {"files": [str(file) for file in written], "tables": tables, "against": report.against}
    typer.echo(json.dumps(summary) if as_json else f"tables {', '.join(tables)} in {', '.join(summary['files'])}")
