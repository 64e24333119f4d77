import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent_generation.dry import DryLLM
from agent_generation.engine import Engine, Journal, Prices, seed_of
from agent_generation.llm import OpenAILLM
from agent_generation.run import (
    Run,
    RunError,
    estimate,
    export_run,
    journal_file,
    open_run,
    plan_session,
    plan_sessions,
    write_sessions,
)
from agent_generation.session import Settings
from dataset_builders.schema import Session
from tests.fixtures.agents import PROFILE, Scripted, encode, make_toolbox
from tests.fixtures.llm_server import Server, completion


PROFILES = [PROFILE.model_copy(update={"name": f"Name{n}"}) for n in range(7)]
PRICES = Prices(0.5, 1.5)
FILES = ("sessions.jsonl", "failures.jsonl", "summary.json", "run.json")


def write_run(folder, llm, count, settings=None, concurrency=8, seed=0):
    """Write a run the way `pegs generate` does."""
    settings, toolbox = settings or Settings(), make_toolbox()
    run = Run(seed, "m", "m", "pack", "profiles", settings)
    with open_run(folder, run):
        journal = Journal(journal_file(folder, 0))
        engine = Engine(llm, journal, concurrency, encode=encode)
        try:
            plans = plan_sessions(count, PROFILES, 2, seed)
            asyncio.run(write_sessions(plans, engine, toolbox, settings, lambda outcome: None))
        finally:
            journal.close()
            summary = export_run(folder, run, plan_sessions(count, PROFILES, 2, seed), PRICES)
    return summary, engine.progress


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_same_seed_gives_the_same_files_whatever_the_concurrency(tmp_path):
    summary, _ = write_run(tmp_path / "a", DryLLM(), 12, concurrency=1)
    write_run(tmp_path / "b", DryLLM(), 12, concurrency=64)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    write_run(tmp_path / "c", DryLLM(), 12, seed=1)
    sessions = [Session.model_validate_json(line) for line in (tmp_path / "a/sessions.jsonl").open()]
    assert (tmp_path / "c/sessions.jsonl").read_text() != (tmp_path / "a/sessions.jsonl").read_text()
    assert [session.session_id for session in sessions] == [f"s0-{n:06d}" for n in range(12)]
    assert summary["sessions"] == 12 and summary["calls"] == sum(session.usage.calls for session in sessions) > 300
    assert sessions[0].usage.cost_usd > 0 and summary["cost_usd"] > 0


def test_a_longer_run_goes_on_where_a_shorter_one_ended(tmp_path):
    write_run(tmp_path / "a", DryLLM(), 4)
    _, progress = write_run(tmp_path / "a", DryLLM(), 10)
    write_run(tmp_path / "b", DryLLM(), 10)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and progress.tasks == 6


def test_profiles_are_used_evenly_and_splits_follow_the_databases():
    plans = [plan_session(number, PROFILES, 10, seed=4) for number in range(700)]
    names = [plan.profile.name for plan in plans]
    assert all(len(set(names[start : start + 7])) == 7 for start in range(0, 700, 7)) and names[:7] != names[7:14]
    assert {plan.database for plan in plans if plan.split == "test"} == {9, 10}
    assert {plan.database for plan in plans if plan.split != "test"} == set(range(1, 9))
    validation = sum(plan.split == "validation" for plan in plans) / sum(plan.split != "test" for plan in plans)
    assert 0.04 < validation < 0.13 and len({plan.seed for plan in plans}) == 700


@pytest.mark.parametrize(("user", "system"), [(0.35, 0.6), (0.31, 0.31), (0.09, 0.09), (0.0, 0.0)])
def test_the_realised_rate_is_the_requested_one(tmp_path, user, system):
    rng = random.Random(0)

    def script(request):  # a model that ends sessions when it likes, forgets JSON, and refuses stickers
        name = request.answer.__name__ if request.answer else ""
        if name and rng.random() < 0.1:
            return "I would rather not say."
        if name == "DialogueReview":
            return json.dumps({"ended": rng.choice(["yes", "no"]), "advice": ""})
        return '{"reason": "", "consistent": "no"}' if name == "StickerReview" and rng.random() < 0.1 else None

    settings = Settings(user_rate=user, system_rate=system, fuse_plan=True)
    summary, _ = write_run(tmp_path, Scripted(script), 300, settings)
    for role, rate in (("user", user), ("system", system)):
        assert abs(summary["rates"][role]["realised"] - rate) < 0.02
    if system:
        assert summary["unusable_answers"] > 0 and summary["absorbed"]["sticker_rejected"] > 0
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").open()]
    assert summary["no_sticker"] == sum(session["no_sticker"] for session in sessions)


def test_a_folder_keeps_to_one_run_and_one_process(tmp_path):
    write_run(tmp_path, DryLLM(), 2)
    with pytest.raises(RunError, match="begun with other settings"):
        write_run(tmp_path, DryLLM(), 2, Settings(max_turns=3))
    with open_run(tmp_path, Run(0, "m", "m", "pack", "profiles", Settings())):
        with pytest.raises(RunError, match="another process"):
            write_run(tmp_path, DryLLM(), 2)


def test_the_estimate_is_near_what_a_run_takes(tmp_path):
    plans = lambda count: plan_sessions(count, PROFILES, 2, 0)  # noqa: E731
    expected = estimate(plans(4), 40, make_toolbox(), Settings(), encode, PRICES, tmp_path)
    summary, _ = write_run(tmp_path / "run", DryLLM(), 40)
    for key in ("calls", "prompt_tokens", "completion_tokens"):
        assert expected[key] == pytest.approx(summary[key], rel=0.15)


def test_a_fifth_of_faulty_answers_loses_no_session_silently(tmp_path):
    faults = [
        (429, b'{"error": {"message": "slow down"}}'),
        (500, b"oops"),
        (200, b"<html>no JSON</html>"),
        (200, b'{"choices": []}'),
        None,
        "",
        '{"choice": 99',
        '{"choice": 99}',
        (200, completion("m", "on and on and on", "length")),
    ]
    dry, lock = DryLLM(), random.Random(0)

    def script(body):
        if lock.random() < 0.2:
            return lock.choice(faults)
        return dry_answer(dry, body)

    with Server(script) as server:
        llm = OpenAILLM(server.url, "m", max_retries=1, timeout=20)
        summary, progress = write_run(tmp_path, llm, 30, concurrency=16)
        bodies = len(server.bodies)
    assert summary["sessions"] + summary["failed"] == 30 and summary["missing"] == 0
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").open()]
    assert len(failures) == summary["failed"] < 15 and all(failure["reason"] for failure in failures)
    assert summary["unusable_answers"] > 20 and bodies >= progress.calls


def dry_answer(dry, body):
    """What the dry writer would say to a request's body."""
    form = body.get("response_format")
    rng = random.Random(json.dumps(body["messages"]) + str(body["seed"]))
    if form is None:
        return " ".join(rng.choices(["so", "it", "goes", "on", "rain", "bread", "kind", "dog", "late", "bus"], k=12)) + str(rng.random())  # fmt: skip
    schema = form["json_schema"]["schema"]
    return json.dumps(dry._fill(schema, schema.get("$defs", {}), rng))


CHILD = """
import sys
from pathlib import Path
from tests.agent_generation.test_run import write_run
from agent_generation.llm import OpenAILLM
summary, _ = write_run(Path(sys.argv[1]), OpenAILLM(sys.argv[2], "m", max_retries=3), 6, concurrency=6)
"""


def test_a_kill_at_any_moment_loses_and_doubles_nothing_and_asks_nothing_twice(tmp_path, kills=6):
    """`make bench` kills 200 times (benchmarks/agent_kills.py); this is the same with few."""
    assert kill_and_resume(tmp_path, kills, seed=0) == []


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[str]:
    """Run, kill at `kills` random moments, resume to the end; what is wrong with the outcome."""
    dry, rng, asked, kept, problems = DryLLM(), random.Random(seed), [], set(), []

    def script(body):
        asked.append(body["seed"])
        if body["seed"] in kept:
            problems.append("an answer that was there was asked for again")
        return dry_answer(dry, body)

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with Server(script, delay=0.005) as server:
        command = [sys.executable, "-c", CHILD]
        subprocess.run([*command, str(folder / "calm"), server.url], env=env, check=True)
        calm = len(asked)
        for kill in range(kills):
            child = subprocess.Popen([*command, str(folder / "killed"), server.url], env=env)
            target = len(asked) + rng.randint(1, max(1, 2 * calm // kills))
            while len(asked) < target and child.poll() is None:
                time.sleep(0.001)
            child.send_signal(signal.SIGKILL)
            child.wait()
            if (journal := journal_file(folder / "killed", 0)).is_file():
                rows = sqlite3.connect(journal).execute("SELECT key FROM answers").fetchall()
                kept.update(seed_of(key) for (key,) in rows)
            if child.returncode == 0:
                problems.append(f"kill {kill} came too late")
        subprocess.run([*command, str(folder / "killed"), server.url], env=env, check=True)
    problems += [
        name for name in FILES if (folder / "calm" / name).read_bytes() != (folder / "killed" / name).read_bytes()
    ]
    return problems
