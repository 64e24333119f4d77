"""Fresh PEGS models and processors from a model's YAML file."""

from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BlipImageProcessorPil
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from modeling_pegs import PegsConfig, PegsModel, PegsProcessor
from modeling_pegs.backbones import find_language_model, find_vision_model, load_vision
from pegs.places import HUB_ID
from pegs.training.stages import ConfigError, reading


def load_checkpoint(folder: str, key: str = "init_from") -> tuple[PegsModel, PegsProcessor]:
    """
    The model and the processor of a PEGS checkpoint.

    Args:
        folder (`str`): Folder or Hub id.
        key (`str`, *optional*, defaults to `"init_from"`): What names it in a configuration.

    Raises:
        ConfigError: If there is none, or a broken one.

    """
    if not Path(folder).exists() and not HUB_ID.fullmatch(folder):
        raise ConfigError(f"{key} {folder}: no such folder; it is what the stage before leaves.")
    with reading(f"{key} {folder}"):
        return PegsModel.from_pretrained(folder), PegsProcessor.from_pretrained(folder)


def build_model(path: str, vision_from: str = "") -> PegsModel:
    """
    A PEGS model with fresh weights around its frozen language model.

    Args:
        path (`str`): YAML file with the arguments of [`PegsConfig`]; `language_model` is required.
        vision_from (`str`, *optional*): Folder or Hub id of the BLIP-2, CLIP or SigLIP checkpoint whose vision tower, and Q-Former if it has one,
            the model takes over, and refers to as long as they stay frozen.

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
        model.config.vision_source = {"hub_id": vision_from}
        model.config.vision_source["parts"] = load_vision(model, find_vision_model(model.config.vision_source))
    return model


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
