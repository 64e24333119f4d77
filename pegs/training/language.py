"""The stages that train PEGS around its language model: perception, sticker output, and joint learning (appendix C)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.modeling_pegs import ADAPTER_FOLDER
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.dialogues import caption_dialogues, request_dialogues, session_messages, text_messages
from pegs.training.targets import StickerTargets


logger = logging.getLogger(__name__)
disable_progress_bars()


@dataclass
class LanguageArguments:
    """
    Parameters of the language stages.

    Args:
        data (`str`): `"captions"` (perception), `"requests"` (sticker output), `"texts"` (what both sides of the sessions say) or `"sessions"` (joint
            learning).
        init_from (`str`): Checkpoint that the stage starts from.
        output_dir (`str`): Where the trained checkpoint goes.
        trainable (`list[str]`): Prefixes of the parameters to train; all others stay frozen.
        max_length (`int`): Longest sequence.
        loss_weights (`dict[str, float]`): Eq. 10's weights under `lm`, `retrieval`, `generation`; those not given are 1.
        lora_learning_rate (`float`): Learning rate of the LoRA weights; all others have the trainer's. A gentle one keeps what the language
            model can say.
        seed (`int`): Seed of data order and dropout.
        trainer (`dict`): Arguments of `transformers.TrainingArguments`.

    """

    data: str
    init_from: str
    output_dir: str
    trainable: list = field(default_factory=list)
    max_length: int = 768
    loss_weights: dict = field(default_factory=dict)
    lora_learning_rate: float = 3e-4
    seed: int = 0
    trainer: dict = field(default_factory=dict)


class PegsTrainer(Trainer):
    """A `Trainer` that logs the three losses apart and restores the LoRA adapter when it resumes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.parts: dict[str, list[float]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss; its parts are kept for the next log line."""
        outputs = model(**inputs)
        for name in ("lm_loss", "retrieval_loss", "generation_loss"):
            if outputs.get(name) is not None:
                name_of_kind = name if model.training else f"eval_{name}"
                self.parts.setdefault(name_of_kind, []).append(outputs[name].item())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with the mean of each loss since the last line."""
        logs |= {name: round(sum(values) / len(values), 4) for name, values in self.parts.items() if values}
        self.parts.clear()
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        language_model = (model or self.model).language_model
        language_model.load_adapter(f"{resume_from_checkpoint}/{ADAPTER_FOLDER}", "default", is_trainable=True)


class LogLine(TrainerCallback):
    """Writes the trainer's numbers to the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line a log event."""
        numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in (logs or {}).items()}
        logger.info("step %d/%d %s", state.global_step, state.max_steps, numbers)


def train_language(args: LanguageArguments) -> None:
    """Train one language stage and save the whole checkpoint, processor included."""
    set_seed(args.seed)
    model = PegsModel.from_pretrained(args.init_from)
    processor = PegsProcessor.from_pretrained(args.init_from)
    for name in ("lm", "retrieval", "generation"):
        setattr(model.config, f"{name}_loss_weight", float(args.loss_weights.get(name, 1.0)))
    pack = cached_pack()
    stickers = pack.split("train")
    held_out: list[list[dict]] = []
    match args.data:
        case "captions":
            dialogues = caption_dialogues(stickers, pack)
        case "requests":
            dialogues = request_dialogues(stickers, pack)
        case "texts":
            dialogues = [text_messages(session) for session in load_mini("train")]
            held_out = [text_messages(session) for session in load_mini("validation")]
        case "sessions":
            dialogues = [session_messages(session, pack) for session in load_mini("train")]
            held_out = [session_messages(session, pack) for session in load_mini("validation")]
        case other:
            raise ValueError(f"`data` must be captions, requests, texts or sessions, got {other!r}.")
    targets = StickerTargets(pack, [sticker.id for sticker in stickers], model, processor)
    freeze_except(model, args.trainable)
    training_args = TrainingArguments(
        output_dir=f"{args.output_dir}/trainer",
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        lr_scheduler_type="cosine",
        eval_strategy="epoch" if held_out else "no",
        prediction_loss_only=True,
        **args.trainer,
    )
    roles = ("user", "assistant") if args.data == "texts" else ("assistant",)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if ".lora_" in name], "lr": args.lora_learning_rate},
        {"params": [p for name, p in trained if ".lora_" not in name], "lr": training_args.learning_rate},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=training_args.weight_decay)
    trainer = PegsTrainer(
        model=model,
        args=training_args,
        optimizers=(optimizer, None),
        train_dataset=[{"messages": messages} for messages in dialogues],
        eval_dataset=[{"messages": messages} for messages in held_out] or None,
        data_collator=DataCollatorForPegs(processor, model.config, targets, args.max_length, roles),
        callbacks=[LogLine()],
    )
    begun = Path(training_args.output_dir).is_dir()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(training_args.output_dir) if begun else None)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


def freeze_except(model: torch.nn.Module, prefixes: list[str]) -> None:
    """
    Leave only the parameters under `prefixes` trainable; `lora` stands for the language model's LoRA weights.

    Raises:
        ValueError: If a prefix names no parameter.

    """
    found = dict.fromkeys(prefixes, 0)
    for name, parameter in model.named_parameters():
        matches = [p for p in prefixes if (".lora_" in name if p == "lora" else name.startswith(p))]
        parameter.requires_grad_(bool(matches))
        for prefix in matches:
            found[prefix] += parameter.numel()
    for prefix, count in found.items():
        if not count:
            raise ValueError(f"`trainable` {prefix!r} names no parameter.")
    logger.info("trainable parameters: %s", found)
