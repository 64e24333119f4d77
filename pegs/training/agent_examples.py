"""What Agent4SC's agents are asked, and what they should answer, out of finished sessions: so that a small model learns to play them."""

import json
import random
from collections.abc import Iterator, Sequence, Set

import numpy as np

from agent_generation.engine import Embedding, seed_of
from agent_generation.llm import Request
from agent_generation.manager import StickerReview
from agent_generation.prompts import ask
from agent_generation.session import Dialogue, SessionPlan, Settings
from agent_generation.tool import Toolbox
from dataset_builders.schema import Emotion, Message, Session, Sticker


ASKED = 0.5  # how often an agent that sends no sticker is asked whether it would like to
QUIET = 2  # importance of all memories: too little for a reflection, of which finished sessions know nothing


class GoldQuota:
    """A sticker quota that wants what a session has."""

    def __init__(self, messages: Sequence[Message], rng: random.Random) -> None:
        self.modes = ["due" if m.sticker else "free" if rng.random() < ASKED else "no" for m in messages]
        self.sent = 0

    def mode(self, turn: int) -> str:
        """Whether a sticker is sent in a turn."""
        return self.modes[turn - 1]

    def owed(self, turn: int) -> int:
        """Nothing is left to send."""
        return 0


class GoldToolbox(Toolbox):
    """A toolbox in whose hand the sticker that will be chosen always is."""

    def __init__(self, toolbox: Toolbox, rng: random.Random) -> None:
        self.stickers, self.databases, self.rng, self.wanted = toolbox.stickers, toolbox.databases, rng, ""

    def retrieve(
        self, database: int, query: np.ndarray, emotion: Emotion, k: int = 10, without: Set[str] = frozenset()
    ) -> list[Sticker]:
        """The nearest stickers, one of them replaced by the wanted one if that is not among them."""
        found = super().retrieve(database, query, emotion, k, without - {self.wanted})
        if self.wanted not in [sticker.id for sticker in found]:
            found[self.rng.randrange(len(found))] = self.stickers[self.wanted]
        return found


class Replay:
    """
    A finished session, asked again.

    Args:
        session ([`Session`]): The session.
        toolbox ([`Toolbox`]): Its sticker databases, with their encoder.
        language (`str`, *optional*, defaults to `"en"`): Of the prompts.

    """

    def __init__(self, session: Session, toolbox: Toolbox, language: str = "en") -> None:
        self.session, self.rng = session, random.Random(seed_of(session.session_id))
        self.messages = [message for turn in session.turns for message in (turn.user, turn.system)]
        self.toolbox = GoldToolbox(toolbox, self.rng)
        plan = SessionPlan(session.session_id, session.split, session.database, session.profile, 0)
        self.dialogue = Dialogue(plan, self.toolbox, Settings(max_turns=len(session.turns) + 1, language=language))
        self.dialogue.user.quota = GoldQuota(self.messages[::2], self.rng)  # type: ignore[assignment]
        self.dialogue.system.quota = GoldQuota(self.messages[1::2], self.rng)  # type: ignore[assignment]

    def examples(self) -> Iterator[tuple[Request, str]]:
        """Questions with the session's answers; ratings of memories are answered, but nothing to learn from."""
        steps = self.dialogue.steps()
        requests = next(steps)
        while True:
            answers = []
            for request in requests:
                if isinstance(request, Embedding):
                    answers.append(next(iter(self.toolbox.databases.values())).encode(request.texts))
                    continue
                if request.role == "stronger" or len(self.dialogue.lines) == len(self.messages) and not request.answer:
                    return
                text = self.answer(request)
                answers.append(request.parse(text))
                if request.role != "memory":
                    yield request, text
                if request.answer is StickerReview:
                    yield self._mismatch()
            try:
                requests = steps.send(answers)
            except StopIteration:
                return

    def answer(self, request: Request) -> str:
        """What the session says to a question, as text."""
        said = len(self.dialogue.lines)
        if request.role == "memory":
            return json.dumps({"ratings": [QUIET] * request.answer.model_fields["ratings"].metadata[0].min_length})
        if request.role == "manager" and request.answer is not StickerReview:
            ended = said == len(self.messages) and self.session.ended_by == "closure"
            return json.dumps({"ended": "yes" if ended else "no", "advice": ""})
        message = self.messages[said]
        if request.answer is None:
            return message.text
        use = message.sticker
        match request.answer.__name__:
            case "FreeIntention" | "DueIntention":
                return json.dumps({"intention": use.intention if use else "none"})
            case "Query":
                self.toolbox.wanted = use.id
                return json.dumps({"query": use.query, "emotion": use.emotion})
            case "Choice":
                return json.dumps({"choice": self._place(request)})
            case _:
                return json.dumps({"reason": "It goes with the message.", "consistent": "yes"})

    def _place(self, request: Request) -> int:
        """The wanted sticker's number in the list of a question."""
        wanted = self.toolbox.stickers[self.toolbox.wanted]
        lines = str(request.messages[-1]["content"]).split("\n")
        shown = [line for line in lines if line.split(".")[0].isdigit()]
        return next(n for n, line in enumerate(shown, 1) if f". {wanted.description} - {wanted.emotion}" in line)

    def _mismatch(self) -> tuple[Request, str]:
        """The review of a sticker that says something else."""
        message = self.messages[len(self.dialogue.lines)]
        others = [s for s in self.toolbox.stickers.values() if s.emotion not in (message.sticker.emotion, "neutral")]
        role = "user" if len(self.dialogue.lines) % 2 == 0 else "system"
        values = {
            "name": self.dialogue._name(role),
            "transcript": self.dialogue._transcript(),
            "message": message.text,
        }
        prompt = ask("review_sticker", self.dialogue.settings.language, sticker=self.rng.choice(others), **values)
        text = json.dumps({"reason": "It says something else than the message.", "consistent": "no"})
        return Request([prompt], "manager", StickerReview), text
