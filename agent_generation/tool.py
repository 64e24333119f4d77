"""Tool module (section 3.2, appendix B.1): which pictures make good stickers, and what is known about them."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from agent_generation.engine import Steps, needed
from agent_generation.llm import AnswerError, Form, Request
from agent_generation.prompts import render
from dataset_builders.schema import Emotion, Sticker
from dataset_builders.stickers.search import StickerSearch


VERDICTS = 5
SEEN = 336  # pixels a side that the model is shown


class Verdict(Form):
    """Third question of the filter."""

    suitable: Literal["yes", "no"]


class Annotation(Form):
    """The five questions about a sticker (appendix B.1)."""

    content: str = Field(min_length=1, max_length=600)
    emotion: str = Field(min_length=1, max_length=400)
    scenes: str = Field(min_length=1, max_length=600)
    tone: str = Field(min_length=1, max_length=400)
    humor: str = Field(min_length=1, max_length=400)


class Knowledge(Form):
    """What is kept of the answers: one emotion of seven, and the texts that stickers are searched and chosen by."""

    emotion: Emotion
    description: str = Field(min_length=1, max_length=300)
    emotion_description: str = Field(min_length=1, max_length=300)
    recommendation: str = Field(min_length=1, max_length=300)
    tags: list[str] = Field(max_length=8)


class Toolbox:
    """
    The agents' sticker databases (section 3.2): both sides of a session use the same one.

    Args:
        search ([`StickerSearch`]): Over the whole pack.
        databases (`dict[str, int]`): Number of each sticker's database.

    """

    def __init__(self, search: StickerSearch, databases: dict[str, int]) -> None:
        self.stickers = {sticker.id: sticker for sticker in search.stickers}
        self.databases: dict[int, StickerSearch] = {}
        for number in sorted(set(databases.values())):
            rows = [row for row, sticker in enumerate(search.stickers) if databases[sticker.id] == number]
            members = [search.stickers[row] for row in rows]
            self.databases[number] = StickerSearch(members, search.text_vectors[rows], search.encode)

    def sticker(self, name: str) -> Sticker:
        """The sticker of an id."""
        return self.stickers[name]

    def retrieve(
        self, database: int, query: np.ndarray, emotion: Emotion, k: int = 10, without: Set[str] = frozenset()
    ) -> list[Sticker]:
        """
        The action "Retrieve": the `k` stickers of a database nearest to a query, those of its emotion preferred.

        Args:
            database (`int`): Its number.
            query (`np.ndarray` of shape `(d,)`): Unit vector of the query.
            emotion (`str`): What it should feel like.
            k (`int`, *optional*, defaults to 10): How many at most.
            without (`Set[str]`, *optional*): Ids to leave out.

        Returns:
            `list[Sticker]`: Best first.

        """
        hits = self.databases[database].by_vector(query, "text", k + len(without), emotion, "prefer")
        return [self.stickers[hit.id] for hit in hits if hit.id not in without][:k]


def picture_part(image: Image.Image) -> dict:
    """A sticker (RGBA) on white, at most `SEEN` pixels a side, as a content part of a chat message."""
    image = image.copy()
    image.thumbnail((SEEN, SEEN))
    ground = Image.new("RGBA", image.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(ground, image).convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _ask_about(image: Image.Image, prompt: str) -> dict:
    return {"role": "user", "content": [picture_part(image), {"type": "text", "text": prompt}]}


def filter_sticker(load: Callable[[], Image.Image], language: str = "en") -> Steps:
    """
    Whether a picture is fit to be a sticker: a chain of three questions, asked five times; a strict majority of yes keeps it.

    Args:
        load (`Callable`): Gives the picture (RGBA).
        language (`str`, *optional*, defaults to `"en"`): Language of the prompts.

    Returns:
        `dict`: `kept` (`bool`), `yes`, `no`, `unknown` (`int`): what cannot be read is unknown, never yes; `reasons` (`list[str]`), the answers to
        the second question.

    """
    first = _ask_about(load(), render("filter_1", language))
    chains: list[list[dict] | None] = [[first] for _ in range(VERDICTS)]
    reasons: list[str] = []
    for question in ("filter_2", "filter_3"):
        answers = yield [Request(tuple(chain), "filter") for chain in chains if chain]
        for number, answer in zip([n for n, chain in enumerate(chains) if chain], answers, strict=True):
            chain = chains[number]
            if isinstance(answer, AnswerError) or chain is None:
                chains[number] = None
                continue
            if question == "filter_3":
                reasons.append(answer)
            chain.append({"role": "assistant", "content": answer})
            chain.append({"role": "user", "content": render(question, language)})
    going = [chain for chain in chains if chain]
    answers = (yield [Request(tuple(chain), "filter", Verdict) for chain in going]) if going else []
    votes = Counter("unknown" if isinstance(answer, AnswerError) else answer.suitable for answer in answers)
    votes["unknown"] += VERDICTS - len(going)
    return {
        "kept": 2 * votes["yes"] > VERDICTS,
        **{vote: votes[vote] for vote in ("yes", "no", "unknown")},
        "reasons": reasons,
    }


def annotate_sticker(load: Callable[[], Image.Image], language: str = "en") -> Steps:
    """
    What is known about a sticker: the five questions, then the knowledge drawn from the answers.

    Args:
        load (`Callable`): Gives the picture (RGBA).
        language (`str`, *optional*, defaults to `"en"`): Language of the prompts and of the texts.

    Returns:
        `dict`: Fields of [`Sticker`], and `answers` (`dict[str, str]`) to the five questions.

    Raises:
        AnswerError: If either answer failed.

    """
    seen = _ask_about(load(), render("annotate", language))
    (annotation,) = yield [Request([seen], "annotate", Annotation)]
    answers = needed(annotation).model_dump()
    prompt = render("knowledge", language, answers=answers)
    (knowledge,) = yield [Request([{"role": "user", "content": prompt}], "knowledge", Knowledge)]
    return {**needed(knowledge).model_dump(), "answers": answers}


def apply_knowledge(sticker: Sticker, fields: dict, annotated_by: str) -> Sticker:
    """`sticker` with new knowledge; its own name stays the first of its tags."""
    known = {key: fields[key] for key in ("emotion", "description", "emotion_description", "recommendation")}
    tags = tuple(dict.fromkeys([*sticker.tags, *(tag.lower() for tag in fields.get("tags", ()))]))
    return sticker.model_copy(update={**known, "tags": tags, "annotated_by": annotated_by})


def annotate_by_neighbours(
    sticker: Sticker, emotion_scores: dict[str, float], neighbours: Sequence[tuple[Sticker, float]]
) -> Sticker:
    """
    Knowledge without a language model: emotion from the vision tower's zero-shot scores and its nearest annotated stickers, texts from the nearest.

    Args:
        sticker ([`Sticker`]): Not annotated yet.
        emotion_scores (`dict[str, float]`): Zero-shot probability of each emotion.
        neighbours (`Sequence`): Nearest annotated stickers with their cosine similarity, nearest first.

    Returns:
        [`Sticker`]: Marked `annotated_by: local`.

    """
    scores = dict(emotion_scores)
    weights = [max(similarity, 0.0) for _, similarity in neighbours]
    for (neighbour, _), weight in zip(neighbours, weights, strict=True):
        if neighbour.emotion:
            scores[neighbour.emotion] = scores.get(neighbour.emotion, 0.0) + weight / max(sum(weights), 1e-9)
    emotion = max(scores, key=lambda name: scores[name])
    alike = next((near for near, _ in neighbours if near.emotion == emotion), neighbours[0][0])
    fields = {
        "emotion": emotion,
        "description": sticker.tags[0] if sticker.tags else f"like {alike.description}",
        "emotion_description": alike.emotion_description,
        "recommendation": alike.recommendation,
    }
    return apply_knowledge(sticker, fields, "local")
