"""What the chat page and the terminal do beside answering, with a pipeline that answers at once."""

from types import SimpleNamespace

import gradio as gr
import pytest

from pegs.serving import terminal
from pegs.serving.chat import MOST_CACHES, build_chat
from pipelines.pipeline_pegs import PegsReply, TooLongError
from tests.fixtures import tiny


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
        self.caches = []

    def __call__(self, messages, past_key_values, **_):
        self.caches.append(past_key_values)
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
        *_, (shown, history, *_) = send(text, None, None, history, "ret", 0, 0, shown, HERE)
    waiting = next(send("three", None, None, history, "ret", 0, 0, shown, HERE))[0]
    assert undo(history, waiting) == (shown, history, "three")
    left = undo(history, shown)
    assert left == (shown[:2], history[:2], "two")
    assert undo(*reversed(left[:2])) == ([], [], "one") and undo([], []) == ([], [], "")


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


def test_a_reply_that_is_under_way_comes_no_more_after_undo_or_clear(page):
    buttons = {event.name: event.targets for event in page if event.name in ("undo", "<lambda>")}
    cancelling = [event.targets for event in page if event.cancels == [event_of(page, "send")._id]]
    assert cancelling == list(buttons.values()) and len(buttons) == 2


def test_what_the_model_cannot_read_ends_no_conversation(monkeypatch, capsys):
    lines = iter(["hello", "long " * 30, "again", "/quit"])
    monkeypatch.setattr(terminal.Console, "input", lambda *_: next(lines))
    parrot = Parrot()
    terminal.run_terminal(parrot, "ret", None)
    assert len(parrot.caches) == 3 and len(set(parrot.caches)) == 1
    said = capsys.readouterr().out
    assert "so hello" in said and "The last message has 9000 tokens" in said and "so again" in said
