"""
Text metrics and MMr at the size of the paper's test split, one JSON line.

    python benchmarks/evaluation.py [--turns 6128]

The predictions are synthetic: references of StickerConv-mini, replies that are other references with some words changed, and stickers of the `openmoji` pack at the paper's rates.
`text` is everything of Table 1 without BERTScore, with bootstrap intervals. `mmr` counts what the mini towers are given: each different sticker and text once.
"""

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dataset_builders.stickerconv.sessions import load_mini
from pegs.evaluation.multimodal import Embedded, EmotionVote, MiniTower, evaluate_multimodal
from pegs.evaluation.predict import Line, Prediction, Predictions, Said, read_predictions, sent_sticker
from pegs.evaluation.text import evaluate_text
from pegs.places import DEFAULT_MODEL, load_pack
from pegs.quiet import quiet_libraries


def write_predictions(file: Path, turns: int, pack, seed: int = 0) -> Predictions:
    """Write synthetic predictions, five turns a session."""
    rng = random.Random(seed)
    lines = [turn.system.text for session in load_mini() for turn in session.turns]
    words = sorted({word for line in lines for word in line.split()})

    def say(text: str, rate: float) -> Said:
        return Said(text=text, sticker=sent_sticker(rng.choice(pack.stickers)) if rng.random() < rate else None)

    with file.open("w", encoding="utf-8") as out:
        for turn in range(turns):
            reply = " ".join(word if rng.random() < 0.8 else rng.choice(words) for word in rng.choice(lines).split())
            row = Prediction(
                session_id=f"s{turn // 5}",
                turn=turn % 5 + 1,
                context=(Line(role="user", text="x"),),
                reference=say(" ".join(rng.choices(words, k=rng.randint(8, 30))), 0.6),
                predicted=say(reply, 0.8),
                model="synthetic",
                seed=seed,
            )
            out.write(row.model_dump_json(exclude_defaults=True) + "\n")
    return read_predictions(file)


class CountingTower(MiniTower):
    """The mini tower; counts what it embeds."""

    texts = images = 0

    def embed_texts(self, texts):
        """As [`MiniTower`]."""
        self.texts += len(texts)
        return super().embed_texts(texts)

    def embed_images(self, images):
        """As [`MiniTower`]."""
        self.images += len(images)
        return super().embed_images(images)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=6128, help="the paper's test split has 6,128")
    args = parser.parse_args()
    quiet_libraries()
    pack = load_pack("openmoji")
    with TemporaryDirectory() as folder:
        run = write_predictions(Path(folder) / "synthetic.jsonl", args.turns, pack)
        started = time.perf_counter()
        evaluate_text(run)
        text_seconds = time.perf_counter() - started
        tower = CountingTower(str(DEFAULT_MODEL))
        started = time.perf_counter()
        embedded = Embedded([run], pack, tower)
        embed_seconds = time.perf_counter() - started
        evaluate_multimodal(run, embedded, EmotionVote(pack, tower))
        sent = [said.sticker.id for row in run.rows for said in (row.reference, row.predicted) if said.sticker]
        different = len({said.text for row in run.rows for said in (row.reference, row.predicted)})
    figures = {
        "turns": args.turns,
        "threads": torch.get_num_threads(),
        "text": {"seconds": round(text_seconds, 1), "limit": 60},
        "mmr": {
            "stickers_sent": len(sent),
            "different_stickers": len(set(sent)),
            "stickers_embedded": tower.images,
            "different_texts": different,
            "texts_embedded": tower.texts,
            "embedding_seconds": round(embed_seconds, 1),
            "seconds": round(time.perf_counter() - started, 1),
        },
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
