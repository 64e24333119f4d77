"""What the chat page and the terminal do beside answering, with a pipeline that answers at once."""

import json
import socket
import time
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from gradio.route_utils import delete_files_created_by_app

from pegs.errors import InputError
from pegs.serving import terminal
from pegs.serving.caches import MOST_CACHES
from pegs.serving.chat import build_chat, serve_chat
from pipelines.pipeline_pegs import PegsReply, TooLongError
from tests.fixtures import tiny
from tests.pegs.evaluation import make


class Parrot:
    """Stands in for a [`PegsPipeline`]."""

    model = SimpleNamespace(generation_config=SimpleNamespace(sticker_rate=None), new_cache=lambda: object())
    pack = SimpleNamespace(
        stickers=[SimpleNamespace(id="a", emotion="sadness", theme=None)],
        info=SimpleNamespace(attribution="nobody"),
        image=lambda _: tiny.picture(),
    )

    def serves(self, variant):
        return True

    def __init__(self):
        self.caches, self.read = [], []

    def __call__(self, messages, past_key_values, **_):
        self.caches.append(past_key_values)
        self.read.append([part["type"] for part in messages[-1]["content"]])
        text = messages[-1]["content"][0]["text"]
        if len(text) > 100:
            raise TooLongError("The last message has 9000 tokens, and the model can read 8112.")
        return PegsReply(f"so {text}", None, "", "ret", [], None, None, 0)


HERE = SimpleNamespace(session_hash="here")


@pytest.fixture
def parrot():
    return Parrot()


@pytest.fixture
def page(parrot):
    return list(build_chat(parrot, "ret", None).fns.values())


def event_of(page, name):
    return next(event for event in page if event.name == name)


def test_undo_takes_back_the_last_exchange_or_the_message_that_waits(page):
    send, undo = event_of(page, "send").fn, event_of(page, "undo").fn
    shown, history = [], []
    for text in ("one", "two"):
        *_, (_, shown, history, *_) = send(text, None, None, history, "ret", 0, 0, shown, HERE)
    waiting = next(send("three", None, None, history, "ret", 0, 0, shown, HERE))[0]
    assert undo(history, waiting) == (shown, shown, history, "three")
    left = undo(history, shown)
    assert left == (shown[:2], shown[:2], history[:2], "two")
    assert undo(*reversed(left[1:3])) == ([], [], [], "one") and undo([], []) == ([], [], [], "")


def test_the_last_conversations_keep_what_was_read(page, parrot):
    send = event_of(page, "send").fn

    def say(session, text="hello"):
        try:
            list(send(text, None, None, [], "ret", 0, 0, [], SimpleNamespace(session_hash=session)))
        except gr.Error:
            return None
        return parrot.caches[-1]

    first = say("a")
    assert say("a") is first and say("b") is not first and say("a") is first
    for other in range(MOST_CACHES):
        say(other)
    again = say("a")
    assert again is not first and say("a") is again
    assert say("a", "long " * 30) is None and say("a") is not again  # what a failed reply has left is not used
    for name in ("clear", "forget"):
        before = say("a")
        event_of(page, name).fn(SimpleNamespace(session_hash="a"))
        assert say("a") is not before


def test_a_reply_that_is_under_way_comes_no_more_after_undo_or_clear(page):
    buttons = {event.name: event.targets for event in page if event.name in ("undo", "clear")}
    cancelling = [event.targets for event in page if event.cancels == [event_of(page, "send")._id]]
    assert cancelling == list(buttons.values()) and len(buttons) == 2


class Browser:
    """Speaks to a served page as its script does."""

    def __init__(self, page, address):
        self.page, self.api = page, f"{address}gradio_api"

    def upload(self, data):
        return httpx.post(f"{self.api}/upload", files={"files": ("picture.png", data)})

    def call(self, name, *data):
        number = next(number for number, event in self.page.fns.items() if event.name == name)
        body = {"data": data, "fn_index": number, "session_hash": "here"}
        httpx.post(f"{self.api}/queue/join", json=body).raise_for_status()
        with httpx.stream("GET", f"{self.api}/queue/data?session_hash=here") as stream:
            told = [json.loads(line.removeprefix("data:")) for line in stream.iter_lines() if line]
        return next(message for message in told if message["msg"] == "process_completed")


@pytest.fixture
def browser(parrot, monkeypatch, tmp_path):
    """Of a page that `serve_chat` serves, with its files in `tmp_path`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.1")
    launch, served = gr.Blocks.launch, []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: served.append((page, launch(page, prevent_thread_lock=True, quiet=True, **options)[1])))  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve_chat(parrot, "ret", "127.0.0.1", port)
    yield Browser(*served[0])
    served[0][0].close(verbose=False)


def test_pictures_and_what_was_read_are_kept_no_longer_than_needed(browser, parrot, tmp_path):
    """The conversation goes on when gradio has deleted its pictures' files; what was read goes with the page."""
    picture = {"path": browser.upload(make.png("red")).json()[0], "meta": {"_type": "gradio.FileData"}}
    with httpx.stream("GET", f"{browser.api}/heartbeat/here"):
        first = browser.call("send", "one", picture, None, None, "ret", 0, 0, None)
        assert (
            first["success"] and len(list(tmp_path.rglob("*.png"))) == 2 and browser.page.delete_cache == (600, 3600)
        )
        delete_files_created_by_app(browser.page, age=None)  # as gradio does with those of an hour ago
        assert not list(tmp_path.rglob("*.png"))
        shown = first["output"]["data"][0]
        assert browser.call("send", "two", None, None, None, "ret", 0, 0, shown)["success"]
        assert (
            len(list(tmp_path.rglob("*.png"))) == 1 and browser.call("undo", None, shown)["output"]["data"][3] == "two"
        )
        assert len(parrot.caches) == 2 and parrot.caches[0] is parrot.caches[1]
    for _ in range(50):  # gradio notices that the page is gone
        time.sleep(0.1)
        browser.call("send", "three", None, None, None, "ret", 0, 0, None)
        if parrot.caches[-1] is not parrot.caches[0]:
            break
    assert parrot.caches[-1] is not parrot.caches[0]


def test_a_huge_picture_is_not_taken(browser):
    assert browser.upload(bytes(20 * 2**20 + 1)).status_code == 413


@pytest.mark.parametrize("port", [-1, 99999])
def test_a_port_that_cannot_be_is_one_line(parrot, port):
    with pytest.raises(InputError, match=rf"^--port {port}: .*must be 0-65535") as caught:
        serve_chat(parrot, "ret", "127.0.0.1", port)
    assert "\n" not in str(caught.value)


def test_what_the_model_cannot_read_ends_no_conversation(monkeypatch, capsys, tmp_path):
    (tmp_path / "red.png").write_bytes(make.png("red"))
    lines = iter(["hello", f"/sticker {tmp_path}/red.png", "long " * 30, "again", "more", "/quit"])
    monkeypatch.setattr(terminal.Console, "input", lambda *_: next(lines))
    parrot = Parrot()
    terminal.run_terminal(parrot, "ret", None)
    assert len(parrot.caches) == 4 and len(set(parrot.caches)) == 1
    assert parrot.read == [["text"], ["text", "image"], ["text", "image"], ["text"]]  # the picture waits for a reply
    said = capsys.readouterr().out
    assert "so hello" in said and "The last message has 9000 tokens" in said and "so again" in said
