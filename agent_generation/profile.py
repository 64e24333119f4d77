"""Profile module (section 3.1): who the User is. Self-instruct (arXiv 2212.10560) from seed profiles, and reading of released ones."""

import json
import math
import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from agent_generation.engine import Steps
from agent_generation.llm import AnswerError, Form, Request
from agent_generation.manager import rouge_l, tokens
from agent_generation.prompts import ask
from dataset_builders.schema import EMOTIONS, Emotion, Profile
from dataset_builders.stickerconv.formats import normalise_label


NOVELTY = 0.7  # ROUGE-L F with every accepted text must stay below; the released profiles' largest is 0.698
ROUND = 64  # profiles asked for at once
SEEDS_SHOWN, WRITTEN_SHOWN = 5, 2


class ProfileError(ValueError):
    """Profiles that cannot be read or written; the message names file, line and field."""


def normalise_emotion(label: str) -> Emotion:
    """
    One of the seven emotions for an untidy label (`"Joy"`, `"Fear "`).

    Raises:
        ValueError: If the label is none that is known.

    """
    emotion = normalise_label(label)
    if emotion is None:
        raise ValueError(f"unknown emotion {label!r}; expected one of {', '.join(EMOTIONS)}")
    return emotion


def read_profiles(path: Path) -> list[Profile]:
    """
    Profiles of a JSON Lines file: ours, or the released ones (`emotion`, `persona`, `situation`; no name, labels untidy).

    Raises:
        ProfileError: On the first line that is no profile.

    """
    try:
        lines = path.read_text("utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: {error}.") from None
    profiles = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ProfileError(f"{path}:{number}: expected an object.")
            row["emotion"] = normalise_emotion(str(row.get("emotion", "")))
            profiles.append(Profile.model_validate({"name": "User", **row}))
        except ProfileError:
            raise
        except (json.JSONDecodeError, RecursionError) as error:
            raise ProfileError(f"{path}:{number}: not JSON ({error}).") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ProfileError(f"{path}:{number}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        except ValueError as error:
            raise ProfileError(f"{path}:{number}: emotion: {error}.") from None
    if not profiles:
        raise ProfileError(f"{path}: no profiles in it.")
    return profiles


def seed_profiles(language: str = "en") -> list[Profile]:
    """The seeds: ten profiles of each emotion, written by the project's authors."""
    text = resources.files("agent_generation").joinpath("seeds", f"{language}.jsonl").read_text("utf-8")
    return [Profile.model_validate_json(line) for line in text.splitlines()]


class NoveltyIndex:
    """
    Finds texts that are too much like earlier ones, exactly and without comparing all pairs.

    A ROUGE-L F of at least `t` between texts of m and n tokens needs a common subsequence, and so common tokens, of at least `t (m + n) / 2`: an
    inverted index counts the common tokens, and only where they suffice is the subsequence computed.

    Args:
        threshold (`float`, *optional*, defaults to 0.7): ROUGE-L F from which a text is not new.

    """

    def __init__(self, threshold: float = NOVELTY) -> None:
        self.threshold = threshold
        self.texts: list[tuple[str, ...]] = []
        self.lengths = array("i")
        self.postings: dict[tuple[str, int], array[int]] = defaultdict(lambda: array("i"))

    def add(self, text: str) -> None:
        """Count a text as known."""
        said = tokens(text)
        for token in number_repeats(said):
            self.postings[token].append(len(self.texts))
        self.texts.append(said)
        self.lengths.append(len(said))

    def is_new(self, text: str) -> bool:
        """Whether no known text is that much like it."""
        said = tokens(text)
        having = [np.frombuffer(self.postings[token], "i") for token in number_repeats(said) if token in self.postings]
        if not having:
            return True
        common = np.bincount(np.concatenate(having), minlength=len(self.texts))
        needed = (
            self.threshold * (len(said) + np.frombuffer(self.lengths, "i")) / 2 - 1e-6
        )  # rounding must not lose one
        return not any(
            rouge_l(said, self.texts[number]) >= self.threshold
            for number in np.flatnonzero((common >= needed) & (common > 0))
        )


def number_repeats(said: Iterable[str]) -> list[tuple[str, int]]:
    """Tokens with how often each came before, so that the tokens two texts share are those of two sets."""
    seen: Counter[str] = Counter()
    numbered = []
    for token in said:
        numbered.append((token, seen[token]))
        seen[token] += 1
    return numbered


class Draft(Form):
    """A profile as a model writes it."""

    name: str = Field(min_length=1, max_length=40)
    persona: str = Field(min_length=1, max_length=900)
    situation: str = Field(min_length=1, max_length=1200)


def find_fault(draft: Draft, language: str) -> str | None:
    """What speaks against a draft: not in the second person, too short or too long, or markup instead of prose."""
    second_person = {"en": ("you", "your", "you're"), "zh": ("你",)}[language]
    for field, shortest in (("persona", 12), ("situation", 15)):
        text: str = getattr(draft, field)
        said = tokens(text)
        if not any(word in said for word in second_person):
            return f"{field} not in the second person"
        if len(said) < shortest:
            return f"{field} too short"
        if len(said) > 220:
            return f"{field} too long"
        if any(mark in text for mark in "{}[]<>*#`|") or len(text.splitlines()) > 1:
            return f"{field} has markup"
    return None


def share_out(count: int, shares: Mapping[Emotion, float]) -> list[Emotion]:
    """`count` emotions in these shares (any positive scale), by largest remainders, in EMOTIONS' order."""
    total = sum(shares.values())
    exact = {emotion: count * shares.get(emotion, 0.0) / total for emotion in EMOTIONS}
    whole = {emotion: math.floor(number) for emotion, number in exact.items()}
    by_remainder = sorted(EMOTIONS, key=lambda emotion: whole[emotion] - exact[emotion])
    for emotion in by_remainder[: count - sum(whole.values())]:
        whole[emotion] += 1
    return [emotion for emotion in EMOTIONS for _ in range(whole[emotion])]


def generate_profiles(
    count: int,
    shares: Mapping[Emotion, float],
    seed: int,
    language: str = "en",
    threshold: float = NOVELTY,
    on_accepted: Callable[[int], object] = lambda count: None,
) -> Steps:
    """
    Write new profiles by self-instruct, in rounds: prompts of a round show seeds and profiles of earlier rounds, so that the outcome does not depend
    on the order in which answers arrive.

    Args:
        count (`int`): How many.
        shares (`Mapping[str, float]`): Target distribution of the emotions.
        seed (`int`): Of all draws.
        language (`str`, *optional*, defaults to `"en"`): Of seeds, prompts and profiles.
        threshold (`float`, *optional*, defaults to 0.7): See [`NoveltyIndex`].
        on_accepted (`Callable`, *optional*): Called with the number accepted after each round.

    Returns:
        `dict`: `profiles` (`list[dict]`), and `refused` (`dict[str, int]`): how many drafts were refused, by reason.

    Raises:
        AnswerError: If a whole round brings nothing new five times running.

    """
    rng, seeds = random.Random(seed), seed_profiles(language)
    personas, situations = NoveltyIndex(threshold), NoveltyIndex(threshold)
    for profile in seeds:
        personas.add(profile.persona)
        situations.add(profile.situation)
    wanted = share_out(count, shares)
    rng.shuffle(wanted)
    written: list[Profile] = []
    refused: Counter[str] = Counter()
    barren = 0
    while wanted:
        emotions, wanted = wanted[:ROUND], wanted[ROUND:]
        answers = yield [
            Request([draft_request(emotion, seeds, written, rng, language)], "profile", Draft) for emotion in emotions
        ]
        before = len(written)
        missing: list[Emotion] = []
        for emotion, answer in zip(emotions, answers, strict=True):
            fault = "unusable answer" if isinstance(answer, AnswerError) else find_fault(answer, language)
            if fault is None and not (personas.is_new(answer.persona) and situations.is_new(answer.situation)):
                fault = "not new"
            if fault is not None:
                refused[fault] += 1
                missing.append(emotion)
                continue
            profile = Profile(emotion=emotion, **answer.model_dump())
            personas.add(profile.persona)
            situations.add(profile.situation)
            written.append(profile)
        wanted = missing + wanted
        barren = barren + 1 if len(written) == before else 0
        if barren == 5:
            raise AnswerError(
                f"nothing new in five rounds; {len(written)} of {count} profiles, refused: {dict(refused)}"
            )
        on_accepted(len(written))
    return {"profiles": [profile.model_dump() for profile in written], "refused": dict(sorted(refused.items()))}


def draft_request(
    emotion: Emotion, seeds: Sequence[Profile], written: Sequence[Profile], rng: random.Random, language: str
) -> dict:
    """The prompt for one more profile, after some of the seeds and of the written ones."""
    shown = rng.sample(seeds, SEEDS_SHOWN) + rng.sample(written, min(WRITTEN_SHOWN, len(written)))
    rng.shuffle(shown)
    examples = [profile.model_dump_json() for profile in shown]
    return ask("profile", language, emotion=emotion, examples=examples)


def make_room(path: Path) -> None:
    """
    Make the folder of a file that is to be written.

    Raises:
        ProfileError: If there is a folder where the file should be, or no folder can be above it.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(f"{path}: its folder cannot be made ({error.strerror}).") from None
    if path.is_dir():
        raise ProfileError(f"{path}: is a folder; expected a file to write.")


def write_profiles(path: Path, profiles: Iterable[Profile]) -> None:
    """
    Write JSON Lines, whole or not at all.

    Raises:
        ProfileError: If that cannot be; see [`make_room`].

    """
    make_room(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{profile.model_dump_json()}\n" for profile in profiles), "utf-8")
    partial.replace(path)
