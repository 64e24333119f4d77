"""A resumable training loop on accelerate, for the parts that are no language model."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset, Subset

from pegs.training.cache import digest


if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


logger = logging.getLogger(__name__)


@dataclass
class LoopArguments:
    """
    Parameters of the loop.

    Args:
        output_dir (`str`): Where the result goes; `output_dir/state` holds what a resumed run needs until then.
        max_steps (`int`): Optimizer steps.
        batch_size (`int`): Samples a step.
        learning_rate (`float`): Peak of the cosine schedule (AdamW).
        warmup_steps (`int`): Steps of linear warm-up.
        weight_decay (`float`): AdamW's decoupled weight decay.
        max_grad_norm (`float`): Gradient clipping by norm.
        save_minutes (`float`): Minutes between saved states.
        seed (`int`): Seed of weights, data order and noise.

    """

    output_dir: str
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    save_minutes: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse several processes: what these stages compute before is computed and kept by one."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this stage trains in one process, on one GPU: launch it with `--num_processes 1`.")


def cosine_with_warmup(step: int, warmup_steps: int, max_steps: int) -> float:
    """Learning-rate factor in `[0, 1]` at `step`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def run_key(args: Any, model: torch.nn.Module, *data: Any) -> str:
    """What a run depends on: its parameters but for those of saving and telling, the weights that it starts from, and the data."""
    settings = {
        key: value for key, value in vars(args).items() if key not in ("output_dir", "save_minutes", "samples")
    }
    silent = ("logging_", "save_", "report_to")
    settings["trainer"] = {k: v for k, v in settings.get("trainer", {}).items() if not k.startswith(silent)}
    return digest(json.dumps(settings, sort_keys=True, default=repr), dict(model.state_dict()), data)


def train_loop(
    args: LoopArguments,
    model: torch.nn.Module,
    dataset: Dataset,
    loss_fn: Callable[[torch.nn.Module, dict | torch.Tensor, torch.Generator], torch.Tensor],
    averages: Sequence["EMAModel"] = (),
) -> torch.nn.Module:
    """
    Train `model` for `args.max_steps` steps, bf16 autocast, resuming from `args.output_dir/state` if a run of the same parameters, weights and data was cut.

    Args:
        args (`LoopArguments`): Parameters of the loop.
        model (`torch.nn.Module`): Trained in place.
        dataset (`Dataset`): Map-style, at least `max_steps * batch_size` long: sample `i` is used once, at step `i // batch_size`.
        loss_fn (`Callable`): `(model, batch, generator) -> loss`; every random draw comes from `generator`.
        averages (`Sequence[EMAModel]`): Moving averages of the weights, one step further after each of the optimizer's.

    Returns:
        `torch.nn.Module`: The trained model, unwrapped.

    """
    key = run_key(args, model, dataset[0])
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision="bf16")
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_with_warmup(step, args.warmup_steps, args.max_steps)
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler, *averages)
    state, first = Path(args.output_dir) / "state", 0
    step_file = state / "step"
    if step_file.is_file():
        saved_step, _, saved_key = step_file.read_text().partition(" ")
        if saved_key == key and (state / f"step-{saved_step}").is_dir():
            accelerator.load_state(str(state / f"step-{saved_step}"))
            first = int(saved_step)
        logger.info("resumed at step %d" if first else "starts at step %d: what was saved is of another run", first)
    for average in averages:
        average.to(accelerator.device)
    order = range(first * args.batch_size, args.max_steps * args.batch_size)
    loader = DataLoader(Subset(dataset, order), batch_size=args.batch_size)
    started = saved = time.monotonic()
    running = 0.0
    for step, batch in enumerate(loader, start=first):
        batch = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(accelerator.device), batch)
        generator = torch.Generator(accelerator.device).manual_seed(args.seed * 1_000_003 + step)
        with accelerator.autocast():
            loss = loss_fn(model, batch, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for average in averages:
            average.step(model.parameters())
        running = 0.98 * running + 0.02 * loss.item() if step > first else loss.item()
        if (step + 1) % 50 == 0 or step + 1 == args.max_steps:
            pace = (time.monotonic() - started) / (step + 1 - first)
            left = pace * (args.max_steps - step - 1) / 60
            logger.info(
                "step %d/%d loss %.4f, %.2f s a step, %.0f min left", step + 1, args.max_steps, running, pace, left
            )
        if time.monotonic() - saved > args.save_minutes * 60:
            save_state(accelerator, state, step + 1, key)
            saved = time.monotonic()
    return accelerator.unwrap_model(model)


def save_state(accelerator: Accelerator, folder: Path, step: int, key: str) -> None:
    """Save what the run `key` has after `step` steps; until that is whole, `folder/step` names what was saved before."""
    new = folder / f"step-{step}"
    accelerator.save_state(str(new))
    (folder / "step.new").write_text(f"{step} {key}")
    (folder / "step.new").replace(folder / "step")
    for old in folder.glob("step-*"):
        if old != new:
            shutil.rmtree(old)
