"""LLM-based metrics (section 5.3, appendix D.2, F.4; Table 3): empathy, consistency and rank by any OpenAI-compatible judge."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, create_model
from scipy.stats import f, kendalltau

from agent_generation.engine import ENDS_A_RUN, Engine, Journal, Outcome, Prices, Steps, most_prompt_tokens
from agent_generation.engine import Progress as Done
from agent_generation.llm import ROLES, AnswerError, Form, OpenAILLM, Request, RoleSettings
from agent_generation.tool import annotate_sticker, picture_part
from dataset_builders.stickers.pack import StickerPack
from pegs.endpoint import Endpoint, check_budget
from pegs.errors import InputError
from pegs.evaluation.predict import Prediction, Predictions, Said, SentSticker
from pegs.evaluation.results import Result, Statistic, make_result, mean_of
from pegs.evaluation.templates import render_prompt
from pegs.sticker_tools import journal_of


SCORINGS = 5  # of each reply and metric (appendix D.2)
JUDGE = {
    "judge": RoleSettings(temperature=1.0, max_tokens=300),
    "annotate": ROLES["annotate"],
    "knowledge": ROLES["knowledge"],
}
LETTERS_A_TOKEN = 4  # for the estimate; the cap counts bytes
ANSWER_TOKENS = 80  # for the estimate

Shown = Literal["descriptions", "images"]
STATISTICS: dict[str, Statistic] = {name: mean_of(name) for name in ("emp_txt", "emp_mm", "con", "rank")}


class Score(Form):
    """A judge's answer about one reply."""

    reason: str
    score: Literal[1, 2, 3, 4, 5]


@lru_cache(maxsize=32)
def ranking_form(count: int) -> type[BaseModel]:
    """Form of an answer that ranks `count` candidates: each number from 1 once, best first; anything else is malformed."""

    def check(ranking: list[int]) -> list[int]:
        if sorted(ranking) != list(range(1, count + 1)):
            raise ValueError(f"must hold each number from 1 to {count} once")
        return ranking

    return create_model("Ranking", __base__=Form, reason=(str, ...), ranking=(Annotated[list[int], AfterValidator(check)], ...))  # fmt: skip


def latin_square(count: int) -> list[tuple[int, ...]]:
    """
    Orders of `count` candidates in which each stands once at every place; for an even count each also follows every other once (Williams 1949).

    Returns:
        `list[tuple[int, ...]]`: `count` orders of the numbers from 0.

    """
    first = [(place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)]
    return [tuple((number + shift) % count for number in first) for shift in range(count)]


class Pictures:
    """
    How a judge is told of stickers: in words, or as pictures that are numbered through a prompt.

    Args:
        shown (`str`): `"descriptions"` or `"images"`.
        load (`Callable`): Gives a sticker's picture (RGBA).

    """

    def __init__(self, shown: Shown, load: Callable[[SentSticker], Image.Image]) -> None:
        self.shown, self.load = shown, load
        self.parts: list[dict] = []

    def tell(self, said: Said) -> dict:
        """A message as the prompts' templates show it."""
        told = said.model_dump()
        if said.sticker is not None:
            told["sticker"]["number"] = None
            if self.shown == "images":
                told["sticker"]["number"] = len(self.parts) // 2 + 1
                self.parts += [{"type": "text", "text": f"{len(self.parts) // 2 + 1}:"}, picture_part(self.load(said.sticker))]  # fmt: skip
        return told

    def message(self, prompt: str) -> dict:
        """A prompt with the pictures it speaks of."""
        return {"role": "user", "content": [{"type": "text", "text": prompt}, *self.parts] if self.parts else prompt}


Load = Callable[[SentSticker], Image.Image]


def judge_reply(row: Prediction, load: Load, shown: Shown, language: str) -> Steps:
    """
    Five independent scores of a reply's empathy and five of its consistency with the context (section 5.3).

    Returns:
        `dict`: `empathy` and `consistency`, lists of scores; `None` stands for an answer that stayed unusable.

    """
    requests = []
    for metric in ("empathy", "consistency"):
        pictures = Pictures(shown, load)
        prompt = render_prompt(metric, language, context=[pictures.tell(line) for line in row.context], reply=pictures.tell(row.predicted))  # fmt: skip
        requests += [Request([pictures.message(prompt)], "judge", Score)] * SCORINGS
    answers = yield requests
    scores = [None if isinstance(answer, AnswerError) else answer.score for answer in answers]
    return {"empathy": scores[:SCORINGS], "consistency": scores[SCORINGS:]}


def rank_replies(
    rows: Sequence[Prediction], loads: Sequence[Load], orders: Sequence[Sequence[int]], shown: Shown, language: str
) -> Steps:
    """
    Rankings of several models' replies to one message, asked in several orders (section 5.3).

    Args:
        rows (`Sequence[Prediction]`): One a model, of the same turn.
        loads (`Sequence[Callable]`): Gives the pictures of each model's stickers.
        orders (`Sequence[Sequence[int]]`): Which model stands at which place, a list a question.
        shown (`str`): `"descriptions"` or `"images"`.
        language (`str`): Language of the prompts.

    Returns:
        `dict`: `places`, for each order the places from best to worst (0-based), or `None` for an answer that stayed unusable.

    """
    requests = []
    for order in orders:
        pictures = Pictures(shown, loads[0])
        context = [pictures.tell(line) for line in rows[0].context]
        replies = []
        for model in order:
            pictures.load = loads[model]
            replies.append(pictures.tell(rows[model].predicted))
        prompt = render_prompt("rank", language, context=context, replies=replies)
        requests.append(Request([pictures.message(prompt)], "judge", ranking_form(len(rows))))
    answers = yield requests
    return {"places": [None if isinstance(a, AnswerError) else [number - 1 for number in a.ranking] for a in answers]}


def ranks_of(order: Sequence[int], places: Sequence[int]) -> list[int]:
    """Rank of each model, from 1 for the best, by the places from best to worst of an order."""
    ranks = [0] * len(order)
    for rank, place in enumerate(places, start=1):
        ranks[order[place]] = rank
    return ranks


def position_bias(ranks: np.ndarray, orders: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """
    Whether a judge prefers a place: F test of the places in the analysis of variance of Latin squares, one a turn, with models and orders as their other factors.

    The mean of a model's ranks in a turn is taken away first, so the models' worth is neither in the places' means nor in the spread that these are held against.

    Args:
        ranks (`np.ndarray` of shape `(turns, orders, models)`): Of each model in each order, from 1 for the best.
        orders (`Sequence[Sequence[int]]`): Which model stands at which place; the same Latin square in every turn.

    Returns:
        `dict`: `mean_rank_by_place` (equal where there is no bias), `f`, `p`, `answers`; `None` without answers.

    """
    if not len(ranks):
        return None
    turns, places, _ = ranks.shape
    by_place = np.take_along_axis(ranks - ranks.mean(1, keepdims=True), np.array(orders)[None], 2)
    shifts = by_place.mean((0, 1))
    explained, total = turns * places * float((shifts**2).sum()), float((by_place**2).sum())
    freedom = max(1, turns * (places - 1) ** 2 - (places - 1))
    noise = (total - explained) / freedom
    if noise < 1e-9:
        noise = places * (places + 1) / 12  # a judge that sees nothing but places leaves none: then that of chance
    statistic = explained / (places - 1) / noise
    return {"mean_rank_by_place": (shifts + (places + 1) / 2).round(4).tolist(), "f": round(statistic, 4), "p": float(f.sf(statistic, places - 1, freedom)), "answers": turns * places}  # fmt: skip


def sample_turns(keys: Sequence[str], count: int, seed: int) -> list[str]:
    """So many of the turns (all for 0), the same for every run, in their order."""
    if not 0 < count < len(keys):
        return list(keys)
    by_chance = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    chosen = set(by_chance[:count])
    return [key for key in keys if key in chosen]


@dataclass(frozen=True)
class Trial:
    """What is judged: predictions cut to the same turns, and how stickers are shown."""

    runs: tuple[Predictions, ...]
    pack: StickerPack
    shown: Shown
    language: str

    def load(self, run: Predictions) -> Load:
        """Gives the pictures of a run's stickers."""
        return partial(run.image, pack=self.pack)

    def undescribed(self) -> dict[str, Callable[[], Image.Image]]:
        """Stickers that must be described before a judge can read of them, by the digest of their picture."""
        if self.shown == "images":
            return {}
        wanted: dict[str, Callable[[], Image.Image]] = {}
        for run in self.runs:
            for row in run.rows:
                sticker = row.predicted.sticker
                if sticker and not sticker.description:
                    wanted[self.digest(run, sticker)] = partial(run.image, sticker, self.pack)
        return wanted

    def digest(self, run: Predictions, sticker: SentSticker) -> str:
        """SHA-256 of a sticker's picture."""
        return hashlib.sha256(run.picture_bytes(sticker, self.pack)).hexdigest()

    def with_descriptions(self, known: Mapping[str, dict]) -> "Trial":
        """With the descriptions that a captioner gave; a sticker it failed on keeps none."""

        def describe(run: Predictions, row: Prediction) -> Prediction:
            sticker = row.predicted.sticker
            found = known.get(self.digest(run, sticker)) if sticker and not sticker.description else None
            if found is None or sticker is None:
                return row
            told = sticker.model_copy(update={"emotion": found["emotion"], "description": found["description"]})
            return row.model_copy(update={"predicted": row.predicted.model_copy(update={"sticker": told})})

        runs = tuple(Predictions(run.path, tuple(describe(run, row) for row in run.rows)) for run in self.runs)
        return Trial(runs, self.pack, self.shown, self.language)

    def can_be_judged(self, row: Prediction) -> bool:
        """Whether the judge can be told of the reply's sticker."""
        return self.shown == "images" or row.predicted.sticker is None or bool(row.predicted.sticker.description)

    def tasks(self) -> dict[str, Callable[[], Steps]]:
        """Everything to ask, by name; ranks only of several models, in the orders of a Latin square."""
        tasks: dict[str, Callable[[], Steps]] = {}
        for run in self.runs:
            for row in run.rows:
                if self.can_be_judged(row):
                    tasks[f"reply/{run.model}/{row.key}"] = partial(judge_reply, row, self.load(run), self.shown, self.language)  # fmt: skip
        if len(self.runs) > 1:
            loads, orders = [self.load(run) for run in self.runs], latin_square(len(self.runs))
            for rows in zip(*(run.rows for run in self.runs), strict=True):
                if all(map(self.can_be_judged, rows)):
                    tasks[f"rank/{rows[0].key}"] = partial(rank_replies, rows, loads, orders, self.shown, self.language)  # fmt: skip
        return tasks


def estimate(trial: Trial, prices: Prices) -> dict[str, Any]:
    """
    What a trial will ask, before anything is asked. Captions of drawn stickers are counted, their answers guessed.

    Returns:
        `dict`: `calls`; `prompt_tokens`, `completion_tokens` and `cost_usd`, guessed; `most_usd`, which no run without retries can pass.

    """
    captions = trial.undescribed()
    seen = {digest: {"emotion": "neutral", "description": "x" * 80} for digest in captions}
    totals = {"calls": 2 * len(captions), "prompt_tokens": 800 * len(captions), "completion_tokens": 300 * len(captions)}  # fmt: skip
    most = prices.cost(4000 * len(captions), (JUDGE["annotate"].max_tokens + JUDGE["knowledge"].max_tokens) * len(captions))  # fmt: skip
    for start in trial.with_descriptions(seen).tasks().values():
        for request in next(start()):
            upper = most_prompt_tokens(request.messages)  # type: ignore[union-attr]
            totals["calls"] += 1
            totals["prompt_tokens"] += upper // LETTERS_A_TOKEN
            totals["completion_tokens"] += ANSWER_TOKENS
            most += prices.cost(upper, JUDGE["judge"].max_tokens)
    cost = prices.cost(totals["prompt_tokens"], totals["completion_tokens"])
    return {**totals, "cost_usd": round(cost, 4), "most_usd": round(most, 4)}


def run_judge(
    trial: Trial, endpoint: Endpoint, folder: Path, on_progress: Callable[[str, int, Done], object]
) -> tuple[list[Result], dict[str, Any]]:
    """
    Judge replies; the same call resumes what was cut short, from the journal in `folder`.

    Args:
        trial ([`Trial`]): What is judged.
        endpoint ([`Endpoint`]): The judge.
        folder (`Path`): For the journal, one a judge.
        on_progress (`Callable`): Called with what is being done, of how many, and the engine's progress.

    Returns:
        `tuple[list[Result], dict]`: Figures of each model, and what the run cost and could not score.

    Raises:
        InputError: If the judge answers nobody or the budget is used up; what was answered is kept.

    """
    check_budget(endpoint.prices, endpoint.budget_usd)
    journal_path = journal_of(folder, "judge", endpoint.model)

    async def run(journal: Journal) -> tuple[Trial, dict[str, Outcome], Done]:
        stage, total = "describing stickers", 0
        engine = Engine(
            OpenAILLM(endpoint.url, endpoint.model, JUDGE, extra_body=endpoint.extra_body),
            journal,
            endpoint.concurrency,
            prices=endpoint.prices,
            budget_usd=endpoint.budget_usd,
            spent_usd=endpoint.prices.cost(*journal.paid()),
            on_progress=lambda done: on_progress(stage, total, done),
        )

        async def answer(tasks: Mapping[str, Callable[[], Steps]]) -> dict[str, Outcome]:
            return {outcome.task: outcome async for outcome in engine.run(tasks.items())}

        captions = trial.undescribed()
        total = len(captions)
        asked = {f"describe/{digest}": partial(annotate_sticker, load, trial.language) for digest, load in captions.items()}  # fmt: skip
        known = {name.partition("/")[2]: outcome.result for name, outcome in (await answer(asked)).items() if outcome.result}  # fmt: skip
        described = trial.with_descriptions(known)
        tasks = described.tasks()
        stage, total = "judging", len(captions) + len(tasks)
        return described, await answer(tasks), engine.progress

    try:
        with closing(Journal(journal_path)) as journal:
            described, outcomes, done = asyncio.run(run(journal))
    except ENDS_A_RUN as error:
        raise InputError(str(error)) from error
    cost = {
        "calls": done.calls,
        "reused": done.reused,
        "retried": done.retried,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "cost_usd": round(done.cost_usd, 6),
    }
    return summarize(described, {name: outcome.result for name, outcome in outcomes.items()}, endpoint.model), cost


def summarize(trial: Trial, answers: Mapping[str, dict | None], judge: str) -> list[Result]:
    """
    Figures of each model from the judge's answers.

    A reply's score is the mean of its usable answers. EMP-txt is over the replies without a sticker, EMP-mm over those with one, as in the reference code. A turn is ranked
    only by a whole Latin square: a missing order would favour someone.

    Returns:
        `list[Result]`: `details` has what could not be scored, self-consistency and position bias.

    """
    orders = latin_square(len(trial.runs))
    ranks: dict[str, np.ndarray] = {}
    for key in trial.runs[0].keys:
        places = (answers.get(f"rank/{key}") or {}).get("places", [None])
        if None not in places:
            ranks[key] = np.array([ranks_of(*pair) for pair in zip(orders, places, strict=True)])  # (orders, models)
    taus = [kendalltau(one, other).statistic for square in ranks.values() for one, other in combinations(square, 2)]
    shared = {
        "position_bias": position_bias(np.array(list(ranks.values())), orders),
        "rank_self_consistency": float(np.mean(taus)) if taus else None,
        "turns_not_ranked": len(trial.runs[0].rows) - len(ranks) if len(trial.runs) > 1 else None,
    }
    results = []
    for number, run in enumerate(trial.runs):
        judged = [answers.get(f"reply/{run.model}/{key}") or {} for key in run.keys]
        empathy, consistency = ([[s for s in found.get(metric, []) if s is not None] for found in judged] for metric in ("empathy", "consistency"))  # fmt: skip
        with_sticker = np.array([row.predicted.sticker is not None for row in run.rows])
        means = np.array([np.mean(scores) if scores else np.nan for scores in empathy])
        columns = {
            "emp_txt": np.where(with_sticker, np.nan, means),
            "emp_mm": np.where(with_sticker, means, np.nan),
            "con": np.array([np.mean(scores) if scores else np.nan for scores in consistency]),
            "rank": np.array([ranks[key][:, number].mean() if key in ranks else np.nan for key in run.keys]),
        }
        details = {
            "unusable_answers": {"empathy": SCORINGS * len(judged) - sum(map(len, empathy)), "consistency": SCORINGS * len(judged) - sum(map(len, consistency))},
            "replies_not_scored": {"empathy": sum(not s for s in empathy), "consistency": sum(not s for s in consistency)},
            "self_consistency_sd": {"empathy": _spread(empathy), "consistency": _spread(consistency)},
            "candidates": [other.model for other in trial.runs],
            **shared,
        }  # fmt: skip
        settings = {"predictions": str(run.path), "sha256": run.sha256, "judge": judge, "stickers_shown_as": trial.shown, "language": trial.language, "scorings": SCORINGS, "orders": len(orders)}  # fmt: skip
        results.append(make_result("llm", run.model, run.keys, columns, STATISTICS, settings, details))
    return results


def _spread(scores: Sequence[Sequence[int]]) -> float | None:
    """Mean standard deviation of a reply's scores: 0 for a judge that always says the same."""
    spreads = [np.std(several, ddof=1) for several in scores if len(several) > 1]
    return float(np.mean(spreads)) if spreads else None
