"""The paper's sizes, on the meta device: no weights, no memory."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_pegs import PegsConfig, PegsModel


CONFIG = Path(__file__).parents[2] / "configs" / "vicuna-7b" / "model.yaml"


def count(module: torch.nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.fixture(scope="module")
def model():
    values = yaml.safe_load(CONFIG.read_text())
    vicuna = LlamaConfig(intermediate_size=11008)  # the other defaults are Llama 7B's
    with torch.device("meta"):
        model = PegsModel(PegsConfig(text_config=vicuna, **values))
        model.attach_language_model(LlamaForCausalLM(vicuna))
    return model


def test_components_have_the_papers_sizes(model):
    assert count(model.causal_lm) - count(model.language_model, trainable=True) == 6_738_415_616
    assert count(model.language_model, trainable=True) == 4_194_304  # LoRA r 8 on q and v of 32 layers
    assert count(model.language_projection) == 768 * 4096 + 4096  # 3.15 M
    assert count(model.feature_mapper) == pytest.approx(31.96e6, rel=5e-3)
    assert count(model.vision_model) == pytest.approx(985.9e6, rel=1e-2)
    assert model.query_tokens.shape == (1, 32, 768)


def test_the_added_vocabulary_is_as_published(model):
    config = model.config
    assert config.new_tokens[:2] == ["<Img>", "</Img>"] and config.first_new_token_id == 32000
    assert len(config.img_token_ids) == 64 and config.img_token_ids[0] == config.image_token_id + 1
    assert model.feature_mapper.queries.shape[-2:] == (77, 512)
