"""A language model in this process: requests of many sessions in one batch, structured answers under a grammar."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import llguidance.hf
import llguidance.torch
import numpy as np
import torch
from llguidance import LLMatcher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agent_generation.llm import ROLES, Reply, Request, RoleSettings, schema_of
from agent_generation.prefix_cache import PrefixCache


MESSAGE = r"[^\n\[\]{{}}<>*#|]{{1,{longest}}}[.!?…。！？]"  # free text: one line of plain text that ends where a sentence does
TOP_K, TOP_P = 256, 0.9
REPEAT = 4  # tokens in a row that a message shares with nothing said before: small models go round in circles
REPETITION = 2.0  # nats that a draft loses if all it says in threes of tokens was said before


@dataclass
class Row:
    """
    An answer that is being drawn, with its own temperature, seed, grammar and length, whatever rows are beside it.

    Args:
        matcher (`LLMatcher`): Its grammar.
        said (`list[int]`, *optional*): Tokens of the chat, of which it must repeat nothing; `None` if it may repeat all.
        temperature (`float`): 0 takes the likeliest token.
        limit (`int`): Most tokens.
        rng (`np.random.Generator`): For its draws.
        eos (`int`): Token that ends it.

    """

    matcher: LLMatcher
    said: list[int] | None
    temperature: float
    limit: int
    rng: np.random.Generator
    eos: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def complete(self) -> bool:
        """Whether it ended by itself."""
        return len(self.tokens) < self.limit or self.matcher.is_accepting()

    def draw(self, logits: np.ndarray, total: float, mask: torch.Tensor) -> None:
        """
        Draw the next token.

        Args:
            logits (`np.ndarray` of shape `(V,)`): The model's.
            total (`float`): Their log-sum-exp.
            mask (`torch.Tensor`): A token bitmask of llguidance, to write into.

        """
        llguidance.torch.fill_next_token_bitmask(self.matcher, mask)
        allowed = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")[: len(logits)]
        if self.said is not None:
            allowed[self._repeating(self.said)] = 0
        token = self._choose(logits, np.flatnonzero(allowed))
        self.tokens.append(token)
        self.log_probs.append(float(logits[token]) - total)
        self.done = (
            token == self.eos
            or not self.matcher.consume_token(token)
            or self.matcher.is_stopped()
            or len(self.tokens) == self.limit
        )

    @property
    def merit(self) -> tuple[bool, bool, float]:
        """What drafts are chosen by: whether it is complete, whether it ended of its own accord, and how likely and new it is."""
        ids, width = [*(self.said or []), *self.tokens], REPEAT - 1
        runs = [tuple(ids[i : i + width]) for i in range(len(ids) - width + 1)]
        new = max(1, len(self.tokens) - width + 1)
        known = set(runs[:-new])
        again = 0
        for run in runs[-new:]:
            again += run in known
            known.add(run)
        return self.complete, self.tokens[-1] == self.eos, float(np.mean(self.log_probs)) - REPETITION * again / new

    def _repeating(self, said: list[int]) -> np.ndarray:
        """Tokens that would repeat `REPEAT` tokens; not the end."""
        ids = np.array([*said, *self.tokens])
        if len(ids) < REPEAT:
            return np.array([], int)
        runs = np.lib.stride_tricks.sliding_window_view(ids, REPEAT)
        tokens = runs[(runs[:, :-1] == runs[-1, 1:]).all(1), -1]
        return tokens[tokens != self.eos]

    def _choose(self, logits: np.ndarray, allowed: np.ndarray) -> int:
        if not len(allowed):
            return self.eos
        logits = logits[allowed]
        if self.temperature == 0:
            return int(allowed[logits.argmax()])
        likely = np.argpartition(-logits, min(TOP_K, len(logits)) - 1)[:TOP_K]
        likely = likely[np.argsort(-logits[likely], kind="stable")]
        p = np.exp((logits[likely] - logits[likely[0]]) / self.temperature)
        total = (p / p.sum()).cumsum()
        kept = min(int(np.searchsorted(total, TOP_P)) + 1, len(total))
        place = np.searchsorted(total[:kept], self.rng.random() * total[kept - 1])
        return int(allowed[likely[min(place, kept - 1)]])


@dataclass
class TransformersLLM:
    """
    A causal language model of transformers.

    Structured answers follow their JSON schema, and messages are one line that repeats nothing of the chat: other tokens are never sampled. Of a
    message several are drawn, and the best is kept ([`Row.merit`]): what a small model is surest of makes the most sense, but it is surest of what was said already.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        name (`str`): What replies name it.
        roles (`Mapping[str, RoleSettings]`, *optional*): Settings by role; `model` is not heeded.
        batch_size (`int`, *optional*, defaults to 32): Rows of a batch.
        drafts (`int`, *optional*, defaults to 1): Rows of a message.
        longest (`int`, *optional*, defaults to 240): Characters of a message.

    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    roles: Mapping[str, RoleSettings] = field(default_factory=lambda: ROLES)
    batch_size: int = 32
    drafts: int = 1
    longest: int = 240

    def __post_init__(self) -> None:
        """Nothing waits yet."""
        self.waiting: list[tuple[Request, int, asyncio.Future]] = []
        self.worker: asyncio.Task | None = None
        self.thread = ThreadPoolExecutor(1)
        self.prefixes = PrefixCache(self.model)

    @cached_property
    def grammar_tokenizer(self) -> llguidance.LLTokenizer:
        """The tokenizer as grammars read it."""
        size = max(self.model.config.get_text_config().vocab_size, len(self.tokenizer))
        return llguidance.hf.from_tokenizer(self.tokenizer, size)  # type: ignore[arg-type]

    def most_tokens(self, role: str) -> int:
        """Longest answer to a role, in tokens."""
        return self.roles[role].max_tokens

    async def close(self) -> None:
        """Nothing to let go of."""

    async def ask(self, request: Request, seed: int) -> Reply:
        """Answer one request, in a batch with what others ask meanwhile; see [`LLM`]."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((request, seed, answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            await asyncio.sleep(0.02)  # let the sessions that were just answered ask again
            batch = self._next_batch()
            try:
                replies = await loop.run_in_executor(self.thread, self.generate, [(r, s) for r, s, _ in batch])
            except Exception as error:  # those who wait must hear of it
                for _, _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, _, answer), reply in zip(batch, replies, strict=True):
                if not answer.done():
                    answer.set_result(reply)

    def _next_batch(self) -> list[tuple[Request, int, asyncio.Future]]:
        """The oldest request, and those most like it in form and length."""

        def shape(request: Request) -> tuple[bool, int]:
            return request.answer is None, sum(len(str(message["content"])) for message in request.messages)

        is_text, length = shape(self.waiting[0][0])

        def distance(entry: tuple[Request, int, asyncio.Future]) -> tuple[bool, int]:
            other_is_text, other = shape(entry[0])
            return other_is_text != is_text, abs(other - length)

        rows = self.drafts if is_text else 1
        batch = sorted(self.waiting, key=distance)[: max(1, self.batch_size // rows)]
        taken = set(map(id, batch))
        self.waiting = [entry for entry in self.waiting if id(entry) not in taken]
        return batch

    @torch.inference_mode()
    def generate(self, batch: Sequence[tuple[Request, int]]) -> list[Reply]:
        """
        Answer requests in one batch.

        Args:
            batch (`Sequence`): Requests with their seeds.

        Returns:
            `list[Reply]`: In the same order.

        """
        rows: list[Row] = []
        prompt_of: list[int] = []
        prompts = [self._tokens(request.messages) for request, _ in batch]
        for n, (request, seed) in enumerate(batch):
            settings, said = self.roles[request.role], self._said(request, prompts[n])
            for draft in range(1 if request.answer else self.drafts):
                rng, temperature = np.random.default_rng(seed + draft), settings.temperature_for(seed)
                eos = self.tokenizer.eos_token_id
                rows.append(Row(self._matcher(request), said, temperature, settings.max_tokens, rng, eos))
                prompt_of.append(n)
        self._draw(rows, prompts, prompt_of)
        replies = []
        for n, prompt in enumerate(prompts):
            drafts = [row for row, of in zip(rows, prompt_of, strict=True) if of == n]
            best = max(drafts, key=lambda row: row.merit)
            replies.append(
                Reply(
                    text=str(self.tokenizer.decode(best.tokens, skip_special_tokens=True)),
                    model=self.name,
                    prompt_tokens=len(prompt),
                    completion_tokens=sum(len(row.tokens) for row in drafts),
                    complete=best.complete,
                )
            )
        return replies

    def _draw(self, rows: Sequence[Row], prompts: Sequence[list[int]], prompt_of: Sequence[int]) -> None:
        """Draw rows to their ends; those that are done are left out as soon as they are a quarter."""
        ids, mask, cache = self.prefixes.read(prompts, prompt_of, max(row.limit for row in rows))
        live = list(rows)
        bitmask = llguidance.torch.allocate_token_bitmask(1, self.grammar_tokenizer.vocab_size)
        while True:
            places = mask.sum(-1, keepdim=True) - 1
            output = self.model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            logits = output.logits[:, -1].float().cpu()
            totals = logits.logsumexp(-1).tolist()
            for row, scores, total in zip(live, logits.numpy(), totals, strict=True):
                if not row.done:
                    row.draw(scores, total, bitmask)
            going = [n for n, row in enumerate(live) if not row.done]
            if not going:
                return
            if len(going) <= 0.75 * len(live):
                live, mask = [live[n] for n in going], mask[going]
                cache.batch_select_indices(torch.tensor(going, device=mask.device))
            ids = torch.tensor([row.tokens[-1:] for row in live], device=mask.device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)

    def _tokens(self, chat: Sequence[dict], ask: bool = True) -> list[int]:
        """A chat as the model reads it; what it quotes cannot open or close a message."""
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            list(chat), add_generation_prompt=ask, sanitize_control_tokens=True, return_dict=False
        )

    def _said(self, request: Request, prompt: list[int]) -> list[int] | None:
        """What follows in a prompt on who the agent is: that it may say again."""
        if request.answer:
            return None
        who = [message for message in request.messages[:1] if message["role"] == "system"]
        return prompt[len(self._tokens(who, ask=False)) if who else 0 :]

    def _matcher(self, request: Request) -> LLMatcher:
        if request.answer is None:
            grammar = LLMatcher.grammar_from_regex(MESSAGE.format(longest=self.longest))
        else:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema_of(request.answer)),  # written as json.dumps does, which is what models have read
                defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        return LLMatcher(self.grammar_tokenizer, grammar)
