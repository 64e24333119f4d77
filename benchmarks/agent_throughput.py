"""
Agent4SC against a serial loop: 64 sessions on a loopback endpoint with 200 ms latency. Prints one JSON line.

`serial_ratio` is the wall-clock time of a serial loop (every call of these sessions, one after the other, at the latency measured in this run) over
ours; `of_ideal` is the time of the longest session running alone over that of all 64. `calls` and `tokens` a session stand beside what the
reference implementation's flow takes for the same turns and stickers, counted by `reference_calls`.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_generation.dry import DryLLM
from agent_generation.encoder_process import EncoderProcess
from agent_generation.engine import Embedding, Engine, Journal, Steps
from agent_generation.llm import OpenAILLM
from agent_generation.run import plan_sessions
from agent_generation.session import Dialogue, SessionPlan, Settings
from agent_generation.tool import Toolbox
from dataset_builders.schema import EMOTIONS, Profile
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.encoder import PACKAGED, TextEncoder
from dataset_builders.stickers.openmoji import cached_folder, cached_pack
from dataset_builders.stickers.search import open_search
from tests.fixtures.llm_server import completion


SESSIONS, LATENCY = 64, 0.2


@dataclass(frozen=True)
class Quoting(DryLLM):
    """A [`DryLLM`] that says what people in StickerConv-mini say: its texts are as long, in tokens, as real ones."""

    messages: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)

    def say(self, form: dict | None, rng: random.Random) -> str:
        """The answer to a request for a message, or for JSON of a form."""
        if form is None:
            return rng.choice(self.messages)
        schema = form["json_schema"]["schema"]
        return json.dumps(self._fill(schema, schema.get("$defs", {}), rng))

    def _fill(self, schema: dict, definitions: dict, rng: random.Random, name: str = "") -> Any:
        if schema.get("type") == "string" and "enum" not in schema and name not in self.fixed:
            return rng.choice(self.queries if name == "query" else self.messages)
        return super()._fill(schema, definitions, rng, name)


async def serve() -> None:
    """The endpoint, in a process of its own: as little work as can be, which on the machines of a real one would not be ours."""
    said = [
        message for session in load_mini("train") for turn in session.turns for message in (turn.user, turn.system)
    ]
    model = Quoting(
        messages=[message.text for message in said if len(message.text) <= 200],
        queries=[message.sticker.query for message in said if message.sticker],
    )

    async def reply(request: web.Request) -> web.Response:
        answered_at = time.monotonic() + LATENCY
        body = json.loads(await request.read())
        rng = random.Random(f"{body['messages']}{body['seed']}")
        content = completion(body["model"], model.say(body.get("response_format"), rng))
        await asyncio.sleep(answered_at - time.monotonic())
        return web.Response(body=content, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", reply)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)


def reference_calls(result: dict) -> tuple[int, int]:
    """
    Calls that the reference implementation's serial flow makes for a session of these turns and stickers: as it runs, and with the reflection that
    its threshold never lets happen.

    A turn: two messages and their importance; on even turns two trait summaries. A sticker: intention, query, selection, its importance, its review.
    A turn without a sticker of a side that was allowed one: its intention. Once, at turn four: whether to end. A reflection of its library: three
    questions in one call, three calls for insights, and the importance of fifteen of them.
    """
    calls, before = 0, {"user": False, "system": False}
    for turn in result["turns"]:
        calls += 4 + 2 * (turn["turn"] % 2 == 0) + (turn["turn"] == 4)
        sent = {role: turn[role]["sticker"] is not None for role in before}
        allowed = {"user": not any(before.values()), "system": not before["system"]}
        calls += sum(5 if sent[role] else allowed[role] for role in sent)
        before = sent
    return calls, calls + 19 * result["tally"].get("reflections", 0)


def counted(steps: Steps, rounds: Counter[str], name: str) -> Steps:
    """The same steps; counts those that wait for the model, one after the other."""
    requests = next(steps)
    while True:
        rounds[name] += not isinstance(requests[0], Embedding)
        answers = yield requests
        try:
            requests = steps.send(answers)
        except StopIteration as stop:
            return stop.value


async def write(url: str, plans: list[SessionPlan], toolbox: Toolbox, settings: Settings):
    """Write sessions; gives the seconds it took, the outcomes, and how often each session waited for the model."""
    rounds: Counter[str] = Counter()
    encode = EncoderProcess(PACKAGED, steady=True)  # as beside an endpoint of `pegs generate`; it has seen no text yet
    encode(["so"])
    with tempfile.TemporaryDirectory() as folder, closing(encode):
        engine = Engine(OpenAILLM(url, "m"), Journal(Path(folder) / "j.sqlite"), SESSIONS, encode=encode)
        started = time.perf_counter()

        def start(plan: SessionPlan) -> Callable[[], Steps]:
            return lambda: counted(Dialogue(plan, toolbox, settings).steps(), rounds, plan.session_id)

        outcomes = [outcome async for outcome in engine.run((plan.session_id, start(plan)) for plan in plans)]
        return time.perf_counter() - started, outcomes, rounds


def main() -> None:
    """Run it."""
    pack = cached_pack()
    toolbox = Toolbox(open_search(cached_folder(), pack, TextEncoder()), pack.databases)
    profiles = [
        Profile(
            name=f"P{n}", emotion=EMOTIONS[n % 7], persona=f"You are number {n}.", situation=f"You have lost {n} keys."
        )
        for n in range(SESSIONS)
    ]
    plans = list(plan_sessions(SESSIONS, profiles, pack.num_databases, 0))
    endpoint = subprocess.Popen(
        [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    url = endpoint.stdout.readline().strip()
    figures: dict = {"benchmark": "agent_throughput", "sessions": SESSIONS, "latency_s": LATENCY}
    for name, settings in (("separate", Settings()), ("fused", Settings(fuse_plan=True))):
        asyncio.run(write(url, plans[:1], toolbox, settings))  # templates
        seconds, outcomes, rounds = asyncio.run(write(url, plans, toolbox, settings))
        longest = max(plans, key=lambda plan: rounds[plan.session_id])
        alone, _, _ = asyncio.run(write(url, [longest], toolbox, settings))
        calls = [outcome.spent.calls for outcome in outcomes]
        reference = [reference_calls(outcome.result) for outcome in outcomes]
        a_call = alone / rounds[longest.session_id]
        figures[name] = {
            "seconds": round(seconds, 2),
            "serial_ratio": round(sum(calls) * a_call / seconds, 1),
            "of_ideal": round(alone / seconds, 3),
            "calls_a_session": round(statistics.mean(calls), 1),
            "prompt_tokens_a_session": round(statistics.mean(o.spent.prompt_tokens for o in outcomes)),
            "reference_calls": round(statistics.mean(r[0] for r in reference), 1),
            "reference_calls_with_reflection": round(statistics.mean(r[1] for r in reference), 1),
            "calls_ratio": round(sum(calls) / sum(r[0] for r in reference), 3),
            "calls_ratio_with_reflection": round(sum(calls) / sum(r[1] for r in reference), 3),
        }
    endpoint.kill()
    print(json.dumps(figures))  # noqa: T201


if __name__ == "__main__":
    asyncio.run(serve()) if sys.argv[1:] == ["serve"] else main()
