"""Statistics of a built dataset: Table 5, what Figures 4, 5 and 6 show, sticker rates, duplicates, leaks and variety."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.emotion_words import EMOTION_OF
from dataset_builders.stickerconv.inputs import ROLES
from dataset_builders.stickerconv.sessions import SessionError
from dataset_builders.stickerconv.sources import SPLITS
from dataset_builders.stickers.pack import first_line


UNKNOWN = "not told"
LONGEST_NGRAM = 3
CLOUD_WORDS = 200  # Figure 6
OPENING = 2  # words that make two turns start alike
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
CHINESE = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]"  # one character


def split_chinese(text: str) -> str:
    """A text with spaces around every Chinese character, each of which counts as a word: nothing parts the words there."""
    return re.sub(CHINESE, r" \g<0> ", text)


def words_of(text: str) -> list[str]:
    """Lower-case words, with their apostrophes, or characters in Chinese."""
    return WORD.findall(split_chinese(text.lower()))


def read_split(folder: Path, split: str) -> Iterator[dict]:
    """Rows of a built dataset's `sessions`, one after the other; a [`SessionError`] if a file is damaged."""
    for file in sorted((folder / "sessions").glob(f"{split}-*.parquet")):
        try:
            for batch in pq.ParquetFile(file).iter_batches(500):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise SessionError(f"{file}: {first_line(error)}") from error


class Rate:
    """How many of a role's turns have a sticker, by some key."""

    def __init__(self) -> None:
        self.sent: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
        self.turns: Counter[str] = Counter()

    def add(self, key: str, turn: dict) -> None:
        """Count a turn under a key."""
        self.turns[key] += 1
        for role in ROLES:
            self.sent[role][key] += turn[role]["sticker"] is not None

    def result(self) -> dict[str, dict]:
        """Turns, and each role's rate, by key, in the order they came."""
        return {
            key: {"turns": count, **{role: share(self.sent[role][key], count) for role in ROLES}}
            for key, count in self.turns.items()
        }


class Variety:
    """How varied texts are: n-grams, repeated texts, and how they begin. Texts are kept as hashes; an empty one, beside a sticker, is none."""

    def __init__(self) -> None:
        self.grams: list[set[int]] = [set() for _ in range(LONGEST_NGRAM)]
        self.totals = [0] * LONGEST_NGRAM
        self.texts: Counter[int] = Counter()
        self.openings: Counter[tuple[str, ...]] = Counter()
        self.words = 0

    def add(self, text: str, words: list[str]) -> None:
        """Count a text."""
        if not text:
            return
        self.words += len(words)
        self.texts[hash(text)] += 1
        if words:
            self.openings[tuple(words[:OPENING])] += 1
        for size in range(1, LONGEST_NGRAM + 1):
            grams = [hash(gram) for gram in zip(*(words[start:] for start in range(size)), strict=False)]
            self.grams[size - 1].update(grams)
            self.totals[size - 1] += len(grams)

    def result(self) -> dict:
        """Distinct-n over all texts, how many repeat an earlier one, and the commonest beginning."""
        opening, count = max(self.openings.items(), key=lambda item: item[1], default=((), 0))
        distinct = zip(self.grams, self.totals, strict=True)
        return {
            **{f"distinct_{n}": share(len(grams), total) for n, (grams, total) in enumerate(distinct, start=1)},
            "words_per_text": round(self.words / max(1, self.texts.total()), 2),
            "repeated_texts": self.texts.total() - len(self.texts),
            "commonest_opening": " ".join(opening),
            "commonest_opening_share": share(count, self.texts.total()),
        }


class Tally:
    """
    Everything that is counted, a session at a time.

    Args:
        count_tokens (`Callable`, *optional*): Number of tokens of some texts.

    """

    def __init__(self, count_tokens: Callable[[list[str]], int] | None = None) -> None:
        self.count_tokens = count_tokens
        self.splits: dict[str, Counter[str]] = defaultdict(Counter)
        self.stickers: dict[str, set[str]] = defaultdict(set)
        self.texts: dict[str, set[int]] = defaultdict(set)
        self.profiles: dict[str, set[int]] = defaultdict(set)
        self.sticker_emotions: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
        self.profile_emotions: Counter[str] = Counter()
        self.emotion_words: Counter[str] = Counter()
        self.ended_by: Counter[str] = Counter()
        self.written_by: Counter[str] = Counter()
        self.rates = {key: Rate() for key in ("all", "by_turn", "by_position", "by_emotion")}
        self.variety = {role: Variety() for role in ROLES}
        self.dialogues: Counter[int] = Counter()
        self.starts_alike = 0

    def add(self, row: dict) -> None:
        """Count a row of `sessions`."""
        split, turns, profile = row["split"], row["turns"], row["profile"]
        emotion = emotion_name(profile["emotion"])
        texts = [turn[role]["text"] for turn in turns for role in ROLES]
        said = list(filter(None, texts))
        uses = [(role, turn[role]["sticker"]) for turn in turns for role in ROLES if turn[role]["sticker"]]
        self.splits[split].update(sessions=1, turns=len(turns), stickers=len(uses), sessions_without_sticker=not uses)
        if self.count_tokens is not None:
            self.splits[split]["tokens"] += self.count_tokens(texts)
        self.texts[split].update(map(hash, said))
        if profile["persona"] or profile["situation"]:
            self.profiles[split].add(hash((profile["persona"], profile["situation"])))
        self.profile_emotions[emotion] += 1
        self.ended_by[row["ended_by"] or UNKNOWN] += 1
        self.written_by[row["generator"]["model"] or row["generator"]["name"]] += 1
        if said:
            self.dialogues[hash(tuple(texts))] += 1
        for role, use in uses:
            self.stickers[split].add(use["id"])
            self.sticker_emotions[role][emotion_name(use["emotion"])] += 1
            self._add_words(split, words_of(use["query"] or ""), counted=False)
        self._add_words(split, words_of(profile["situation"]), counted=False)
        self._add_turns(split, turns, emotion)

    def _add_turns(self, split: str, turns: list[dict], emotion: str) -> None:
        openings: list[tuple[str, ...]] = []
        for position, turn in enumerate(turns):
            place = "first" if position == 0 else "last" if position == len(turns) - 1 else "between"
            for rate, key in (
                ("all", "all"),
                ("by_turn", str(turn["turn"])),
                ("by_position", place),
                ("by_emotion", emotion),
            ):
                self.rates[rate].add(key, turn)
            for role in ROLES:
                words = words_of(turn[role]["text"])
                self.variety[role].add(turn[role]["text"], words)
                self._add_words(split, words)
            if words:
                openings.append(tuple(words[:OPENING]))
        self.starts_alike += len(set(openings)) < len(openings)

    def _add_words(self, split: str, words: list[str], counted: bool = True) -> None:
        self.splits[split]["words"] += len(words) * counted
        self.emotion_words.update(word for word in words if word in EMOTION_OF)

    def result(self) -> dict:
        """The statistics, in plain types."""
        names = [split for split in SPLITS if split in self.splits]
        table = {split: self._split_result(split) for split in names}
        total: Counter[str] = sum((self.splits[split] for split in names), Counter())
        sessions = total["sessions"]
        return {
            "table_5": table,
            "all": {
                **{key: total[key] for key in ("sessions", "turns", "stickers", "sessions_without_sticker")},
                "unique_stickers": len(set().union(*self.stickers.values())),
                "profiles": len(set().union(*self.profiles.values())),
                "turns_per_session": round(total["turns"] / sessions, 2),
                "stickers_per_session": round(total["stickers"] / sessions, 2),
            },
            "sticker_emotions": {role: _in_order(counts) for role, counts in self.sticker_emotions.items()},
            "profile_emotions": _in_order(self.profile_emotions),
            "emotion_words": dict(self.emotion_words.most_common(CLOUD_WORDS)),
            "sticker_rate": {key: rate.result() for key, rate in self.rates.items()}
            | {"by_emotion": _in_order(self.rates["by_emotion"].result())},
            "variety": {
                **{role: variety.result() for role, variety in self.variety.items()},
                "sessions_whose_system_turns_start_alike": share(self.starts_alike, sessions),
            },
            "duplicate_sessions": self.dialogues.total() - len(self.dialogues),
            "leaks": {
                "stickers": self._leaked(self.stickers),
                "profiles": self._leaked(self.profiles),
                "texts": self._leaked(self.texts),
            },
            "ended_by": dict(self.ended_by.most_common()),
            "written_by": dict(self.written_by.most_common()),
        }

    def _split_result(self, split: str) -> dict:
        counts = self.splits[split]
        tokens = {"tokens": counts["tokens"]} if self.count_tokens is not None else {}
        kept = {key: counts[key] for key in ("sessions", "turns", "stickers", "words")}
        return {"unique_stickers": len(self.stickers[split]), **kept, **tokens}

    @staticmethod
    def _leaked(kept: dict[str, set]) -> int:
        return len(kept["test"] & (kept["train"] | kept["validation"]))


def _in_order(counts: dict) -> dict:
    return {name: counts[name] for name in (*EMOTIONS, UNKNOWN) if name in counts}


def emotion_name(number: int | None) -> str:
    """Name of a class number."""
    return UNKNOWN if number is None else EMOTIONS[number]


def share(part: int, whole: int) -> float:
    """`part / whole`, rounded; 0 of nothing."""
    return round(part / whole, 4) if whole else 0.0


def token_counter(tokenizer: str) -> Callable[[list[str]], int]:
    """
    What counts the tokens of texts.

    Args:
        tokenizer (`str`): Folder or Hub id.

    Raises:
        OSError: If there is none.

    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    return lambda texts: sum(map(len, encode(texts, add_special_tokens=False)["input_ids"]))


def compute_statistics(
    folder: Path,
    count_tokens: Callable[[list[str]], int] | None = None,
    on_row: Callable[[int], object] = lambda count: None,
) -> dict:
    """
    Statistics of a built dataset, in one pass over its sessions.

    Args:
        folder (`Path`): The dataset.
        count_tokens (`Callable`, *optional*): Number of tokens of some texts, for Table 5.
        on_row (`Callable`, *optional*): Called after every session with how many there are so far.

    Returns:
        `dict`: Plain types, as `statistics.json` holds it.

    """
    tally, count = Tally(count_tokens), 0
    for split in SPLITS:
        for row in read_split(folder, split):
            count += 1
            tally.add(row)
            on_row(count)
    return tally.result()
