"""The providers' batch API, at half the price: all that live sessions ask becomes one batch, and its answers start the next round."""

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

from openai import NotFoundError, OpenAIError

from agent_generation.llm import AnswerError, ModelError, OpenAILLM, Reply, Request


MOST = 50_000  # requests of a batch
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class BatchLLM(OpenAILLM):
    """
    An endpoint with OpenAI's batch API.

    Batches in flight are noted in a file before they are waited for, so that a run that was killed collects what it has paid for.

    Args:
        notes (`Path`): The file.
        linger (`float`, *optional*, defaults to 2.0): Seconds without a new request before a round is sent.
        poll (`float`, *optional*, defaults to 20.0): Seconds between two looks at a batch.

    """

    notes: Path = Path("batches.json")
    linger: float = 2.0
    poll: float = 20.0
    waiting: dict[str, tuple[Request, int, asyncio.Future]] = field(default_factory=dict, init=False)
    arrived: dict[str, dict] | None = field(default=None, init=False)  # of batches that an earlier process had sent
    worker: asyncio.Task | None = field(default=None, init=False)

    async def ask(self, request: Request, seed: int) -> Reply:
        """Answer one request, in the next round; see [`LLM`]."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting[f"{request.digest[:40]}-{seed}"] = (request, seed, answer)
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        try:
            if self.arrived is None:
                self.arrived = await self._collect_noted()
            while self.waiting:
                count = -1
                while count != len(self.waiting):
                    count = len(self.waiting)
                    await asyncio.sleep(self.linger)
                for key in [key for key in self.waiting if key in self.arrived]:
                    self._settle(key, self.arrived.pop(key), self.body(*self.waiting[key][:2]))
                if round_ := dict(list(self.waiting.items())[:MOST]):
                    await self._round(round_)
        except Exception as error:  # all who wait must hear of it
            ended = ModelError(str(self.explain(error))) if isinstance(error, OpenAIError) else error
            for _, _, answer in self.waiting.values():
                if not answer.done():
                    answer.set_exception(ended)
            self.waiting.clear()

    async def _round(self, asked: dict[str, tuple[Request, int, asyncio.Future]]) -> None:
        bodies = {key: self.body(request, seed) for key, (request, seed, _) in asked.items()}
        lines = [
            {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            for key, body in bodies.items()
        ]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        file = await self.client.files.create(file=("round.jsonl", data), purpose="batch")
        batch = await self.client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        partial = self.notes.with_name(f"{self.notes.name}.partial")
        partial.write_text(json.dumps([batch.id]))
        partial.replace(self.notes)
        answers = await self._collect([batch.id])
        for key, body in bodies.items():
            self._settle(key, answers.get(key, {"error": {"message": "no answer in its batch"}}), body)

    async def _collect_noted(self) -> dict[str, dict]:
        """Answers of the batches that an earlier process had sent; none of those that the provider does not keep any more."""
        try:
            return await self._collect(json.loads(self.notes.read_text()) if self.notes.is_file() else [])
        except NotFoundError:
            return {}

    async def _collect(self, batches: list[str]) -> dict[str, dict]:
        """Wait for batches and read their answers, by custom id; a batch without any is not noted any more."""
        answers: dict[str, dict] = {}
        for batch_id in batches:
            batch = await self.client.batches.retrieve(batch_id)
            while batch.status not in ENDED:
                await asyncio.sleep(self.poll)
                batch = await self.client.batches.retrieve(batch_id)
            if batch.status == "failed":
                reasons = [error.message for error in (batch.errors.data if batch.errors else None) or []]
                said = self.without_key("; ".join(map(str, reasons)))[:200]
                self.notes.unlink(missing_ok=True)
                raise ModelError(f"{self.address}: batch {batch_id} failed: {said}")
            for file in (batch.output_file_id, batch.error_file_id):
                if file:
                    lines = (await self.client.files.content(file)).text.split("\n")  # JSON may hold other line ends
                    try:
                        answers.update((row["custom_id"], row) for row in map(json.loads, filter(str.strip, lines)))
                    except (ValueError, KeyError, TypeError):
                        self.notes.unlink(missing_ok=True)
                        raise ModelError(
                            f"{self.address}: batch {batch_id}: {file} is no output of a batch."
                        ) from None
        return answers

    def _settle(self, key: str, row: dict, asked: dict) -> None:
        request, _, answer = self.waiting[key]
        if not answer.done():
            try:
                reply = self._read(row, request, asked)
                if reply is None:
                    return
                answer.set_result(reply)
            except AnswerError as error:
                answer.set_exception(error)
        del self.waiting[key]

    def _read(self, row: dict, request: Request, asked: dict) -> Reply | None:
        """The reply in a row of a batch's output; `None` if the next round asks again, without what the model refuses."""
        response = row.get("response") or {}
        body = response.get("body") or {}
        if response.get("status_code") == 200:
            return self.as_reply(body, request)
        told = row.get("error") or (body.get("error") if isinstance(body, dict) else body) or {}
        if isinstance(told, dict) and self.learn(asked, told.get("code"), told.get("param")):
            return None
        said = (told.get("message") if isinstance(told, dict) else told) or "no answer"
        raise AnswerError(f"status {response.get('status_code')}: {self.without_key(str(said))}"[:200])
