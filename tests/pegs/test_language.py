"""Packing, kept vision features, and runs that are cut."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dataset_builders.stickerconv.build import build_dataset
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.language import PegsTrainer, last_whole_checkpoint
from pegs.training.stages import main
from pegs.training.targets import VisionFeatures
from tests.fixtures import tiny
from tests.fixtures.processes import run_two
from tests.pegs.test_stage_configs import make_pack, make_session


ROOT = Path(__file__).parents[2]


class Targets:
    vision_features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def positives(self, sent):
        return torch.nn.functional.one_hot(torch.arange(len(sent)), 3).bool()

    def prompt_embeds(self, sent):
        return torch.ones(len(sent), 5, 24)


def features() -> list[dict]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A good name."}]}
    return [{"messages": [*tiny.dialogue(), answer]}, {"messages": tiny.dialogue()[:2]}]


def test_a_packed_row_has_the_loss_and_gradients_of_padded_rows(processor):
    results = []
    for packed in (False, True):
        model = tiny.make_tiny_model()
        if packed:
            model.causal_lm.set_attn_implementation("dialogues")
        batch = DataCollatorForPegs(processor, model.config, Targets(), 600, packed=packed)(features())
        assert batch["input_ids"].shape[0] == (1 if packed else 2)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_packed_dialogue_does_not_see_the_one_before_it(processor):
    model = tiny.make_tiny_model()
    model.causal_lm.set_attn_implementation("dialogues")
    collator = DataCollatorForPegs(processor, model.config, Targets(), 600, packed=True)
    alone, after = collator(features()[1:]), collator(features())
    length = alone["input_ids"].shape[1]
    keys = ("input_ids", "position_ids", "pixel_values")
    one, two = (model(**{k: b[k] for k in keys}).last_hidden_state for b in (alone, after))
    torch.testing.assert_close(one, two[:, -length:])


def test_what_is_not_packed_is_as_without_packing(processor):
    contexts = [tiny.dialogue(), tiny.dialogue(stickers=False)]  # of different length: padded on the left
    inputs = processor.apply_chat_template(contexts, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    results = []
    for attention in ("sdpa", "dialogues"):
        model = tiny.make_tiny_model()
        model.causal_lm.set_attn_implementation(attention)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=5, sticker_bias=torch.inf)
        results.append((output.sequences, output.sticker_queries))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_kept_vision_features_give_the_same_batch_and_are_computed_once(tmp_path, monkeypatch, processor):
    monkeypatch.setattr("pegs.training.targets.HF_HOME", str(tmp_path))
    model, pack = tiny.make_tiny_model(), make_pack()
    vision = VisionFeatures(pack, model, processor)
    collator = DataCollatorForPegs(processor, model.config, Targets(), 600, vision=vision)
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "image", "image": b"", "sticker_id": "red"}],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Ho"}, {"type": "image", "image": b"", "sticker_id": "blue"}],
        },
    ]
    batch = collator([{"messages": messages}])
    assert "pixel_values" not in batch
    inputs = processor(["<IMG>"] * 2, [pack.image(i) for i in ("red", "blue")], return_tensors="pt")
    expected = model.encode_images(inputs["pixel_values"])
    torch.testing.assert_close(batch["vision_states"], expected.last_hidden_state)
    torch.testing.assert_close(vision.pooled(["blue"]), expected.pooler_output[1:])
    monkeypatch.setattr("pegs.training.targets.compute_vision", None)  # the second time nothing is computed
    VisionFeatures(pack, model, processor)
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.mul_(2)
    with pytest.raises(TypeError, match="not callable"):  # other weights, other features
        VisionFeatures(pack, model, processor)


def test_a_checkpoint_that_was_cut_is_not_resumed(tmp_path):
    assert last_whole_checkpoint(str(tmp_path / "none")) is None
    for step, text in ((1, "{}"), (2, "{"), (3, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")


def stage(folder: Path, sessions: int, **changes) -> list[str]:
    """The arguments of `train.py` for a joint stage at tiny sizes, from a start in `folder`."""
    start = tiny.make_tiny_model(lora={"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]})
    start.save_pretrained(folder / "start")
    tiny.make_tiny_processor(start.config).save_pretrained(folder / "start")
    make_pack().save(folder / "pack")
    made = [make_session(number, "train") for number in range(sessions)] + [make_session(sessions, "validation")]
    (folder / "sessions.jsonl").write_text("\n".join(session.model_dump_json() for session in made))
    values = {
        "stage": "joint",
        "data": "sessions",
        "init_from": str(folder / "start"),
        "stickers": str(folder / "pack"),
    }
    values |= {"trainable": ["lora", "added_vocabulary", "qformer", "retrieval_head"], "negatives": "batch"}
    values |= {"sessions": str(folder / "sessions.jsonl"), "packed": True, "loss_weights": {"generation": 0.0}}
    (folder / "joint.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return ["--config", str(folder / "joint.yaml"), "--output_dir"]


TWO_PROCESSES = """
import os, sys, torch
import accelerate.state
from accelerate.utils import DistributedType
from pegs.training.stages import main

torch.set_num_threads(1)
begin = accelerate.state.PartialState.__init__

def on_a_cpu(self, *args, **kwargs):  # accelerate shards on GPUs alone; torch does on any device
    begin(self, *args, **kwargs)
    if "ACCELERATE_USE_FSDP" in os.environ and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

accelerate.state.PartialState.__init__ = on_a_cpu
sys.exit(main(sys.argv[1:]))
"""


def train_in_two(command: list[str], sharded: bool) -> None:
    """Run `train.py` in two processes, each with all weights, or sharing them as `configs/accelerate/fsdp2.yaml` has it."""
    environment = {}
    if sharded:
        settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
        renamed = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
        environment = {renamed.get(name, name.upper()): str(value).lower() if value in (True, False) else str(value) for name, value in settings.items()}  # fmt: skip
        environment["ACCELERATE_USE_FSDP"] = "true"
    run_two(TWO_PROCESSES, command, environment)


@pytest.mark.slow
def test_shared_weights_become_those_of_whole_ones(tmp_path):
    trainer = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "no"}  # fmt: skip
    command = stage(tmp_path, 13, trainer=trainer)
    folder = tmp_path / "shared"
    train_in_two([*command, str(folder)], sharded=True)
    first = load_file(folder / "model.safetensors")
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in (tmp_path / "start").glob("*.py")}
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == auto_map["AutoModelForImageTextToText"] == "modeling_pegs.PegsModel"
    shutil.rmtree(folder / "trainer" / "checkpoint-4")
    (folder / "model.safetensors").unlink()
    train_in_two([*command, str(folder)], sharded=True)
    resumed = load_file(folder / "model.safetensors")
    train_in_two([*command, str(tmp_path / "whole")], sharded=False)
    whole, start = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "start"))
    assert sum(not torch.equal(value, start[name]) for name, value in whole.items()) > 20
    for name, value in whole.items():
        assert torch.equal(resumed[name], first[name]), name
        torch.testing.assert_close(first[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_goes_on_with_its_own_checkpoints_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pegs.training.targets.HF_HOME", str(tmp_path))
    caplog.set_level("INFO")
    trainer = {"max_steps": 1, "save_steps": 1, "bf16": True, "eval_strategy": "steps", "optim": "sgd"}
    command = stage(tmp_path, 2, trainer=trainer, dtype="bfloat16", attn_implementation="eager", packed=False)
    made = []

    class Spy(PegsTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr("pegs.training.language.PegsTrainer", Spy)
    results = {}
    for name, changes in {"a": [], "again": [], "b": ["--lora_learning_rate", "0.5"]}.items():
        assert main([*command, str(tmp_path / "out"), "--samples", "1", *changes]) == 0
        results[name] = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name, value in results["a"].items() if not torch.equal(value, results["b"][name])}
    assert changed and all(".lora_" in name for name in changed)
    assert all(torch.equal(value, results["again"][name]) for name, value in results["a"].items())
    assert sum("is of another run, and moves to" in message for message in caplog.messages) == 1
    model = made[0].model
    dtypes = {parameter.requires_grad: set() for parameter in model.parameters()}
    for parameter in model.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes[True] == {torch.float32} and torch.bfloat16 in dtypes[False]
    assert {p.dtype for n, p in model.language_model.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    assert model.causal_lm.config._attn_implementation == "eager"
    assert isinstance(made[0].optimizer.optimizer, torch.optim.SGD)
    assert (tmp_path / "out" / "replies.jsonl").is_file()


def test_a_built_dataset_is_sessions_and_stickers(tmp_path, monkeypatch):
    monkeypatch.setattr("pegs.training.targets.HF_HOME", str(tmp_path))
    command = stage(tmp_path, 2, trainer={"max_steps": 1, "eval_strategy": "no"})
    build_dataset([tmp_path / "sessions.jsonl"], tmp_path / "built", stickers=str(tmp_path / "pack"))
    both = ["--sessions", str(tmp_path / "built"), "--stickers", str(tmp_path / "built")]
    assert main([*command, str(tmp_path / "one")]) == main([*command, str(tmp_path / "two"), *both]) == 0
    one, two, start = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "start"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, start[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    trainer = {"max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    trainer |= {"save_steps": 3, "save_total_limit": 2, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    config = stage(tmp_path, 26, trainer=trainer)  # seven steps an epoch, none of which ends where something is saved

    def command(name: str) -> list[str]:
        return [sys.executable, str(ROOT / "train.py"), *config, str(tmp_path / name)]

    subprocess.run(command("whole"), check=True, capture_output=True, cwd=ROOT)
    process = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    while not (tmp_path / "cut" / "trainer" / "checkpoint-6" / "trainer_state.json").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    subprocess.run(command("cut"), check=True, capture_output=True, cwd=ROOT)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert any(".lora_" in name for name in one)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
