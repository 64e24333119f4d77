"""The command as its user runs it, on the embedded mini model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pegs.places import DEFAULT_MODEL
from tests.fixtures import tiny


PEGS = str(Path(sys.executable).with_name("pegs"))


def pegs(*args, **kwargs):
    return subprocess.run([PEGS, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture
def messages(tmp_path):
    tiny.picture().save(tmp_path / "sad.png")
    content = [{"type": "text", "text": "My dog died yesterday."}, {"type": "image", "path": "sad.png"}]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": content}]))
    return path


@pytest.mark.parametrize("variant", ["ret", "gen", "rag"])
def test_respond_repeats_itself_by_seed(messages, tmp_path, variant):
    answers = []
    for run in ("one", "two"):
        done = pegs("respond", messages, "--out", tmp_path / run, "--variant", variant, "--seed", 3, "--json")
        assert done.returncode == 0, done.stderr
        response = json.loads(done.stdout)
        assert response == json.loads((tmp_path / run / "response.json").read_text())
        sticker = (tmp_path / run / "sticker.png").read_bytes() if response["sticker"] else None
        answers.append((response["text"], sticker))
    assert answers[0] == answers[1]
    assert len(answers[0][0].split()) >= 3
    assert response["variant"] == variant and set(response["seconds"]) == {"load", "text", "sticker"}
    for item in response["retrieved"]:
        assert set(item) == {"id", "score", "emotion"}
    if answers[0][1]:
        assert Image.open(tmp_path / "one" / "sticker.png").mode == "RGBA"


def test_the_rate_decides_on_the_sticker_and_not_on_the_words(messages, tmp_path):
    answers = {}
    for rate in (0, 0.999):
        done = pegs("respond", messages, "--out", tmp_path / str(rate), "--sticker-rate", rate, "--seed", 3, "--json")
        assert done.returncode == 0, done.stderr
        answers[rate] = json.loads(done.stdout)
    assert answers[0]["sticker"] is None and answers[0.999]["sticker"] == "sticker.png"
    assert answers[0]["text"] == answers[0.999]["text"]
    wrong = pegs("respond", messages, "--out", tmp_path / "out", "--sticker-rate", 1.5)
    assert wrong.returncode == 2 and "--sticker-rate" in wrong.stderr


def test_respond_is_fast_and_small_enough(messages, tmp_path):
    """Not a timing of anything: bounds a laptop can count on, four times what is measured."""
    started = time.monotonic()
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, PEGS, "respond", messages, "--out", tmp_path / "out", "--variant", "rag"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 1024**2  # KiB
    assert time.monotonic() - started < 80


@pytest.mark.parametrize(("args", "message"), [
    (["nowhere.json"], "nowhere.json: no such file"),
    (["messages.json", "--variant", "fax"], "must be ret, gen or rag"),
    (["messages.json", "--model", "empty"], "--model empty: has no config.json"),
    (["messages.json", "--model", "weightless"], "--model weightless: has no weights"),
    (["messages.json", "--model", "nowhere"], "--model nowhere: no such folder"),
    (["messages.json", "--model", "empty", "--revision", "v1"], "--revision v1: --model empty is a folder"),
    (["messages.json", "--stickers", "empty"], "is not a sticker pack: it has no pack.yaml"),
    (["cut.json"], "cut.png: not a readable image"),
    (["long.json"], "long.json: The last message has "),
    (["messages.json", "--device", "abacus"], "--device abacus: "),
])  # fmt: skip
def test_bad_input_gets_one_line_and_exit_2(messages, tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_bytes((DEFAULT_MODEL / "config.json").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "sad.png").read_bytes()[:60])
    cut = [{"role": "user", "content": [{"type": "image", "path": "cut.png"}]}]
    (tmp_path / "cut.json").write_text(json.dumps(cut))
    (tmp_path / "long.json").write_text(json.dumps([{"role": "user", "content": "\U0001f9a9" * 8000}]))
    done = pegs("respond", *args, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "out" / "response.json").exists()


def test_without_a_language_model_the_three_ways_are_named(messages, tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PEGS_LANGUAGE_MODEL": str(tmp_path),
    }
    done = pegs("respond", messages, "--out", tmp_path / "out", env=environment)
    assert done.returncode == 2 and "has no config.json" in done.stderr


def test_every_verb_has_help_with_an_example():
    for verb in (["respond"], ["chat"], ["stickers", "build"], ["stickers", "show"]):
        done = pegs(*verb, "--help")
        assert done.returncode == 0 and f"Example: pegs {' '.join(verb)}" in " ".join(done.stdout.split())


def test_terminal_chat_answers(tmp_path):
    done = pegs("chat", "--terminal", "--variant", "ret", input="my dog died yesterday\n/sticker nowhere.png\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "pegs " in done.stdout and "nowhere.png: no such file" in done.stdout
