"""
Requested beside realised sticker rates on the test split, and what they do to the timing, one JSON line.

    python benchmarks/sticker_rate.py [--model checkpoints/pegs-mini] [--rates 0.1 0.3 0.6 0.9] [--limit 0] [--turns 5000]

Text and log-odds of a reply do not depend on the rate (with a seed they are the same to the last bit), so each context is answered once, and for each rate the stickers are
drawn as `generate` draws them. A few replies are then generated with each rate and compared (`generate_agrees`). All variants share this path: they differ in what
is made of a sticker, not in whether there is one. `f_mmr` (eq. 11) is of the replies with the retrieved stickers that the rate sends, from the whole pack, under the mini
tower; `learned` is the model's without a rate. `--turns` adds that many replies to train and validation contexts, several a context if there are fewer. The turns of a
few sessions are a batch, and each dialogue is read once.
"""

import argparse
import json
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import BatchFeature

from dataset_builders.schema import Message
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel
from modeling_pegs.generation_pegs import (
    PegsCache,
    PegsGenerateOutput,
    draw_thresholds,
    find_sticker_bias,
    identify_tokens,
)
from modeling_pegs.processing_pegs import load_sticker
from pegs.assemble import load_pipeline
from pegs.evaluation.multimodal import ALPHAS, MiniTower, f_mmr, f_mmr_name, mmr
from pegs.places import DEFAULT_MODEL
from pegs.quiet import quiet_libraries
from pegs.training.calibrate import CUT, logit_quantiles
from pegs.training.dialogues import sent_stickers, turn_contexts
from pipelines.pipeline_pegs import PegsPipeline


@dataclass
class Turns:
    """
    System turns of one session.

    Args:
        contexts (`list[list[dict]]`): The messages before each, the longest last.
        golds (`list[Message]`): What the session's System says there.

    """

    contexts: list[list[dict]]
    golds: list[Message]

    def repeat(self, copies: int) -> "Turns":
        """Each turn `copies` times."""
        return Turns(
            [context for context in self.contexts for _ in range(copies)],
            [gold for gold in self.golds for _ in range(copies)],
        )


@dataclass
class Replies:
    """
    A model's own replies to n turns.

    Args:
        logits (`torch.Tensor` of shape `(n,)`): Log-odds of a sticker at their ends, NaN where one was cut.
        golds (`list[Message]`): What the sessions' System says there.
        texts (`list[str]`): Their words.
        stickers (`list[str | None]`): Ids of the stickers that would be retrieved; `None` without retrieval.

    """

    logits: torch.Tensor
    golds: list[Message]
    texts: list[str]
    stickers: list[str | None]

    @property
    def gold_mask(self) -> torch.Tensor:
        """Whether the sessions' System sends a sticker there, `(n,)`."""
        return torch.tensor([gold.sticker is not None for gold in self.golds])


def system_turns(split: str, pack: StickerPack) -> list[Turns]:
    """A split's System turns, session by session."""
    return [
        Turns(turn_contexts(session, pack), [turn.system for turn in session.turns]) for session in load_mini(split)
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


def answer(pegs: PegsPipeline, sessions: list[Turns], together: int, seed: int) -> Replies:
    """Own replies to all turns, of `together` sessions at once."""
    torch.manual_seed(seed)
    replies = Replies(torch.empty(0), [], [], [])
    for start in tqdm(range(0, len(sessions), together), mininterval=30):
        batch = sessions[start : start + together]
        contexts = [context for session in batch for context in session.contexts]
        inputs = pegs.processor.apply_chat_template(
            contexts, add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ).to(pegs.model.device)
        cache = read_once(pegs.model, inputs, [len(session.golds) for session in batch])
        output = pegs.model.generate(**inputs, past_key_values=cache, sticker_bias=torch.inf)
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        replies.logits = torch.cat([replies.logits, output.sticker_logit.float().cpu()])
        replies.golds += [gold for session in batch for gold in session.golds]
        replies.texts += [text.strip() for text in pegs.processor.batch_decode(new_ids, skip_special_tokens=True)]
        replies.stickers += [find_sticker(pegs, output, row, context) for row, context in enumerate(contexts)]
    return replies


def find_sticker(pegs: PegsPipeline, output: PegsGenerateOutput, row: int, context: list[dict]) -> str | None:
    """Id of the sticker that `PegsPipeline` retrieves for a row of `output`."""
    if output.sticker_queries is None:
        return None
    sent = sent_stickers(context)
    embeds = output.sticker_prompt_embeds
    meant = pegs.read_prompt_embeds(None if embeds is None else embeds[row : row + 1], exclude=sent)
    return pegs.retrieve(output.sticker_queries[row] if meant is None else meant, 1, sent)[0].id


def find_relevance(replies: Replies, tower: MiniTower, pack: StickerPack) -> np.ndarray:
    """MMr of each reply without its sticker and with it, `(n, 2)`."""
    ids = sorted(
        {sticker for sticker in replies.stickers if sticker}
        | {gold.sticker.id for gold in replies.golds if gold.sticker}
    )
    images = dict(zip(ids, tower.embed_images([load_sticker(pack.image(name)) for name in ids]), strict=True))
    images[None] = None
    texts, gold_texts = tower.embed_texts(replies.texts), tower.embed_texts([gold.text for gold in replies.golds])
    return np.array([
        [mmr(gold_text, images[gold.sticker and gold.sticker.id], text, image)["mmr"] for image in (None, images[sticker])]
        for gold, gold_text, text, sticker in zip(replies.golds, gold_texts, texts, replies.stickers, strict=True)
    ])  # fmt: skip


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


def describe_rate(
    rate: float | str, bias: float, replies: Replies, relevance: np.ndarray | None, args: argparse.Namespace
) -> dict:
    """Realised rate of a requested one, how well its stickers are timed, and with the replies' MMr their f-MMr."""
    logits, golds = replies.logits, replies.gold_mask
    sent = draw_stickers(logits, bias, args.batch_size, args.seed)
    right = int((sent & golds).sum())
    realised = sent.float().mean().item()
    figures = {
        "requested": rate,
        "realised": round(realised, 4),
        "expected": round(torch.sigmoid(logits.nan_to_num(nan=CUT) + bias).mean().item(), 4),
        "precision": round(right / max(int(sent.sum()), 1), 4),
        "recall": round(right / max(int(golds.sum()), 1), 4),
        "timing_average_precision": average_precision(
            torch.sigmoid(logits.nan_to_num(nan=CUT).double() + bias), golds
        ),
    }
    if relevance is not None:
        mean = relevance[np.arange(len(sent)), sent.long().numpy()].mean()
        figures["mmr"] = round(mean, 4)
        figures |= {f_mmr_name(alpha): round(f_mmr(realised, mean, alpha), 4) for alpha in ALPHAS}
    return figures


def generate_agrees(pegs: PegsPipeline, contexts: list[list[dict]], rate: float, bias: float) -> bool:
    """Whether replies generated with a rate get the stickers that their log-odds and the same draws say."""
    inputs = pegs.processor.apply_chat_template(
        contexts, add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    output = pegs.model.generate(**inputs.to(pegs.model.device), sticker_rate=rate)
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
    pegs = load_pipeline(args.model, device=str(device))
    splits = {split: system_turns(split, pegs.pack)[: args.limit or None] for split in ("train", "validation", "test")}

    figures: dict = {"device": str(device), "seed": args.seed}
    settings = pegs.model.generation_config
    quantiles = settings.to_dict().get("sticker_logit_quantiles")
    figures["calibrated"] = "checkpoint" if quantiles else "here, on validation"
    if quantiles is None:
        quantiles = logit_quantiles(answer(pegs, splits["validation"], args.sessions, args.seed).logits)
        settings.update(allow_custom_entries=True, sticker_logit_quantiles=quantiles)
    biases = {rate: find_sticker_bias(rate, torch.tensor(quantiles), sampled=True) for rate in args.rates}

    replies = answer(pegs, splits["test"], args.sessions, args.seed + 1)
    relevance = None if pegs.selector is None else find_relevance(replies, MiniTower(str(DEFAULT_MODEL)), pegs.pack)
    contexts = splits["test"][0].contexts[:4]
    figures["test"] = {
        "turns": len(replies.golds),
        "gold_rate": round(replies.gold_mask.float().mean().item(), 4),
        "cut_replies": int(replies.logits.isnan().sum()),
        "learned": describe_rate("model", 0.0, replies, relevance, args),
        "rates": [describe_rate(rate, bias, replies, relevance, args) for rate, bias in biases.items()],
        "generate_agrees": all(generate_agrees(pegs, contexts, rate, bias) for rate, bias in biases.items()),
    }
    if args.turns:
        turns = take_turns(splits["train"] + splits["validation"], args.turns, args.seed)
        replies = answer(pegs, turns, args.sessions, args.seed + 2)
        figures["train_and_validation"] = {
            "turns": len(replies.golds),
            "rates": [describe_rate(rate, bias, replies, None, args) for rate, bias in biases.items()],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
