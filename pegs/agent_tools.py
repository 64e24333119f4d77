"""What `pegs profiles generate` and `pegs generate` do: Agent4SC with its stickers, models and run folders."""

import asyncio
import hashlib
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent_generation.batch_api import BatchLLM
from agent_generation.encoder_process import EncoderProcess
from agent_generation.engine import ENDS_A_RUN, Engine, Journal, Outcome, Prices
from agent_generation.llm import LLM, ROLES, OpenAILLM
from agent_generation.profile import (
    ProfileError,
    generate_profiles,
    make_room,
    normalise_emotion,
    read_profiles,
    write_profiles,
)
from agent_generation.run import (
    Run,
    RunError,
    digest_databases,
    digest_profiles,
    estimate,
    export_run,
    journal_file,
    open_run,
    plan_sessions,
    replace_text,
    shard_of,
    write_sessions,
)
from agent_generation.session import SessionPlan, Settings
from agent_generation.tool import Toolbox
from dataset_builders.schema import Emotion, Profile
from dataset_builders.stickers.encoder import Encoder, TextEncoder
from dataset_builders.stickers.pack import PackError, StickerPack
from dataset_builders.stickers.search import StickerSearch, digest_texts, open_search
from pegs.adapters import EMBEDDED, load_language_model
from pegs.encoder import load_encoder
from pegs.endpoint import check_budget, parse_extra_body
from pegs.errors import InputError
from pegs.places import CHECKPOINTS, DEFAULT_MODEL, find_pack, load_pack
from pegs.sticker_tools import journal_of


RATES = {"stickerconv": (0.35, 0.60), "mod": (0.31, 0.31), "line": (0.09, 0.09), "off": (0.0, 0.0)}
AGENTS = CHECKPOINTS / "agent4sc-mini"  # an adapter on top of the mini model's
DIALOGUE_ROLES = ("user", "system", "manager", "memory", "stronger")
SHARDS = 16  # of a run on a cluster
NOTHING_DONE = {"sessions": 0, "turns": 0, "stickers": 0, "tokens": 0, "usd": 0}
DRAFTS = 4  # of a message of the embedded model
LONGEST = 140  # characters of such a message; of those that it has learned 99 in 100 are shorter
ESTIMATED = 4  # sessions written with random words


@dataclass(frozen=True)
class Writer:
    """
    Who writes: an OpenAI-compatible endpoint, or without `url` the embedded model.

    Args:
        url (`str`): Address up to and with `/v1`.
        model (`str`): Name of its model.
        role_models (`dict[str, str]`): Names of others that answer for some roles.
        concurrency (`int`): Requests in flight at once.
        prices ([`Prices`]): For the cost.
        budget_usd (`float`, *optional*): Hard cap.
        batch_api (`bool`): Whether to ask through the provider's batch API.
        extra_body (`dict[str, Any]`): Fields for the body of every request.

    """

    url: str
    model: str
    role_models: dict[str, str]
    concurrency: int
    prices: Prices
    budget_usd: float | None = None
    batch_api: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def open(self, notes: Path) -> LLM:
        """The model; a batch API's notes are kept in `notes`."""
        if not self.url:
            return embedded_writer()
        roles = {role: replace(settings, model=self.role_models.get(role)) for role, settings in ROLES.items()}
        if self.batch_api:
            return BatchLLM(self.url, self.model, roles, extra_body=self.extra_body, notes=notes)
        return OpenAILLM(self.url, self.model, roles, extra_body=self.extra_body)


def make_writer(
    llm: str,
    model: str,
    role_models: Sequence[str],
    concurrency: int,
    price_in: float,
    price_out: float,
    budget_usd: float | None,
    language: str,
    batch_api: bool = False,
    extra_body: str = "",
) -> Writer:
    """
    Who writes, as the command line says it; a batch API costs half.

    Raises:
        InputError: If that does not go together.

    """
    if llm and not model:
        raise InputError("--model is needed with --llm.")
    if not llm and (model or role_models or batch_api or extra_body or language != "en"):
        raise InputError(
            "--model, --role-model, --strong-model, --batch-api, --extra-body and --language zh need --llm: the embedded model is small and speaks English."
        )
    check_budget(Prices(price_in, price_out), budget_usd)
    half = 0.5 if batch_api else 1.0
    prices = Prices(price_in * half, price_out * half)
    by_role = parse_role_models(role_models)
    extra = parse_extra_body(extra_body)
    return Writer(llm, model or EMBEDDED["hub_id"], by_role, concurrency, prices, budget_usd, batch_api, extra)


def parse_role_models(words: Sequence[str]) -> dict[str, str]:
    """
    Models by role, each as `manager=NAME`.

    Raises:
        InputError: If one is not of that form.

    """
    models = dict(word.partition("=")[::2] for word in words)
    if unknown := [role for role, name in models.items() if role not in DIALOGUE_ROLES or not name]:
        raise InputError(
            f"--role-model {unknown[0]}: expected one of {', '.join(DIALOGUE_ROLES)}, and =NAME after it."
        )
    return models


def embedded_writer() -> LLM:
    """The embedded model, in this process: the mini PEGS' language model, trained to play the agents."""
    from agent_generation.local import TransformersLLM

    model, tokenizer = load_language_model(EMBEDDED, [DEFAULT_MODEL / "adapter", AGENTS])
    return TransformersLLM(model.bfloat16().eval(), tokenizer, EMBEDDED["hub_id"], drafts=DRAFTS, longest=LONGEST)


def parse_rates(words: Sequence[str]) -> tuple[float, float]:
    """
    User's and System's sticker rates: a preset's name, one number for both, or `user=0.35 system=0.60`; a side that is not named keeps StickerConv's.

    Raises:
        InputError: If it is none of these.

    """
    text = " ".join(words).replace(",", " ").split()
    if len(text) == 1 and text[0] in RATES:
        return RATES[text[0]]
    try:
        if len(text) == 1 and "=" not in text[0]:
            rates = (float(text[0]), float(text[0]))
        else:
            given = dict(part.split("=", 1) for part in text)
            if set(given) - {"user", "system"}:
                raise ValueError(given)
            user, system = RATES["stickerconv"]
            rates = (float(given.get("user", user)), float(given.get("system", system)))
    except ValueError:
        rates = (-1.0, -1.0)
    if not all(0 <= rate <= 1 for rate in rates):
        known = ", ".join(RATES)
        raise InputError(
            f"--sticker-rate {' '.join(words)}: expected {known}, or shares from 0 to 1: user=0.35 system=0.60."
        )
    return rates


def parse_shares(text: str) -> dict[Emotion, float]:
    """
    A target distribution of emotions, `sadness=3,fear=2,...`; those not named get none.

    Raises:
        InputError: If it is not of that form.

    """
    try:
        shares = {
            normalise_emotion(name): float(value) for name, value in (part.split("=", 1) for part in text.split(","))
        }
        if min(shares.values()) < 0 or not 0 < sum(shares.values()) < math.inf:
            raise ValueError("shares must be positive and finite")
        return shares
    except ValueError as error:
        raise InputError(f"--emotions {text}: {error}; expected for example sadness=3,fear=2,happiness=1.") from error


def load_toolbox(stickers: str, encoder: Encoder) -> tuple[Toolbox, StickerPack]:
    """
    The sticker databases of a pack, and the pack.

    Raises:
        InputError: If the pack cannot be read, is not annotated or not split.

    """
    pack = load_pack(stickers)
    if not pack.databases or not all(sticker.emotion for sticker in pack.stickers):
        raise InputError(
            f"--stickers {stickers}: the pack must be annotated and split (pegs stickers annotate, split)."
        )
    return Toolbox(search_pack(find_pack(stickers), pack, encoder), pack.databases), pack


def search_pack(folder: Path, pack: StickerPack, encoder: Encoder) -> StickerSearch:
    """Search a pack; vectors that it lacks are kept beside it, or in `$HF_HOME/stickerconv/vectors` where a folder is the Hub's or cannot be written."""
    try:
        return StickerSearch.open(folder, pack, encoder)
    except (FileNotFoundError, PackError):
        if Path(HF_HUB_CACHE) in folder.parents or not os.access(folder, os.W_OK):
            name = hashlib.sha256(f"{encoder.name}\n{digest_texts(pack.stickers)}".encode()).hexdigest()[:24]
            folder = Path(HF_HOME) / "stickerconv" / "vectors" / name
            folder.mkdir(parents=True, exist_ok=True)
        return open_search(folder, pack, encoder)


def load_profiles(path: Path) -> list[Profile]:
    """
    Profiles of a file.

    Raises:
        InputError: If there are none, or a broken one.

    """
    with told_plainly():
        return read_profiles(path)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Errors that end a run or keep it from beginning, as one line."""
    try:
        yield
    except (*ENDS_A_RUN, RunError, ProfileError) as error:
        raise InputError(str(error)) from error


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[..., object]]:
    """A bar on stderr while it is a terminal; gives what updates it."""
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task(unit, total=total, said="")
        yield lambda done, said="": bar.update(row, completed=done, said=said)


def make_profiles(
    count: int, out: Path, shares: dict[Emotion, float], seed: int, language: str, writer: Writer
) -> dict:
    """
    Write user profiles by self-instruct into `out`; the journal beside it, one a model, resumes what was cut short.

    Returns:
        `dict`: `profiles` (count), `refused` (by reason), and what it took.

    Raises:
        InputError: If `out` cannot be written, the model answers nobody or has nothing new to say, or the budget is used up.

    """
    with told_plainly():
        make_room(out)
    task, file = f"profiles/{seed}", journal_of(out.parent, f"{out.name}.journal", writer.model)
    with told_plainly(), closing(Journal(file)) as journal, progress_bar(count, "profiles") as show:
        engine = Engine(
            writer.open(out.with_name(f"{out.name}.batches.json")),
            journal,
            writer.concurrency,
            prices=writer.prices,
            budget_usd=writer.budget_usd,
            spent_usd=writer.prices.cost(*journal.paid()),
        )

        async def write() -> Outcome:
            start = lambda: generate_profiles(count, shares, seed, language, on_accepted=show)  # noqa: E731
            return [outcome async for outcome in engine.run([(task, start)])][0]

        outcome = asyncio.run(write())
        if outcome.result is None:
            journal.try_again([task])
            raise InputError(f"{out}: {outcome.failed}")
    write_profiles(out, [Profile.model_validate(row) for row in outcome.result["profiles"]])
    spent = outcome.spent
    return {
        "out": str(out),
        "profiles": count,
        "refused": outcome.result["refused"],
        **vars(spent),
        "cost_usd": round(writer.prices.cost(spent.prompt_tokens, spent.completion_tokens), 4),
    }


@dataclass(frozen=True)
class Job:
    """Everything that `pegs generate` is told."""

    count: int
    profiles: Sequence[Profile]
    stickers: str
    encoder: str
    settings: Settings
    writer: Writer
    seed: int
    out: Path
    engine: Literal["local", "ray"] = "local"
    workers: int = 1

    @property
    def shards(self) -> int:
        """Journals of the run."""
        return SHARDS if self.engine == "ray" else 1

    def plans(self, databases: int) -> Iterator[SessionPlan]:
        """The job's sessions."""
        return plan_sessions(self.count, self.profiles, databases, self.seed)


def estimate_sessions(job: Job) -> dict:
    """What a job will take; see [`estimate`]."""
    encoder = load_encoder(job.encoder)
    toolbox, _ = load_toolbox(job.stickers, encoder)
    few = islice(job.plans(len(toolbox.databases)), ESTIMATED)
    with tempfile.TemporaryDirectory() as folder:
        return estimate(few, job.count, toolbox, job.settings, encoder, job.writer.prices, Path(folder))


def make_sessions(job: Job) -> dict:
    """
    Write sessions into a run folder; the same call resumes what was cut short.

    Returns:
        `dict`: The run's summary.

    Raises:
        InputError: If the folder holds another run, Ray is missing, the model answers nobody or the budget is used up.

    """
    if job.engine == "ray" and find_spec("ray") is None:
        raise InputError("--engine ray needs Ray: pip install 'stickerconv[ray]'.")
    toolbox, pack = load_toolbox(job.stickers, TextEncoder(job.encoder))
    run = Run(
        job.seed,
        job.writer.model,
        job.writer.role_models,
        digest_texts(pack.stickers),
        digest_profiles(job.profiles),
        job.settings,
        job.shards,
        encoder=job.encoder,
        databases=digest_databases(pack.databases),
    )
    databases = len(toolbox.databases)
    with told_plainly(), open_run(job.out, run):
        try:
            with progress_bar(job.count, "sessions") as bar:

                def show(done: Mapping[str, float]) -> None:
                    bar(done["sessions"], "{turns:.0f} turns, {stickers:.0f} stickers, {tokens:.0f} tokens, {usd:.4f} USD".format_map(done))  # fmt: skip

                if job.engine == "local":
                    write_shard(job, 0, show)
                else:
                    from agent_generation.ray_engine import run_on_cluster

                    run_on_cluster(
                        partial(write_shard_of_cluster, job),
                        job.shards,
                        job.workers,
                        lambda: show(total_progress(job)),
                    )
        finally:
            summary = export_run(job.out, run, job.plans(databases), job.writer.prices)
    return {"out": str(job.out), **summary}


def write_shard(job: Job, shard: int, show: Callable[[Mapping[str, float]], object]) -> None:
    """Write one shard's sessions in this process; `show` is told how far it is."""
    writer = job.writer
    kept = max(4096, 64 * writer.concurrency)  # what is embedded ahead must still be there when it is wanted
    with ExitStack() as opened:
        encoder: Encoder = TextEncoder(job.encoder, kept=kept, steady=True)
        if writer.url:  # its client leaves no time for vectors
            encoder = opened.enter_context(closing(EncoderProcess(job.encoder, kept=kept, steady=True)))
        toolbox, _ = load_toolbox(job.stickers, encoder)
        journal = opened.enter_context(closing(Journal(journal_file(job.out, shard))))
        engine = Engine(
            writer.open(job.out / f"batches-{shard:03d}.json"),
            journal,
            writer.concurrency,
            live_tasks=writer.concurrency if writer.batch_api else None,
            prices=writer.prices,
            budget_usd=writer.budget_usd and writer.budget_usd / job.shards,
            spent_usd=writer.prices.cost(*journal.paid()),
            encode=encoder,
        )
        plans = (plan for plan in job.plans(len(toolbox.databases)) if shard_of(plan.session_id, job.shards) == shard)
        asyncio.run(write_sessions(plans, engine, toolbox, job.settings, SessionCounter(engine, show)))


def write_shard_of_cluster(job: Job, shard: int) -> None:
    """What a worker does: it notes in a file how far it is, which all nodes see."""
    file = progress_file(job, shard)
    write_shard(job, shard, lambda done: replace_text(file, json.dumps(done)))


def progress_file(job: Job, shard: int) -> Path:
    """Where a shard's worker notes how far it is."""
    return job.out / f"progress-{shard:03d}.json"


def total_progress(job: Job) -> Mapping[str, float]:
    """How far all shards are together."""
    total = Counter(NOTHING_DONE)
    for file in (progress_file(job, shard) for shard in range(job.shards)):
        if file.is_file():
            total.update(json.loads(file.read_text()))
    return total


class SessionCounter:
    """Tells how far a run is: sessions, turns, stickers; and tokens and US dollars of this process."""

    def __init__(self, engine: Engine, show: Callable[[Mapping[str, float]], object]) -> None:
        self.engine, self.show, self.done = engine, show, Counter(NOTHING_DONE)

    def __call__(self, outcome: Outcome) -> None:
        """Count a session that has ended."""
        self.done["sessions"] += 1
        for turn in outcome.result["turns"] if outcome.result else ():
            self.done["turns"] += 1
            self.done["stickers"] += sum(turn[role]["sticker"] is not None for role in ("user", "system"))
        spent = self.engine.progress
        self.show({**self.done, "tokens": spent.prompt_tokens + spent.completion_tokens, "usd": spent.cost_usd})
