"""Running many tasks that ask a language model: concurrent, journaled, resumable, within a budget."""

import asyncio
import hashlib
import json
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent_generation.llm import LLM, AnswerError, ModelError, Reply, Request, schema_length


@dataclass(frozen=True)
class Embedding:
    """
    A request for vectors of texts: computed here, so neither journaled nor paid; the answer has shape `(len(texts), d)`.

    Args:
        texts (`tuple[str, ...]`): What to embed.
        ahead (`bool`, *optional*, defaults to `False`): They are wanted later: the answer is `None` and comes at once, and the vectors are computed
            when nobody waits for others.

    """

    texts: tuple[str, ...]
    ahead: bool = False


Steps = Generator[Sequence[Request | Embedding], list[Any], dict]
"""
A task as a pure state machine: it yields requests that may be asked at once, takes their answers in the same order (an [`AnswerError`] in place
of one that failed), and returns its result. It must draw nothing but what its own seed gives, so that it can be run again from the journal.
"""

Encode = Callable[[Sequence[str]], np.ndarray]


class JournalError(RuntimeError):
    """A journal that another process has open."""


class BudgetError(RuntimeError):
    """The next request could pass the budget; run again with a larger one to go on."""


ENDS_A_RUN = (ModelError, BudgetError, JournalError)
"""Errors that end a whole run and that its user must hear of; what was answered is kept."""


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass
class Progress:
    """What a run has done so far; `reused` answers came from the journal."""

    tasks: int = 0
    failed: int = 0
    calls: int = 0
    reused: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


@dataclass
class Spent:
    """What a task has used, answers from the journal included, and how many answers it could not use."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unusable: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a task ended: its result, or why it failed; and what it used."""

    task: str
    result: dict | None
    failed: str | None = None
    spent: Spent = field(default_factory=Spent)


def needed(answer: Any) -> Any:
    """`answer`, for a task that cannot go on without it.

    Raises:
        AnswerError: If it is one.

    """
    if isinstance(answer, AnswerError):
        raise answer
    return answer


class Journal:
    """
    Answers that have arrived, in SQLite: each is written before it is used, so none is asked for (and paid) twice.

    Args:
        file (`Path`): Made if needed. It holds requests' digests and models' answers, never a key. One process opens it at a time: without shared
            memory, SQLite's write-ahead log works on the network file systems of clusters too.
        patience (`float`): Seconds to wait for another process to let go of it.

    Raises:
        JournalError: If another process has it open still.

    """

    def __init__(self, file: Path, patience: float = 20.0) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(file, isolation_level=None)
        self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        until = time.monotonic() + patience
        while True:
            try:  # SQLite's own timeout does not hold for a write-ahead log without shared memory
                self.connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() > until:
                    self.connection.close()
                    raise JournalError(f"{file}: another process is writing there; wait for its end.") from None
                time.sleep(0.1)
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, digest TEXT, text TEXT, model TEXT,"
            " prompt_tokens INTEGER, completion_tokens INTEGER, complete INTEGER) WITHOUT ROWID"
        )
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS outcomes (task TEXT PRIMARY KEY, result TEXT, failed TEXT, spent TEXT)"
        )
        self.connection.execute("CREATE TABLE IF NOT EXISTS failures (task TEXT PRIMARY KEY, runs INTEGER)")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS paid (only INTEGER PRIMARY KEY, prompt_tokens INTEGER, completion_tokens INTEGER)"
        )
        self.connection.execute("INSERT OR IGNORE INTO paid VALUES (0, 0, 0)")
        self.connection.execute(
            "CREATE TEMP TRIGGER pay AFTER INSERT ON answers BEGIN UPDATE paid SET"
            " prompt_tokens = prompt_tokens + new.prompt_tokens, completion_tokens = completion_tokens + new.completion_tokens; END"
        )

    def find(self, key: str, digest: str) -> dict[int, Reply | AnswerError]:
        """What came of the request of this key, by attempt, if what was asked is the same: answers, and that the task went on without one."""
        rows = self.connection.execute(
            "SELECT key, text, model, prompt_tokens, completion_tokens, complete FROM answers"
            " WHERE key > ? AND key < ? AND digest = ?",
            (f"{key}/", f"{key}0", digest),
        )
        return {
            int(place.rpartition("/")[2]): AnswerError(text) if model is None else Reply(text, model, said, answered, bool(complete))
            for place, text, model, said, answered, complete in rows
        }  # fmt: skip

    def add(self, key: str, digest: str, reply: Reply) -> None:
        """Keep an answer; it survives a kill from here on."""
        self.connection.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, digest, reply.text, reply.model, reply.prompt_tokens, reply.completion_tokens, reply.complete),
        )

    def go_without(self, key: str, digest: str, failure: AnswerError) -> None:
        """Keep that a task went on without an answer, unless its last attempt gave one, if a useless one."""
        self.connection.execute(
            "INSERT INTO answers VALUES (?, ?, ?, NULL, 0, 0, 0) ON CONFLICT (key) DO UPDATE"
            " SET digest = excluded.digest, text = excluded.text, model = NULL WHERE digest != excluded.digest",
            (key, digest, str(failure)),
        )

    def finish(self, outcome: Outcome) -> None:
        """Keep how a task ended; its answers are not needed any more if it ended well."""
        row = (
            outcome.task,
            json.dumps(outcome.result, ensure_ascii=False),
            outcome.failed,
            json.dumps(vars(outcome.spent)),
        )
        self.connection.execute("BEGIN")
        self.connection.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?)", row)
        if outcome.failed is None:
            self.connection.execute(
                "DELETE FROM answers WHERE key > ? AND key < ?", (f"{outcome.task}/", f"{outcome.task}0")
            )
        self.connection.execute("COMMIT")

    def outcome(self, task: str) -> Outcome | None:
        """How a task ended, if it did."""
        row = self.connection.execute("SELECT * FROM outcomes WHERE task = ?", (task,)).fetchone()
        return Outcome(row[0], json.loads(row[1]), row[2], Spent(**json.loads(row[3]))) if row else None

    def paid(self) -> tuple[int, int]:
        """Prompt and completion tokens of all answers that ever came, whether they are kept or not."""
        return self.connection.execute("SELECT prompt_tokens, completion_tokens FROM paid").fetchone()

    def try_again(self, tasks: Iterable[str]) -> None:
        """Give tasks that failed in a run further attempts in the next; call it when the run has ended, so that one that is cut short ends the same."""
        self.connection.execute("BEGIN")
        self.connection.executemany(
            "INSERT INTO failures VALUES (?, 1) ON CONFLICT (task) DO UPDATE SET runs = runs + 1",
            ((task,) for task in tasks),
        )
        self.connection.execute("COMMIT")

    def failed_runs(self, task: str) -> int:
        """How many runs have ended in which a task failed."""
        row = self.connection.execute("SELECT runs FROM failures WHERE task = ?", (task,)).fetchone()
        return row[0] if row else 0

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


class Engine:
    """
    Runs tasks against a model.

    Args:
        llm ([`LLM`]): Answers.
        journal ([`Journal`]): Keeps the answers.
        concurrency (`int`, *optional*, defaults to 32): Requests in flight at once.
        live_tasks (`int`, *optional*): Tasks begun and not ended at once; twice the concurrency if not given.
        attempts (`int`, *optional*, defaults to 3): How often a run asks a request until its answer has the right form.
        prices ([`Prices`], *optional*): For the cost.
        budget_usd (`float`, *optional*): Hard cap on the cost, the most that requests in flight can cost counted in.
        spent_usd (`float`, *optional*, defaults to 0.0): What earlier processes have spent of it.
        encode (`Callable`, *optional*): Answers [`Embedding`] requests; a text's vector must not depend on the texts beside it.
        on_progress (`Callable`, *optional*): Called with [`Progress`] after every answer and every task.

    """

    def __init__(
        self,
        llm: LLM,
        journal: Journal,
        concurrency: int = 32,
        live_tasks: int | None = None,
        attempts: int = 3,
        prices: Prices | None = None,
        budget_usd: float | None = None,
        spent_usd: float = 0.0,
        encode: Encode | None = None,
        on_progress: Callable[[Progress], object] = lambda progress: None,
    ) -> None:
        self.llm, self.journal, self.attempts = llm, journal, attempts
        self.live_tasks = live_tasks or 2 * concurrency
        self.slots = asyncio.Semaphore(concurrency)
        self.prices, self.budget_usd = prices or Prices(), budget_usd
        self.committed_usd = spent_usd  # spent and in flight
        self.progress, self.on_progress = Progress(), on_progress
        self.embedder = Embedder(encode) if encode else None
        self.ended: ModelError | BudgetError | None = None

    async def run(self, tasks: Iterable[tuple[str, Callable[[], Steps]]]) -> AsyncIterator[Outcome]:
        """
        Run tasks, given by name and start, and give their outcomes as they end.

        A task whose needed answer failed ends with the reason; the others go on.

        Raises:
            ModelError: If the model answers nobody.
            BudgetError: If the budget is used up.

        """
        waiting = iter(tasks)
        live: set[asyncio.Task[Outcome]] = set()
        try:
            while True:
                while len(live) < self.live_tasks and (task := next(waiting, None)):
                    live.add(asyncio.create_task(self._run_one(*task)))
                if not live:
                    return
                done, live = await asyncio.wait(live, return_when=asyncio.FIRST_COMPLETED)
                for finished in done:
                    try:
                        outcome = finished.result()
                    except (ModelError, BudgetError) as error:
                        self.ended = error  # nothing new is asked; what is paid for still arrives and is kept
                        await asyncio.gather(*done, *live, return_exceptions=True)
                        raise
                    self.progress.tasks += 1
                    self.progress.failed += outcome.failed is not None
                    self.on_progress(self.progress)
                    yield outcome
        finally:
            for task_left in live:
                task_left.cancel()
            await asyncio.gather(*live, return_exceptions=True)
            await self.llm.close()

    async def _run_one(self, name: str, start: Callable[[], Steps]) -> Outcome:
        steps, asked, spent = start(), 0, Spent()
        attempts = self.attempts * (1 + self.journal.failed_runs(name))
        try:
            requests = next(steps)
            while True:
                keys = [f"{name}/{asked + i}" for i in range(len(requests))]
                going = [self._answer(k, request, attempts, spent) for k, request in zip(keys, requests, strict=True)]
                # where one request ends the run, the others are paid for all the same, and must arrive
                answers = await asyncio.gather(*going, return_exceptions=True)
                for answer in answers:
                    if isinstance(answer, BaseException) and not isinstance(answer, AnswerError):
                        raise answer
                asked += len(requests)
                coming = steps.send(answers)
                for key, request, answer in zip(keys, requests, answers, strict=True):
                    if isinstance(request, Request) and isinstance(answer, AnswerError):
                        self.journal.go_without(f"{key}/{attempts - 1}", request.digest, answer)
                requests = coming
        except StopIteration as stop:
            return Outcome(name, stop.value, None, spent)
        except AnswerError as error:
            return Outcome(name, None, str(error), spent)

    async def _answer(self, key: str, request: Request | Embedding, attempts: int, spent: Spent) -> Any:
        """The parsed answer, or the [`AnswerError`] of the last attempt; those before a journaled one had failed and are not made again."""
        if isinstance(request, Embedding):
            assert self.embedder is not None
            vectors = self.embedder.embed(request)
            return None if request.ahead else await vectors
        known, failure = self.journal.find(key, request.digest), AnswerError("not asked")
        last = max(known, default=-1)
        for attempt in range(attempts):
            self.progress.retried += attempt > 0
            try:
                if attempt > last:
                    reply = await self._ask(f"{key}/{attempt}", request)
                else:
                    reply = needed(known.get(attempt, failure))
                    self.progress.reused += 1
                spent.calls += 1
                spent.prompt_tokens += reply.prompt_tokens
                spent.completion_tokens += reply.completion_tokens
                if not reply.complete:
                    raise AnswerError("answer cut off")
                return request.parse(reply.text)
            except AnswerError as error:
                spent.unusable += 1
                failure = error
        return failure

    async def _ask(self, key: str, request: Request) -> Reply:
        async with self.slots:
            if self.ended:
                raise self.ended
            schema = schema_length(request.answer) if request.answer else 0
            prompt_tokens = most_prompt_tokens(request.messages) + schema
            most_tokens = self.llm.most_tokens(request.role)
            most = self.prices.cost(prompt_tokens, most_tokens)
            if self.budget_usd is not None and self.committed_usd + most > self.budget_usd:
                raise BudgetError(
                    f"the budget of {self.budget_usd} USD is used up ({self.committed_usd:.4f} USD spent or in flight)"
                )
            self.committed_usd += most
            cost = 0.0
            try:
                reply = await self.llm.ask(request, seed_of(key))
                if not reply.prompt_tokens:  # an endpoint that does not tell
                    reply = replace(reply, prompt_tokens=prompt_tokens, completion_tokens=most_tokens)
                cost = self.prices.cost(reply.prompt_tokens, reply.completion_tokens)
            finally:
                self.committed_usd += cost - most
        self.journal.add(key, request.digest, reply)
        progress = self.progress
        progress.calls += 1
        progress.prompt_tokens += reply.prompt_tokens
        progress.completion_tokens += reply.completion_tokens
        progress.cost_usd += cost
        self.on_progress(progress)
        return reply


class Embedder:
    """
    Embeds what tasks ask for in few batches, in a thread: while one batch is computed, the next gathers.

    Args:
        encode (`Callable`): Gives the vectors of texts, and remembers those of texts that were wanted ahead.
        batch_size (`int`, *optional*, defaults to 24): Texts of a batch, about.

    """

    def __init__(self, encode: Encode, batch_size: int = 24) -> None:
        self.encode, self.batch_size = encode, batch_size
        self.waiting: deque[tuple[tuple[str, ...], asyncio.Future]] = deque()
        self.ahead: deque[tuple[tuple[str, ...], asyncio.Future]] = deque()
        self.worker: asyncio.Task | None = None
        self.thread = ThreadPoolExecutor(1)  # one and the same: torch starts a pool of its own under every thread

    def embed(self, request: Embedding) -> asyncio.Future:
        """Vectors of a request's texts, of shape `(len(texts), d)`."""
        answer = asyncio.get_running_loop().create_future()
        (self.ahead if request.ahead else self.waiting).append((request.texts, answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return answer

    async def _work(self) -> None:
        while queue := self.waiting or self.ahead:
            batch: list[tuple[tuple[str, ...], asyncio.Future]] = []
            while queue and sum(len(texts) for texts, _ in batch) < self.batch_size:
                batch.append(queue.popleft())
            try:
                loop, flat = asyncio.get_running_loop(), [text for texts, _ in batch for text in texts]
                vectors = await loop.run_in_executor(self.thread, self.encode, flat)
            except Exception as error:  # every task that waits for it must hear of it
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            start = 0
            for texts, answer in batch:
                if not answer.done():
                    answer.set_result(vectors[start : start + len(texts)])
                start += len(texts)


def most_prompt_tokens(messages: Sequence[dict]) -> int:
    """An upper bound on the length of a prompt in tokens: its UTF-8 bytes, and 2,000 an image."""
    tokens = 0
    for message in messages:
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            tokens += len(part["text"].encode()) + 8 if "text" in part else 2000
    return tokens


def seed_of(text: str) -> int:
    """A seed in `[0, 2**31)` that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
