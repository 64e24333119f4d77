from collections import Counter

import pytest

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.sessions import SessionError, load_mini, parse_sessions
from dataset_builders.stickers import openmoji
from dataset_builders.stickers.split import split_of_database


CLICHES = (
    "sorry to hear that", "i understand how you feel", "that must be", "it sounds like", "i'm here for you", "it's okay to",
    "take care of yourself", "as an ai", "you're not alone", "one day at a time", "self-care", "deep breath",
)  # fmt: skip


@pytest.fixture(scope="module")
def sessions():
    return load_mini()


@pytest.fixture(scope="module")
def databases():
    rows = openmoji.load_annotations()
    emotions = {row["id"]: row["emotion"] for row in rows}
    return emotions, openmoji.split_databases(emotions, 10)


def test_there_are_enough_sessions_of_the_right_length(sessions):
    splits = Counter(session.split for session in sessions)
    assert splits["train"] >= 400 and splits["validation"] >= 40 and splits["test"] >= 40
    turns = [len(session.turns) for session in sessions]
    assert min(turns) >= 3 and max(turns) <= 6 and sum(turns) >= 2600 and 5.0 <= sum(turns) / len(turns) <= 6.0
    assert len({session.session_id for session in sessions}) == len(sessions)


def test_every_sticker_is_from_the_sessions_database(sessions, databases):
    emotions, database_of = databases
    for session in sessions:
        assert session.split in split_of_database(session.database, 10), session.session_id
        for turn in session.turns:
            for message in (turn.user, turn.system):
                if message.sticker is not None:
                    assert database_of[message.sticker.id] == session.database, (session.session_id, turn.turn)
                    assert emotions[message.sticker.id] == message.sticker.emotion


def test_test_stickers_are_never_seen_in_training(sessions):
    def used(split):
        turns = [turn for session in sessions if session.split == split for turn in session.turns]
        return {m.sticker.id for turn in turns for m in (turn.user, turn.system) if m.sticker is not None}

    assert used("test") and not used("test") & (used("train") | used("validation"))


def test_sticker_rates(sessions):
    turns = [turn for session in sessions for turn in session.turns]
    rate = {
        role: sum(getattr(turn, role).sticker is not None for turn in turns) / len(turns)
        for role in ("user", "system")
    }
    assert 0.57 <= rate["system"] <= 0.63 and 0.28 <= rate["user"] <= 0.42, rate


def test_nearly_all_stickers_are_used(sessions, databases):
    used = {m.sticker.id for s in sessions for t in s.turns for m in (t.user, t.system) if m.sticker}
    assert len(used) >= 0.9 * len(databases[0])


def test_users_feel_everything_and_the_system_is_gentle(sessions):
    assert {session.profile.emotion for session in sessions} == set(EMOTIONS)
    sent = Counter(t.system.sticker.emotion for s in sessions for t in s.turns if t.system.sticker)
    felt = Counter(t.user.sticker.emotion for s in sessions for t in s.turns if t.user.sticker)
    gentle = ("neutral", "happiness")
    share = [sum(c[e] for e in gentle) / c.total() for c in (sent, felt)]
    assert share[0] > 0.6 > share[1], share


def test_the_system_has_no_stock_phrases(sessions):
    texts = [turn.system.text for session in sessions for turn in session.turns]
    for text in texts:
        assert not [cliche for cliche in CLICHES if cliche in text.lower()], text
    assert len(set(texts)) == len(texts)
    openings = Counter(tuple(text.lower().split()[:3]) for text in texts)
    assert openings.most_common(1)[0][1] <= 0.02 * len(texts), openings.most_common(5)


def test_a_bad_line_is_named():
    with pytest.raises(SessionError, match="f.jsonl:1: not JSON"):
        parse_sessions(["{"], "f.jsonl")
    with pytest.raises(SessionError, match="f.jsonl:1: session_id: Field required"):
        parse_sessions(["{}"], "f.jsonl")
