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
from transformers import (
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from agent_generation.llm import ROLES, Reply, Request, RoleSettings, schema_of


MESSAGE = r"[^\n\[\]{}<>*#|]{1,240}[.!?…。！？]"  # free text: one line of plain text that ends where a sentence does
TOP_K, TOP_P = 256, 0.9
REPEAT = 4  # tokens in a row that a message shares with nothing said before: small models go round in circles


class RowSampler(LogitsProcessor):
    """
    Makes greedy search sample, each row with its own temperature, seed, grammar and length, whatever rows are beside it.

    Args:
        matchers (`Sequence[LLMatcher]`): A grammar a row.
        said_from (`Sequence[int | None]`): Where a row's chat begins, of which it must repeat nothing; `None` if it may.
        temperatures (`Sequence[float]`): 0 takes the likeliest token.
        limits (`Sequence[int]`): Most tokens of a row.
        seeds (`Sequence[int]`): For the rows' draws.
        eos_token_id (`int`): Ends a row.
        vocab_size (`int`): Of the grammars' tokenizer.

    """

    def __init__(
        self,
        matchers: Sequence[LLMatcher],
        said_from: Sequence[int | None],
        temperatures: Sequence[float],
        limits: Sequence[int],
        seeds: Sequence[int],
        eos_token_id: int,
        vocab_size: int,
    ) -> None:
        self.vocab_size, self.said_from = vocab_size, said_from
        self.matchers, self.temperatures, self.limits, self.eos = matchers, temperatures, limits, eos_token_id
        self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.done = [False] * len(matchers)
        self.drawn: list[list[float]] = [[] for _ in matchers]  # log-probabilities of the rows' tokens
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores `(B, V)` whose largest is each row's draw."""
        last = input_ids[:, -1].tolist()
        mask = llguidance.torch.allocate_token_bitmask(1, self.vocab_size)
        totals = scores.float().logsumexp(-1)
        drawn = torch.full_like(scores, float("-inf"))
        for row, matcher in enumerate(self.matchers):
            if self.step and not self.done[row]:
                self.done[row] = last[row] == self.eos or not matcher.consume_token(last[row])
            if self.done[row] or matcher.is_stopped() or self.step >= self.limits[row]:
                drawn[row, self.eos] = 0
                continue
            llguidance.torch.fill_next_token_bitmask(matcher, mask)
            allowed = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")[: scores.shape[1]]
            if (start := self.said_from[row]) is not None:
                allowed[self._repeating(input_ids[row, start:])] = 0
            token = self._draw(row, scores[row].float().numpy(), np.flatnonzero(allowed))
            self.drawn[row].append(float(scores[row, token] - totals[row]))
            drawn[row, token] = 0
        self.step += 1
        return drawn

    def _repeating(self, ids: torch.Tensor) -> np.ndarray:
        """Tokens that would repeat `REPEAT` tokens; not the end."""
        if len(ids) < REPEAT:
            return np.array([], int)
        runs = np.lib.stride_tricks.sliding_window_view(ids.cpu().numpy(), REPEAT)
        tokens = runs[(runs[:, :-1] == runs[-1, 1:]).all(1), -1]
        return tokens[tokens != self.eos]

    def _draw(self, row: int, logits: np.ndarray, allowed: np.ndarray) -> int:
        if not len(allowed):
            return self.eos
        logits, temperature = logits[allowed], self.temperatures[row]
        if temperature == 0:
            return int(allowed[logits.argmax()])
        likely = np.argpartition(-logits, min(TOP_K, len(logits)) - 1)[:TOP_K]
        likely = likely[np.argsort(-logits[likely], kind="stable")]
        p = np.exp((logits[likely] - logits[likely[0]]) / temperature)
        total = (p / p.sum()).cumsum()
        kept = min(int(np.searchsorted(total, TOP_P)) + 1, len(total))
        place = np.searchsorted(total[:kept], self.rngs[row].random() * total[kept - 1])
        return int(allowed[likely[min(place, kept - 1)]])


@dataclass
class TransformersLLM:
    """
    A causal language model of transformers.

    Structured answers follow their JSON schema, and messages are one line that repeats nothing of the chat: other tokens are never sampled. Of a
    message several are drawn, and the likeliest by its mean log-probability is kept: what a small model is surest of makes the most sense.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        name (`str`): What replies name it.
        roles (`Mapping[str, RoleSettings]`, *optional*): Settings by role; `model` is not heeded.
        batch_size (`int`, *optional*, defaults to 16): Rows of a batch.
        drafts (`int`, *optional*, defaults to 1): Rows of a message.

    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    roles: Mapping[str, RoleSettings] = field(default_factory=lambda: ROLES)
    batch_size: int = 16
    drafts: int = 1

    def __post_init__(self) -> None:
        """Nothing waits yet."""
        self.waiting: list[tuple[Request, int, asyncio.Future]] = []
        self.worker: asyncio.Task | None = None
        self.thread = ThreadPoolExecutor(1)

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
        rows, seeds = [], []  # of each row: which request, and its draws
        for n, (request, seed) in enumerate(batch):
            for draft in range(1 if request.answer else self.drafts):
                rows.append(n)
                seeds.append(seed + draft)
        inputs = self._tokens([request.messages for request, _ in batch]).to(self.model.device)
        settings = [self.roles[request.role] for request, _ in batch]
        said_from = [
            self._said_from(request, mask) for (request, _), mask in zip(batch, inputs["attention_mask"], strict=True)
        ]
        eos = self.tokenizer.eos_token_id
        sampler = RowSampler(
            [self._matcher(batch[n][0]) for n in rows],
            [said_from[n] for n in rows],
            [settings[n].temperature_for(batch[n][1]) for n in rows],
            [settings[n].max_tokens for n in rows],
            seeds,
            eos,
            self.grammar_tokenizer.vocab_size,
        )
        most = max(setting.max_tokens for setting in settings) + 1
        config = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=eos, pad_token_id=self.tokenizer.pad_token_id
        )
        output = self.model.generate(  # type: ignore[operator]
            **{name: values[rows] for name, values in inputs.items()},
            past_key_values=self._read(inputs, rows),
            generation_config=config,
            logits_processor=[sampler],
        )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        replies = []
        for n, setting in enumerate(settings):
            drafts = [row for row in range(len(rows)) if rows[row] == n]
            whole = {row: self._is_whole(sampler, row, setting.max_tokens) for row in drafts}
            best = max(drafts, key=lambda row: (whole[row], np.mean(sampler.drawn[row])))  # noqa: B023
            tokens = answers[best][: len(sampler.drawn[best])]
            replies.append(
                Reply(
                    text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
                    model=self.name,
                    prompt_tokens=int(inputs["attention_mask"][n].sum()),
                    completion_tokens=sum(len(sampler.drawn[row]) for row in drafts),
                    complete=whole[best],
                )
            )
        return replies

    def _is_whole(self, sampler: RowSampler, row: int, limit: int) -> bool:
        """Whether a row ended by itself."""
        return len(sampler.drawn[row]) < limit or sampler.matchers[row].is_accepting()

    def _tokens(self, chats: Sequence[Sequence[dict]], ask: bool = True) -> BatchEncoding:
        """Chats as the model reads them, padded at the left; what they quote cannot open or close a message."""
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            [list(chat) for chat in chats],
            add_generation_prompt=ask,
            sanitize_control_tokens=True,
            return_tensors="pt",
            padding=True,
            return_dict=True,
            tokenizer_kwargs={"padding_side": "left"},
        )

    def _said_from(self, request: Request, mask: torch.Tensor) -> int | None:
        """The column of a padded prompt where the chat begins, after who the agent is: that it may say again."""
        if request.answer:
            return None
        who = [message for message in request.messages[:1] if message["role"] == "system"]
        return int((mask == 0).sum()) + (self._tokens([who], ask=False)["input_ids"].shape[1] if who else 0)

    def _read(self, inputs: BatchEncoding, rows: Sequence[int]) -> DynamicCache:
        """The cache of prompts that were read once each, but for their last token, with as many rows as drafts."""
        mask = inputs["attention_mask"][:, :-1]
        cache = DynamicCache(config=self.model.config)
        self.model(
            input_ids=inputs["input_ids"][:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_select_indices(torch.tensor(rows, device=mask.device))
        return cache

    def _matcher(self, request: Request) -> LLMatcher:
        if request.answer is None:
            grammar = LLMatcher.grammar_from_regex(MESSAGE)
        else:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema_of(request.answer)),  # written as json.dumps does, which is what models have read
                defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        return LLMatcher(self.grammar_tokenizer, grammar)
