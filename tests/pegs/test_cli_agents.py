"""Agent4SC as its user runs it, against a scripted endpoint."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent_generation.dry import DryLLM
from agent_generation.run import digest_databases
from agent_generation.session import Settings
from dataset_builders.schema import Session
from pegs.agent_tools import Job, make_profiles, make_sessions, make_writer, parse_rates
from pegs.errors import InputError
from pegs.places import load_pack
from tests.fixtures.agents import PROFILE, dry_answer
from tests.fixtures.llm_server import Server


PEGS = str(Path(sys.executable).with_name("pegs"))


@pytest.fixture(scope="module")
def server():
    dry = DryLLM()
    with Server(lambda body: dry_answer(dry, body), delay=0.02) as server:
        yield server


@pytest.fixture
def profiles(tmp_path):
    file = tmp_path / "profiles.jsonl"
    file.write_text(PROFILE.model_dump_json() + "\n")
    return file


def pegs(*args, encodings_named=False):
    """`encodings_named`: files must be written in an encoding of their own, not the machine's."""
    strict = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning:agent_generation.run"}
    env = {**os.environ, **(strict if encodings_named else {})}
    return subprocess.run([PEGS, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


def generate(server, profiles, out, *args):
    return ["generate", "--profiles", profiles, "--out", out, "--llm", server.url, "--model", "m", *args]


def test_sessions_with_the_wanted_rate_within_a_budget(server, profiles, tmp_path):
    args = generate(server, profiles, tmp_path / "run", "-n", 5, "--sticker-rate", "user=0", "system=1.0", "--json")
    prices = ("--price-in", 1, "--price-out", 2)
    for _ in range(2):  # the cap is the run's, not the process's
        poor = pegs(*args, *prices, "--budget-usd", 0.01)
        assert poor.returncode == 2 and "the budget of 0.01 USD is used up" in poor.stderr
        assert json.loads((tmp_path / "run/summary.json").read_text())["missing"] == 5
    done = pegs(*args, *prices, "--budget-usd", 5, encodings_named=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["sessions"] == 5 and summary["rates"]["system"] == {"requested": 1.0, "realised": 1.0, "lost": 0}
    assert "about " in done.stderr and " calls, " in done.stderr and summary["cost_usd"] > 0
    sessions = [Session.model_validate_json(line) for line in (tmp_path / "run/sessions.jsonl").open()]
    assert all(turn.system.sticker and not turn.user.sticker for session in sessions for turn in session.turns)
    built = pegs("dataset", "build", tmp_path / "run", "--out", tmp_path / "stickerconv", "--json")
    assert built.returncode == 0, built.stderr


def test_language_and_models_by_role_reach_the_endpoint(server, profiles, tmp_path):
    before = len(server.bodies)
    models = ("--role-model", "manager=judge", "--role-model", "memory=small", "--strong-model", "big")
    args = generate(server, profiles, tmp_path / "run", "-n", 2, "--max-turns", 4, *models)
    done = pegs(*args, "--language", "zh", "--json")
    assert done.returncode == 0, done.stderr
    asked = {}
    for body in server.bodies[before:]:
        form = body.get("response_format", {}).get("json_schema", {}).get("name")
        asked.setdefault(body["model"], set()).add(form)
        assert all(
            re.search("[\u4e00-\u9fff]", m["content"]) for m in body["messages"] if m["role"] == "system" or form
        )
    assert asked["judge"] == {"DialogueReview", "StickerReview"} and asked["small"] >= {"Importance"}
    assert None in asked["m"] and "Choice" in asked["m"]


def test_ctrl_c_leaves_what_the_same_command_goes_on_with(server, profiles, tmp_path):
    args = generate(server, profiles, tmp_path / "run", "-n", 8, "--concurrency", 2, "--json")
    child = subprocess.Popen(
        [PEGS, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
    )
    before = len(server.bodies)
    while len(server.bodies) < before + 40 and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    cut = len(server.bodies) - before
    done = pegs(*args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sessions"] == 8
    whole = pegs(*generate(server, profiles, tmp_path / "whole", "-n", 8, "--json"))
    assert (
        json.loads(whole.stdout)["calls"] + 4 >= len(server.bodies) - before - json.loads(whole.stdout)["calls"] > cut
    )
    assert (tmp_path / "run/sessions.jsonl").read_bytes() == (tmp_path / "whole/sessions.jsonl").read_bytes()
    begun = json.loads((tmp_path / "run/run.json").read_text())
    assert begun["encoder"] == "all-MiniLM-L6-v2"
    assert begun["databases"] == digest_databases(load_pack("openmoji").databases)


def test_profiles_are_written_from_seeds(server, tmp_path):
    def script(body):
        rng = random.Random(body["seed"])
        text = " ".join("".join(rng.choices("bdfgklmnprst", k=4)) for _ in range(25))
        return json.dumps({"name": "Ada", "persona": f"You are {text}.", "situation": f"You have {text[::-1]}."})

    with Server(script) as server:
        done = pegs("profiles", "generate", "-n", 9, "--out", tmp_path / "p.jsonl", "--llm", server.url, "--model", "m", "--emotions", "fear=2,joy=1", "--json")  # fmt: skip
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").open()]
    assert [row["emotion"] for row in rows].count("fear") == 6 and json.loads(done.stdout)["profiles"] == 9
    seeds = pegs("profiles", "seeds", "--out", tmp_path / "seeds.jsonl", "--language", "zh", "--json")
    assert json.loads(seeds.stdout) == {"profiles": 70, "out": str(tmp_path / "seeds.jsonl")}
    assert len((tmp_path / "seeds.jsonl").read_text().splitlines()) == 70


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--llm", "http://x/v1"], "--model is needed with --llm"),
        (["--language", "zh"], "need --llm"),
        (
            ["--llm", "http://x/v1", "--model", "m", "--role-model", "boss=x"],
            "--role-model boss: expected one of user,",
        ),
        (["--sticker-rate", "often"], "--sticker-rate often: expected stickerconv, mod, line, off, or shares"),
        (["--budget-usd", "3"], "--budget-usd needs --price-in and --price-out"),
        (["--stickers", "nowhere"], "--stickers nowhere"),
        (["--encoder", "./no/such/encoder"], "--encoder ./no/such/encoder: "),
    ],
)
def test_what_does_not_go_together_is_one_line(profiles, tmp_path, args, said):
    done = pegs("generate", "--profiles", profiles, "--out", tmp_path / "run", "-n", 2, *args)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "rates"),
    [(["user=0.2"], (0.2, 0.6)), (["system=0"], (0.35, 0.0)), (["user=0.2", "system=1"], (0.2, 1.0)), (["0.3"], (0.3, 0.3)), (["mod"], (0.31, 0.31))],
)  # fmt: skip
def test_a_side_whose_rate_is_not_named_keeps_its_own(words, rates):
    assert parse_rates(words) == rates


@pytest.mark.parametrize("share", ["nan", "inf"])
def test_a_share_of_an_emotion_that_is_no_number_is_one_line(server, tmp_path, share):
    done = pegs("profiles", "generate", "-n", 3, "--out", tmp_path / "p.jsonl", "--llm", server.url, "--model", "m", "--emotions", f"sadness={share},fear=1")  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"--emotions sadness={share},fear=1: shares must be positive and finite;" in done.stderr


def test_a_broken_profile_and_a_wrong_key_are_one_line(profiles, tmp_path):
    profiles.write_text('{"emotion": "sadness", "persona": 3, "situation": "You wait."}\n')
    done = pegs("generate", "--profiles", profiles, "--out", tmp_path / "run", "-n", 2)
    assert done.returncode == 2 and f"{profiles}:1: persona" in done.stderr
    profiles.write_text(PROFILE.model_dump_json() + "\n")
    with Server(
        lambda body: (401, b'{"error": {"message": "Incorrect API key provided: sk-abcdef123456"}}')
    ) as server:
        done = pegs(*generate(server, profiles, tmp_path / "run", "-n", 2))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("pegs: ") and "Incorrect API key" in last
    assert "sk-abcdef" not in done.stderr and "Traceback" not in done.stderr


def test_profiles_of_another_model_are_its_own(tmp_path):
    def script(body):
        rng = random.Random(body["seed"])
        text = " ".join("".join(rng.choices("bdfgklmnprst", k=4)) for _ in range(25))
        return json.dumps({"name": "Ada", "persona": f"You are {text}.", "situation": f"You have {text[::-1]}."})

    def write(model):
        writer = make_writer(server.url, model, (), 4, 0, 0, None, "en")
        make_profiles(3, tmp_path / "p.jsonl", {"fear": 1.0}, 0, "en", writer)
        return [body["model"] for body in server.bodies]

    with Server(script) as server:
        assert write("org/one") == write("org/one") == ["org/one"] * 3
        assert write("org/two")[3:] == ["org/two"] * 3


def test_a_place_where_no_file_can_be_is_told_before_anything_is_asked(server, tmp_path):
    asked = len(server.bodies)
    endpoint = ("--llm", server.url, "--model", "m")
    for args in (("generate", "-n", 3, *endpoint), ("seeds",)):
        done = pegs("profiles", *args, "--out", tmp_path)
        assert done.returncode == 2 and f"pegs: {tmp_path}: is a folder; expected a file to write." in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert len(server.bodies) == asked


def test_a_cluster_without_ray_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr("pegs.agent_tools.find_spec", lambda name: None)
    writer = make_writer(server.url, "m", (), 4, 0, 0, None, "en")
    job = Job(1, [PROFILE], "openmoji", "all-MiniLM-L6-v2", Settings(), writer, 0, tmp_path / "run", engine="ray")
    with pytest.raises(InputError, match=r"--engine ray needs Ray: pip install 'stickerconv\[ray\]'"):
        make_sessions(job)
    assert not (tmp_path / "run").exists()


def test_an_address_that_cannot_be_read_is_told_without_its_password(server, profiles, tmp_path):
    server_like = type("Like", (), {"url": "http://me:very/secret@host/v1"})
    done = pegs(*generate(server_like, profiles, tmp_path / "run", "-n", 1))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "secret" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("pegs: the endpoint's address cannot be read")


def test_extra_fields_reach_the_endpoint(server, profiles, tmp_path):
    extra, before = {"chat_template_kwargs": {"enable_thinking": False}}, len(server.bodies)
    done = pegs(*generate(server, profiles, tmp_path / "run", "-n", 1, "--extra-body", json.dumps(extra)))
    assert done.returncode == 0, done.stderr
    endpoint = ("--llm", server.url, "--model", "m", "--extra-body", json.dumps(extra))
    pegs("profiles", "generate", "-n", 1, "--out", tmp_path / "new.jsonl", *endpoint)
    asked = server.bodies[before:]
    assert all(body.items() >= extra.items() for body in asked) and any("Draft" in str(body) for body in asked)
    for bad, said in (("[1]", "expected a JSON object."), ("{", "not JSON"), ("[" * 9999, "not JSON")):
        with pytest.raises(InputError, match=f"^--extra-body: {re.escape(said)}"):
            make_writer(server.url, "m", (), 4, 0, 0, None, "en", extra_body=bad)


def test_a_budget_is_counted_by_prices_for_both_sides():
    for prices in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        with pytest.raises(InputError, match="--budget-usd needs --price-in and --price-out"):
            make_writer("http://x/v1", "m", (), 4, *prices, 5.0, "en")
    for values, option in (((math.nan, 1, 5), "--price-in nan"), ((1, math.inf, 5), "--price-out inf"), ((1, 1, math.nan), "--budget-usd nan"), ((-1, 1, None), "--price-in -1")):  # fmt: skip
        with pytest.raises(InputError, match=f"{option}: expected US dollars, from 0."):
            make_writer("http://x/v1", "m", (), 4, *values, "en")
    assert make_writer("http://x/v1", "m", (), 4, 1.0, 2.0, 5.0, "en").budget_usd == 5.0
