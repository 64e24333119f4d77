import asyncio
import json
import random
import time

import pytest

from agent_generation.dry import DryLLM
from agent_generation.engine import seed_of
from agent_generation.llm import ModelError, OpenAILLM
from agent_generation.run import Run, RunError, digest_databases, estimate, open_run, plan_session, plan_sessions
from agent_generation.session import Settings
from dataset_builders.schema import Session
from tests.fixtures.agents import (
    PRICES,
    PROFILES,
    Scripted,
    contents,
    dry_answer,
    encode,
    make_toolbox,
    reluctant,
    write_run,
)
from tests.fixtures.kills import kill_and_resume
from tests.fixtures.llm_server import Server, completion


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


def test_the_order_in_which_answers_arrive_changes_nothing(tmp_path):
    class Late(DryLLM):
        async def ask(self, request, seed):
            await asyncio.sleep(seed_of(f"{seed}/{request.role}") % 7 / 1000)
            return await super().ask(request, seed)

    write_run(tmp_path / "a", DryLLM(), 6)
    write_run(tmp_path / "b", Late(), 6, concurrency=24)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


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
    settings = Settings(user_rate=user, system_rate=system, fuse_plan=True)
    summary, _ = write_run(tmp_path, Scripted(reluctant(0)), 300, settings)
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
    with open_run(tmp_path, Run(0, "m", {}, "pack", "profiles", Settings())):
        with pytest.raises(RunError, match="another process"):
            write_run(tmp_path, DryLLM(), 2)


def test_the_estimate_is_near_what_a_run_takes(tmp_path):
    plans = lambda count: plan_sessions(count, PROFILES, 2, 0)  # noqa: E731
    expected = estimate(plans(4), 40, make_toolbox(), Settings(), encode, PRICES, tmp_path)
    summary, _ = write_run(tmp_path / "run", DryLLM(), 40)
    for key in ("calls", "prompt_tokens", "completion_tokens"):
        assert expected[key] == pytest.approx(summary[key], rel=0.15)


def test_a_fifth_of_faulty_answers_loses_no_session_silently(tmp_path):
    faults = {
        "429": (429, b'{"error": {"message": "slow down"}}'),
        "500": (500, b"oops"),
        "400": (400, b'{"error": {"message": "content filter"}}'),
        "no JSON": (200, b"<html>no JSON</html>"),
        "no choices": (200, b'{"choices": []}'),
        "lost connection": None,
        "timeout": "late",
        "empty": "",
        "truncated": '{"choice": 99',
        "out of range": '{"choice": 99}',
        "below range": '{"choice": -2}',
        "cut off": (200, completion("m", "on and on and on", "length")),
        "endless": "and so on and on, " * 2000,
    }
    dry, rng, sent = DryLLM(), random.Random(0), set()

    def script(body):
        if rng.random() >= 0.2:
            return dry_answer(dry, body)
        name = rng.choice(list(faults))
        sent.add(name)
        if name == "timeout":
            time.sleep(1.2)
        return faults[name]

    with Server(script) as server:
        llm = OpenAILLM(server.url, "m", max_retries=1, timeout=1)
        summary, progress = write_run(tmp_path, llm, 30, concurrency=30)
        bodies = len(server.bodies)
    assert sent == set(faults)
    assert summary["sessions"] + summary["failed"] == 30 and summary["missing"] == 0
    failures = [json.loads(line) for line in (tmp_path / "failures.jsonl").open()]
    sessions = [json.loads(line) for line in (tmp_path / "sessions.jsonl").open()]
    assert len({row["session_id"] for row in failures + sessions}) == 30
    assert len(failures) == summary["failed"] < 15 and all(failure["reason"] for failure in failures)
    assert summary["unusable_answers"] > 20 and bodies >= progress.calls
    assert all(len(turn[role]["text"]) <= 400 for row in sessions for turn in row["turns"] for role in ("user", "system"))  # fmt: skip


def test_a_kill_at_any_moment_loses_and_doubles_nothing_and_asks_nothing_twice(tmp_path):
    """`benchmarks/agent_scale.py` kills 200 times; this is the same with few."""
    runs, problems = kill_and_resume(tmp_path, kills=8, seed=0)
    assert runs >= 1 and problems == []


def test_sessions_that_failed_are_tried_again_when_the_run_has_ended(tmp_path):
    mute = Scripted(lambda request: "" if request.role == "user" else None)
    summary, _ = write_run(tmp_path / "a", mute, 3)
    assert (summary["failed"], summary["missing"]) == (3, 0)
    summary, _ = write_run(tmp_path / "a", DryLLM(), 3)
    assert (summary["sessions"], summary["failed"]) == (3, 0)


def test_a_run_that_is_cut_short_ends_like_any_other_though_sessions_failed(tmp_path):
    unlucky = plan_session(0, PROFILES, 2, 0).profile.name

    def script(request):
        return "" if request.role == "user" and unlucky in str(request.messages) else None

    def cut(request):
        return ModelError("no credit") if len(cut_short.asked) > 60 else script(request)

    cut_short = Scripted(cut)
    with pytest.raises(ModelError):
        write_run(tmp_path / "a", cut_short, 3, concurrency=1)
    assert len((tmp_path / "a/failures.jsonl").read_text().splitlines()) == 1
    write_run(tmp_path / "a", Scripted(script), 3)
    write_run(tmp_path / "b", Scripted(script), 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_run_keeps_to_its_encoder_and_to_the_deal_of_its_stickers(tmp_path):
    def run(encoder, databases):
        return Run(0, "m", {}, "pack", "profiles", Settings(), encoder=encoder, databases=digest_databases(databases))

    with open_run(tmp_path, run("one", {"a": 1, "b": 2})):
        pass
    with open_run(tmp_path, run("one", {"b": 2, "a": 1})):
        pass
    for other, said in ((run("two", {"a": 1, "b": 2}), "encoder"), (run("one", {"a": 2, "b": 1}), "databases")):
        with pytest.raises(RunError, match=f"begun with other {said};"), open_run(tmp_path, other):
            pass


def test_a_run_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=f"{tmp_path}/run: File exists"):
        write_run(tmp_path / "run", DryLLM(), 1)
