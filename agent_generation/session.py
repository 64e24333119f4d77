"""A dialogue session between a User and a System agent (sections 3.3 to 3.7), as a pure state machine."""

import random
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agent_generation.action import clean_message, cut_message
from agent_generation.engine import Embedding, Steps, needed
from agent_generation.llm import AnswerError, Request
from agent_generation.manager import (
    BLOCK,
    CONSISTENT,
    LONGEST,
    DialogueReview,
    StickerQuota,
    StickerReview,
    about_sticker,
    find_problem,
)
from agent_generation.memory import RECALLED, VIEW, MemoryStream, rate_request, reflect_request
from agent_generation.plan import DueIntention, DuePlan, FreeIntention, FreePlan, Query, candidates, choice_form
from agent_generation.prompts import ask, render
from agent_generation.tool import Toolbox
from dataset_builders.schema import Message, Profile, Split, Sticker, StickerUse, Turn


REWRITES = 3
CHOICES = 3  # stickers proposed to the manager, one after the other, before there is none this turn

Role = Literal["user", "system"]
Part = Generator[Sequence[Request | Embedding], list[Any], Any]


@dataclass(frozen=True)
class SessionPlan:
    """What a session starts from; all its random draws come from `seed`."""

    session_id: str
    split: Split
    database: int
    profile: Profile
    seed: int


@dataclass(frozen=True)
class Settings:
    """
    How sessions are written.

    Args:
        user_rate, system_rate (`float`, *optional*): Share of each side's turns with a sticker; the defaults are StickerConv's.
        max_turns (`int`, *optional*, defaults to 6): Most turns.
        min_turns (`int`, *optional*, defaults to 4): The manager ends no session before.
        candidates (`int`, *optional*, defaults to 10): Stickers to choose from, K of section 3.4.
        fuse_plan (`bool`, *optional*, defaults to `False`): Ask for intention and query in one call.
        review (`str`, *optional*, defaults to `"model"`): How the manager tells whether a sticker is consistent: by asking, or by `"vectors"` of what is
            said and of the sticker, where the model is too small to judge.
        language (`str`, *optional*, defaults to `"en"`): Language of the prompts and dialogues.

    """

    user_rate: float = 0.35
    system_rate: float = 0.60
    max_turns: int = 6
    min_turns: int = 4
    candidates: int = 10
    fuse_plan: bool = False
    review: Literal["model", "vectors"] = "model"
    language: str = "en"


@dataclass
class Agent:
    """One side: its traits and observations (short-term memory), its stream (long-term memory), its stickers' quota."""

    role: Role
    name: str
    quota: StickerQuota
    persona: str = ""
    situation: str = ""
    self_image: str = ""
    advice: str = ""
    stream: MemoryStream = field(default_factory=MemoryStream)
    cue: str = ""  # what the other side just said

    @property
    def who(self) -> dict[str, str]:
        """What prompts show of it."""
        keys = ("role", "name", "persona", "situation", "self_image")
        return {key: getattr(self, key) for key in keys}


class Dialogue:
    """
    One session.

    Args:
        plan ([`SessionPlan`]): Profile, sticker database and seed.
        toolbox ([`Toolbox`]): The sticker databases.
        settings ([`Settings`]): How it is written.

    """

    def __init__(self, plan: SessionPlan, toolbox: Toolbox, settings: Settings) -> None:
        self.plan, self.toolbox, self.settings = plan, toolbox, settings
        rng = random.Random(plan.seed)
        quotas = [StickerQuota(rate, settings.max_turns, rng) for rate in (settings.user_rate, settings.system_rate)]
        profile = plan.profile
        self.user = Agent("user", profile.name, quotas[0], profile.persona, profile.situation)
        self.system = Agent("system", render("system_name", settings.language), quotas[1])
        self.lines: list[tuple[Role, Message]] = []
        self.tally: Counter[str] = Counter()

    def steps(self) -> Steps:
        """
        Write the session.

        Returns:
            `dict`: `turns`, `ended_by` (fields of [`Session`]), and `tally` (`dict[str, int]`): what had to be absorbed.

        Raises:
            AnswerError: If a message failed, or nothing was said.

        """
        ended_by, turn = "max_turns", 0
        while turn < self.settings.max_turns:
            turn += 1
            for agent in (self.user, self.system):
                text = yield from self._speak(agent, turn)
                if text is None:
                    break
                sticker = yield from self._send_sticker(agent, turn, text)
                yield from self._show(agent, turn, Message(text=text, sticker=sticker))
            if text is None:
                ended_by = "repetition"
                break
            if turn % BLOCK == 0 and turn < self.settings.max_turns:
                ended = yield from self._review(turn)
                if ended and turn >= self.settings.min_turns:
                    ended_by = "closure"
                    break
        pairs = zip(self.lines[::2], self.lines[1::2], strict=False)  # a last line without an answer is left out
        turns = [
            Turn(turn=number, user=user, system=system) for number, ((_, user), (_, system)) in enumerate(pairs, 1)
        ]
        if not turns:
            raise AnswerError("repetition in the first turn")
        for agent in (self.user, self.system):
            sent = sum(getattr(line, agent.role).sticker is not None for line in turns)
            self.tally[f"{agent.role}_stickers"] = sent
            self.tally[f"{agent.role}_stickers_lost"] = max(0, agent.quota.owed(len(turns)))
        return {
            "turns": [line.model_dump() for line in turns],
            "ended_by": ended_by,
            "tally": dict(sorted(self.tally.items())),
        }

    def _name(self, role: str) -> str:
        return self.user.name if role == "user" else self.system.name

    def _shown(self, role: Role, message: Message, key: str) -> str:
        """A line as the other side, a memory or the manager sees it: the sticker is described."""
        sticker = self.toolbox.sticker(message.sticker.id) if message.sticker else None
        return render(key, self.settings.language, name=self._name(role), text=message.text, sticker=sticker)

    def _transcript(self) -> list[str]:
        """The turns in view."""
        return [self._shown(role, message, "line") for role, message in self.lines[-2 * VIEW :]]

    def _speak(self, agent: Agent, turn: int) -> Part:
        """A message that neither repeats an earlier one nor is too long; `None` if it keeps repeating."""
        recalled = yield from self._recall(agent, turn)
        language, messages = self.settings.language, self._chat(agent, turn, recalled)
        earlier = [message.text for _, message in self.lines]
        (answer,) = yield [Request(messages, agent.role)]
        for rewrite in range(REWRITES + 1):
            text = clean_message(needed(answer), [agent.name])
            problem = find_problem(text, earlier)
            if problem is None:
                return text
            if rewrite < REWRITES:
                self.tally[f"message_{problem}"] += 1
                request = ask("rewrite", language, problem=problem, limit=LONGEST)
                again = [*messages, {"role": "assistant", "content": text or "…"}, request]
                (answer,) = yield [Request(again, "stronger")]
        if problem == "too_long":
            return cut_message(text, LONGEST)
        if problem == "empty":
            raise AnswerError("empty message")
        return None

    def _recall(self, agent: Agent, turn: int) -> Part:
        """What comes to the agent's mind; texts are embedded only where there is more than can come to mind."""
        memories, relevance = agent.stream.candidates(turn), None
        if len(memories) > RECALLED:
            (vectors,) = yield [Embedding((agent.cue, *(memory.text for memory in memories)))]
            relevance = vectors[1:] @ vectors[0]
        return agent.stream.recall(turn, relevance)

    def _chat(self, agent: Agent, turn: int, recalled: Sequence[str]) -> list[dict]:
        """The dialogue as the agent's chat: its own lines are the assistant's, and it sees the other's stickers."""
        values = {"who": agent.who, "recalled": recalled, "advice": agent.advice, "turn": turn}
        first = render(f"{agent.role}_agent", self.settings.language, max_turns=self.settings.max_turns, **values)
        chat = [{"role": "system", "content": first}]
        if agent.role == "user":
            chat.append(ask("opening", self.settings.language, name=agent.name))
        for role, message in self.lines[-2 * VIEW - (agent.role == "system") :]:
            if role == agent.role:
                chat.append({"role": "assistant", "content": message.text})
            else:
                chat.append({"role": "user", "content": self._shown(role, message, "seen")})
        return chat

    def _ask(self, agent: Agent, name: str, text: str, form: Any, **values: object) -> Part:
        """A question of the plan to an agent about the message it is about to send; `None` if the answer cannot be used."""
        prompt = ask(
            name, self.settings.language, who=agent.who, transcript=self._transcript(), message=text, **values
        )
        (answer,) = yield [Request([prompt], agent.role, form)]
        if isinstance(answer, AnswerError):
            self.tally[f"{name}_failed"] += 1
            return None
        return answer

    def _send_sticker(self, agent: Agent, turn: int, text: str) -> Part:
        """Intention, query, retrieve, select, review; `None` if there is no sticker this turn."""
        mode = agent.quota.mode(turn)
        if mode == "no":
            return None
        free = mode == "free"
        if self.settings.fuse_plan:
            plan = query = yield from self._ask(agent, "plan", text, FreePlan if free else DuePlan, free=free)
        else:
            plan = yield from self._ask(agent, "intention", text, FreeIntention if free else DueIntention, free=free)
        if plan is None:
            return None
        if plan.intention == "none":
            self.tally["declined"] += 1
            return None
        if not self.settings.fuse_plan:
            query = yield from self._ask(agent, "query", text, Query, intention=plan.intention)
            if query is None:
                return None
        (vectors,) = yield [Embedding((query.query,))]
        sent = {message.sticker.id for _, message in self.lines if message.sticker}
        found = self.toolbox.retrieve(
            self.plan.database, vectors[0], query.emotion, self.settings.candidates, without=sent
        )
        chosen = yield from self._select(agent, text, plan.intention, found)
        if chosen is None:
            return None
        agent.quota.sent += 1
        return StickerUse(
            id=chosen.id,
            emotion=chosen.emotion,
            query=query.query,
            rank=found.index(chosen),
            intention=plan.intention,
        )

    def _select(self, agent: Agent, text: str, intention: str, found: Sequence[Sticker]) -> Part:
        """The agent's choice that the manager finds consistent; what it refuses is not offered again."""
        left = list(found)
        for _ in range(min(CHOICES, len(found))):
            shown = {"intention": intention, "stickers": candidates(left)}
            choice = yield from self._ask(agent, "select", text, choice_form(len(left)), **shown)
            if choice is None:
                return None
            sticker = left.pop(choice.choice - 1)
            consistent = yield from self._is_consistent(agent, text, sticker)
            if consistent is None:
                return None
            if consistent:
                return sticker
            self.tally["sticker_rejected"] += 1
        return None

    def _is_consistent(self, agent: Agent, text: str, sticker: Sticker) -> Part:
        """The manager's review of a sticker; `None` if it cannot be used."""
        if self.settings.review == "vectors":
            said = " ".join([*(message.text for _, message in self.lines[-1:]), text])
            (vectors,) = yield [Embedding((said, about_sticker(sticker)))]
            return bool(vectors[0] @ vectors[1] >= CONSISTENT)
        values = {"name": agent.name, "transcript": self._transcript(), "message": text, "sticker": sticker}
        prompt = ask("review_sticker", self.settings.language, **values)
        (review,) = yield [Request([prompt], "manager", StickerReview)]
        if isinstance(review, AnswerError):
            self.tally["review_failed"] += 1
            return None
        return review.consistent == "yes"

    def _show(self, agent: Agent, turn: int, message: Message) -> Part:
        """The message is sent: both sides observe it, and the other has something to answer."""
        self.lines.append((agent.role, message))
        observed = self._shown(agent.role, message, "observation")
        for observer in (self.user, self.system):
            observer.stream.observe(observed, turn)
        (self.system if agent is self.user else self.user).cue = message.text
        if turn < self.settings.max_turns - VIEW:  # it may have to be recalled
            yield [Embedding((observed,), ahead=True)]

    def _review(self, turn: int) -> Part:
        """Every two turns: the manager reviews the dialogue, while both sides rate what they observed and reflect if it was much."""
        language, agents = self.settings.language, (self.user, self.system)
        transcript = [self._shown(role, message, "line") for role, message in self.lines]
        prompt = ask("review_dialogue", language, transcript=transcript, turn=turn, max_turns=self.settings.max_turns)
        ratings = [rate_request(agent.stream, agent.who, language) for agent in agents]
        review, *answers = yield [Request([prompt], "manager", DialogueReview), *ratings]
        for agent, answer in zip(agents, answers, strict=True):
            if isinstance(answer, AnswerError):
                self.tally["rating_failed"] += 1
            else:
                agent.stream.rate(answer.ratings)
        if isinstance(review, AnswerError):
            self.tally["dialogue_review_failed"] += 1
        else:
            self.user.advice = self.system.advice = review.advice
            if review.ended == "yes":
                return True
        yield from self._reflect(turn, [agent for agent in agents if agent.stream.must_reflect])
        return False

    def _reflect(self, turn: int, agents: Sequence[Agent]) -> Part:
        if not agents:
            return
        answers = yield [reflect_request(agent.stream, agent.who, self.settings.language) for agent in agents]
        for agent, answer in zip(agents, answers, strict=True):
            if isinstance(answer, AnswerError):
                self.tally["reflection_failed"] += 1
                continue
            self.tally["reflections"] += 1
            agent.self_image = answer.self_image
            for insight in answer.insights:
                agent.stream.understand(insight.text, turn, insight.importance)
            yield [Embedding(tuple(insight.text for insight in answer.insights), ahead=True)]
