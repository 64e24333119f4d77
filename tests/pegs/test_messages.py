import json

import pytest

from pegs.errors import InputError
from pegs.messages import read_messages
from tests.fixtures import tiny


def user(text="hi", *parts):
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def assistant(text="hello"):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def write(tmp_path, messages):
    path = tmp_path / "messages.json"
    path.write_text(messages if isinstance(messages, str) else json.dumps(messages), "utf-8")
    return path


def test_a_dialogue_with_a_sticker_is_read(tmp_path):
    tiny.picture().save(tmp_path / "sad.png")
    messages = read_messages(
        write(tmp_path, [user(), assistant(), user("look", {"type": "image", "path": "sad.png"})])
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[-1]["content"][1]["image"].size == (40, 40)


@pytest.mark.parametrize(("messages", "message"), [
    ("{not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ([], "at least one message"),
    ({"role": "user"}, "must be a list"),
    ([assistant()], "message 1: `role` must be 'user'"),
    ([user(), user()], "message 2: `role` must be 'assistant'"),
    ([user(), assistant()], "message 2: the last message must be a user's"),
    ([user("x" * 50_000)], "message 1: has 50,000 characters, more than 8,000"),
    ([user("  ")], "message 1: is empty"),
    ([{"role": "user", "content": 3}], "message 1: `content` must be"),
    ([{"role": "user", "text": "hi"}], "message 1: must be an object with `role` and `content`"),
    ([user("a", {"type": "video", "path": "x"})], "message 1, part 2: must be"),
    ([user("a", {"type": "image", "path": "missing.png"})], "message 1, part 2: .*missing.png: no such file"),
    ([user("a", {"type": "image", "path": "messages.json"})], "message 1, part 2: .*not a readable image"),
])  # fmt: skip
def test_bad_dialogues_are_named(tmp_path, messages, message):
    with pytest.raises(InputError, match=message) as caught:
        read_messages(write(tmp_path, messages))
    assert "\n" not in str(caught.value) and "messages.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.json: no such file"):
        read_messages(tmp_path / "nowhere.json")
