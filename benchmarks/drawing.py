"""
How good the drawn stickers of a model are, one JSON line; contact sheets and `drawing.json` into the checkpoint, for its card.

    python benchmarks/drawing.py [--model checkpoints/pegs-mini] [--turns 120]

`captions`: the captions of the held-out stickers, drawn as the model does by itself, and in 20 and 50 steps with guidance, beside the real stickers. `replies`: stickers for
test turns where the gold reply has one, by Gen, RAG and Ret: one drawing each from the generation tokens, and `as sent`, chosen among the candidates that
the model draws by itself. What each figure is, [`measure_drawings`] says.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dataset_builders.schema import EMOTIONS, Sticker
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.encoder import TextEncoder
from pegs.assemble import load_pipeline
from pegs.evaluation.drawing import DrawingJudge, choose_evenly, draw_all, measure_drawings, save_sheet, to_pixels
from pegs.evaluation.predict import system_turns
from pegs.evaluation.replies import write_replies
from pegs.places import DEFAULT_MODEL
from pegs.quiet import quiet_libraries
from pegs.training.text_states import encode_captions
from pipelines.pipeline_pegs import PegsPipeline
from pipelines.pipeline_sticker import StickerPipeline


THINGS = ("face", "cat face", "person", "sleeping face", "dog", "red heart")
GUIDANCE = 2.5
SIZE = 256


def draw_replies(
    pegs: PegsPipeline, count: int, seed: int
) -> tuple[dict[str, list[Image.Image]], list[str], list[Sticker]]:
    """Stickers by kind of reply for test turns, with the replies' words and the gold stickers."""
    turns = [turn for turn in system_turns(load_mini("test"), pegs.pack) if turn.turn.system.sticker is not None]
    chosen = turns[:: max(1, len(turns) // count)][:count]
    written = write_replies(pegs, [turn.context for turn in chosen], sticker_bias=math.inf, do_sample=False)
    states = torch.stack([reply.prompt_embeds for reply in written])
    nearest = [pegs.retrieve(reply.query, 1) for reply in written]
    over = torch.cat([pegs.mix_latents(found) for found in nearest])
    images = {
        "Ret": [pegs.pack.image(found[0].id) for found in nearest],
        "Gen": draw_all(pegs.decoder, states, seed),
        "RAG": draw_all(pegs.decoder, states, seed, init_image=over, strength=0.6),
    }
    for name, variant in (("Gen as sent", "gen"), ("RAG as sent", "rag")):
        images[name] = [
            pegs(turn.context, variant, seed + i, floor=0, size=SIZE, sticker_bias=math.inf, do_sample=False).sticker
            for i, turn in enumerate(chosen)
        ]
    golds = [pegs.pack.by_id[turn.turn.system.sticker.id] for turn in chosen]
    return images, [reply.text for reply in written], golds


def main() -> None:
    """Print the figures and draw the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--turns", type=int, default=120, help="how many test turns are answered")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet_libraries()
    pegs = load_pipeline(args.model)
    judge, pack = DrawingJudge.of(pegs, pegs.pack), pegs.pack
    embed = TextEncoder(pegs.model.config.retrieval_text_encoder)
    training = to_pixels([pack.image(sticker.id) for sticker in pack.split("train")])

    def measure(images: Sequence[Image.Image], meant: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
        return measure_drawings(judge, images, meant, torch.from_numpy(embed(captions)), training)

    held_out = pack.split("test")
    captions, emotions = [s.caption for s in held_out], [s.emotion for s in held_out]
    length = pegs.model.config.prompt_length
    states = encode_captions(captions, length)
    few = f"{pegs.decoder.config.default_num_inference_steps} steps"
    drawn = {few: draw_all(pegs.decoder, states, args.seed)}
    for steps in (20, 50):
        name = f"{steps} steps, guidance {GUIDANCE}"
        drawn[name] = draw_all(pegs.decoder, states, args.seed, num_inference_steps=steps, guidance_scale=GUIDANCE)
    figures: dict = {"benchmark": "drawing", "model": Path(args.model).name, "held_out": len(held_out)}
    figures["captions"] = {
        **{name: measure(images, emotions, captions) for name, images in drawn.items()},
        "real stickers": measure([pack.image(sticker.id) for sticker in held_out], emotions, captions),
        "chance": {"emotion_agreement": round(max(map(emotions.count, EMOTIONS)) / len(emotions), 3), "caption_recall_at_10": 0.1},
    }  # fmt: skip
    replies, words, golds = draw_replies(pegs, args.turns, args.seed)
    meant, about = [sticker.emotion for sticker in golds], [sticker.caption for sticker in golds]
    figures["turns"] = len(golds)
    figures["replies"] = {name: measure(images, meant, about) for name, images in replies.items()}

    assets = Path(args.model) / "assets"
    shown = choose_evenly(held_out, 6)
    images = dict(zip([sticker.id for sticker in held_out], drawn[few], strict=True))
    labels = [f"{sticker.emotion}: {sticker.tags[0]}" for sticker in shown]
    save_sheet([images[sticker.id] for sticker in shown], labels, 6, assets / "held_out_42.png")
    save_sheet(replies["Gen as sent"][:42], words[:42], 6, assets / "replies_42.png")
    asked = [f"{thing}, {emotion}" for thing in THINGS for emotion in EMOTIONS]
    grid = [image for row in encode_captions(asked, length).split(len(EMOTIONS)) for image in same_noise(pegs.decoder, row, args.seed)]  # fmt: skip
    save_sheet(grid, asked, len(EMOTIONS), assets / "emotions_42.png")
    (Path(args.model) / "drawing.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    print(json.dumps(figures))


def same_noise(decoder: StickerPipeline, states: torch.Tensor, seed: int) -> list[Image.Image]:
    """Stickers for `states` `(N, L, D)` that all start from the same noise, so that only the caption tells them apart."""
    generators = [torch.Generator().manual_seed(seed) for _ in states]
    return decoder(prompt_embeds=states, generator=generators).images


if __name__ == "__main__":
    main()
