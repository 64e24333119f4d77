"""Human metrics (section 5.4, Figure 12; Tables 4 and 9): a questionnaire for several raters, and the analysis of their scores."""

import csv
import hashlib
import io
import json
import random
import secrets
import sqlite3
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr

from dataset_builders.stickers.pack import StickerPack
from pegs.errors import InputError
from pegs.evaluation.predict import Predictions, Said, common_turns
from pegs.evaluation.results import ROUNDS, Metric, Result, Statistic, interval, make_result, mean_of, result_files


FILE = "study.sqlite3"
CHECK_EVERY = 20  # pages for one attention check
MOST_STICKERS = 24  # of a model on its diversity page
LEAST_AGREEMENT, MOST_ALIKE, MOST_SHIFT = 0.2, 0.9, 1.0  # beyond which a rater is flagged

Kind = Literal["reply", "check", "diversity"]


@dataclass(frozen=True)
class Question:
    """One of the paper's seven metrics as raters read it; `about` is what a page must show to ask it."""

    key: str
    title: str
    definition: str
    low: str
    high: str
    about: Literal["reply", "sticker", "drawing", "model"]


QUESTIONS = (
    Question("Et", "Empathy of the words", "Do the words show that the companion noticed the user's feeling, understood where it comes from, and cares?", "ignores the feeling", "fully with the user", "reply"),
    Question("Es", "Empathy of the sticker", "Does the sticker carry a feeling that fits the user's mood, and make the reply warmer or livelier?", "jars with the mood", "says just the right thing", "sticker"),
    Question("Con", "Consistency", "Does the whole reply, words and sticker, follow from the conversation without contradicting it or itself?", "does not belong here", "follows perfectly", "reply"),
    Question("Flu", "Fluency", "Do the words read like natural, correct language?", "hard to read", "flawless", "reply"),
    Question("Inf", "Informativity", "Does the reply say something of substance that gives the user something to go on from?", "says nothing", "rich in content", "reply"),
    Question("StiGQ", "Quality of the sticker", "Is the sticker well made: clear, complete, recognisable, and pleasant to look at?", "broken", "like a professional's", "drawing"),
    Question("StiD", "Variety of the stickers", "These are stickers that one companion sent in the conversations you rated. How varied are they in what they show and feel?", "all the same", "very varied", "model"),
)  # fmt: skip
BY_KEY = {question.key: question for question in QUESTIONS}
STATISTICS: dict[str, Statistic] = {q.key: mean_of(q.key) for q in QUESTIONS if q.about != "model"}

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS study (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS pictures (digest TEXT PRIMARY KEY, data BLOB);
CREATE TABLE IF NOT EXISTS items (turn TEXT PRIMARY KEY, context TEXT);
CREATE TABLE IF NOT EXISTS replies (turn TEXT, model TEXT, reply TEXT, questions TEXT, PRIMARY KEY (turn, model));
CREATE TABLE IF NOT EXISTS raters (rater INTEGER PRIMARY KEY, token TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS pages (rater INTEGER, position INTEGER, kind TEXT, turn TEXT, model TEXT, wanted INTEGER,
    questions TEXT, PRIMARY KEY (rater, position));
CREATE TABLE IF NOT EXISTS answers (rater INTEGER, position INTEGER, metric TEXT, score INTEGER CHECK (score BETWEEN 1 AND 5),
    answered_at REAL, PRIMARY KEY (rater, position, metric));
"""


class AnswerRefused(ValueError):
    """A form that is not one of a page's; nothing of it was saved."""


@dataclass(frozen=True)
class Page:
    """A page of a rater: what it shows, what it asks, and what was answered so far. It does not say whose reply it is."""

    position: int
    kind: Kind
    context: list[dict]
    reply: dict | None
    number: int
    of: int
    stickers: list[str]
    questions: tuple[Question, ...]
    scores: dict[str, int]

    @property
    def is_done(self) -> bool:
        """Whether every question is answered."""
        return len(self.scores) == len(self.questions)


class Study:
    """
    A questionnaire in a folder: one SQLite file with all it shows and every answer.

    Args:
        folder (`Path`): Its folder.

    Raises:
        InputError: If there is none.

    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        if not self.file.is_file():
            raise InputError(f"--study {folder}: has no {FILE}; name predictions to begin a study.")

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """
        A connection; what is written is committed at the end, or not at all.

        Raises:
            InputError: If the file is no questionnaire, or cannot be read or written.

        """
        try:
            with closing(sqlite3.connect(self.file, timeout=30)) as connection, connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise InputError(f"--study {self.file.parent}: {FILE}: {error}.") from error

    def value(self, key: str) -> Any:
        """A setting of the study; `None` of one that did not keep it yet."""
        with self.open() as db:
            row = db.execute("SELECT value FROM study WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def links(self) -> list[tuple[int, str]]:
        """Raters and the secret parts of their links."""
        with self.open() as db:
            return db.execute("SELECT rater, token FROM raters ORDER BY rater").fetchall()

    def rater(self, token: str) -> int | None:
        """Whose link it is."""
        with self.open() as db:
            row = db.execute("SELECT rater FROM raters WHERE token = ?", (token,)).fetchone()
        return row[0] if row else None

    def progress(self, rater: int) -> list[bool]:
        """Of each page, whether it is done."""
        with self.open() as db:
            rows = db.execute(
                "SELECT questions, (SELECT COUNT(*) FROM answers a WHERE a.rater = p.rater AND a.position = p.position)"
                " FROM pages p WHERE rater = ? ORDER BY position",
                (rater,),
            ).fetchall()
        return [len(json.loads(questions)) == answered for questions, answered in rows]

    def page(self, rater: int, position: int) -> Page | None:
        """A rater's page, from 1; `None` if there is no such page."""
        with self.open() as db:
            row = db.execute(
                "SELECT kind, turn, model, wanted, questions FROM pages WHERE rater = ? AND position = ?",
                (rater, position),
            ).fetchone()
            if row is None:
                return None
            kind, turn, model, wanted, questions = row
            answered = db.execute(
                "SELECT metric, score FROM answers WHERE rater = ? AND position = ?", (rater, position)
            )
            scores = dict(answered.fetchall())
            context, reply, stickers, number, of = [], None, [], 0, 0
            if kind == "diversity":
                stickers = _stickers_of(db, model)
            else:
                context = json.loads(db.execute("SELECT context FROM items WHERE turn = ?", (turn,)).fetchone()[0])
                of = db.execute("SELECT COUNT(*) FROM replies WHERE turn = ?", (turn,)).fetchone()[0]
                before = "SELECT COUNT(*) FROM pages WHERE rater = ? AND turn = ? AND kind = 'reply' AND position <= ?"
                number = db.execute(before, (rater, turn, position)).fetchone()[0]
            if kind == "reply":
                found = db.execute("SELECT reply FROM replies WHERE turn = ? AND model = ?", (turn, model)).fetchone()
                reply = json.loads(found[0])
            elif kind == "check":
                reply = {"text": f"This page checks that you are reading. Please give a {wanted} to every question on it.", "picture": None}  # fmt: skip
        asked = tuple(BY_KEY[key] for key in json.loads(questions))
        return Page(position, kind, context, reply, number, of, stickers, asked, scores)

    def save(self, rater: int, position: int, scores: dict[str, str]) -> None:
        """
        Keep answers of a page; later ones replace earlier ones.

        Raises:
            AnswerRefused: If there is no such page, it does not ask that, or a score is not from 1 to 5.

        """
        with self.open() as db:
            row = db.execute("SELECT questions FROM pages WHERE rater = ? AND position = ?", (rater, position)).fetchone()  # fmt: skip
            asked = set(json.loads(row[0])) if row else set()
            for metric, score in scores.items():
                if metric not in asked:
                    raise AnswerRefused(f"page {position} does not ask {metric[:40]!r}")
                if score not in ("1", "2", "3", "4", "5"):
                    raise AnswerRefused(f"{metric}: must be from 1 to 5")
            now = time.time()
            db.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                [(rater, position, metric, int(score), now) for metric, score in scores.items()],
            )

    def picture(self, digest: str) -> bytes | None:
        """A picture's bytes."""
        with self.open() as db:
            row = db.execute("SELECT data FROM pictures WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def ratings(self) -> list[dict]:
        """Every answer: `rater`, `position`, `kind`, `turn`, `model`, `wanted`, `metric`, `score`, `answered_at`."""
        with self.open() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(
                "SELECT p.rater, p.position, p.kind, p.turn, p.model, p.wanted, a.metric, a.score, a.answered_at FROM answers a"
                " JOIN pages p ON a.rater = p.rater AND a.position = p.position ORDER BY p.rater, p.position, a.metric"
            )
            return [dict(row) for row in rows]

    def add_raters(self, count: int) -> None:
        """Make raters until there are so many, each with pages in an order of their own."""
        with self.open() as db:
            there = db.execute("SELECT COUNT(*) FROM raters").fetchone()[0]
            seed = json.loads(db.execute("SELECT value FROM study WHERE key = 'seed'").fetchone()[0])
            for rater in range(there + 1, count + 1):
                db.execute("INSERT INTO raters VALUES (?, ?)", (rater, secrets.token_urlsafe(24)))
                rows = _deal_pages(db, random.Random(f"{seed}/{rater}"))
                db.executemany("INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)", [(rater, n, *row) for n, row in enumerate(rows, start=1)])  # fmt: skip


def _stickers_of(db: sqlite3.Connection, model: str) -> list[str]:
    replies = db.execute("SELECT reply FROM replies WHERE model = ? ORDER BY turn", (model,))
    return [picture for row in replies if (picture := json.loads(row[0])["picture"])][:MOST_STICKERS]


def _deal_pages(
    db: sqlite3.Connection, rng: random.Random
) -> list[tuple[Kind, str | None, str | None, int | None, str]]:
    """Pages of one rater: conversations shuffled, in each the models shuffled, checks between, then the models' stickers."""
    replies: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for turn, model, questions in db.execute("SELECT turn, model, questions FROM replies ORDER BY turn, model"):
        replies[turn].append((model, questions))
    turns = list(replies)
    rng.shuffle(turns)
    pages: list[tuple[Kind, str | None, str | None, int | None, str]] = []
    for turn in turns:
        rng.shuffle(replies[turn])
        pages += [("reply", turn, model, None, questions) for model, questions in replies[turn]]
    for _ in range(max(1, len(pages) // CHECK_EVERY)):
        asked = json.dumps([q.key for q in QUESTIONS if q.about == "reply"])
        pages.insert(rng.randrange(1, len(pages) + 1), ("check", rng.choice(turns), None, rng.randint(1, 5), asked))
    models = sorted({model for several in replies.values() for model, _ in several})
    rng.shuffle(models)
    asked = json.dumps([q.key for q in QUESTIONS if q.about == "model"])
    return pages + [("diversity", None, model, None, asked) for model in models if len(_stickers_of(db, model)) > 1]


def begin_study(
    folder: Path,
    runs: Sequence[Predictions],
    pack: StickerPack,
    raters: int | None = None,
    sessions: int | None = None,
    seed: int | None = None,
) -> Study:
    """
    Make a questionnaire, or open the one that is there; more raters than it has are added.

    One turn of each sampled session is shown, the same to all raters and with the replies of all models.

    Args:
        folder (`Path`): Folder of the study.
        runs (`Sequence[Predictions]`): One a model; none to open a study.
        pack ([`StickerPack`]): Holds the stickers.
        raters (`int`, *optional*): How many raters, defaults to those it has, 5 of a new one (as in the paper).
        sessions (`int`, *optional*): How many sessions are sampled, defaults to its own, 100 of a new one (as in the paper).
        seed (`int`, *optional*): Seed of the sample and of all orders, defaults to its own, 0 of a new one.

    Raises:
        InputError: If there is no study to open, the one that is there is of other predictions, another seed or number of sessions, results of two models would have
            one name, or what should be a sticker is no picture.

    """
    digests = sorted(run.sha256 for run in runs)
    if (folder / FILE).is_file():
        study = Study(folder)
        if runs and digests != study.value("predictions"):
            raise InputError(f"--study {folder}: is of other predictions; choose another folder.")
        for option, ours in (("sessions", sessions), ("seed", seed)):
            theirs = study.value(option) if ours is not None else None
            if theirs not in (None, ours):
                raise InputError(
                    f"--{option} {ours}: --study {folder} was begun with {theirs}; leave it out to go on."
                )
    else:
        if runs:
            _write_study(folder, runs, pack, sessions or 100, seed or 0, digests)
        study = Study(folder)
    study.add_raters(raters or (0 if study.links() else 5))
    return study


def _write_study(
    folder: Path, runs: Sequence[Predictions], pack: StickerPack, sessions: int, seed: int, digests: list[str]
) -> None:
    rng = random.Random(seed)
    by_session: dict[str, list[str]] = defaultdict(list)
    for key in common_turns(runs):
        by_session[key.rpartition("/")[0]].append(key)
    chosen = rng.sample(sorted(by_session), min(sessions, len(by_session)))
    # names that clash would be found out after the raters' work
    result_files(folder, "human", {run.model: run.model for run in runs}, "--study")
    partial = folder / f"{FILE}.partial"
    partial.unlink(missing_ok=True)
    db = sqlite3.connect(partial)
    partial.chmod(0o600)  # it holds the raters' links
    db.executescript(SCHEMA.replace("WAL", "DELETE"))  # one file, so that it can be renamed

    def show(run: Predictions, said: Said) -> dict:
        if said.sticker is None:
            return {"text": said.text, "picture": None}
        run.image(said.sticker, pack)  # raters are shown pictures only
        data = run.picture_bytes(said.sticker, pack)
        digest = hashlib.sha256(data).hexdigest()
        db.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (digest, data))
        return {"text": said.text, "picture": digest}

    for session in chosen:
        turn = rng.choice(by_session[session])
        for number, run in enumerate(runs):
            row = run.only([turn]).rows[0]
            if number == 0:
                context = [{"role": line.role, **show(run, line)} for line in row.context]
                db.execute("INSERT INTO items VALUES (?, ?)", (turn, json.dumps(context)))
            sticker = row.predicted.sticker
            about = {"reply", *(["sticker"] if sticker else []), *(["drawing"] if sticker and sticker.picture else [])}
            asked = json.dumps([question.key for question in QUESTIONS if question.about in about])
            db.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", (turn, run.model, json.dumps(show(run, row.predicted)), asked))  # fmt: skip
    settings = {"seed": seed, "sessions": sessions, "predictions": digests, "attribution": pack.info.attribution}
    db.executemany("INSERT INTO study VALUES (?, ?)", [(key, json.dumps(value)) for key, value in settings.items()])
    db.commit()
    db.execute("PRAGMA journal_mode = WAL")
    db.close()
    partial.replace(folder / FILE)


def export_ratings(study: Study) -> str:
    """All answers as CSV; the raters' links are not in it."""
    buffer = io.StringIO()
    fields = ["rater", "position", "kind", "turn", "model", "wanted", "metric", "score", "answered_at"]
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(study.ratings())
    return buffer.getvalue()


@dataclass(frozen=True)
class Analysis:
    """Figures of each model (Table 4), ICC of each metric (Table 9), and what is odd about raters."""

    results: list[Result]
    icc: dict[str, dict[str, Any] | None]
    raters: dict[str, dict[str, Any]]


def intraclass(scores: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """
    Agreement of raters by the intraclass correlation, all six forms of Shrout and Fleiss (1979), by pingouin.

    Args:
        scores (`Sequence[Sequence[float]]`): A row a target, a column a rater.

    Returns:
        `dict`: Of each form (`ICC1`, `ICC2`, `ICC3`, `ICC1k`, `ICC2k`, `ICC3k`) `value`, `low` and `high` (95 %), and `p`; `targets` and `raters`. `None` for fewer than two
        targets or raters, fewer than five scores, or scores that are all the same.

    """
    import pandas as pd
    import pingouin

    table = np.array(scores, float)
    if table.ndim < 2 or min(table.shape) < 2 or table.size < 5 or np.ptp(table) == 0:
        return None
    rows = [(t, r, table[t, r]) for t in range(table.shape[0]) for r in range(table.shape[1])]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = pingouin.intraclass_corr(pd.DataFrame(rows, columns=["target", "rater", "score"]), targets="target", raters="rater", ratings="score")  # fmt: skip
    names = {"ICC(1,1)": "ICC1", "ICC(A,1)": "ICC2", "ICC(C,1)": "ICC3", "ICC(1,k)": "ICC1k", "ICC(A,k)": "ICC2k", "ICC(C,k)": "ICC3k"}  # fmt: skip
    forms = {}
    for row in found.to_dict("records"):
        low, high = (_finite(bound) for bound in row["CI95"])
        forms[names[row["Type"]]] = {"value": _finite(row["ICC"]), "low": low, "high": high, "p": _finite(row["pval"])}
    return {**forms, "targets": table.shape[0], "raters": table.shape[1]}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def analyze(study: Study, without: Sequence[int] = ()) -> Analysis:
    """
    Analyse the scores of a study.

    Args:
        study ([`Study`]): The questionnaire.
        without (`Sequence[int]`, *optional*): Raters to leave out of the figures and of ICC.

    Returns:
        [`Analysis`]: A reply's score is the mean of its raters; ICC is over the replies that all raters scored.

    Raises:
        InputError: If nobody answered yet, or one to leave out is no rater.

    """
    raters = [rater for rater, _ in study.links()]
    for rater in without:
        if rater not in raters:
            raise InputError(f"--without {rater}: must be one of {', '.join(map(str, raters))}.")
    ratings = [row for row in study.ratings() if row["kind"] != "check"]
    counted = [row for row in ratings if row["rater"] not in without]
    if not counted:
        raise InputError(f"--study {study.file.parent}: has no answers yet.")
    by_target: dict[tuple[str, str, str], dict[int, int]] = defaultdict(dict)  # metric, model, turn (or "")
    for row in counted:
        by_target[row["metric"], row["model"], row["turn"] or ""][row["rater"]] = row["score"]
    turns = sorted({row["turn"] for row in counted if row["turn"]})
    settings = {"study": str(study.file), "raters": len({row["rater"] for row in counted})}
    results = [_result(settings, model, turns, by_target) for model in sorted({row["model"] for row in counted})]
    icc = {}
    for question in QUESTIONS:
        scores = [given for (metric, _, _), given in sorted(by_target.items()) if metric == question.key]
        asked = sorted(set().union(*scores)) if scores else []
        icc[question.key] = intraclass([[given[r] for r in asked] for given in scores if len(given) == len(asked)])
    return Analysis(results, icc, _describe_raters(study, ratings))


def _result(
    settings: dict[str, Any], model: str, turns: Sequence[str], by_target: dict[tuple[str, str, str], dict]
) -> Result:
    def mean(metric: str, turn: str) -> float:
        given = by_target.get((metric, model, turn))
        return float(np.mean(list(given.values()))) if given else np.nan

    columns = {metric: np.array([mean(metric, turn) for turn in turns]) for metric in STATISTICS}
    result = make_result("human", model, turns, columns, STATISTICS, settings)
    given = list(by_target.get(("StiD", model, ""), {}).values())
    variety = Metric(value=None, n=0)
    if given:
        draws = (
            np.random.default_rng(0).choice(given, (ROUNDS, len(given))).mean(1)
        )  # over raters: a model has one score each
        low, high = interval(draws)
        variety = Metric(value=float(np.mean(given)), low=low, high=high, n=len(given))
    return result.model_copy(update={"metrics": {**result.metrics, "StiD": variety}})


def _describe_raters(study: Study, ratings: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Of each rater: answers, checks passed, agreement with and distance from the mean of the others, and flags."""
    targets: dict[tuple, dict[int, int]] = defaultdict(dict)
    for row in ratings:
        targets[row["metric"], row["model"], row["turn"]][row["rater"]] = row["score"]
    checks: dict[tuple[int, int], list[bool]] = defaultdict(list)  # by rater and page
    for row in study.ratings():
        if row["kind"] == "check":
            checks[row["rater"], row["position"]].append(row["score"] == row["wanted"])
    described = {}
    for rater, _ in study.links():
        mine = [row["score"] for row in ratings if row["rater"] == rater]
        pairs = [(given[rater], np.mean([s for r, s in given.items() if r != rater])) for given in targets.values() if rater in given and len(given) > 1]  # fmt: skip
        own, others = (np.array(side) for side in zip(*pairs, strict=True)) if pairs else (np.array([]), np.array([]))
        varied = len(pairs) > 2 and np.ptp(own) > 0 and np.ptp(others) > 0
        agreement = float(spearmanr(own, others).statistic) if varied else None
        shift = float((own - others).mean()) if pairs else None
        alike = max(Counter(mine).values()) / len(mine) if mine else None
        passed = [all(right) for (checked, _), right in checks.items() if checked == rater]
        flags = {
            "failed an attention check": not all(passed),
            "disagrees with the others": agreement is not None and agreement < LEAST_AGREEMENT,
            "nearly always the same score": alike is not None and len(mine) > 10 and alike > MOST_ALIKE,
            "much stricter or milder": shift is not None and abs(shift) > MOST_SHIFT,
        }
        described[str(rater)] = {
            "answers": len(mine),
            "pages_done": sum(study.progress(rater)),
            "checks_passed": sum(passed),
            "checks": len(passed),
            "agreement": agreement,
            "shift": shift,
            "most_frequent_share": alike,
            "flags": [flag for flag, raised in flags.items() if raised],
        }
    return described
