import base64
import hashlib
import io
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent_generation.llm import AnswerError, Request
from agent_generation.prompts import LANGUAGES, render
from agent_generation.tool import (
    Annotation,
    Knowledge,
    Verdict,
    annotate_by_neighbours,
    annotate_sticker,
    filter_sticker,
)
from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickers.build import build_from_source
from dataset_builders.stickers.pack import StickerPack
from tests.fixtures.llm_server import Server


ROOT = Path(__file__).parents[2]
PEGS = str(Path(sys.executable).with_name("pegs"))


def picture():
    return Image.new("RGBA", (40, 20), (200, 30, 30, 255))


def drive(steps, answer):
    """Run a task by hand; `answer` gives the text of each request by its number in all, or raises."""
    asked, requests = [], next(steps)
    try:
        while True:
            answers = []
            for request in requests:
                asked.append(request)
                try:
                    answers.append(request.parse(answer(len(asked) - 1, request)))
                except AnswerError as error:
                    answers.append(error)
            requests = steps.send(answers)
    except StopIteration as stop:
        return stop.value, asked


@pytest.mark.parametrize(
    ("votes", "kept"),
    [
        (["yes"] * 5, True),
        (["yes", "yes", "yes", "no", "no"], True),
        (["yes", "yes", "no", "no", "maybe"], False),  # a tie of what could be read
        (["yes", "yes", "maybe", "maybe", "maybe"], False),
        (["maybe"] * 5, False),
        (["no"] * 5, False),
    ],
)
def test_a_strict_majority_keeps_and_what_cannot_be_read_is_no_yes(votes, kept):
    result, asked = drive(
        filter_sticker(picture), lambda n, request: json.dumps({"suitable": votes[n - 10]}) if request.answer else f"a{n}"
    )  # fmt: skip
    assert len(asked) == 15 and result["kept"] is kept
    assert [result[name] for name in ("yes", "no", "unknown")] == [votes.count(v) for v in ("yes", "no", "maybe")]
    last = asked[-1].messages
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"] and asked[
        -1
    ].answer is Verdict
    assert sum(part["type"] == "image_url" for part in last[0]["content"]) == 1 and isinstance(last[2]["content"], str)


def test_a_chain_that_breaks_is_unknown():
    def answer(number, request):
        if number in (0, 6):
            return ""
        return '{"suitable": "yes"}' if request.answer else "fine"

    result, asked = drive(filter_sticker(picture), answer)
    assert result["unknown"] == 2 and result["yes"] == 3 and result["kept"] and len(asked) == 5 + 4 + 3


def test_annotation_asks_five_questions_and_condenses():
    annotation = {k: f"about {k}" for k in ("content", "emotion", "scenes", "tone", "humor")}
    knowledge = {"emotion": "sadness", "description": "a", "emotion_description": "b", "recommendation": "c", "tags": ["X"]}  # fmt: skip
    texts = [json.dumps(annotation), json.dumps(knowledge)]
    result, asked = drive(annotate_sticker(picture), lambda n, _: texts[n])
    assert result == {**knowledge, "answers": annotation} and asked[1].answer is Knowledge
    assert all(f"about {key}" in asked[1].messages[0]["content"] for key in annotation)
    with pytest.raises(AnswerError, match="emotion"):
        drive(annotate_sticker(picture), lambda n, _: [texts[0], json.dumps(knowledge | {"emotion": "joyful"})][n])


def test_prompts_exist_in_every_language_and_show_data_as_data():
    answers = dict.fromkeys(("content", "emotion", "scenes", "tone", "humor"), "{{ 7 * 7 }}")
    for language in LANGUAGES:
        for name in ("filter_1", "filter_2", "filter_3", "annotate"):
            assert len(render(name, language)) > 20
        assert "{{ 7 * 7 }}" in render("knowledge", language, answers=answers)
    with pytest.raises(ValueError, match="'xx'"):
        render("annotate", "xx")


def test_the_local_path_says_so():
    fields = {"image_path": "x", "width": 1, "height": 1, "sha256": "0"}
    near = [
        (Sticker(id=e, emotion=e, description=f"a {e}", emotion_description=f"feels {e}", recommendation=f"when {e}", **fields), s)
        for e, s in (("fear", 0.5), ("sadness", 0.4), ("sadness", 0.4))
    ]  # fmt: skip
    made = annotate_by_neighbours(Sticker(id="new", tags=("wolf",), **fields), dict.fromkeys(EMOTIONS, 1 / 7), near)
    assert (made.emotion, made.annotated_by, made.emotion_description) == ("sadness", "local", "feels sadness")
    assert made.tags == ("wolf",) and made.description == "wolf"


def knowing(body):
    """Answers that depend on the picture and the question alone."""
    last = body["messages"][-1]["content"]
    if isinstance(last, list):
        pixels = Image.open(io.BytesIO(base64.b64decode(last[0]["image_url"]["url"].partition(",")[2])))
        name = hashlib.sha256(pixels.tobytes()).hexdigest()[:8]
        return json.dumps({k: f"{k} of {name}" for k in ("content", "emotion", "scenes", "tone", "humor")})
    name = last.partition("content of ")[2][:8]
    emotion = EMOTIONS[int(name, 16) % 7]
    return json.dumps({"emotion": emotion, "description": name, "emotion_description": f"{emotion} {name}", "recommendation": "now", "tags": [name]})  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{i:02}.png")
    for name in ("killed", "whole"):
        build_from_source(str(tmp_path / "in"), tmp_path / name)
    return tmp_path


def test_annotate_survives_being_killed(folder):
    rng, asked_again, killed = random.Random(0), 0, 0
    with Server(knowing, delay=0.05) as server:
        command = [PEGS, "stickers", "annotate", "--llm", server.url, "--model", "m", "--concurrency", "2", "--json", "--pack"]  # fmt: skip
        while killed < 20:
            before = set(journaled(folder / "killed"))
            asked = len(server.bodies)
            process = subprocess.Popen([*command, folder / "killed"], stdout=subprocess.PIPE, cwd=ROOT)
            while len(server.bodies) < asked + rng.randint(1, 5) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            new = [digest(body) for body in server.bodies[asked:]]
            asked_again += sum(d in before for d in new)
        done = subprocess.run([*command, folder / "killed"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        calls = len(server.bodies)
        report = json.loads(done.stdout)
        assert report["annotated"] == 40 and report["failed"] == {}
        subprocess.run([*command, folder / "whole"], check=True, stdout=subprocess.PIPE, cwd=ROOT)
        assert len(server.bodies) - calls == 80
    assert asked_again == 0
    for name in ("stickers.parquet", "pack.yaml"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    stickers = StickerPack.load(folder / "killed").stickers
    assert {s.annotated_by for s in stickers} == {"m"} and all(
        s.description in s.emotion_description for s in stickers
    )
    assert max(Counter(journaled(folder / "killed")).values()) == 1


def digest(body):
    role, form = {"Annotation": ("annotate", Annotation), "Knowledge": ("knowledge", Knowledge)}[
        body["response_format"]["json_schema"]["name"]
    ]
    return Request(body["messages"], role, form).digest


def journaled(folder):
    """Digests of the requests whose answers are kept so far."""
    file = folder / "annotate-m.sqlite3"
    if not file.exists():
        return []
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return [row[0] for row in connection.execute("SELECT digest FROM answers")]
