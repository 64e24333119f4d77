"""
What PEGS' `generate` costs beside the bare language model's, an [IMG] span in one pass beside token by token, and a conversation's next turn with its cache
beside one that reads the dialogue again: one JSON line of ratios.

    python benchmarks/generate_overhead.py [--model checkpoints/pegs-mini] [--new-tokens 48] [--span 32] [--repeats 3]

The bare model is the very language model in PEGS, LoRA merged, so both have the same weights. Both write the same number of tokens, in turns. Time is the
process's CPU time without an accelerator, because that does not count what other programs on the machine take, and the clock's with one.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from dataset_builders.stickerconv.sessions import load_mini
from modeling_pegs import PegsConfig, PegsModel, PegsProcessor
from pegs.places import DEFAULT_MODEL, load_pack
from pegs.quiet import quiet_libraries
from pegs.training.dialogues import turn_contexts


MESSAGES = ["my dog died yesterday", "I got the job!", "I can't sleep, exams tomorrow", "guess who moved in next door"]


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int, device: torch.device) -> tuple:
    """Median seconds of two calls that are made in turns, after one call each that does not count."""
    first(), second()
    times = [(measure(first, device), measure(second, device)) for _ in range(repeats)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def compare_text(model: PegsModel, processor: PegsProcessor, batch_size: int, args: argparse.Namespace) -> dict:
    """Text tokens a second of PEGS and of its language model alone."""
    contexts = [[{"role": "user", "content": MESSAGES[i % len(MESSAGES)]}] for i in range(batch_size)]
    inputs = processor.apply_chat_template(contexts, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    length = {"do_sample": False, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    bare_length = {**length, "pad_token_id": model.generation_config.pad_token_id}
    pegs, bare = in_turns(
        lambda: model.generate(**inputs, **length, sticker_rate=0.0),
        lambda: model.causal_lm.generate(**inputs, **bare_length),
        args.repeats,
        model.device,
    )
    count = batch_size * args.new_tokens
    return {"pegs": round(count / pegs, 2), "bare": round(count / bare, 2), "ratio": round(bare / pegs, 4)}


@torch.no_grad()
def compare_span(model: PegsModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict:
    """One forward pass over a span, and a step for each of its tokens."""
    values = {**model.config.to_dict(), "language_model": {"hub_id": "bare"}, "variant": "ret"}
    values |= {"num_retrieval_tokens": args.span, "num_generation_tokens": 0}
    spans = PegsModel(PegsConfig(**values)).eval().to(model.device)
    spans.language_model = model.language_model
    trained = model.added_vocabulary.embedding.weight
    rows = [*range(3), *(3 + i % model.config.num_img_tokens for i in range(args.span))]
    spans.added_vocabulary.embedding.weight.copy_(trained[rows])
    text = " ".join(MESSAGES * 4)
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    mask = torch.ones_like(ids)
    caches: list = []

    def fill_caches(count: int) -> None:
        cache = spans(input_ids=ids, use_cache=True).past_key_values
        caches.extend(copy.deepcopy(cache) for _ in range(count))

    def one_pass() -> torch.Tensor:
        return spans.compute_img_span(mask, caches.pop())

    def steps() -> torch.Tensor:
        own, states = caches.pop(), []
        for token in spans.config.img_token_ids:
            step = spans(input_ids=torch.tensor([[token]], device=ids.device), past_key_values=own, use_cache=True)
            states.append(step.last_hidden_state)
        return torch.cat(states, dim=1)

    fill_caches(2 * args.repeats + 4)
    difference = (one_pass() - steps()).abs().max().item()
    fast, slow = in_turns(one_pass, steps, args.repeats, model.device)
    dtype = model.dtype
    spans.double()
    fill_caches(2)
    rounding_apart = (one_pass() - steps()).abs().max().item()
    model.to(dtype)  # the language model is the same module
    return {
        "tokens": args.span,
        "one_pass_seconds": round(fast, 4),
        "steps_seconds": round(slow, 4),
        "speedup": round(slow / fast, 2),
        "max_abs_diff": difference,
        "max_abs_diff_float64": rounding_apart,
    }


def compare_next_turn(model: PegsModel, processor: PegsProcessor, args: argparse.Namespace) -> dict:
    """The last turn of a test session, read whole and with the cache of the turn before."""
    session = max(load_mini("test"), key=lambda session: len(session.turns))
    before, now = (
        processor.apply_chat_template(context, add_generation_prompt=True, tokenize=True, return_tensors="pt").to(
            model.device
        )
        for context in turn_contexts(session, load_pack("openmoji"))[-2:]
    )
    cache = model.generate(**before, do_sample=False).past_key_values
    caches = [copy.deepcopy(cache) for _ in range(args.repeats + 1)]
    whole, kept = in_turns(
        lambda: model.generate(**now, do_sample=False),
        lambda: model.generate(**now, do_sample=False, past_key_values=caches.pop()),
        args.repeats,
        model.device,
    )
    return {
        "prompt_tokens": now["input_ids"].shape[1],
        "whole_seconds": round(whole, 2),
        "kept_seconds": round(kept, 2),
        "ratio": round(whole / kept, 2),
    }


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--span", type=int, default=32, help="tokens of the [IMG] span")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 16])
    args = parser.parse_args()
    quiet_libraries()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = PegsModel.from_pretrained(args.model).merge().to(device)
    processor = PegsProcessor.from_pretrained(args.model)
    figures = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype),
        "span": compare_span(model, processor.tokenizer, args),
        "next_turn": compare_next_turn(model, processor, args),
        "text_tokens_per_second": {str(n): compare_text(model, processor, n, args) for n in args.batch_sizes},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
