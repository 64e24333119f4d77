"""Filtering and annotating a pack, against a scripted endpoint."""

import dataclasses
import json

import pytest
from PIL import Image

from agent_generation.engine import Prices, seed_of
from dataset_builders.stickers.build import build_from_source
from dataset_builders.stickers.pack import StickerPack
from pegs.endpoint import Endpoint
from pegs.errors import InputError
from pegs.sticker_tools import annotate_pack, annotate_pack_locally, filter_pack
from tests.fixtures.llm_server import Server


KNOWLEDGE = {"emotion": "fear", "description": "d", "emotion_description": "e", "recommendation": "r", "tags": []}
ANNOTATION = dict.fromkeys(("content", "emotion", "scenes", "tone", "humor"), "x")


def script(body):
    form = body.get("response_format", {}).get("json_schema", {}).get("name")
    answers = {"Annotation": ANNOTATION, "Knowledge": KNOWLEDGE, "Verdict": {"suitable": "yes"}}
    return json.dumps(answers[form]) if form else "fine"


@pytest.fixture
def pack(tmp_path):
    """Folder of a pack of three stickers; annotating one takes two calls, filtering it fifteen."""
    (tmp_path / "in").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (24, 24), name).save(tmp_path / "in" / f"{name}.png")
    build_from_source(str(tmp_path / "in"), tmp_path / "pack")
    return tmp_path / "pack"


@pytest.fixture
def server():
    with Server(script) as server:
        yield server


def endpoint(server, model="m", budget_usd=None, prices=Prices()):  # noqa: B008
    return Endpoint(server.url, model, 1, budget_usd, prices, "en")


def annotate(server, pack, again=False, **kwargs):
    return annotate_pack(StickerPack.load(pack), endpoint(server, **kwargs), pack, again)


def test_each_model_gives_its_own_answers_and_again_asks_anew(server, pack):
    assert annotate(server, pack, model="cheap")["calls"] == 6
    assert annotate(server, pack, model="cheap")["calls"] == 0
    for _ in range(2):
        assert annotate(server, pack, again=True, model="better/one")["calls"] == 6
    assert {sticker.annotated_by for sticker in StickerPack.load(pack).stickers} == {"better/one"}
    for model, calls in (("cheap", 45), ("cheap", 0), ("better", 45)):
        assert filter_pack(StickerPack.load(pack), endpoint(server, model), pack.parent / "kept")["calls"] == calls


def test_asking_again_goes_on_where_it_was_cut_short(server, pack):
    server.script = lambda body: script(body) if len(server.bodies) < 4 else (401, b'{"error": {"message": "no"}}')
    with pytest.raises(InputError, match="status 401"):
        annotate(server, pack, again=True)
    server.script = script
    result = annotate(server, pack, again=True)
    assert (result["reused"], result["calls"]) == (3, 3)


@pytest.mark.parametrize("again", [False, True])
def test_the_same_command_tries_again_what_failed_and_nothing_else(server, pack, again):
    spoiled = {}

    def spoils(body):
        answer = script(body)
        first = spoiled.setdefault("what", body["messages"])
        return "no idea" if body["messages"] == first else answer

    server.script = spoils
    failed = annotate(server, pack, again)
    assert len(failed["failed"]) == 1 and failed["annotated"] == 2 and failed["calls"] == 3 + 4
    server.script = script
    mended = annotate(server, pack, again)
    assert mended["failed"] == {} and mended["calls"] == 2
    assert all(sticker.emotion for sticker in StickerPack.load(pack).stickers)


def test_extra_fields_reach_the_endpoint(server, pack):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = dataclasses.replace(endpoint(server), extra_body=extra)
    annotate_pack(StickerPack.load(pack), asked, pack, again=False)
    filter_pack(StickerPack.load(pack), asked, pack.parent / "kept")
    assert len(server.bodies) == 51 and all(body.items() >= extra.items() for body in server.bodies)


def test_filtering_asks_again_for_the_answers_that_an_outage_took(server, pack):
    def filtered():
        return filter_pack(StickerPack.load(pack), endpoint(server), pack.parent / "kept")

    lost = {seed_of(f"filter/red/{chain}/{attempt}") for chain in range(3) for attempt in range(3)}
    server.script = lambda body: (400, b'{"error": {"message": "busy"}}') if body["seed"] in lost else script(body)
    found = filtered()
    assert (found["stickers"], found["refused"], found["unknown_answers"]) == (2, 1, 3)
    server.script = script
    found = filtered()
    assert (found["stickers"], found["refused"], found["unknown_answers"]) == (3, 0, 0) and 9 <= found["calls"] < 15
    assert filtered()["calls"] == 0


def test_the_budget_counts_what_earlier_commands_spent(server, pack):
    prices = Prices(1e-6, 1000.0)  # 0.5 USD at most for an annotation
    long = json.dumps(dict.fromkeys(ANNOTATION, "x " * 60))  # 0.3 USD
    server.script = lambda body: long if "Annotation" in str(body) else script(body)
    for _ in range(4):
        with pytest.raises(InputError, match="budget of 0.7 USD is used up"):
            annotate(server, pack, budget_usd=0.7, prices=prices)
    assert sum("Annotation" in str(body) for body in server.bodies) == 1
    whole = annotate(server, pack, budget_usd=30.0, prices=prices)
    assert whole["annotated"] == 3 and len(server.bodies) == 6


def test_a_pack_that_is_annotated_needs_no_model(server, pack, tmp_path):
    annotate(server, pack)
    done = StickerPack.load(pack)
    assert annotate_pack_locally(done, done, "nowhere", tmp_path / "out", again=False)["annotated"] == 0
    assert StickerPack.load(tmp_path / "out").stickers == done.stickers


def test_a_model_that_cannot_be_read_is_named(pack, tmp_path):
    new = StickerPack.load(pack)
    for files, said in (({}, "has no config.json"), ({"config.json": "{}", "model.safetensors": "x"}, "Unrecognized")):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"^--model {tmp_path}: {said}"):
            annotate_pack_locally(new, new, str(tmp_path), tmp_path / "out", again=False)
