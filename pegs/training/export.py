"""
Put a trained model and its decoder into one folder in Hub layout, in half precision, calibrated for any sticker rate on a turn of each session.

    python -m pegs.training.export --language outputs/mini/joint --decoder outputs/mini/decoder_unet/pipeline --out checkpoints/pegs-mini
"""

import argparse
import json
import logging
import random
import shutil
from functools import partial
from pathlib import Path

import torch

from dataset_builders.schema import EMOTIONS, Session
from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.generation_pegs import find_sticker_bias
from pegs.training.calibrate import logit_quantiles, sticker_logits
from pegs.training.dialogues import turn_contexts
from pegs.training.text_states import encode_captions
from pipelines.emotions import EmotionStates
from pipelines.pipeline_sticker import StickerPipeline


logger = logging.getLogger(__name__)

SAMPLING = {"do_sample": True, "temperature": 0.4, "top_p": 0.9, "max_new_tokens": 64, "num_drafts": 4}


def export(language: str, decoder: str, out: str, sessions: list[Session], pack: StickerPack) -> None:
    """
    Write the folder that `AutoModel`, `AutoProcessor` and `DiffusionPipeline` all load from.

    Weights are stored as float16 and computed with as float32, which the configuration says.

    Args:
        language (`str`): Trained PEGS checkpoint.
        decoder (`str`): Trained `StickerPipeline` folder.
        out (`str`): Folder to write; only the card of an earlier export is kept.
        sessions (`list[Session]`): Training and validation sessions. `sticker_rate` is calibrated on one turn of each, since turns of a session are alike, and its default is the share of
            their System turns with a sticker.
        pack ([`StickerPack`]): Where their stickers are.

    Raises:
        ValueError: If `out` holds something else than an earlier export, or what is to be exported.

    """
    folder = Path(out)
    for name, source in (("language", language), ("decoder", decoder)):
        if Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {out} is emptied before it is written, and --{name} {source} is in it.")
    if any(folder.glob("*")) and not (folder / "model_index.json").is_file():
        raise ValueError(f"--out {out} is not empty and holds no earlier export.")
    pipeline = StickerPipeline.from_pretrained(decoder, dtype=torch.float16)
    for part in (pipeline.unet, pipeline.vae):
        part.register_to_config(_name_or_path="")  # a place on this machine
    things = [sticker.caption.rpartition(",")[0] for sticker in pack.split("train")]
    pipeline.emotion_states = EmotionStates.measure(partial(encode_captions, max_length=pipeline.config.prompt_length), things, EMOTIONS)  # fmt: skip
    model, processor = PegsModel.from_pretrained(language), PegsProcessor.from_pretrained(language)
    model.generation_config.update(**SAMPLING, allow_custom_entries=True)
    model.generation_config.max_length = None
    vars(model.generation_config).pop("sticker_bias", None)  # of an earlier stage; the rate says it now
    golds = [turn.system.sticker is not None for session in sessions for turn in session.turns]
    rng = random.Random(0)
    contexts = [rng.choice(turn_contexts(session, pack)) for session in sessions]
    quantiles = logit_quantiles(sticker_logits(model, processor, contexts))
    rate = round(sum(golds) / len(golds), 3)
    logger.info("sticker_rate %.3f, bias %.3f", rate, find_sticker_bias(rate, torch.tensor(quantiles), sampled=True))
    settings = {"sticker_rate": rate, "sticker_logit_quantiles": quantiles}
    model.generation_config.update(allow_custom_entries=True, **settings)
    for path in folder.glob("*"):
        if path.name not in ("README.md", "figures.json", "drawing.json", "assets"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    pipeline.save_pretrained(folder)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))  # less than half the size
    (folder / "tokenizer.json").write_text(compact, "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("language", "decoder", "out"):
        parser.add_argument(f"--{name}", required=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sessions = [*load_mini("train"), *load_mini("validation")]
        export(**vars(parser.parse_args()), sessions=sessions, pack=cached_pack())
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
