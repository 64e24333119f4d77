"""The commands `pegs profiles` and `pegs generate`: one function a verb, no logic."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pegs.cli_stickers import (
    BudgetOption,
    ExtraBodyOption,
    JsonOption,
    LanguageOption,
    PriceInOption,
    PriceOutOption,
    StickersOption,
)
from pegs.errors import InputError


profiles_app = typer.Typer(help="User profiles.", no_args_is_help=True)

LlmOption = Annotated[
    str, typer.Option("--llm", help="Address of an OpenAI-compatible endpoint; without it, the embedded model writes.")
]
ModelOption = Annotated[str, typer.Option("--model", help="Its model.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Requests in flight at once.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same data.")]


def report(result: dict, as_json: bool, shown: tuple[str, ...]) -> None:
    """Print a result as JSON, or some of it as a line."""
    said = ", ".join(f"{key.replace('_', ' ')}: {result[key]}" for key in shown)
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else said)


@profiles_app.command(
    "generate",
    epilog="Example: pegs profiles generate -n 2000 --out profiles.jsonl --llm http://127.0.0.1:8000/v1 --model qwen3",
)
def profiles_generate(
    count: Annotated[int, typer.Option("-n", min=1, help="How many.")],
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file to write.")],
    llm: LlmOption = "",
    model: ModelOption = "",
    extra_body: ExtraBodyOption = "",
    emotions: Annotated[
        str, typer.Option(help="Target distribution: sadness=3,fear=2,...", show_default="all alike")
    ] = "",
    seed: SeedOption = 0,
    concurrency: ConcurrencyOption = 32,
    budget_usd: BudgetOption = None,
    price_in: PriceInOption = 0.0,
    price_out: PriceOutOption = 0.0,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Write new user profiles from seeds, each unlike all others."""
    from dataset_builders.schema import EMOTIONS
    from pegs.agent_tools import make_profiles, make_writer, parse_shares

    shares = parse_shares(emotions) if emotions else dict.fromkeys(EMOTIONS, 1.0)
    writer = make_writer(llm, model, (), concurrency, price_in, price_out, budget_usd, language, extra_body=extra_body)
    report(make_profiles(count, out, shares, seed, language, writer), as_json, ("profiles", "refused", "out"))


@profiles_app.command("seeds", epilog="Example: pegs profiles seeds --out seeds.jsonl")
def profiles_seeds(
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file to write.")],
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Write the seed profiles, to start from without a model."""
    from agent_generation.profile import ProfileError, seed_profiles, write_profiles

    seeds = seed_profiles(language)
    try:
        write_profiles(out, seeds)
    except ProfileError as error:
        raise InputError(str(error)) from error
    report({"profiles": len(seeds), "out": str(out)}, as_json, ("profiles", "out"))


def generate(
    profiles: Annotated[Path, typer.Option("--profiles", help="JSON Lines file of user profiles.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder; the same command resumes it.")],
    count: Annotated[int, typer.Option("-n", min=1, help="How many sessions.")],
    stickers: StickersOption = "openmoji",
    llm: LlmOption = "",
    model: ModelOption = "",
    extra_body: ExtraBodyOption = "",
    strong_model: Annotated[
        str, typer.Option(help="Asked when an agent repeats itself.", show_default="--model")
    ] = "",
    role_model: Annotated[
        list[str] | None,
        typer.Option(help="manager=NAME: another model for user, system, manager or memory; may be repeated."),
    ] = None,
    sticker_rate: Annotated[
        str,
        typer.Option(
            help="Share of turns with a sticker: user=0.35 system=0.60, one number for both, or stickerconv, mod, line, off."
        ),
    ] = "stickerconv",
    more_rates: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    max_turns: Annotated[int, typer.Option(min=1, help="Turns of a session at most.")] = 6,
    candidates: Annotated[
        int | None,
        typer.Option(min=1, help="Stickers to choose from.", show_default="10; the embedded model chooses from 4"),
    ] = None,
    fuse_plan: Annotated[bool, typer.Option("--fuse-plan", help="Intention and query in one call.")] = False,
    language: LanguageOption = "en",
    encoder: Annotated[str, typer.Option(help="Sentence encoder: folder or Hub id.")] = "all-MiniLM-L6-v2",
    seed: SeedOption = 0,
    concurrency: ConcurrencyOption = 32,
    batch_api: Annotated[
        bool, typer.Option("--batch-api", help="Ask in rounds, through the provider's batch API.")
    ] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="One process, or a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes of the cluster.")] = 4,
    budget_usd: BudgetOption = None,
    price_in: PriceInOption = 0.0,
    price_out: PriceOutOption = 0.0,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it would take.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write dialogue sessions with stickers: Agent4SC."""
    from agent_generation.session import Settings
    from pegs.agent_tools import Job, estimate_sessions, load_profiles, make_sessions, make_writer, parse_rates

    user_rate, system_rate = parse_rates([sticker_rate, *(more_rates or [])])
    role_models = [*(role_model or []), *([f"stronger={strong_model}"] if strong_model else [])]
    writer = make_writer(
        llm, model, role_models, concurrency, price_in, price_out, budget_usd, language, batch_api, extra_body
    )
    settings = Settings(
        user_rate,
        system_rate,
        max_turns,
        candidates=candidates or (10 if llm else 4),  # among ten, the embedded model takes the first or the last
        fuse_plan=fuse_plan,
        review="model" if llm else "vectors",
        language=language,
    )
    job = Job(count, load_profiles(profiles), stickers, encoder, settings, writer, seed, out, engine, workers)
    expected = estimate_sessions(job)
    if estimate:
        report(expected, as_json, ("calls", "prompt_tokens", "completion_tokens", "cost_usd"))
        return
    typer.echo(f"about {expected['calls']} calls, {expected['cost_usd']} USD", err=True)
    summary = make_sessions(job)
    report(summary, as_json, ("sessions", "failed", "missing", "turns", "rates", "calls", "cost_usd"))
    if summary["failed"] or summary["missing"]:
        raise typer.Exit(1)
