"""
Few steps against many, and what a reply with a sticker takes: one JSON line.

    python benchmarks/decoding.py [--model checkpoints/pegs-mini] [--decoder DIR] [--against DIR] [--stickers 110] [--seeds 0 1 2] [--replies 12]

`drawing`: the captions of held-out stickers, each drawn in 4 steps without guidance and in 50 steps with guidance, in turn and from each seed, one sticker a call, so that both meet the
same machine. Seconds are medians of whole calls (denoiser, autoencoder, safety check); `denoising` leaves all
but the denoiser out. A drawing's emotion is named by the vote of the five nearest training stickers under PEGS' vision tower, which the decoder was not trained with; how often that
judge is right about real held-out stickers is told beside it. `replies`: whole answers to test dialogues, text and sticker, with everything loaded.
"""

import argparse
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset_builders.schema import Sticker
from dataset_builders.stickerconv.sessions import load_mini
from pegs.assemble import load_pipeline
from pegs.evaluation.drawing import DrawingJudge
from pegs.places import DEFAULT_MODEL
from pegs.quiet import quiet_libraries
from pegs.training.dialogues import turn_contexts
from pegs.training.text_states import encode_captions
from pipelines.pipeline_pegs import PegsPipeline
from pipelines.pipeline_sticker import StickerPipeline


FEW, MANY, GUIDANCE = 4, 50, 2.5


def load_decoder(folder: str) -> StickerPipeline:
    """A decoder in float32 with the scheduler that it is saved with."""
    decoder = StickerPipeline.from_pretrained(folder, dtype=torch.float32)
    decoder.set_progress_bar_config(disable=True)
    return decoder


class Drawer:
    """Draws one sticker a call and keeps the seconds of the call and of its denoising."""

    def __init__(self, decoder: StickerPipeline, **settings) -> None:
        self.decoder, self.settings = decoder, settings
        self.calls: list[float] = []
        self.denoising: list[float] = []

    def __call__(self, prompt_embeds: torch.Tensor, seed: int) -> Image.Image:
        """A sticker of `prompt_embeds` `(1, L, D)`."""
        ends = []

        def after_step(*_) -> dict:
            ends.append(time.perf_counter())
            return {}

        started = time.perf_counter()
        image = self.decoder(
            prompt_embeds=prompt_embeds,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_step,
            **self.settings,
        ).images[0]
        self.calls.append(time.perf_counter() - started)
        self.denoising.append(ends[-1] - started)
        return image


def percent(hits: np.ndarray) -> dict[str, float]:
    """Mean of hits `(captions, seeds)` in per cent, with its standard error over the captions."""
    of_captions = 100 * hits.mean(axis=1)
    error = of_captions.std(ddof=1) / math.sqrt(len(of_captions))
    return {"percent": round(of_captions.mean(), 1), "standard_error": round(error, 1)}


def compare_drawing(pegs: PegsPipeline, few: Drawer, many: Drawer, count: int, seeds: list[int]) -> dict:
    """Time and emotion of `count` held-out captions drawn by both, from each seed."""
    held_out = pegs.pack.split("test")
    chosen = held_out[:: max(1, len(held_out) // count)][:count]
    states = encode_captions([sticker.caption for sticker in chosen], pegs.model.config.prompt_length)
    for drawer in (few, many):
        drawer(states[:1], 0)
        drawer.calls, drawer.denoising = [], []
    pictures: dict[str, list[Image.Image]] = {"few": [], "many": []}
    for i, prompt_embeds in enumerate(states.split(1)):
        for seed in seeds:
            pictures["few"].append(few(prompt_embeds, seed * len(chosen) + i))
            pictures["many"].append(many(prompt_embeds, seed * len(chosen) + i))
    judge = DrawingJudge.of(pegs, pegs.pack)

    def as_meant(images: list[Image.Image], stickers: list[Sticker]) -> np.ndarray:
        said = np.array(judge.name_emotions(judge.embed(images))).reshape(len(stickers), -1)
        return said == np.array([[sticker.emotion] for sticker in stickers])

    real = as_meant([pegs.pack.image(sticker.id) for sticker in held_out], held_out)
    hits = {name: as_meant(images, chosen) for name, images in pictures.items()}
    frequent = Counter(sticker.emotion for sticker in chosen).most_common(1)[0][1]
    seconds = {"few": statistics.median(few.calls), "many": statistics.median(many.calls)}
    denoising = {"few": statistics.median(few.denoising), "many": statistics.median(many.denoising)}
    return {
        "captions": len(chosen),
        "seeds": seeds,
        "steps": {"few": FEW, "many": MANY},
        "guidance": {"few": 1.0, "many": GUIDANCE},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times_faster": round(seconds["many"] / seconds["few"], 1),
        "denoising_times_faster": round(denoising["many"] / denoising["few"], 1),
        "emotion_agreement": {name: percent(found) for name, found in hits.items()},
        "few_less_many": percent(hits["few"].astype(float) - hits["many"]),
        "judge_on_real_held_out_stickers": percent(real),
        "most_frequent_emotion_percent": round(100 * frequent / len(chosen), 1),
    }


def time_replies(pegs: PegsPipeline, count: int, seed: int) -> dict:
    """Median seconds of whole replies with a sticker, by variant, over the same dialogues."""
    contexts = [context for session in load_mini("test") for context in turn_contexts(session, pegs.pack)[1:2]][:count]
    figures = {}
    for variant in ("ret", "gen", "rag"):
        pegs(contexts[0], variant=variant, seed=seed, sticker_bias=math.inf)
        pegs.counts.clear()
        replies = [pegs(context, variant=variant, seed=seed, sticker_bias=math.inf) for context in contexts]
        parts = {part: statistics.median(reply.seconds[part] for reply in replies) for part in ("text", "sticker")}
        whole = statistics.median(sum(reply.seconds.values()) for reply in replies)
        figures[variant] = {
            "seconds": round(whole, 2),
            **{part: round(value, 2) for part, value in parts.items()},
            **pegs.counts,
        }
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="PEGS checkpoint: the judge, and what replies")
    parser.add_argument("--decoder", help="decoder of few steps, e.g. a distilled one; default the model's")
    parser.add_argument("--against", help="decoder of many steps, default the model's")
    parser.add_argument("--stickers", type=int, default=110, help="how many held-out captions are drawn")
    parser.add_argument("--replies", type=int, default=12, help="how many dialogues are answered by each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each caption is drawn once from each")
    args = parser.parse_args()
    quiet_libraries()
    pegs = load_pipeline(args.model)
    few = Drawer(load_decoder(args.decoder or args.model), num_inference_steps=FEW, guidance_scale=1.0)
    many = Drawer(load_decoder(args.against or args.model), num_inference_steps=MANY, guidance_scale=GUIDANCE)
    if args.decoder:
        pegs.decoder = few.decoder
    decoders = {"few_steps_of": args.decoder or args.model, "many_steps_of": args.against or args.model}
    print(
        json.dumps(
            {
                "benchmark": "decoding",
                "model": Path(args.model).name,
                **{name: Path(folder).name for name, folder in decoders.items()},
                "threads": torch.get_num_threads(),
                "drawing": compare_drawing(pegs, few, many, args.stickers, args.seeds),
                "replies": time_replies(pegs, args.replies, args.seeds[0]),
            }
        )
    )


if __name__ == "__main__":
    main()
