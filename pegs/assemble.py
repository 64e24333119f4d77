"""Putting the parts together: model, processor, pack and decoder as one `PegsPipeline`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from dataset_builders.schema import Sticker
from dataset_builders.stickers.encoder import TextEncoder
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from pegs.errors import InputError
from pegs.places import DEFAULT_MODEL, load_pack
from pegs.training.cache import digest, write_tensors
from pipelines.pipeline_pegs import PegsPipeline
from pipelines.pipeline_sticker import StickerPipeline


def embed_pack(model: PegsModel, processor: PegsProcessor, pack: StickerPack) -> torch.Tensor:
    """
    A pack's vectors `(M, e)` in the model's retrieval space: of the caption where a sticker is annotated and the model's space has a sentence encoder, else of
    the picture. Kept in `$HF_HOME/stickerconv/vectors` for the next time.
    """
    encoder_name = model.config.retrieval_text_encoder
    captions = {s.id: s.caption for s in pack.stickers if s.emotion and encoder_name}
    parts = [encoder_name or "", *(f"{sticker.id} {captions.get(sticker.id, '')}" for sticker in pack.stickers)]
    if len(captions) < len(pack.stickers):
        parts.append(picture_key(model, pack.stickers))

    def compute() -> torch.Tensor:
        embeddings = torch.zeros(len(pack.stickers), model.config.retrieval_dim)
        known = torch.tensor([sticker.id in captions for sticker in pack.stickers])
        if captions:
            embeddings[known] = torch.from_numpy(TextEncoder(encoder_name)(list(captions.values())))
        if not known.all():
            unknown = [sticker for sticker in pack.stickers if sticker.id not in captions]
            embeddings[~known] = embed_pictures(model, processor, pack, unknown)
        return embeddings

    return _cached("\n".join(parts), compute)


def embed_pictures(
    model: PegsModel, processor: PegsProcessor, pack: StickerPack, stickers: list[Sticker]
) -> torch.Tensor:
    """Vectors `(len(stickers), e)` of stickers' pictures in the model's retrieval space (eq. 5), kept like [`embed_pack`]'s."""

    def compute() -> torch.Tensor:
        chunks = []
        for start in range(0, len(stickers), 64):
            images = [pack.image(sticker.id) for sticker in stickers[start : start + 64]]
            inputs = processor(["<IMG>"] * len(images), images, return_tensors="pt")
            with torch.no_grad():
                chunks.append(model.embed_stickers(inputs["pixel_values"].to(model.device)).float().cpu())
        return torch.cat(chunks)

    return _cached(picture_key(model, stickers), compute)


def picture_key(model: PegsModel, stickers: list[Sticker]) -> str:
    """What the pictures' vectors depend on: the pixels, and the weights of vision tower and image projection."""
    parts = (model.vision_model, model.retrieval_head.image_projection)
    return digest([part.state_dict() for part in parts], [sticker.sha256 for sticker in stickers])


def _cached(key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = Path(HF_HOME) / "stickerconv" / "vectors" / f"{name}.safetensors"
    if not file.is_file():
        write_tensors(file, {"embeddings": compute()})
    return load_file(file)["embeddings"]


def load_pipeline(
    model: str | os.PathLike = DEFAULT_MODEL,
    stickers: str = "openmoji",
    variant: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
) -> PegsPipeline:
    """
    Load everything that answers a dialogue.

    Args:
        model (`str` or `os.PathLike`, *optional*): Folder or Hub id of a PEGS checkpoint with its decoder.
        stickers (`str`, *optional*, defaults to `"openmoji"`): Pack name or folder.
        variant (`str`, *optional*): If given and `"ret"`, no decoder is loaded.
        device (`str`, *optional*, defaults to `"cpu"`): Where model and decoder run.
        revision (`str`, *optional*): Branch, tag or commit of a repository.

    Returns:
        [`PegsPipeline`].

    Raises:
        InputError: If the checkpoint or the pack cannot be read, the variant is unknown, or there is no such device.

    """
    pack = load_pack(stickers)
    folder, pegs, processor = load_model(model, revision)
    try:
        if variant is not None:
            pegs.config.check_variant(variant)
        decoder = None
        if variant != "ret" and (folder / "model_index.json").is_file():
            decoder = StickerPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            decoder.set_progress_bar_config(disable=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"--model {model}: {' '.join(str(error).split())}") from error
    pegs.merge()
    if variant in ("gen", "rag") and decoder is None:
        raise InputError(
            f"--model {model}: has no model_index.json of a sticker decoder, which --variant {variant} needs."
        )
    move(pegs, device)
    if decoder is not None:
        move(decoder, device)
    retrieves = pegs.config.num_retrieval_tokens > 0
    embeds = embed_pack(pegs, processor, pack) if retrieves else torch.zeros(len(pack.stickers), 0)
    try:
        return PegsPipeline(pegs, processor, pack, embeds, decoder, caption_encoder(decoder))
    except ValueError as error:
        raise InputError(f"--model {model}: {error}") from error


def load_model(model: str | os.PathLike, revision: str | None = None) -> tuple[Path, PegsModel, PegsProcessor]:
    """
    A PEGS checkpoint's folder, its model and its processor; see [`load_pipeline`].

    Raises:
        InputError: If it cannot be read, or holds another model.

    """
    folder = resolve_checkpoint(model, revision)
    try:
        pegs, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"--model {model}: {' '.join(str(error).split())}") from error
    if not isinstance(pegs, PegsModel):
        raise InputError(f"--model {model}: holds a {type(pegs).__name__}, not a PegsModel.")
    return folder, pegs, processor


def move(part: Any, device: str) -> None:
    """
    Move a model or a pipeline.

    Raises:
        InputError: If there is no such device.

    """
    try:
        part.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error


def check_rate(model: PegsModel, sticker_rate: float | None) -> None:
    """
    Check that a model can keep a sticker rate.

    Raises:
        InputError: If its generation config lacks what that needs.

    """
    try:
        model.get_sticker_bias(model.generation_config, sticker_rate, None, sampled=True)
    except ValueError as error:
        raise InputError(f"--sticker-rate {sticker_rate}: {error}") from None


def caption_encoder(decoder: StickerPipeline | None) -> Callable[[list[str]], torch.Tensor] | None:
    """From captions to a decoder's prompt embeddings `(B, L, D)`: MiniLM, by which one without a text encoder of its own was trained."""
    if decoder is None or decoder.text_encoder is not None:
        return None

    def encode(captions: list[str]) -> torch.Tensor:
        from pegs.training.text_states import encode_captions  # seconds to import, and seldom used

        return encode_captions(captions, decoder.config.prompt_length)

    return encode


def resolve_checkpoint(model: str | os.PathLike, revision: str | None = None) -> Path:
    """
    Local folder of a checkpoint, downloaded if `model` is a Hub id, at `revision` (branch, tag or commit).

    Raises:
        InputError: If there is no such folder or repository, it has no such revision, or it lacks configuration or weights.

    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: --model {model} is a folder; revisions are of repositories.")
    else:
        if folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith("."):
            raise InputError(f"--model {model}: no such folder.")
        try:
            folder = Path(snapshot_download(str(model), revision=revision))
        except RevisionNotFoundError as error:
            raise InputError(f"--revision {revision}: {model} has no such branch, tag or commit.") from error
        except Exception as error:
            raise InputError(f"--model {model}: neither a folder nor a repository that can be reached.") from error
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {model}: has no config.json.")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"--model {model}: has no weights (model.safetensors).")
    return folder
