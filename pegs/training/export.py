"""
Put a trained model and its decoder into one folder in Hub layout, in half precision.

    python -m pegs.training.export --language outputs/mini/joint --decoder outputs/mini/decoder_unet/pipeline --out checkpoints/pegs-mini
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from modeling_pegs import PegsModel, PegsProcessor
from pipelines.pipeline_sticker import StickerPipeline


def export(language: str, decoder: str, out: str) -> None:
    """
    Write the folder that `AutoModel`, `AutoProcessor` and `DiffusionPipeline` all load from.

    Weights are stored as float16 and computed with as float32, which the configuration says.

    Args:
        language (`str`): Trained PEGS checkpoint.
        decoder (`str`): Trained `StickerPipeline` folder.
        out (`str`): Folder to write; only the card of an earlier export is kept.

    """
    folder = Path(out)
    for path in folder.glob("*"):
        if path.name not in ("README.md", "figures.json", "assets"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    pipeline = StickerPipeline.from_pretrained(decoder, dtype=torch.float16)
    pipeline.save_pretrained(folder)
    model = PegsModel.from_pretrained(language)
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1, max_new_tokens=64
    )
    model.generation_config.max_length = None
    model.half().save_pretrained(folder)
    PegsProcessor.from_pretrained(language).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("language", "decoder", "out"):
        parser.add_argument(f"--{name}", required=True)
    export(**vars(parser.parse_args()))
