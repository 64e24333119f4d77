"""
Requested beside realised sticker rates on the test split, and what they do to the timing, one JSON line.

    python benchmarks/sticker_rate.py [--model checkpoints/pegs-mini] [--rates 0.1 0.3 0.6 0.9] [--limit 0] [--turns 5000]

Text and log-odds of a reply do not depend on the rate (with a seed they are the same to the last bit), so each context is answered once, and for each rate the stickers are
drawn as `generate` draws them. A few replies are then generated with each rate and compared (`generate_agrees`). All variants share this path: they differ in what
is made of a sticker, not in whether there is one. `--turns` adds that many replies to train and validation contexts, several a context if there are fewer. The turns of a
few sessions are a batch, and each dialogue is read once.
"""

import argparse
import json
import random
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import BatchFeature

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.generation_pegs import PegsCache, draw_thresholds, find_sticker_bias, identify_tokens
from pegs.assemble import DEFAULT_MODEL, load_pack
from pegs.quiet import quiet_libraries
from pegs.training.calibrate import CUT, logit_quantiles
from pegs.training.dialogues import turn_contexts


@dataclass
class Turns:
    """
    System turns of one session.

    Args:
        contexts (`list[list[dict]]`): The messages before each, the longest last.
        golds (`list[bool]`): Whether each has a sticker.

    """

    contexts: list[list[dict]]
    golds: list[bool]

    def repeat(self, copies: int) -> "Turns":
        """Each turn `copies` times."""
        return Turns(
            [context for context in self.contexts for _ in range(copies)],
            [gold for gold in self.golds for _ in range(copies)],
        )


def system_turns(split: str, pack: StickerPack) -> list[Turns]:
    """A split's System turns, session by session."""
    return [
        Turns(turn_contexts(session, pack), [turn.system.sticker is not None for turn in session.turns])
        for session in load_mini(split)
    ]


def take_turns(sessions: list[Turns], count: int, seed: int) -> list[Turns]:
    """`count` turns: those of all sessions as often as that gives whole times, and of sessions in random order the rest."""
    times, rest = divmod(count, sum(len(session.golds) for session in sessions))
    taken = [session.repeat(times) for session in sessions if times]
    for session in random.Random(seed).sample(sessions, len(sessions)):
        if not rest:
            break
        part = Turns(session.contexts[:rest], session.golds[:rest])
        taken.append(part)
        rest -= len(part.golds)
    return taken


@torch.no_grad()
def read_once(model: PegsModel, inputs: BatchFeature, sizes: list[int]) -> PegsCache:
    """
    The cache of a batch of sessions' prompts, of which only each session's last one, whose beginnings the others are, is read.

    Args:
        model ([`PegsModel`]): On one device.
        inputs (`BatchFeature`): Prompts `(B, T)`, padded on the left, with their pictures.
        sizes (`list[int]`): How many of them each session has; they sum to B.

    Returns:
        [`PegsCache`]: Of all prompts but their last tokens.

    """
    ids, mask, pictures = inputs["input_ids"], inputs["attention_mask"], inputs.get("pixel_values")
    tokens = identify_tokens(ids, mask, pictures, model.config.image_token_id)
    lengths, pictured = mask.sum(dim=1).tolist(), (ids == model.config.image_token_id).sum(dim=1)
    ends = (pictured.cumsum(dim=0) // model.config.num_query_tokens).tolist()  # of each row's pictures
    states, row = [], -1
    for size in sizes:
        row += size
        longest, length = PegsCache(model.config.text_config), lengths[row]
        first = ends[row - 1] if row else 0
        model(
            input_ids=ids[row : row + 1, -length:],
            pixel_values=pictures[first : ends[row]] if ends[row] > first else None,
            past_key_values=longest,
            use_cache=True,
            logits_to_keep=1,
        )
        for other in range(row - size + 1, row + 1):
            known = lengths[other] - 1
            if not torch.equal(tokens[other, -known - 1 : -1], tokens[row, -length:][:known]):
                raise ValueError(f"Prompt {other} is no beginning of prompt {row}.")
            room = (0, 0, ids.shape[1] - 1 - known, 0)
            states.append([[nn.functional.pad(part[0, :, :known], room) for part in layer[:2]] for layer in longest])
    cache = PegsCache(model.config.text_config)
    for number, layers in enumerate(zip(*states, strict=True)):
        cache.update(*(torch.stack(parts) for parts in zip(*layers, strict=True)), number)
    cache.token_ids = tokens[:, :-1]
    return cache


def answer(
    model: PegsModel, processor: PegsProcessor, sessions: list[Turns], together: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds of a sticker at the end of own replies to all turns, NaN where one was cut, and whether the turns have one."""
    torch.manual_seed(seed)
    logits = []
    for start in tqdm(range(0, len(sessions), together), mininterval=30):
        batch = sessions[start : start + together]
        inputs = processor.apply_chat_template(
            [context for session in batch for context in session.contexts],
            add_generation_prompt=True,
            tokenize=True,
            return_tensors="pt",
        ).to(model.device)
        cache = read_once(model, inputs, [len(session.golds) for session in batch])
        output = model.generate(**inputs, past_key_values=cache, sticker_rate="model")
        logits.append(output.sticker_logit.float().cpu())
    return torch.cat(logits), torch.tensor([gold for session in sessions for gold in session.golds])


def average_precision(scores: torch.Tensor, golds: torch.Tensor) -> float:
    """Mean, over the turns with a sticker, of the share of stickers among the turns that score at least as high."""
    order = scores.argsort(descending=True, stable=True)
    hits = golds[order].float()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return round(((precision * hits).sum() / hits.sum()).item(), 4)


def draw_stickers(logits: torch.Tensor, bias: float, batch_size: int, seed: int) -> torch.Tensor:
    """Which replies `(n,)` get a sticker, in batches as `generate` has them; a reply that was cut has none."""
    torch.manual_seed(seed)
    return torch.cat([part > draw_thresholds(len(part), bias, sampled=True) for part in logits.split(batch_size)])


def describe_rate(rate: float | str, bias: float, logits: torch.Tensor, golds: torch.Tensor, args) -> dict:
    """Realised rate of a requested one, and how well its stickers are timed."""
    sent = draw_stickers(logits, bias, args.batch_size, args.seed)
    right = int((sent & golds).sum())
    return {
        "requested": rate,
        "realised": round(sent.float().mean().item(), 4),
        "expected": round(torch.sigmoid(logits.nan_to_num(nan=CUT) + bias).mean().item(), 4),
        "precision": round(right / max(int(sent.sum()), 1), 4),
        "recall": round(right / max(int(golds.sum()), 1), 4),
        "timing_average_precision": average_precision(
            torch.sigmoid(logits.nan_to_num(nan=CUT).double() + bias), golds
        ),
    }


def generate_agrees(
    model: PegsModel, processor: PegsProcessor, contexts: list[list[dict]], rate: float, bias: float
) -> bool:
    """Whether replies generated with a rate get the stickers that their log-odds and the same draws say."""
    inputs = processor.apply_chat_template(contexts, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs.to(model.device), sticker_rate=rate)
    torch.manual_seed(0)
    thresholds = draw_thresholds(len(contexts), bias, sampled=True)
    return bool(((output.sticker_logit.cpu() > thresholds) == output.sticker_mask.cpu()).all())


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.3, 0.6, 0.9])
    parser.add_argument("--limit", type=int, default=0, help="only so many sessions a split")
    parser.add_argument("--turns", type=int, default=0, help="replies to train and validation contexts")
    parser.add_argument("--batch-size", type=int, default=16, help="replies that share the strata of a draw")
    parser.add_argument("--sessions", type=int, default=3, help="whose turns are answered together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = PegsModel.from_pretrained(args.model).merge().to(device)
    processor, pack = PegsProcessor.from_pretrained(args.model), load_pack("openmoji")
    splits = {split: system_turns(split, pack)[: args.limit or None] for split in ("train", "validation", "test")}

    figures: dict = {"device": str(device), "seed": args.seed}
    quantiles = model.generation_config.to_dict().get("sticker_logit_quantiles")
    figures["calibrated"] = "checkpoint" if quantiles else "here, on validation"
    if quantiles is None:
        quantiles = logit_quantiles(answer(model, processor, splits["validation"], args.sessions, args.seed)[0])
        model.generation_config.update(allow_custom_entries=True, sticker_logit_quantiles=quantiles)
    biases = {rate: find_sticker_bias(rate, torch.tensor(quantiles), sampled=True) for rate in args.rates}

    logits, gold = answer(model, processor, splits["test"], args.sessions, args.seed + 1)
    contexts = splits["test"][0].contexts[:4]
    figures["test"] = {
        "turns": len(gold),
        "gold_rate": round(gold.float().mean().item(), 4),
        "cut_replies": int(logits.isnan().sum()),
        "learned": describe_rate("model", 0.0, logits, gold, args),
        "rates": [describe_rate(rate, bias, logits, gold, args) for rate, bias in biases.items()],
        "generate_agrees": all(
            generate_agrees(model, processor, contexts, rate, bias) for rate, bias in biases.items()
        ),
    }
    if args.turns:
        turns = take_turns(splits["train"] + splits["validation"], args.turns, args.seed)
        logits, gold = answer(model, processor, turns, args.sessions, args.seed + 2)
        figures["train_and_validation"] = {
            "turns": len(gold),
            "rates": [describe_rate(rate, bias, logits, gold, args) for rate, bias in biases.items()],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
