"""Fresh PEGS models and processors from a model's YAML file."""

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BlipImageProcessorPil
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from modeling_pegs import PegsConfig, PegsModel, PegsProcessor
from modeling_pegs.backbones import find_language_model


def build_model(path: str, vision_from: str = "") -> PegsModel:
    """
    A PEGS model with fresh weights around its frozen language model.

    Args:
        path (`str`): YAML file with the arguments of [`PegsConfig`]; `language_model` is required.
        vision_from (`str`, *optional*): Folder or Hub id of the BLIP-2, CLIP or SigLIP checkpoint whose vision tower, and Q-Former if it has one,
            the model takes over.

    Returns:
        `PegsModel`: With the language model attached.

    """
    values = yaml.safe_load(Path(path).read_text("utf-8"))
    folder = find_language_model(values["language_model"])
    text_config = AutoConfig.from_pretrained(folder)
    first_new_token_id = len(AutoTokenizer.from_pretrained(folder))
    model = PegsModel(PegsConfig(text_config=text_config, first_new_token_id=first_new_token_id, **values))
    model.attach_language_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    if vision_from:
        load_vision(model, vision_from)
    return model


def load_vision(model: PegsModel, source: str) -> None:
    """
    Take over a checkpoint's vision tower, and its Q-Former and queries if it has them.

    Args:
        model ([`PegsModel`]): Changed in place.
        source (`str`): Folder or Hub id of a BLIP-2, CLIP or SigLIP checkpoint in safetensors.

    Raises:
        ValueError: If the checkpoint lacks a tensor of the vision tower, or has one of another shape.

    """
    folder = (
        Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
    )
    found = dict(_read_vision(folder))
    parts = ["vision_model", "qformer"] if any(name.startswith("qformer.") for name in found) else ["vision_model"]
    for part in parts:
        expected = getattr(model, part).state_dict()
        tensors = {name.removeprefix(f"{part}."): tensor for name, tensor in found.items() if name.startswith(part)}
        nested = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}
        for name, tensor in expected.items():
            value = tensors.get(name, nested.get(name))
            if value is None or value.shape != tensor.shape:
                shape = "is missing" if value is None else f"has the shape {tuple(value.shape)}"
                raise ValueError(f"{source}: {part}.{name} {shape}, the configuration asks for {tuple(tensor.shape)}.")
            tensor.copy_(value)
    if "query_tokens" in found:
        model.query_tokens.data.copy_(found["query_tokens"])


def _read_vision(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a folder's safetensors files hold of vision tower, Q-Former and queries."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.removeprefix("model.")
                if name.startswith(("vision_model.", "qformer.")) or name == "query_tokens":
                    yield name, file.get_tensor(key)


def build_processor(config: PegsConfig, chat_template_file: str) -> PegsProcessor:
    """
    The processor of a fresh model.

    Args:
        config ([`PegsConfig`]): The model's configuration.
        chat_template_file (`str`): Jinja file; `img_span` in it becomes the model's `[IMG1]` ... `[IMGr]`.

    Returns:
        `PegsProcessor`: Its tokenizer knows the added tokens under the ids that the configuration says.

    """
    tokenizer = AutoTokenizer.from_pretrained(find_language_model(config.language_model))
    tokenizer.add_special_tokens({"extra_special_tokens": config.new_tokens})
    assert tokenizer.convert_tokens_to_ids("<IMG>") == config.image_token_id
    assert tokenizer.convert_tokens_to_ids(config.new_tokens[3:]) == config.img_token_ids
    size = config.vision_config.image_size
    is_siglip = config.vision_config.model_type.startswith("siglip")
    image_processor = BlipImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=IMAGENET_STANDARD_MEAN if is_siglip else OPENAI_CLIP_MEAN,
        image_std=IMAGENET_STANDARD_STD if is_siglip else OPENAI_CLIP_STD,
    )
    span = "".join(config.new_tokens[3:])
    template = Path(chat_template_file).read_text("utf-8").replace("{{ img_span }}", span)
    return PegsProcessor(image_processor, tokenizer, config.num_query_tokens, chat_template=template)
