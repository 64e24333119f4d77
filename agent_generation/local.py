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
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from agent_generation.llm import ROLES, Reply, Request, RoleSettings, schema_of


MESSAGE = r"[^\n\[\]{}<>*#|]{1,240}[.!?…。！？]"  # free text: one line of plain text that ends where a sentence does
TOP_K, TOP_P = 256, 0.9
REPEAT = 4  # tokens in a row that a message shares with nothing before it: small models go round in circles


class RowSampler(LogitsProcessor):
    """
    Makes greedy search sample, each row with its own temperature, seed, grammar and length, whatever rows are beside it.

    Args:
        matchers (`Sequence[LLMatcher]`): A grammar a row.
        is_text (`Sequence[bool]`): Rows that must not repeat what stands in the prompt or before.
        temperatures (`Sequence[float]`): 0 takes the likeliest token.
        limits (`Sequence[int]`): Most tokens of a row.
        seeds (`Sequence[int]`): For the rows' draws.
        eos_token_id (`int`): Ends a row.
        vocab_size (`int`): Of the grammars' tokenizer.

    """

    def __init__(
        self,
        matchers: Sequence[LLMatcher],
        is_text: Sequence[bool],
        temperatures: Sequence[float],
        limits: Sequence[int],
        seeds: Sequence[int],
        eos_token_id: int,
        vocab_size: int,
    ) -> None:
        self.vocab_size, self.is_text = vocab_size, is_text
        self.matchers, self.temperatures, self.limits, self.eos = matchers, temperatures, limits, eos_token_id
        self.rngs = [np.random.default_rng(seed) for seed in seeds]
        self.done = [False] * len(matchers)
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores `(B, V)` whose largest is each row's draw."""
        last = input_ids[:, -1].tolist()
        mask = llguidance.torch.allocate_token_bitmask(1, self.vocab_size)
        drawn = torch.full_like(scores, float("-inf"))
        for row, matcher in enumerate(self.matchers):
            if self.step and not self.done[row]:
                self.done[row] = last[row] == self.eos or not matcher.consume_token(last[row])
            if self.done[row] or matcher.is_stopped() or self.step >= self.limits[row]:
                drawn[row, self.eos] = 0
                continue
            llguidance.torch.fill_next_token_bitmask(matcher, mask)
            allowed = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")[: scores.shape[1]]
            if self.is_text[row]:
                allowed[self._repeating(input_ids[row])] = 0
            drawn[row, self._draw(row, scores[row].float().numpy(), np.flatnonzero(allowed))] = 0
        self.step += 1
        return drawn

    def _repeating(self, ids: torch.Tensor) -> np.ndarray:
        """Tokens that would repeat `REPEAT` tokens; not the end."""
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

    Structured answers follow their JSON schema, and messages are one line that repeats nothing: other tokens are never sampled.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        name (`str`): What replies name it.
        roles (`Mapping[str, RoleSettings]`, *optional*): Settings by role; `model` is not heeded.
        batch_size (`int`, *optional*, defaults to 16): Requests of a batch.

    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    roles: Mapping[str, RoleSettings] = field(default_factory=lambda: ROLES)
    batch_size: int = 16

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

        batch = sorted(self.waiting, key=distance)[: self.batch_size]
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
        prompts = [
            self.tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
            for request, _ in batch
        ]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.model.device)
        settings = [self.roles[request.role] for request, _ in batch]
        eos = self.tokenizer.eos_token_id
        sampler = RowSampler(
            [self._matcher(request) for request, _ in batch],
            [request.answer is None for request, _ in batch],
            [setting.temperature for setting in settings],
            [setting.max_tokens for setting in settings],
            [seed for _, seed in batch],
            eos,
            self.grammar_tokenizer.vocab_size,
        )
        most = max(setting.max_tokens for setting in settings) + 1
        config = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=eos, pad_token_id=self.tokenizer.pad_token_id
        )
        output = self.model.generate(**inputs, generation_config=config, logits_processor=[sampler])  # type: ignore[operator]
        replies = []
        for row, (_, setting) in enumerate(zip(batch, settings, strict=True)):
            tokens = output[row, inputs["input_ids"].shape[1] :].tolist()
            tokens = tokens[: tokens.index(eos)] if eos in tokens else tokens
            replies.append(
                Reply(
                    text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
                    model=self.name,
                    prompt_tokens=int(inputs["attention_mask"][row].sum()),
                    completion_tokens=len(tokens),
                    complete=len(tokens) < setting.max_tokens or sampler.matchers[row].is_accepting(),
                )
            )
        return replies

    def _matcher(self, request: Request) -> LLMatcher:
        if request.answer is None:
            grammar = LLMatcher.grammar_from_regex(MESSAGE)
        else:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema_of(request.answer)),  # written as json.dumps does, which is what models have read
                defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        return LLMatcher(self.grammar_tokenizer, grammar)
