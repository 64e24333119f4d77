"""
Requested beside realised sticker rates on the test split, and what they do to the timing, one JSON line.

    python benchmarks/sticker_rate.py [--model checkpoints/pegs-mini] [--rates 0.1 0.3 0.6 0.9] [--limit 0] [--turns 5000]

Text and log-odds of a reply do not depend on the rate (with a seed they are the same to the last bit), so each context is answered once, and for each rate the stickers are
drawn as `generate` draws them. A few replies are then generated with each rate and compared (`generate_agrees`). All variants share this path: they differ in what
is made of a sticker, not in whether there is one. `--turns` adds that many replies to train and validation contexts, several a context if there are fewer.
"""

import argparse
import itertools
import json
import random

import torch

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.generation_pegs import draw_thresholds, find_sticker_bias
from pegs.assemble import DEFAULT_MODEL, load_pack
from pegs.quiet import quiet_libraries
from pegs.training.calibrate import CUT, batches_of_like_length, logit_quantiles, sticker_logits
from pegs.training.dialogues import turn_contexts


def system_turns(split: str, pack: StickerPack) -> tuple[list[list[dict]], list[bool]]:
    """The contexts of a split's System turns, and whether each has a sticker."""
    contexts, golds = [], []
    for session in load_mini(split):
        contexts += turn_contexts(session, pack)
        golds += [turn.system.sticker is not None for turn in session.turns]
    return contexts, golds


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
    parser.add_argument("--limit", type=int, default=0, help="only so many contexts a split")
    parser.add_argument("--turns", type=int, default=0, help="replies to train and validation contexts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = PegsModel.from_pretrained(args.model).merge().to(device)
    processor, pack = PegsProcessor.from_pretrained(args.model), load_pack("openmoji")
    splits = {split: system_turns(split, pack) for split in ("train", "validation", "test")}

    def answer(contexts: list[list[dict]], seed: int) -> tuple[torch.Tensor, list[int]]:
        """Log-odds of replies in the order in which they were generated, and the contexts' places in that order."""
        order = list(itertools.chain(*batches_of_like_length(processor, contexts, args.batch_size)))
        return sticker_logits(model, processor, contexts, args.batch_size, seed)[order], order

    figures: dict = {"device": str(device), "seed": args.seed}
    quantiles = model.generation_config.to_dict().get("sticker_logit_quantiles")
    figures["calibrated"] = "checkpoint" if quantiles else "here, on validation"
    if quantiles is None:
        contexts = splits["validation"][0][: args.limit or None]
        quantiles = logit_quantiles(answer(contexts, args.seed)[0])
        model.generation_config.update(allow_custom_entries=True, sticker_logit_quantiles=quantiles)
    biases = {rate: find_sticker_bias(rate, torch.tensor(quantiles), sampled=True) for rate in args.rates}

    contexts, golds = (column[: args.limit or None] for column in splits["test"])
    logits, order = answer(contexts, args.seed + 1)
    gold = torch.tensor(golds)[order]
    learned = describe_rate("model", 0.0, logits, gold, args)
    figures["test"] = {
        "turns": len(contexts),
        "gold_rate": round(gold.float().mean().item(), 4),
        "cut_replies": int(logits.isnan().sum()),
        "learned": learned,
        "rates": [describe_rate(rate, bias, logits, gold, args) for rate, bias in biases.items()],
        "generate_agrees": all(
            generate_agrees(model, processor, contexts[:4], rate, bias) for rate, bias in biases.items()
        ),
    }
    if args.turns:
        rows = [
            (context, gold) for split in ("train", "validation") for context, gold in zip(*splits[split], strict=True)
        ]
        random.Random(args.seed).shuffle(rows)
        rows = list(itertools.islice(itertools.cycle(rows), args.turns))
        logits, order = answer([context for context, _ in rows], args.seed + 2)
        gold = torch.tensor([gold for _, gold in rows])[order]
        figures["train_and_validation"] = {
            "turns": len(rows),
            "rates": [describe_rate(rate, bias, logits, gold, args) for rate, bias in biases.items()],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
