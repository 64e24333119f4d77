"""The OpenAI-compatible API, asked by OpenAI's own client over a socket where that matters."""

import base64
import contextlib
import functools
import io
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from starlette.testclient import TestClient

from pegs.errors import InputError
from pegs.serving import server
from pegs.serving.server import ChatRequest, make_app
from pegs.web import address_of, listen
from pipelines.pipeline_pegs import PegsPipeline
from tests.fixtures import tiny
from tests.pipelines.test_pipeline_pegs import Pack, encode_captions


HI = [{"role": "user", "content": "Hi"}]
QUANTILES = [number / 50 - 1 for number in range(101)]


@pytest.fixture(scope="module")
def pipeline():
    model = tiny.make_tiny_model()
    settings = model.generation_config
    settings.max_new_tokens, settings.forced_eos_token_id, settings.do_sample = 8, tiny.EOS, True
    settings.sticker_bias = torch.inf
    vectors = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    decoder = tiny.make_tiny_decoder(default_num_inference_steps=2)
    return PegsPipeline(model, tiny.make_tiny_processor(model.config), Pack(), vectors, decoder, encode_captions)


@pytest.fixture(scope="module")
def client(pipeline):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        served = uvicorn.Server(uvicorn.Config(make_app(pipeline, "tiny", "ret"), log_level="error"))
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        yield openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        served.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def local(pipeline):
    return TestClient(make_app(pipeline, "tiny", "ret"), raise_server_exceptions=False)


def ask(client, messages=HI, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def shown(url):
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def address(color, size=40):
    file = io.BytesIO()
    tiny.picture(color, size).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def lengths_read(model, monkeypatch):
    """The lengths of what the model reads from now on."""
    lengths, forward = [], model.forward

    @functools.wraps(forward)
    def noting(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noting)
    return lengths


def test_a_conversation_goes_on_with_what_the_server_gave(client, pipeline, monkeypatch):
    messages, sent, read = [*HI], [], lengths_read(pipeline.model, monkeypatch)
    for seed in range(3):
        read.clear()
        done = ask(client, messages, seed=seed)
        message = done.choices[0].message.model_dump(exclude_none=True)
        sent.append(message["sticker"]["id"])
        assert shown(message["images"][0]["image_url"]["url"]).tobytes() == tiny.picture(sent[-1]).tobytes()
        assert done.choices[0].finish_reason == "stop" and 0 < done.usage.completion_tokens < 8
        assert done.usage.prompt_tokens > 0 and message["sticker"]["why"].startswith(sent[-1])
        if seed:
            assert max(read) < done.usage.prompt_tokens  # the rest was read a turn earlier
        messages += [message, {"role": "user", "content": "And then?"}]
    assert len(set(sent)) == 3
    last = ask(client, messages, seed=3).choices[0].message
    assert not hasattr(last, "sticker")  # the pack has no other


def test_the_same_request_gets_the_same_answer_whoever_asks_beside(client):
    def answer(seed):
        done = ask(client, [{"role": "user", "content": f"I am {seed}."}], seed=seed)
        return done.choices[0].message.model_dump()

    alone = [answer(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(answer, range(8))) == alone
    assert len({message["content"] for message in alone}) > 1


@pytest.mark.parametrize("variant", ["ret", "gen", "rag"])
def test_a_stream_gives_words_then_the_sticker_then_the_end(client, variant):
    options = {"seed": 5, "temperature": 0, "extra_body": {"variant": variant}}
    whole = ask(client, **options)
    chunks = list(ask(client, **options, stream=True, stream_options={"include_usage": True}))
    *said, end, counted = chunks
    deltas = [chunk.choices[0].delta for chunk in said]
    assert "".join(delta.content or "" for delta in deltas).strip() == whole.choices[0].message.content
    last, message = deltas[-1].model_dump(), whole.choices[0].message.model_dump()
    assert last["images"] == message["images"] and last["sticker"] == message["sticker"]
    assert (last["sticker"]["id"] is not None) == (variant == "ret")
    assert not any(hasattr(delta, "images") for delta in deltas[:-1])
    assert end.choices[0].finish_reason == "stop" and counted.usage == whole.usage


def test_a_text_that_is_cut_has_no_sticker_and_says_so(client, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.model.generation_config, "forced_eos_token_id", None)
    monkeypatch.setattr(pipeline.model.generation_config, "suppress_tokens", [tiny.EOS], raising=False)
    done = ask(client, max_tokens=3)
    assert done.usage.completion_tokens == 3 and done.choices[0].finish_reason == "length"
    assert not hasattr(done.choices[0].message, "sticker")


def test_pictures_are_read_and_made_small():
    for size, side in ((40, 40), (2000, server.PICTURE_SIDE)):
        part = {"type": "image_url", "image_url": {"url": address("red", size)}}
        (message,) = ChatRequest(model="tiny", messages=[{"role": "user", "content": [part]}]).dialogue()
        ((kind, image),) = [(part["type"], part["image"]) for part in message["content"]]
        assert kind == "image" and image.size == (side, side) and image.getpixel((side // 3, side // 3)) == (255, 0, 0)


def test_what_other_clients_make_of_a_dialogue_is_read(pipeline):
    """Of a failed reply some keep an empty message, some nothing."""
    user, failed = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}
    for messages in ([user, user], [user, failed, user], [failed, *[user] * 2]):
        (message,) = ChatRequest(model="tiny", messages=messages).dialogue()
        assert [part["text"] for part in message["content"]] == ["Hi", "Hi"]
    system = {"role": "system", "content": "Be kind."}
    sticker = {**failed, "images": [{"type": "image_url", "image_url": {"url": address("red")}}]}
    long = ChatRequest(model="tiny", messages=[system, *[user, sticker] * 500, user]).dialogue()
    assert [message["role"] for message in long[:3]] == ["system", "user", "assistant"]
    assert sum(message["role"] == "assistant" for message in long) == server.MOST_PICTURES
    assert (
        len(ChatRequest(model="tiny", messages=[user, {**failed, "content": "So?"}] * 500 + [user]).dialogue()) == 255
    )


def test_models_and_health(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    told = httpx.get(str(client.base_url.join("/health"))).json()
    assert told["status"] == "ok" and told["waiting"] == 0


@pytest.mark.parametrize(("change", "status", "param", "told"), [
    ({"model": "gpt-5"}, 404, "model", "'gpt-5' is not served; 'tiny' is"),
    ({"messages": []}, 400, "messages", "at least 1 item"),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages.0.role", "must be 'user'"),
    ({"messages": [*HI, {"role": "system", "content": "Be kind."}, *HI]}, 400, "messages.1.role", "only the first"),
    ({"messages": [*HI, {"role": "assistant", "content": "Hi"}]}, 400, "messages", "the last message must be a user's"),
    ({"messages": [{"role": "system", "content": "Be kind."}]}, 400, "messages", "the last message must be a user's"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages.0", "is empty"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages.0", "9,000 characters"),
    ({"messages": [{"role": "user", "content": "x " * 3900}]}, 400, "messages", "has 7[0-9]{3} tokens"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages.0.content.0", "audio"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}]}, 400, "messages.0", "addresses are not fetched"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}, 400, "messages.0", "not a readable image"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}]}]}, 400, "messages.0", "base64"),
    ({"n": 2}, 400, "n", "1"),
    ({"tools": [{"type": "function"}]}, 400, None, "`tools` is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, None, "`response_format` is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9"}}]}]}, 400, "messages.0", "ASCII"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 65}]}, 400, "messages.0", "has 65 pictures"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"sticker_rate": 0.5}, 400, None, "needs `sticker_logit_quantiles`"),
    ({"variant": "gen", "emotion": "joy"}, 400, None, "`emotion`"),
])  # fmt: skip
def test_what_cannot_be_served_is_told_as_the_api_tells_it(local, change, status, param, told):
    for stream in (False, True):
        body = {"model": "tiny", "messages": HI, "stream": stream, **change}
        got = local.post("/v1/chat/completions", json=body)
        error = got.json()["error"]
        assert got.status_code == status and error["type"] == "invalid_request_error"
        assert error["param"] == param if param is None else re.fullmatch(param, error["param"])
        assert re.search(told, error["message"]), error


def test_bodies_have_a_most_size_and_are_json(local, monkeypatch):
    assert local.post("/v1/chat/completions", content=b"{").json()["error"]["message"].startswith("Invalid JSON")
    monkeypatch.setattr(server, "MOST_BYTES", 10)
    got = local.post("/v1/chat/completions", json={"model": "tiny", "messages": HI})
    assert got.status_code == 413 and "10 bytes" in got.json()["error"]["message"]


def test_a_system_message_and_a_rate_are_heeded(pipeline, local, monkeypatch):
    seen = []
    monkeypatch.setattr(
        PegsPipeline, "__call__", lambda self, messages, **rest: seen.append((messages, rest)) or 1 / 0
    )
    monkeypatch.setattr(pipeline.model.generation_config, "sticker_logit_quantiles", QUANTILES, raising=False)
    body = {"model": "tiny", "messages": [{"role": "developer", "content": "Be kind."}, *HI], "sticker_rate": 0.3, "top_p": 0.5, "max_tokens": 10**6}  # fmt: skip
    assert local.post("/v1/chat/completions", json=body).status_code == 500
    ((messages, rest),) = seen
    assert [message["role"] for message in messages] == ["system", "user"]
    assert (rest["sticker_rate"], rest["top_p"], rest["max_new_tokens"]) == (0.3, 0.5, 1024)


def test_the_key_is_asked_for(pipeline):
    local = TestClient(make_app(pipeline, "tiny", "ret", key="secret"))
    assert local.get("/health").status_code == 200
    for headers, status in (
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secret"}, 200),
    ):
        assert local.get("/v1/models", headers=headers).status_code == status
        body = {"model": "tiny", "messages": HI}
        assert local.post("/v1/chat/completions", json=body, headers=headers).status_code == status


def test_too_many_are_sent_away_and_the_rest_is_answered(client, pipeline, monkeypatch):
    monkeypatch.setattr(server, "MOST_WAITING", 3)
    free, answer = threading.Event(), PegsPipeline.__call__

    def answer_later(self, *args, **kwargs):
        free.wait(30)
        return answer(self, *args, **kwargs)

    monkeypatch.setattr(PegsPipeline, "__call__", answer_later)
    with ThreadPoolExecutor(9) as threads:
        asked = [threads.submit(ask, client) for _ in range(9)]
        while sum(done.done() for done in asked) < 6:
            time.sleep(0.01)
        assert httpx.get(str(client.base_url.join("/health"))).json()["waiting"] == 3
        free.set()
    refused = [done.exception() for done in asked if done.exception()]
    assert len(refused) == 6 and all(isinstance(error, openai.InternalServerError) for error in refused)
    assert {(error.status_code, error.response.headers["retry-after"]) for error in refused} == {(503, "1")}


def test_an_address_that_is_not_to_be_had_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"^--host 127.0.0.1 --port {port}: .*in use"):
            listen("127.0.0.1", port)
    assert address_of("::1", 80) == "http://[::1]:80"


@pytest.mark.parametrize(("variant", "stream"), [("ret", False), ("ret", True), ("gen", False)])
def test_a_client_that_leaves_stops_what_it_waited_for(client, pipeline, monkeypatch, variant, stream):
    if variant == "ret":
        monkeypatch.setattr(pipeline.model.generation_config, "forced_eos_token_id", None)
        monkeypatch.setattr(pipeline.model.generation_config, "suppress_tokens", [tiny.EOS], raising=False)
        monkeypatch.setattr(server, "WordStreamer", Letters)
    else:
        monkeypatch.setattr(pipeline.decoder, "_internal_dict", FrozenDict({**pipeline.decoder.config, "default_num_inference_steps": 1000}))  # fmt: skip
    part = pipeline.model if variant == "ret" else pipeline.decoder.unet
    calls, forward = [], part.forward

    @functools.wraps(forward)
    def slow(*args, **kwargs):
        calls.append(1)
        time.sleep(0.01)
        return forward(*args, **kwargs)

    monkeypatch.setattr(part, "forward", slow)
    body = {"model": "tiny", "messages": HI, "max_tokens": 1000 if variant == "ret" else 5, "variant": variant, "stream": stream}  # fmt: skip
    address = f"{client.base_url}chat/completions"
    left = contextlib.nullcontext() if stream else pytest.raises(httpx.ReadTimeout)
    with left, httpx.stream("POST", address, json=body, timeout=1) as got:
        next(got.iter_lines())
    until = time.monotonic() + 30
    while httpx.get(str(client.base_url.join("/health"))).json()["waiting"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert 1 < len(calls) < 900


class Letters(server.WordStreamer):
    """Hands each token on, were there a space behind it or not."""

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.hand_on(json.dumps(value.tolist()))
        self.next_tokens_are_prompt = False
