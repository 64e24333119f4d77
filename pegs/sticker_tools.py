"""What `pegs stickers filter` and `annotate` do: the Tool module's steps over a pack."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent_generation.engine import ENDS_A_RUN, Engine, Journal, Outcome, Steps
from agent_generation.engine import Progress as Done
from agent_generation.llm import OpenAILLM
from agent_generation.tool import annotate_by_neighbours, annotate_sticker, apply_knowledge, filter_sticker
from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickers.pack import StickerPack
from pegs.endpoint import Endpoint, check_budget
from pegs.errors import InputError


NEIGHBOURS = 5
Make = Callable[[Callable[[], Image.Image], str], Steps]


def journal_of(folder: Path, work: str, model: str) -> Path:
    """The journal of a piece of work in `folder`: one a model, since its answers are nobody else's."""
    return folder / f"{work}-{quote(model, safe='')}.sqlite3"


def ask_about(
    pack: StickerPack, stickers: Sequence[Sticker], step: str, make: Make, endpoint: Endpoint, file: Path
) -> tuple[dict[str, Outcome], Done]:
    """
    Ask a model about stickers, with the journal `file`; the same call resumes what was cut short.

    Raises:
        InputError: If the endpoint answers nobody or the budget is used up.

    """
    check_budget(endpoint.prices, endpoint.budget_usd)

    def start(sticker: Sticker) -> Callable[[], Steps]:
        return lambda: make(lambda: pack.image(sticker.id), endpoint.language)

    async def run(journal: Journal, bar: Progress) -> tuple[dict[str, Outcome], Done]:
        row = bar.add_task(step, total=len(stickers), cost=0.0)
        engine = Engine(
            OpenAILLM(endpoint.url, endpoint.model, extra_body=endpoint.extra_body),
            journal,
            endpoint.concurrency,
            prices=endpoint.prices,
            budget_usd=endpoint.budget_usd,
            spent_usd=endpoint.prices.cost(*journal.paid()),
            on_progress=lambda done: bar.update(row, completed=done.tasks, cost=done.cost_usd),
        )
        tasks = ((f"{step}/{sticker.id}", start(sticker)) for sticker in stickers)
        outcomes = {outcome.task.partition("/")[2]: outcome async for outcome in engine.run(tasks)}
        return outcomes, engine.progress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[cost]:.4f} USD"))  # fmt: skip
    try:
        with (
            closing(Journal(file)) as journal,
            Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
        ):
            return asyncio.run(run(journal, bar))
    except ENDS_A_RUN as error:
        raise InputError(str(error)) from error


def filter_pack(pack: StickerPack, endpoint: Endpoint, out: Path) -> dict:
    """
    Keep what is fit for casual chat: write the smaller pack into `out`. The next call asks again for the answers that could not be read or did not come.

    Returns:
        `dict`: `stickers` kept, `refused`, `ties`, `unknown_answers`, `failed` (id to reason), `refusals` (id to votes and reasons), and the run's cost.

    """
    out.mkdir(parents=True, exist_ok=True)
    file = journal_of(out, "filter", endpoint.model)
    outcomes, done = ask_about(pack, pack.stickers, "filter", filter_sticker, endpoint, file)
    votes = {name: outcome.result for name, outcome in outcomes.items() if outcome.result}
    if unsure := [outcomes[name].task for name, vote in votes.items() if vote["unknown"]]:
        with closing(Journal(file)) as journal:
            journal.try_again(unsure)
    kept = [sticker for sticker in pack.stickers if votes.get(sticker.id, {}).get("kept")]
    if not kept:
        raise InputError(f"not one of {len(pack.stickers)} stickers passed the filter; nothing was written")
    StickerPack(pack.info, kept, pack.images).save(out)
    return {
        "pack": str(out),
        "stickers": len(kept),
        "refused": len(votes) - len(kept),
        "ties": sum(vote["yes"] == vote["no"] for vote in votes.values()),
        "unknown_answers": sum(vote["unknown"] for vote in votes.values()),
        "refusals": {s.id: votes[s.id] for s in pack.stickers if s.id in votes and not votes[s.id]["kept"]},
        **_report(outcomes, done),
    }


def annotate_pack(pack: StickerPack, endpoint: Endpoint, out: Path, again: bool) -> dict:
    """
    Write knowledge for the stickers that have none (or, `again`, for all) into the pack in `out`. The next call tries those that failed again; `again`
    asks about all of them anew when none has failed.

    Returns:
        `dict`: `annotated`, `failed` (id to reason), and the run's cost.

    """
    out.mkdir(parents=True, exist_ok=True)
    wanted = [sticker for sticker in pack.stickers if again or not sticker.emotion or not sticker.description]
    file = journal_of(out, "annotate-again" if again else "annotate", endpoint.model)
    outcomes, done = ask_about(pack, wanted, "annotate", annotate_sticker, endpoint, file)
    known = {name: outcome.result for name, outcome in outcomes.items() if outcome.result}
    by = endpoint.model
    stickers = [apply_knowledge(s, known[s.id], by) if s.id in known else s for s in pack.stickers]
    StickerPack(pack.info, stickers, pack.images, pack.databases).save(out)
    if failed := [outcome.task for outcome in outcomes.values() if outcome.failed]:
        with closing(Journal(file)) as journal:
            journal.try_again(failed)
    elif again:
        file.unlink()
    return {"pack": str(out), "annotated": len(known), **_report(outcomes, done)}


def annotate_pack_locally(pack: StickerPack, reference: StickerPack, model_name: str, out: Path, again: bool) -> dict:
    """
    Write knowledge with the embedded model's vision tower and the stickers of an annotated pack; no endpoint is asked.

    Returns:
        `dict`: `annotated`.

    Raises:
        InputError: If the model cannot be read.

    """
    from pegs.assemble import embed_pictures, load_model
    from pegs.training.text_states import embed_sentences

    wanted = [sticker for sticker in pack.stickers if again or not sticker.emotion or not sticker.description]
    if not wanted:
        pack.save(out)
        return {"pack": str(out), "annotated": 0, "failed": {}}
    _, model, processor = load_model(model_name)
    known = [sticker for sticker in reference.stickers if sticker.emotion]
    known_vectors = embed_pictures(model, processor, reference, known)
    vectors = embed_pictures(model, processor, pack, wanted)
    prompts = embed_sentences([f"a sticker that shows {emotion}, {emotion}" for emotion in EMOTIONS])
    zero_shot = (vectors @ prompts.T / model.config.retrieval_temperature).softmax(-1)
    nearest = (vectors @ known_vectors.T).topk(NEIGHBOURS)
    made = {}
    for sticker, scores, values, rows in zip(wanted, zero_shot, nearest.values, nearest.indices, strict=True):
        neighbours = [(known[row], value) for row, value in zip(rows.tolist(), values.tolist(), strict=True)]
        made[sticker.id] = annotate_by_neighbours(
            sticker, dict(zip(EMOTIONS, scores.tolist(), strict=True)), neighbours
        )
    StickerPack(pack.info, [made.get(s.id, s) for s in pack.stickers], pack.images, pack.databases).save(out)
    return {"pack": str(out), "annotated": len(made), "failed": {}}


def _report(outcomes: dict[str, Outcome], done: Done) -> dict:
    return {
        "failed": {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed},
        "calls": done.calls,
        "reused": done.reused,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "cost_usd": round(done.cost_usd, 6),
    }
