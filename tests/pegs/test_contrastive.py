"""One big batch, one dialogue at a time, and two processes give the same gradients."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import TrainingArguments

from pegs.training.contrastive import contrast, contrastive_loss
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.language import PegsTrainer
from tests.fixtures import tiny
from tests.fixtures.processes import run_two


ROOT = Path(__file__).parents[2]
SENT = ["red", "green", "red", "blue"]  # one of them twice


class Targets:
    def prompt_embeds(self, sent):
        generator = torch.Generator().manual_seed(1)
        states = {color: torch.randn(5, 24, generator=generator) for color in sorted(set(SENT))}
        return torch.stack([states[color] for color in sent])


def dialogues() -> list[dict]:
    texts = ["ok", "I see what you mean.", "no", "And then?"]
    return [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": text[::-1]}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": text},
                        {"type": "image", "image": tiny.picture(color), "sticker_id": color},
                    ],
                },
            ]
        }
        for text, color in zip(texts, SENT, strict=True)
    ]


def gradients(folder, batch_size: int, rank: int = 0, world: int = 1, packed: bool = False, dropout: float = 0.0):
    """Gradients of a whole optimizer step over the four dialogues, of which each process has its share."""
    qformer = {**tiny.make_tiny_config().qformer_config.to_dict(), "hidden_dropout_prob": dropout}
    model = tiny.make_tiny_model(qformer_config={**qformer, "attention_probs_dropout_prob": dropout})
    if packed:
        model.causal_lm.set_attn_implementation("dialogues")
    processor = tiny.make_tiny_processor(model.config)
    collator = DataCollatorForPegs(processor, model.config, Targets(), 600, negatives="batch", packed=packed)
    args = TrainingArguments(str(folder), use_cpu=True, remove_unused_columns=False, report_to="none")
    trainer = PegsTrainer(
        model=model, args=args, data_collator=collator, lora_learning_rate=1e-3, contrasts_batch=True
    )
    own = dialogues()[rank::world]
    batches = [collator(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    wrapped = trainer.accelerator.prepare_model(model) if world > 1 else model
    trainer.model_wrapped = wrapped
    model.train()
    samples, _ = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    loss = 0.0
    for number, sample in enumerate(samples):
        if world > 1:
            wrapped.require_backward_grad_sync = number == len(samples) - 1
        loss += trainer.training_step(wrapped, sample).item() / world
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss, grads


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(two) and any("retrieval_head" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Loss and gradients of one big batch, by plain autograd."""
    model = tiny.make_tiny_model()
    collator = DataCollatorForPegs(
        tiny.make_tiny_processor(model.config), model.config, Targets(), 600, negatives="batch"
    )
    batch = dict(collator(dialogues()))
    ids = batch.pop("sticker_ids")
    model.train()
    for module in model.qformer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output = model(**batch)
    loss = output.loss + contrastive_loss(output.text_embeds, output.image_embeds, ids, 0.07)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("batch_size", "packed"), [(4, False), (2, False), (1, False), (2, True), (4, True)])
def test_accumulation_steps_equal_one_big_batch(tmp_path, big, batch_size, packed):
    loss, grads = gradients(tmp_path, batch_size, packed=packed)
    assert loss == pytest.approx(big[0], rel=1e-5)
    assert_same(big[1], grads)


PROCESS = """
import sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from accelerate import PartialState
from safetensors.torch import save_file
from tests.pegs.test_contrastive import gradients
state = PartialState(cpu=True)
loss, grads = gradients(sys.argv[1], 1, state.process_index, 2)
total = torch.tensor(loss)
torch.distributed.all_reduce(total)
if state.is_main_process:
    save_file(grads | {"loss": total}, sys.argv[1] + "/grads.safetensors")
torch.distributed.barrier()
"""


@pytest.mark.slow
def test_two_processes_equal_one_big_batch(tmp_path, big):
    run_two(PROCESS, [str(tmp_path)], {"ACCELERATE_USE_CPU": "true"})
    grads = load_file(tmp_path / "grads.safetensors")
    assert grads.pop("loss").item() == pytest.approx(big[0], rel=1e-5)
    assert_same(big[1], grads)


def test_the_second_pass_has_the_dropout_of_the_first(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pegs.training.language.contrast", lambda texts, *rest: seen.append(texts) or contrast(texts, *rest)
    )
    original = PegsTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        loss, outputs = original(self, model, inputs, return_outputs=True)
        seen.append(outputs.text_embeds.detach())
        return loss

    monkeypatch.setattr(PegsTrainer, "compute_loss", compute_loss)
    gradients(tmp_path, 2, dropout=0.5)
    torch.testing.assert_close(torch.cat(seen[1:]), seen[0])


def test_a_sticker_that_occurs_twice_is_one_sticker():
    texts = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    images = copy.deepcopy(texts[[0, 1, 0]])
    ids = torch.tensor([7, 9, 7])
    logits = texts @ images[:2].T / 0.07
    by_reply = logits.log_softmax(1)
    by_sticker = logits.log_softmax(0)
    expected = -(by_reply[0, 0] + by_reply[1, 1] + by_reply[2, 0]) / 3
    expected = expected - ((by_sticker[0, 0] + by_sticker[2, 0]) / 2 + by_sticker[1, 1]) / 2
    torch.testing.assert_close(contrastive_loss(texts, images, ids, 0.07), expected / 2)


def test_nobody_sends_a_sticker():
    nothing = torch.zeros(0, 8)
    assert contrast(nothing, nothing, torch.zeros(0, dtype=torch.long), 0.07, Accelerator(cpu=True)) is None
