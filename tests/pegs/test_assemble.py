"""Checkpoints as they may come from elsewhere."""

import pytest
import torch
from safetensors.torch import load_file

from pegs.assemble import load_pipeline
from pegs.errors import InputError
from pegs.places import load_pack, load_sessions
from tests.fixtures import tiny


@pytest.fixture
def drawing_only(tmp_path):
    model = tiny.make_tiny_model(variant="gen", num_retrieval_tokens=0)
    tiny.make_tiny_decoder().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tiny.make_tiny_processor(model.config).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_that_only_draws_can_be_loaded(drawing_only):
    pipeline = load_pipeline(drawing_only)
    assert pipeline.selector is None
    settings = {"max_new_tokens": 3, "forced_eos_token_id": tiny.EOS, "sticker_bias": float("inf"), "size": 32}
    reply = pipeline(tiny.dialogue(), variant="gen", num_inference_steps=2, **settings)
    assert reply.sticker is not None and reply.sticker_id is None
    with pytest.raises(InputError, match="needs `num_retrieval_tokens` > 0"):
        load_pipeline(drawing_only, variant="ret")


@pytest.mark.parametrize("name", ["model.safetensors", "unet/diffusion_pytorch_model.safetensors"])
def test_a_truncated_checkpoint_is_one_line(drawing_only, name):
    file = drawing_only / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError) as caught:
        load_pipeline(drawing_only)
    assert str(caught.value).startswith(f"--model {drawing_only}: ") and "\n" not in str(caught.value)


def test_a_decoder_of_pickles_is_not_opened(drawing_only):
    weights = drawing_only / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_pipeline(drawing_only)


@pytest.mark.parametrize(("name", "said"), [
    ("none.jsonl", "No such file or directory"),
    ("empty", "No such file or directory"),
    ("broken", "dataset.yaml: not YAML"),
    ("bad.jsonl", "bad.jsonl:1: turns: "),
])  # fmt: skip
def test_sessions_that_cannot_be_read_are_one_line(tmp_path, name, said):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "dataset.yaml").write_text("{")
    (tmp_path / "bad.jsonl").write_text('{"session_id": "a", "split": "train", "database": 1, "profile": null}')
    with pytest.raises(InputError, match=said) as caught:
        load_sessions(str(tmp_path / name), "test")
    assert "\n" not in str(caught.value)
    if name == "broken":
        with pytest.raises(InputError, match=r"--stickers .*broken: .*not YAML"):
            load_pack(str(tmp_path / name))
