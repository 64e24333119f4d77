import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
import time
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from agent_generation.engine import (
    BudgetError,
    Embedding,
    Engine,
    Journal,
    JournalError,
    Outcome,
    Prices,
    Spent,
    needed,
)
from agent_generation.llm import ROLES as LLM_ROLES
from agent_generation.llm import AnswerError, ModelError, OpenAILLM, Reply, Request, RoleSettings
from tests.fixtures.llm_server import Server, completion


ROOT = Path(__file__).parents[2]
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


def test_a_bad_form_is_asked_again_at_once_and_a_busy_endpoint_after_a_pause(journal):
    times, counts = {}, {}

    def script(body):
        last = body["messages"][-1]["content"]
        times.setdefault(last, []).append(time.monotonic())
        counts[last] = counts.get(last, 0) + 1
        if "then" in last and counts[last] < 3:
            return "no JSON"
        return (
            (429, b'{"error": {"message": "slow down"}}') if last == "t0 one" and counts[last] == 1 else honest(body)
        )

    with Server(script) as server:
        outcomes, _ = run(server, journal, ["t0"])
    assert outcomes["t0"].result
    first, second = times["t0 one"]
    (again,) = [at for last, at in times.items() if "then" in last]
    assert len(again) == 3 and again[-1] - again[0] < second - first and second - first > 0.3


def test_an_endpoint_that_opens_late_is_waited_for(journal):
    with Server(honest) as server:
        port = server.server_port
    late = {}

    async def ask():
        engine = Engine(OpenAILLM(f"http://127.0.0.1:{port}/v1", "m", ROLES, max_retries=4), journal)
        asyncio.get_running_loop().call_later(0.4, lambda: late.update(server=Server(honest, port=port).__enter__()))
        return [outcome async for outcome in engine.run([("t", two_steps("t"))])]

    try:
        (outcome,) = asyncio.run(ask())
    finally:
        late["server"].__exit__()
    assert outcome.result and outcome.spent.unusable == 0


def test_the_key_reaches_no_log_no_journal_and_no_outcome(tmp_path, caplog):
    file = tmp_path / "journal.sqlite3"
    journal, said = Journal(file), "Incorrect API key provided: sk-very-secret, Bearer sk-very-secret"

    def script(body):
        return (400, json.dumps({"error": {"message": said}}).encode()) if "bad" in str(body) else honest(body)

    with caplog.at_level(logging.DEBUG), Server(script) as server:
        outcomes, _ = run(server, journal, ["good", "bad"])
        assert any("sk-very-secret" in key for key in server.keys)
    journal.finish(outcomes["bad"])
    journal.close()
    assert outcomes["good"].result and "Incorrect API key" in outcomes["bad"].failed
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert "very-secret" not in outcomes["bad"].failed + caplog.text and b"very-secret" not in written and caplog.text
    llm = OpenAILLM(
        "http://me:very-secret@127.0.0.1:9/v1?key=very-secret", "m", max_retries=0, api_key="sk-very-secret"
    )
    with pytest.raises(AnswerError, match="no connection to http://127.0.0.1:9/v1") as raised:
        asyncio.run(llm.ask(text("x"), 0))
    assert "very-secret" not in str(raised.value) + repr(llm.api_key and llm).replace(llm.base_url, "")


def test_a_name_and_password_in_the_address_are_sent_as_they_are_meant():
    with Server(honest) as server:
        llm = OpenAILLM(server.url.replace("//", "//me:p%40ss@"), "m", api_key="unused")
        assert asyncio.run(llm.ask(text("x"), 0)).text == "<x>"
    assert server.keys == ["Basic " + b64encode(b"me:p@ss").decode()]


def test_what_is_wanted_later_holds_nobody_up(tmp_path):
    seen, journal = [], Journal(tmp_path / "journal.sqlite3")

    def encode(texts):
        seen.append(list(texts))
        return np.ones((len(texts), 2))

    def steps():
        nothing, vectors = yield [Embedding(("later", "much later"), ahead=True), Embedding(("now",))]
        (again,) = yield [Embedding(("later",))]
        return {"ahead": nothing, "now": vectors.tolist(), "later": again.tolist()}

    async def collect():
        return [
            o
            async for o in Engine(OpenAILLM("http://127.0.0.1:9/v1", "m"), journal, encode=encode).run([("t", steps)])
        ]

    (outcome,) = asyncio.run(collect())
    assert outcome.result == {"ahead": None, "now": [[1.0, 1.0]], "later": [[1.0, 1.0]]}
    assert seen[0] == ["now"] and ["later", "much later"] in seen and ["later"] in seen
    journal.close()


def test_roles_have_models_and_temperatures_of_their_own():
    llm = OpenAILLM("http://x/v1", "m", {**LLM_ROLES, "manager": replace(LLM_ROLES["manager"], model="judge")})

    def body(role, seed=0):
        return llm.body(Request([{"role": "user", "content": "x"}], role), seed)

    asked = {role: (body(role)["temperature"], body(role)["max_tokens"]) for role in ("user", "system", "manager")}
    assert asked == {"user": (0.7, 150), "system": (0.5, 150), "manager": (0.0, 200)}
    assert [body(role)["model"] for role in ("user", "manager")] == ["m", "judge"]
    assert {body("stronger", seed)["temperature"] for seed in range(40)} == {tenth / 10 for tenth in range(1, 11)}


def test_the_budget_counts_what_earlier_processes_spent(tmp_path):
    prices, budget = Prices(prompt=10.0, completion=100.0), 0.05
    with Server(honest) as server:
        for _ in range(4):  # each time a new process's engine
            journal = Journal(tmp_path / "j.sqlite3")

            async def write(journal=journal):
                spent = prices.cost(*journal.paid())
                engine = Engine(OpenAILLM(server.url, "m", ROLES), journal, 4, prices=prices, budget_usd=budget, spent_usd=spent)  # fmt: skip
                async for outcome in engine.run((f"t{i}", two_steps(f"t{i}")) for i in range(100)):
                    journal.finish(outcome)

            with pytest.raises(BudgetError, match="0.05 USD"):
                asyncio.run(write())
            journal.close()
        paid = sum(prices.cost(10, len(re.findall(r"\w+", honest(b)))) for b in server.bodies)
    journal = Journal(tmp_path / "j.sqlite3")
    assert 0.02 < paid <= budget and prices.cost(*journal.paid()) == pytest.approx(paid)
    journal.close()


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


def test_what_was_asked_beside_a_request_that_ends_the_run_arrives_and_is_kept(tmp_path):
    prices, journal = Prices(prompt=10.0, completion=100.0), Journal(tmp_path / "j.sqlite3")
    with Server(honest, delay=0.3) as server:

        async def write():
            engine = Engine(OpenAILLM(server.url, "m", ROLES), journal, 4, prices=prices, budget_usd=0.004)
            return [outcome async for outcome in engine.run([("one", two_steps("one"))])]

        with pytest.raises(BudgetError):
            asyncio.run(write())
        assert len(server.bodies) == 1
    assert journal.paid()[0] == 10


def test_a_journal_is_written_by_one_process_at_a_time(tmp_path):
    file = tmp_path / "j.sqlite3"
    code = f"import time; from pathlib import Path; from agent_generation.engine import Journal; j = Journal(Path({str(file)!r})); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        with pytest.raises(JournalError, match=f"{file}: another process is writing there"):
            Journal(file, patience=0.3)
        threading.Timer(0.5, other.kill).start()
        Journal(file).close()


def unauthorised(body):
    return 401, b'{"error": {"message": "no"}}'


def test_an_attempt_that_failed_and_was_made_up_for_is_not_made_again_after_a_kill(journal):
    lost = ["t one"]

    def script(body):
        last = body["messages"][-1]["content"]
        if last in lost:
            lost.remove(last)
            return 503, b"busy"
        return unauthorised(body) if "then" in last else honest(body)

    with Server(script) as server, pytest.raises(ModelError):
        run(server, journal, ["t"], max_retries=0)
    with Server(honest) as server:
        outcomes, progress = run(server, journal, ["t"])
        assert ["then" in body["messages"][-1]["content"] for body in server.bodies] == [True]
    assert outcomes["t"].result and outcomes["t"].spent.unusable == 1 and progress.reused == 2


def test_a_task_that_went_on_without_an_answer_does_so_again_after_a_kill(journal):
    def steps():
        (rating,) = yield [text("how good")]
        (said,) = yield [text("say")]
        (more,) = yield [text(f"{needed(said)} more")]
        return {"rating": str(rating), "more": needed(more)}

    def ask(script):
        async def collect():
            engine = Engine(OpenAILLM(server.url, "m", ROLES, max_retries=0), journal)
            return [outcome async for outcome in engine.run([("t", steps)])]

        with Server(script) as server:
            try:
                return asyncio.run(collect()), len(server.bodies)
            except ModelError:
                return None, len(server.bodies)

    def fails(body):
        last = body["messages"][-1]["content"]
        return (503, b"busy") if last == "how good" else unauthorised(body) if "more" in last else honest(body)

    assert ask(fails) == (None, 5)
    (outcome,), asked = ask(honest)
    assert (
        asked == 1 and outcome.result["more"] == "<<say> more>" and outcome.result["rating"].startswith("status 503")
    )
    assert outcome.spent.unusable == 3


def test_answers_that_others_replaced_stay_paid_for(journal):
    for digest in ("one", "other"):
        journal.add("t/0/0", digest, Reply("x", "m", 10, 5))
    journal.finish(Outcome("t", {}, None, Spent(calls=1, prompt_tokens=10, completion_tokens=5)))
    assert journal.paid() == (20, 10)


def test_a_task_that_failed_gets_new_attempts_when_its_run_has_ended(journal):
    def stubborn(body):
        return "no" if "then" in body["messages"][-1]["content"] else honest(body)

    with Server(stubborn) as server:
        run(server, journal, ["t"])
        first = {body["seed"] for body in server.bodies}
        outcomes, progress = run(server, journal, ["t"])  # cut short and resumed
        assert progress.calls == 0 and outcomes["t"].failed == "malformed answer: no JSON object"
        journal.try_again(["t"])
        _, progress = run(server, journal, ["t"])
        assert progress.calls == 3 and not first & {body["seed"] for body in server.bodies[5:]}
        journal.try_again(["t"])
        server.script = honest
        outcomes, progress = run(server, journal, ["t"])
    assert outcomes["t"].result and progress.calls == 1


@pytest.mark.parametrize("address", ["http://me:very/secret@host/v1", "http://host:secret/v1"])
def test_an_address_that_cannot_be_read_ends_the_run_without_telling_its_password(address):
    with pytest.raises(ModelError, match="address cannot be read") as raised:
        asyncio.run(OpenAILLM(address, "m").ask(text("x"), 0))
    assert "secret" not in str(raised.value) and raised.value.__suppress_context__
    assert OpenAILLM("http://me:1/secret@host/v1", "m").address == "http://host/v1"


def test_an_answer_whose_usage_is_not_told_counts_as_much_as_it_could_have_used(journal):
    untold = b'{"choices": [{"message": {"content": "hm"}}]}'
    prices = Prices(prompt=10.0, completion=100.0)
    with Server(lambda body: (200, untold)) as server:
        with pytest.raises(BudgetError):
            run(server, journal, [f"t{i}" for i in range(100)], prices=prices, budget_usd=0.05)
    prompt_tokens, completion_tokens = journal.paid()
    assert (
        completion_tokens == 20 * len(server.bodies) > 0
        and 0.04 < prices.cost(prompt_tokens, completion_tokens) <= 0.05
    )
