"""Runs of Agent4SC: which sessions there are, writing them, and the files of a run folder."""

import asyncio
import fcntl
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from agent_generation.dry import DryLLM
from agent_generation.engine import Encode, Engine, Journal, Outcome, Prices, Spent, Steps, seed_of
from agent_generation.prompts import VERSION
from agent_generation.session import Dialogue, SessionPlan, Settings
from agent_generation.tool import Toolbox
from dataset_builders.schema import Generator, Profile, Session, Usage
from dataset_builders.stickerconv.sessions import RUN_FILE
from dataset_builders.stickers.encoder import PACKAGED
from dataset_builders.stickers.split import split_of_database


VALIDATION = 0.08  # of the sessions whose database serves train and validation
CONFIG, SESSIONS, FAILURES, SUMMARY = "run.json", RUN_FILE, "failures.jsonl", "summary.json"


class RunError(ValueError):
    """A run folder that cannot be gone on with; the message says why."""


@dataclass(frozen=True)
class Run:
    """
    A run: what must be the same for it to be resumed.

    Args:
        seed (`int`): Of all draws; session i depends on it and on i alone.
        model (`str`): Who writes.
        role_models (`dict[str, str]`): Who writes instead, by role.
        pack (`str`): Digest of the stickers.
        profiles (`str`): Digest of the profiles.
        settings ([`Settings`]): How sessions are written.
        shards (`int`, *optional*, defaults to 1): Journals that the sessions are dealt to.
        prompts (`str`, *optional*): Version of the prompts.
        encoder (`str`, *optional*): Sentence encoder that stickers are found and memories recalled with.
        databases (`str`, *optional*): Digest of the stickers' deal into databases.

    """

    seed: int
    model: str
    role_models: dict[str, str]
    pack: str
    profiles: str
    settings: Settings
    shards: int = 1
    prompts: str = VERSION
    encoder: str = PACKAGED
    databases: str = ""


@contextmanager
def open_run(folder: Path, run: Run) -> Iterator[None]:
    """
    Hold a run folder: new, or of the same run; nobody else may write it meanwhile.

    Raises:
        RunError: If it is no folder, holds another run or another process writes it.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}; expected a folder to write.") from None
    with (folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is writing it.") from None
        file, ours = folder / CONFIG, asdict(run)
        if file.is_file():
            theirs = json.loads(file.read_text("utf-8"))
            differing = [key for key in ours if theirs.get(key) != ours[key]]
            if differing:
                raise RunError(
                    f"{file}: begun with other {', '.join(differing)}; use the same to resume it, or another folder."
                )
        else:
            replace_text(file, json.dumps(ours, indent=2, ensure_ascii=False) + "\n")
        yield


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)


def digest_profiles(profiles: Sequence[Profile]) -> str:
    """SHA-256 of profiles in their order."""
    return hashlib.sha256("\n".join(profile.model_dump_json() for profile in profiles).encode()).hexdigest()


def digest_databases(databases: Mapping[str, int]) -> str:
    """SHA-256 of which database each sticker is in."""
    return hashlib.sha256(json.dumps(databases, sort_keys=True).encode()).hexdigest()


def plan_session(number: int, profiles: Sequence[Profile], databases: int, seed: int) -> SessionPlan:
    """
    Session `number` of a run: all profiles are used once, in random order, before any is used again; the database is drawn at random.

    Args:
        number (`int`): From 0.
        profiles (`Sequence[Profile]`): Of the Users.
        databases (`int`): How many sticker databases there are.
        seed (`int`): The run's.

    """
    past, place = divmod(number, len(profiles))
    order = list(range(len(profiles)))
    random.Random(seed_of(f"{seed}/profiles/{past}")).shuffle(order)
    rng = random.Random(seed_of(f"{seed}/{number}"))
    database = rng.randint(1, databases)
    splits = split_of_database(database, databases)
    split = splits[0] if len(splits) == 1 or rng.random() >= VALIDATION else "validation"
    return SessionPlan(f"s{seed}-{number:06d}", split, database, profiles[order[place]], rng.getrandbits(31))


def plan_sessions(count: int, profiles: Sequence[Profile], databases: int, seed: int) -> Iterator[SessionPlan]:
    """The first `count` sessions of a run; see [`plan_session`]."""
    return (plan_session(number, profiles, databases, seed) for number in range(count))


async def write_sessions(
    plans: Iterator[SessionPlan],
    engine: Engine,
    toolbox: Toolbox,
    settings: Settings,
    on_session: Callable[[Outcome], object],
) -> None:
    """
    Write sessions that are not in the engine's journal yet; those that failed go on from their journaled answers.

    Raises:
        ModelError: If the model answers nobody.
        BudgetError: If the budget is used up.

    """

    def waiting() -> Iterator[tuple[str, Callable[[], Steps]]]:
        for plan in plans:
            known = engine.journal.outcome(plan.session_id)
            if known is not None and known.failed is None:
                on_session(known)
            else:
                yield plan.session_id, Dialogue(plan, toolbox, settings).steps

    async for outcome in engine.run(waiting()):
        engine.journal.finish(outcome)
        on_session(outcome)


def shard_of(session_id: str, shards: int) -> int:
    """The journal that a session belongs to."""
    return seed_of(session_id) % shards


def journal_file(folder: Path, shard: int) -> Path:
    """A shard's journal."""
    return folder / f"journal-{shard:03d}.sqlite"


def export_run(folder: Path, run: Run, plans: Iterator[SessionPlan], prices: Prices) -> dict:
    """
    Write `sessions.jsonl`, `failures.jsonl` and `summary.json` from the journals: in the sessions' order, each file whole or not at all. When no
    session is missing, the run has ended, and the next one tries those that failed again.

    Returns:
        `dict`: The summary.

    """
    journals = [Journal(journal_file(folder, shard)) for shard in range(run.shards)]
    total: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    failed: dict[int, list[str]] = defaultdict(list)  # by shard
    with (
        (folder / f"{SESSIONS}.partial").open("w", encoding="utf-8") as sessions,
        (folder / f"{FAILURES}.partial").open("w", encoding="utf-8") as failures,
    ):
        for plan in plans:
            shard = shard_of(plan.session_id, run.shards)
            outcome = journals[shard].outcome(plan.session_id)
            if outcome is None:
                total["missing"] += 1
                continue
            count_spent(total, outcome.spent)
            if outcome.result is None:
                total["failed"] += 1
                failed[shard].append(plan.session_id)
                row = {"session_id": plan.session_id, "reason": outcome.failed}
                failures.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            session = as_session(plan, outcome, run, prices)
            sessions.write(session.model_dump_json() + "\n")
            total.update(sessions=1, turns=len(session.turns), no_sticker=session.no_sticker)
            tally.update(outcome.result["tally"])
    summary = summarise(total, tally, run.settings, prices)
    for name in (SESSIONS, FAILURES):
        (folder / f"{name}.partial").replace(folder / name)
    replace_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    for shard, journal in enumerate(journals):
        if not total["missing"]:
            journal.try_again(failed[shard])
        journal.close()
    return summary


def count_spent(total: Counter[str], spent: Spent) -> None:
    """Add what a session has used."""
    total.update(vars(spent))


def as_session(plan: SessionPlan, outcome: Outcome, run: Run, prices: Prices) -> Session:
    """The session of an outcome that did not fail."""
    assert outcome.result is not None
    spent = outcome.spent
    usage = Usage(
        calls=spent.calls,
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
        cost_usd=round(prices.cost(spent.prompt_tokens, spent.completion_tokens), 6),
    )
    turns = outcome.result["turns"]
    return Session(
        session_id=plan.session_id,
        split=plan.split,
        database=plan.database,
        profile=plan.profile,
        turns=turns,
        ended_by=outcome.result["ended_by"],
        no_sticker=not any(turn[role]["sticker"] for turn in turns for role in ("user", "system")),
        generator=Generator(name="agent4sc", model=run.model, version=run.prompts, seed=plan.seed),
        usage=usage,
    )


def summarise(total: Counter[str], tally: Counter[str], settings: Settings, prices: Prices) -> dict:
    """What a run has written and what it had to absorb; `rates` are shares of turns with a sticker."""
    turns = max(total["turns"], 1)
    counted = ("sessions", "failed", "missing", "turns", "no_sticker", "calls", "prompt_tokens", "completion_tokens")
    rates = {
        role: {
            "requested": getattr(settings, f"{role}_rate"),
            "realised": round(tally[f"{role}_stickers"] / turns, 4),
            "lost": tally[f"{role}_stickers_lost"],
        }
        for role in ("user", "system")
    }
    cost = prices.cost(total["prompt_tokens"], total["completion_tokens"])
    absorbed = {key: count for key, count in sorted(tally.items()) if "_stickers" not in key}
    return {
        **{key: total[key] for key in counted},
        "cost_usd": round(cost, 4),
        "rates": rates,
        "unusable_answers": total["unusable"],
        "absorbed": absorbed,
    }


def estimate(
    plans: Iterator[SessionPlan],
    count: int,
    toolbox: Toolbox,
    settings: Settings,
    encode: Encode,
    prices: Prices,
    folder: Path,
) -> dict:
    """
    What a run will take, from a few sessions written with random words.

    Args:
        plans (`Iterator[SessionPlan]`): Of the few.
        count (`int`): Sessions of the run.
        toolbox ([`Toolbox`]): The sticker databases.
        settings ([`Settings`]): How they are written.
        encode (`Callable`): Gives the vectors of texts.
        prices ([`Prices`]): For the cost.
        folder (`Path`): For a journal, which is thrown away.

    Returns:
        `dict`: `calls`, `prompt_tokens`, `completion_tokens`, `cost_usd` of the whole run.

    """
    spent: list[Spent] = []
    engine = Engine(DryLLM(), Journal(folder / "estimate.sqlite"), encode=encode)
    asyncio.run(write_sessions(plans, engine, toolbox, settings, lambda outcome: spent.append(outcome.spent)))
    engine.journal.close()
    mean = {
        key: sum(getattr(one, key) for one in spent) / max(len(spent), 1) for key in vars(Spent()) if key != "unusable"
    }
    whole = {key: round(value * count) for key, value in mean.items()}
    return {**whole, "cost_usd": round(prices.cost(whole["prompt_tokens"], whole["completion_tokens"]), 2)}
