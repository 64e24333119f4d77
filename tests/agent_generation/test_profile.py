import asyncio
import json
import random
from collections import Counter

import pytest

from agent_generation.engine import Engine, Journal
from agent_generation.manager import rouge_l, tokens
from agent_generation.profile import (
    Draft,
    NoveltyIndex,
    ProfileError,
    find_fault,
    generate_profiles,
    normalise_emotion,
    read_profiles,
    seed_profiles,
    share_out,
    write_profiles,
)
from dataset_builders.schema import EMOTIONS
from tests.fixtures.agents import Scripted


WORDS = [f"word{n}" for n in range(400)]


def drafts(request):
    """A fresh profile, every third a copy of one that the prompt shows."""
    drafts.count += 1
    rng = random.Random(drafts.count)
    if drafts.count % 3 == 0:
        shown = json.loads(request.messages[0]["content"].split("1. ", 1)[1].split("\n")[0])
        return json.dumps({"name": shown["name"], "persona": shown["persona"], "situation": shown["situation"]})
    text = " ".join(rng.choices(WORDS, k=30))
    return json.dumps({"name": "Ada", "persona": f"You are {text}.", "situation": f"You have {text[::-1]}."})


def write(tmp_path, count, concurrency, shares=None):
    drafts.count = 0
    llm = Scripted(drafts)

    async def run():
        engine = Engine(llm, Journal(tmp_path / f"{concurrency}.sqlite"), concurrency=concurrency)
        steps = lambda: generate_profiles(count, shares or dict.fromkeys(EMOTIONS, 1.0), seed=3)  # noqa: E731
        return [outcome async for outcome in engine.run([("profiles", steps)])][0]

    return asyncio.run(run()), llm


def test_profiles_are_new_in_the_wanted_shares_whatever_the_concurrency(tmp_path):
    outcome, llm = write(tmp_path, 100, 7, {"sadness": 3, "fear": 1})
    profiles = outcome.result["profiles"]
    assert Counter(profile["emotion"] for profile in profiles) == {"sadness": 75, "fear": 25}
    assert outcome.result["refused"]["not new"] > 20
    said = [tokens(profile["situation"]) for profile in [*profiles, *map(dict, seed_profiles())]]
    assert max(rouge_l(a, b) for i, a in enumerate(said) for b in said[:i]) < 0.7
    assert len(llm.asked[0].messages[0]["content"].split("\n")) > 5


def test_a_model_with_nothing_new_to_say_is_given_up_with_the_count(tmp_path):
    llm = Scripted(lambda request: '{"name": "A", "persona": "You are one.", "situation": "You sit."}')

    async def run():
        engine = Engine(llm, Journal(tmp_path / "j.sqlite"))
        steps = lambda: generate_profiles(5, {"fear": 1.0}, seed=0)  # noqa: E731
        return [outcome async for outcome in engine.run([("profiles", steps)])][0]

    outcome = asyncio.run(run())
    assert outcome.failed.startswith("nothing new in five rounds; 0 of 5 profiles, refused: {'persona too short'")


def test_the_index_finds_what_all_pairs_would(tmp_path):
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS[:25], k=rng.randint(5, 14))) for _ in range(300)]
    index = NoveltyIndex(0.6)
    known = []
    for text in texts:
        brute = all(rouge_l(tokens(text), tokens(other)) < 0.6 for other in known)
        assert index.is_new(text) == brute
        if brute:
            index.add(text)
            known.append(text)
    assert 50 < len(known) < 300


def test_released_profiles_are_read_and_their_labels_made_tidy(tmp_path):
    file = tmp_path / "released.json"
    rows = [{"emotion": label, "persona": "You are.", "situation": "You go."} for label in ("Fear", "Joy", "Love ", "sadness")]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [profile.emotion for profile in read_profiles(file)] == ["fear", "happiness", "happiness", "sadness"]
    for bad, said in (("{", "not JSON"), ('{"emotion": "Bored"}', "unknown emotion 'Bored'"), ('{"emotion": "joy", "persona": 3, "situation": ""}', "persona")):  # fmt: skip
        file.write_text(json.dumps(rows[0]) + "\n" + bad)
        with pytest.raises(ProfileError, match=f"released.json:2: .*{said}"):
            read_profiles(file)
    for bad, said in (("[1]", "expected an object."), ("[" * 9999, "not JSON (maximum recursion")):
        file.write_text(bad)
        with pytest.raises(ProfileError) as raised:
            read_profiles(file)
        assert str(raised.value).startswith(f"{file}:1: {said}")
    file.write_text("")
    with pytest.raises(ProfileError, match="no profiles"):
        read_profiles(file)


def test_labels_and_shares():
    assert normalise_emotion(" Angry") == "anger"
    with pytest.raises(ValueError, match="expected one of anger"):
        normalise_emotion("meh")
    assert Counter(share_out(10, {"anger": 1, "fear": 2})) == {"anger": 3, "fear": 7}
    assert len(share_out(2000, dict.fromkeys(EMOTIONS, 1.0))) == 2000


@pytest.mark.parametrize("language", ["en", "zh"])
def test_seeds_are_ten_of_each_emotion_faultless_and_unlike_each_other(language):
    seeds = seed_profiles(language)
    assert Counter(seed.emotion for seed in seeds) == dict.fromkeys(EMOTIONS, 10)
    assert len({seed.name for seed in seeds}) > 60
    for field in ("persona", "situation"):
        index = NoveltyIndex(0.6)
        for seed in seeds:
            assert index.is_new(getattr(seed, field))
            index.add(getattr(seed, field))
    for seed in seeds:
        assert find_fault(Draft(name=seed.name, persona=seed.persona, situation=seed.situation), language) is None


def test_faults_are_named():
    good = "You are a gardener who talks to tomatoes and never to the neighbours at all"
    assert find_fault(Draft(name="A", persona=good, situation=good + " today, and it rains"), "en") is None
    assert find_fault(Draft(name="A", persona=good.replace("You are", "She is"), situation=good), "en") == "persona not in the second person"  # fmt: skip
    assert find_fault(Draft(name="A", persona=good, situation="You fell."), "en") == "situation too short"
    assert (
        find_fault(Draft(name="A", persona=good, situation=good + " {and} more of it"), "en") == "situation has markup"
    )


def test_a_profile_with_an_unusual_line_end_is_read_as_it_was_written_and_not_written_by_a_model(tmp_path):
    odd = seed_profiles()[0]
    odd = odd.model_copy(update={"persona": f"{odd.persona}\u2028And \x85 you sing."})
    write_profiles(tmp_path / "p.jsonl", [odd])
    assert read_profiles(tmp_path / "p.jsonl") == [odd]
    assert find_fault(Draft(name="A", persona=odd.persona, situation=odd.situation), "en") == "persona has markup"


def test_a_folder_in_the_place_of_a_file_of_profiles_is_one_line(tmp_path):
    with pytest.raises(ProfileError, match=f"{tmp_path}: is a folder; expected a file"):
        write_profiles(tmp_path, seed_profiles())
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="p.jsonl: its folder cannot be made"):
        write_profiles(tmp_path / "file/p.jsonl", seed_profiles())
