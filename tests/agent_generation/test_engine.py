import asyncio
import json
import re

import pytest
from pydantic import BaseModel

from agent_generation.engine import BudgetError, Engine, Journal, Prices, needed
from agent_generation.llm import AnswerError, ModelError, OpenAILLM, Request, RoleSettings
from tests.fixtures.llm_server import Server, completion


ROLES = {"user": RoleSettings(temperature=0.3, max_tokens=20)}


class Pick(BaseModel):
    number: int


def text(prompt, answer=None):
    return Request([{"role": "user", "content": prompt}], "user", answer)


def two_steps(name):
    def steps():
        first, second = yield [text(f"{name} one"), text(f"{name} two")]
        (pick,) = yield [text(f"{needed(first)} then {needed(second)}", Pick)]
        return {"name": name, "number": needed(pick).number}

    return steps


def run(server, journal, tasks, **kwargs):
    async def collect():
        engine = Engine(
            OpenAILLM(server.url, "m", ROLES, max_retries=kwargs.pop("max_retries", 2), api_key="sk-very-secret"),
            journal,
            **kwargs,
        )
        return {o.task: o async for o in engine.run((name, two_steps(name)) for name in tasks)}, engine.progress

    return asyncio.run(collect())


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


def honest(body):
    last = body["messages"][-1]["content"]
    return json.dumps({"number": len(last)}) if "then" in last else f"<{last}>"


def test_tasks_run_and_nothing_is_asked_twice(journal, tmp_path):
    names = [f"t{i}" for i in range(30)]
    with Server(honest) as server:
        outcomes, progress = run(server, journal, names, concurrency=8)
        assert len(server.bodies) == progress.calls == 90 and progress.failed == 0
        again, progress = run(server, journal, names, concurrency=3)
        assert again == outcomes and progress.calls == 0 and progress.reused == 90 and len(server.bodies) == 90
        one_by_one, _ = run(server, Journal(tmp_path / "other.sqlite3"), names, concurrency=1)
    assert one_by_one == outcomes
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.3, 20, "m") and "seed" in body
    forms = [b["response_format"]["json_schema"]["schema"] for b in server.bodies if "response_format" in b]
    assert forms[0]["required"] == ["number"] and forms[0]["additionalProperties"] is False


def test_seeds_depend_on_the_task_alone(journal, tmp_path):
    def seeds(concurrency, file):
        with Server(honest) as server:
            run(server, Journal(tmp_path / file), ["a", "b", "c"], concurrency=concurrency)
            return {(b["messages"][-1]["content"], b["seed"]) for b in server.bodies}

    assert seeds(1, "1.sqlite3") == seeds(8, "8.sqlite3")


def test_faults_that_pass_are_absorbed(journal):
    counts = {}

    def flaky(body):
        last = body["messages"][-1]["content"]
        counts[last] = counts.get(last, 0) + 1
        if counts[last] == 1:
            kind = sum(last.encode()) % 6
            return [
                (429, b'{"error": {"message": "slow down"}}'),
                (500, b"oops"),
                None,
                "",
                (200, completion("m", "this goes on and on", "length")),
                "not JSON" if "then" in last else "",
            ][kind]
        return honest(body)

    with Server(flaky) as server:
        outcomes, progress = run(server, journal, [f"t{i}" for i in range(12)], concurrency=4)
    assert progress.failed == 0 and len(outcomes) == 12 and progress.retried > 0


def test_a_task_whose_answers_stay_bad_fails_with_its_reason_and_the_others_go_on(journal):
    with Server(lambda body: "no" if "then" in body["messages"][-1]["content"] and "bad" in str(body) else honest(body)) as server:  # fmt: skip
        outcomes, progress = run(server, journal, ["good", "bad", "fine"])
    assert outcomes["bad"].failed == "malformed answer: no JSON object" and outcomes["bad"].result is None
    assert progress.failed == 1 and outcomes["good"].result and outcomes["fine"].result


@pytest.mark.parametrize(
    ("status", "said"), [(401, "Incorrect API key provided: sk-very-secret"), (404, "no model m")]
)
def test_what_no_retry_helps_ends_the_run_without_telling_the_key(journal, status, said):
    body = json.dumps({"error": {"message": said}}).encode()
    with Server(lambda _: (status, body)) as server:
        with pytest.raises(ModelError) as raised:
            run(server, journal, [f"t{i}" for i in range(50)], concurrency=2)
        assert len(server.bodies) <= 8
    assert "sk-very-secret" not in str(raised.value) and raised.value.__suppress_context__


def test_the_budget_is_never_passed(journal):
    prices = Prices(prompt=10.0, completion=100.0)
    with Server(honest) as server:
        with pytest.raises(BudgetError, match="0.05 USD"):
            run(server, journal, [f"t{i}" for i in range(100)], concurrency=8, prices=prices, budget_usd=0.05)
        spent = sum(prices.cost(10, len(re.findall(r"\w+", honest(b)))) for b in server.bodies)
        assert 0.02 < spent <= 0.05
        asked = len(server.bodies)
        _, progress = run(server, journal, [f"t{i}" for i in range(10)], concurrency=8)
        assert progress.reused > 0 and len(server.bodies) - asked == progress.calls


def test_answers_are_read_from_fences_and_refused_otherwise():
    request = text("?", Pick)
    assert request.parse('Sure:\n```json\n{"number": 3}\n```').number == 3
    for bad in ("", "three", '{"number": "x"}', '{"number": 3'):
        with pytest.raises(AnswerError):
            request.parse(bad)
