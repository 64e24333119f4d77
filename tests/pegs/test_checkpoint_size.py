"""What training saves is small: an adapter and heads."""

from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_pegs import PegsConfig, PegsModel
from pegs.training.language import freeze_except


ROOT = Path(__file__).parents[2]


def test_the_mini_checkpoint_is_under_25_mb():
    folder = ROOT / "checkpoints" / "pegs-mini"
    files = [folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"]
    assert sum(file.stat().st_size for file in files) < 25e6


def test_all_that_the_papers_stages_train_is_under_250_mb():
    configs = ROOT / "configs" / "vicuna-7b"
    vicuna = LlamaConfig(intermediate_size=11008)
    with torch.device("meta"):
        model = PegsModel(PegsConfig(text_config=vicuna, **yaml.safe_load((configs / "model.yaml").read_text())))
        model.attach_language_model(LlamaForCausalLM(vicuna))
    stages = [yaml.safe_load(path.read_text()) for path in configs.glob("*.yaml")]
    freeze_except(model, sorted({prefix for stage in stages for prefix in stage.get("trainable", [])}))
    assert sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) < 250e6  # in float32
