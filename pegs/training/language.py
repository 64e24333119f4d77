"""The stages that train PEGS around its language model: perception, sticker output, and joint learning (appendix C)."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import disable_progress_bars
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from dataset_builders.schema import Sticker
from dataset_builders.stickerconv.sessions import load_openers
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from modeling_pegs.modeling_pegs import ADAPTER_FOLDER
from pegs.assemble import embed_pack
from pegs.places import load_pack, load_sessions
from pegs.training.build import build_model, build_processor, load_checkpoint
from pegs.training.cache import without_pictures
from pegs.training.contrastive import Contrast, contrast, contrastive_loss
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.dialogues import (
    caption_dialogues,
    caption_messages,
    opener_messages,
    request_dialogues,
    request_messages,
    session_messages,
    turn_contexts,
)
from pegs.training.loop import run_key
from pegs.training.pairs import stream_pairs
from pegs.training.stages import ConfigError, check_dtype, reading
from pegs.training.targets import CaptionStates, PairTargets, StickerTargets, VisionFeatures, compute_vision


logger = logging.getLogger(__name__)
disable_progress_bars()


@dataclass
class LanguageArguments:
    """
    Parameters of the language stages.

    > Parameters that control the data

    Args:
        data (`str`): `"captions"` (perception), `"requests"` (sticker output), `"texts"` (what both sides of the sessions say) or `"sessions"` (joint
            learning).
        stickers (`str`): Sticker pack, by name, folder or Hub id.
        sessions (`str`): The sessions, see [`load_sessions`].
        openers (`bool`): Whether the openers are learned beside the sessions.
        pairs (`list[str]`): For captions and requests, image-text pairs to stream instead of the pack's stickers: tars of WebDataset or parquet files.
        caption_length (`int`): Longest caption of a pair, in tokens.
        max_length (`int`): Longest sequence.

    > Parameters that control the model

    Args:
        init_from (`str`): Checkpoint that the stage starts from, or the YAML file of a fresh model.
        vision_from (`str`): For a fresh model, folder or Hub id of the checkpoint whose vision tower, and Q-Former if it has one, it takes over.
        chat_template (`str`): For a fresh model, Jinja file of its chat template.
        text_encoder (`str`): Folder or Hub id of the Stable Diffusion pipeline whose text states the mapper learns (eq. 9); MiniLM's if empty.
        variant (`str`): What the model is trained to act as, `"ret"`, `"gen"` or `"rag"`; as before if empty.
        trainable (`list[str]`): Prefixes of the parameters to train; all others stay frozen.
        dtype (`str`): Of the frozen language model, `"float32"`, or `"bfloat16"` with the trainer's `bf16`; all else, LoRA too, is float32.
        attn_implementation (`str`): Of the language model, e.g. `"flash_attention_2"`; the library's choice if empty.

    > Parameters that control the training

    Args:
        output_dir (`str`): Where the trained checkpoint goes.
        loss_weights (`dict[str, float]`): Eq. 10's weights under `lm`, `retrieval`, `generation`; those not given are 1, and what has 0 is not computed.
        negatives (`str`): What InfoNCE contrasts a reply with: `"pack"`, all stickers that may be sent, or `"batch"`, those of the effective batch over
            all processes and accumulation steps.
        packed (`bool`): Whether dialogues share one row without padding.
        lora_learning_rate (`float`): Learning rate of the LoRA weights; all others have the trainer's. A gentle one keeps what the language
            model can say.
        samples (`int`): Held-out turns that are answered at each evaluation, into the log and `replies.jsonl`.
        seed (`int`): Seed of data order and dropout.
        trainer (`dict`): Arguments of `transformers.TrainingArguments`.

    """

    data: str
    init_from: str
    output_dir: str
    stickers: str = "openmoji"
    sessions: str = "mini"
    openers: bool = False
    pairs: list = field(default_factory=list)
    caption_length: int = 77
    max_length: int = 768
    vision_from: str = ""
    chat_template: str = ""
    text_encoder: str = ""
    variant: str = ""
    trainable: list = field(default_factory=list)
    dtype: str = "float32"
    attn_implementation: str = ""
    loss_weights: dict = field(default_factory=dict)
    negatives: str = "pack"
    packed: bool = False
    lora_learning_rate: float = 3e-4
    samples: int = 2
    seed: int = 0
    trainer: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what depends on each other."""
        if self.data not in ("captions", "requests", "texts", "sessions"):
            raise ValueError(f"`data` must be captions, requests, texts or sessions, got {self.data!r}.")
        if self.negatives not in ("pack", "batch"):
            raise ValueError(f"`negatives` must be pack or batch, got {self.negatives!r}.")
        check_dtype(self.dtype, self.trainer)
        unknown = sorted(map(str, set(self.loss_weights) - {"lm", "retrieval", "generation"}))
        if unknown:
            raise ValueError(f"`loss_weights` are of lm, retrieval and generation, got {unknown[0]!r}.")
        if self.pairs and self.data not in ("captions", "requests"):
            raise ValueError(f"`pairs` are for captions or requests, not for {self.data}.")
        if self.pairs and self.data == "requests" and self.negatives == "pack":
            raise ValueError("Streamed `pairs` are not known beforehand: `negatives` must be batch.")
        if self.pairs and self.trainer.get("max_steps", 0) <= 0:
            raise ValueError("Streamed `pairs` have no length: `trainer` needs `max_steps`.")
        sees = any(name.startswith("vision_model") for name in self.trainable)
        if sees and self.data in ("requests", "sessions") and self.negatives == "pack":
            raise ValueError("Features of a pack's stickers are computed once: where `vision_model` is `trainable`, `negatives` must be batch.")  # fmt: skip


class PegsTrainer(Trainer):
    """
    A `Trainer` whose step is that of one big batch, whatever the number of processes and accumulation steps.

    Eq. 4 is averaged over all labels, eq. 9 over all produced stickers, and eq. 8 contrasts all of them if batches hold `sticker_ids`. The three losses
    are logged apart.

    Args:
        lora_learning_rate (`float`): Learning rate of the LoRA weights.
        contrasts_batch (`bool`): Whether batches hold `sticker_ids`.
        *args: As for `transformers.Trainer`.
        **kwargs: As for `transformers.Trainer`.

    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, lora_learning_rate: float, contrasts_batch: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lora_learning_rate, self.contrasts_batch = lora_learning_rate, contrasts_batch
        self.parts: dict[str, list[float]] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.num_batches = 1
        self.uncontrasted: list[dict] = []

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, with a learning rate for LoRA and one for all else."""
        trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if ".lora_" in name], "lr": self.lora_learning_rate},
            {"params": [p for name, p in trained if ".lora_" not in name], "lr": self.args.learning_rate},
        ]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
        options |= {"weight_decay": self.args.weight_decay}
        self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The batches of a step; what is averaged over all of them is counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        first_id = self.accelerator.unwrap_model(self.model).config.img_token_ids[0]
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        stickers = sum(int((batch["input_ids"] == first_id).sum()) for batch in batches)
        counts = self.accelerator.reduce(torch.tensor([labels, stickers], device=device), "sum")
        self.counts = {"num_items_in_batch": counts[0].clamp(min=1), "num_stickers_in_batch": counts[1].clamp(min=1)}
        self.num_batches = max(1, len(batches))
        self.uncontrasted = batches if self.contrasts_batch else []
        return batches, None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        """A batch forward and backward; before a step's first one, when a resumed run has its random state back, InfoNCE's gradients are computed."""
        if self.uncontrasted:
            self.add_contrast(self.uncontrasted)
            self.uncontrasted = []
        return super().training_step(model, inputs, *args, **kwargs)

    def add_contrast(self, batches: list[dict]) -> None:
        """Put into each batch InfoNCE's gradients by its replies and stickers, as `contrast`."""
        self.model_wrapped.train()
        skipped = ("labels", "target_prompt_embeds", "sticker_ids")
        model = self.accelerator.unwrap_model(self.model)
        texts, images, ids = [], [], []
        # the second pass draws the same dropout from the state that this one leaves as it was
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                inputs = {key: value for key, value in batch.items() if key not in skipped}
                outputs = self.model_wrapped(**self._prepare_inputs(inputs), logits_to_keep=1)
                if outputs.text_embeds is not None:
                    texts.append(outputs.text_embeds)
                    images.append(outputs.image_embeds)
                    ids.append(batch["sticker_ids"].to(self.args.device))
        empty = torch.zeros(0, model.config.retrieval_dim, device=self.args.device)
        found = contrast(
            torch.cat(texts or [empty]),
            torch.cat(images or [empty]),
            torch.cat(ids or [torch.zeros(0, dtype=torch.long, device=self.args.device)]),
            model.config.retrieval_temperature,
            self.accelerator,
        )
        start = 0
        for batch in batches:
            if found is not None and "sticker_ids" in batch:
                own = slice(start, start + len(batch["sticker_ids"]))
                batch["contrast"] = Contrast(found.loss, found.text_gradients[own], found.image_gradients[own])
                start = own.stop

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, as its share of the whole effective batch; its parts are kept for the next log line."""
        inputs = dict(inputs)
        found, ids = inputs.pop("contrast", None), inputs.pop("sticker_ids", None)
        outputs = model(**inputs, **(self.counts if model.training else {}))
        loss = outputs.loss
        parts = {name: outputs.get(name) for name in ("lm_loss", "retrieval_loss", "generation_loss")}
        weight = self.accelerator.unwrap_model(model).config.retrieval_loss_weight
        if found is not None:
            stand_in = (outputs.text_embeds * found.text_gradients).sum()
            stand_in = stand_in + (outputs.image_embeds * found.image_gradients).sum()
            parts["retrieval_loss"] = found.loss / self.num_batches / self.accelerator.num_processes
            loss = loss + weight * (stand_in - stand_in.detach() + parts["retrieval_loss"])
        elif ids is not None and not model.training:
            temperature = self.accelerator.unwrap_model(model).config.retrieval_temperature
            parts["retrieval_loss"] = contrastive_loss(outputs.text_embeds, outputs.image_embeds, ids, temperature)
            loss = loss + weight * parts["retrieval_loss"]
        share = 1
        if model.training:
            loss = loss * self.accelerator.num_processes  # which the mean of the processes' gradients takes back
            share = self.num_batches * self.accelerator.num_processes
        for name, value in parts.items():
            if value is not None:
                self.parts.setdefault(name if model.training else f"eval_{name}", []).append(value.item() * share)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with the mean of each loss since the last line."""
        logs |= {name: round(sum(values) / len(values), 4) for name, values in self.parts.items() if values}
        self.parts.clear()
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        adapter = Path(resume_from_checkpoint) / ADAPTER_FOLDER
        if adapter.is_dir():
            (model or self.model).language_model.load_adapter(str(adapter), "default", is_trainable=True)


class LogLine(TrainerCallback):
    """Writes the trainer's numbers to the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """One line a log event, of all processes."""
        if not state.is_world_process_zero:
            return
        numbers = {key: round(value, 4) if isinstance(value, float) else value for key, value in (logs or {}).items()}
        logger.info("step %d/%d %s", state.global_step, state.max_steps, numbers)


class SampleReplies(TrainerCallback):
    """
    Answers a few held-out turns at each evaluation, into the log and `replies.jsonl`.

    Args:
        processor ([`PegsProcessor`]): The model's processor.
        contexts (`list[list[dict]]`): Messages in the chat format, each list ending with a user's.
        pack ([`StickerPack`]): What stickers are retrieved from.
        vectors (`Callable`): Makes the pack's vectors `(M, e)` in the model's retrieval space.
        file (`Path`): Where the replies go, a JSON object a line.

    """

    def __init__(
        self,
        processor: PegsProcessor,
        contexts: list[list[dict]],
        pack: StickerPack,
        vectors: Callable[[PegsModel], torch.Tensor],
        file: Path,
    ) -> None:
        self.processor, self.contexts, self.pack, self.vectors, self.file = processor, contexts, pack, vectors, file

    @torch.no_grad()
    def on_evaluate(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Answer greedily, with the sticker that the model would retrieve."""
        was_training = model.training
        model.eval()
        for context in self.contexts:
            inputs = self.processor.apply_chat_template(
                context, add_generation_prompt=True, tokenize=True, return_tensors="pt"
            )
            output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=48, sticker_bias=0.0)
            new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
            sticker = None
            if output.sticker_mask[0] and output.sticker_queries is not None:
                row = int((self.vectors(model).to(model.device) @ output.sticker_queries[0]).argmax())
                sticker = self.pack.stickers[row].id
            text = self.processor.decode(new_ids, skip_special_tokens=True).strip()
            said = next(part["text"] for part in context[-1]["content"] if part["type"] == "text")
            reply = {"step": state.global_step, "user": said, "reply": text, "sticker": sticker}
            logger.info("%s", reply)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(reply, ensure_ascii=False) + "\n")
        model.train(was_training)


class PairStream(IterableDataset):
    """Dialogues of streamed image-text pairs; workers of a data loader share them."""

    def __init__(self, args: LanguageArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args, self.tokenizer = args, tokenizer

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        pairs = stream_pairs(self.args.pairs, self.args.seed)
        write = caption_messages if self.args.data == "captions" else request_messages
        for image, caption in islice(pairs, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            ids = self.tokenizer.encode(caption, add_special_tokens=False)[: self.args.caption_length]
            short = self.tokenizer.decode(ids).strip()
            yield {"messages": write({"type": "image", "image": image, "sticker_id": short}, short)}


def load_model(args: LanguageArguments) -> tuple[PegsModel, PegsProcessor]:
    """The model that a stage starts from, fresh or trained."""
    if Path(args.init_from).suffix == ".yaml":
        with reading(f"init_from {args.init_from}"):
            model = build_model(args.init_from, args.vision_from)
            processor = build_processor(model.config, args.chat_template)
    else:
        model, processor = load_checkpoint(args.init_from)
    with reading("variant, attn_implementation or loss_weights"):
        if args.variant:
            model.config.check_variant(args.variant)
            model.config.variant = args.variant
        if args.attn_implementation:
            model.causal_lm.set_attn_implementation(args.attn_implementation)
        for name in ("lm", "retrieval", "generation"):
            setattr(model.config, f"{name}_loss_weight", float(args.loss_weights.get(name, 1.0)))
    return model, processor


def training_dialogues(sessions: str, openers: bool, pack: StickerPack | None) -> list[list[dict]]:
    """The training sessions, and maybe the openers; without a pack, without their stickers."""
    dialogues = [session_messages(session, pack) for session in load_sessions(sessions, "train")]
    return dialogues + (opener_dialogues(pack) if openers else [])


def opener_dialogues(pack: StickerPack | None) -> list[list[dict]]:
    """The openers; without a pack, without their stickers."""
    return [opener_messages(opener, pack) for opener in load_openers()]


def sendable(pack: StickerPack) -> list[Sticker]:
    """Stickers that training may send."""
    return pack.split("train") if pack.databases else pack.stickers


def make_dialogues(args: LanguageArguments, pack: StickerPack) -> tuple[list[list[dict]], list[list[dict]]]:
    """Training and held-out dialogues from a pack and sessions."""
    stickers = sendable(pack)
    if args.data == "captions":
        return caption_dialogues(stickers, pack), []
    if args.data == "requests":
        return request_dialogues(stickers, pack), []
    shown = None if args.data == "texts" else pack
    held_out = [session_messages(session, shown) for session in load_sessions(args.sessions, "validation")]
    return training_dialogues(args.sessions, args.openers, shown), held_out


def make_collator(
    args: LanguageArguments, model: PegsModel, processor: PegsProcessor, pack: StickerPack | None
) -> DataCollatorForPegs:
    """The stage's collator; without a pack, for streamed pairs."""
    with reading(f"text_encoder {args.text_encoder}"):
        encode = CaptionStates(args.text_encoder, model.config.prompt_length)
    targets: StickerTargets | PairTargets | None = None
    vision = None
    if pack is None:
        targets = PairTargets(encode)
    elif args.data != "texts":
        vision = VisionFeatures(pack, model, processor)
        targets = StickerTargets({sticker.id: sticker.caption for sticker in sendable(pack)}, encode, vision)
    if learns_to_see(model):
        vision = None
    roles = ("user", "assistant") if args.data == "texts" else ("assistant",)
    options: dict[str, Any] = {"vision": vision, "negatives": args.negatives, "packed": args.packed}
    return DataCollatorForPegs(processor, model.config, targets, args.max_length, roles, **options)


def train_language(args: LanguageArguments) -> None:
    """Train one language stage and save the whole checkpoint, processor included."""
    set_seed(args.seed)
    model, processor = load_model(args)
    freeze_except(model, args.trainable)
    keep_what_learns(model)
    for name, parameter in model.language_model.named_parameters():
        if not parameter.requires_grad and ".lora_" not in name:
            parameter.data = parameter.data.to(getattr(torch, args.dtype))
    if args.packed and model.causal_lm.config._attn_implementation == "sdpa":
        model.causal_lm.set_attn_implementation("dialogues")
    pack = None if args.pairs else load_pack(args.stickers)
    with reading("sessions or stickers"):
        dialogues, held_out = ([], []) if pack is None else make_dialogues(args, pack)
    defaults = {
        "eval_strategy": "epoch" if held_out else "no",
        "report_to": "none",
        "lr_scheduler_type": "cosine",
        "accelerator_config": {"dispatch_batches": False},  # batches hold pictures of all dialogues and cannot be cut
        "ddp_find_unused_parameters": True,  # a batch without a sticker has nothing for the heads
    }
    known = None if pack is None else [(s.id, s.sha256, s.caption) for s in pack.stickers]
    key = run_key(args, model, without_pictures(dialogues), known)
    # the text encoder's model, too, is loaded before the trainer's arguments are there: from then on ZeRO 3 would share out its weights
    collator = make_collator(args, model, processor, pack)
    with reading("trainer"):
        training_args = TrainingArguments(
            output_dir=f"{args.output_dir}/trainer",
            remove_unused_columns=False,
            seed=args.seed,
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            prediction_loss_only=True,
            **{**defaults, **args.trainer},
        )
    trainer = PegsTrainer(
        model=model,
        args=training_args,
        train_dataset=[{"messages": messages} for messages in dialogues] or PairStream(args, processor.tokenizer),
        eval_dataset=[{"messages": messages} for messages in held_out] or None,
        data_collator=collator,
        callbacks=[LogLine()],
        lora_learning_rate=args.lora_learning_rate,
        contrasts_batch=args.negatives == "batch"
        and args.data in ("requests", "sessions")
        and learns_retrieval(model),
    )
    unsharded = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    whole = trainer.accelerator.distributed_type in unsharded
    if args.data == "sessions" and whole and trainer.is_world_process_zero():
        trainer.add_callback(sample_replies(args, processor, pack))
    trainer.train(resume_from_checkpoint=checkpoint_of(key, training_args))
    # sharded weights are gathered by all processes, and written by one
    state_dict = None if whole else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model.save_pretrained(args.output_dir, state_dict=state_dict)
        processor.save_pretrained(args.output_dir)


def keep_what_learns(model: PegsModel) -> None:
    """Parts of perception that learn become part of the checkpoint, which else refers to where they came from."""
    if model.config.vision_source:
        learning = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = [part for part in model.referenced_parts() if part not in learning]
        model.config.vision_source = {**model.config.vision_source, "parts": frozen} if frozen else None


def learns_to_see(model: PegsModel) -> bool:
    """Whether the vision tower changes, so that none of its features can be kept."""
    return any(parameter.requires_grad for parameter in model.vision_model.parameters())


def learns_retrieval(model: PegsModel) -> bool:
    """Whether InfoNCE is part of the model's loss."""
    return bool(model.config.num_retrieval_tokens and model.config.retrieval_loss_weight)


def sample_replies(args: LanguageArguments, processor: PegsProcessor, pack: StickerPack) -> SampleReplies:
    """Replies to the last turns of the first held-out sessions."""
    sessions = load_sessions(args.sessions, "validation")[: args.samples]
    contexts = [turn_contexts(session, pack)[-1] for session in sessions]

    def vectors(model: PegsModel) -> torch.Tensor:
        if model.config.retrieval_text_encoder:
            return embed_pack(model, processor, pack)
        ids = [sticker.id for sticker in pack.stickers]
        if learns_to_see(model):
            features = compute_vision(pack, ids, model, processor)["pooled"]  # of today; no use keeping them
        else:
            features = VisionFeatures(pack, model, processor).pooled(ids)
        return model.retrieval_head.embed_image(features.to(model.device, model.dtype)).float()

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    return SampleReplies(processor, contexts, pack, vectors, Path(args.output_dir) / "replies.jsonl")


def checkpoint_of(key: str, args: TrainingArguments) -> str | None:
    """The newest whole checkpoint of the run `key`, see [`run_key`], or `None`; another run's folder moves aside, before its are taken for this one's."""
    folder, file = Path(args.output_dir), Path(args.output_dir) / "run"
    with args.main_process_first(local=False):
        if args.process_index == 0 and (not file.is_file() or file.read_text("utf-8") != key):
            if any(folder.glob("checkpoint-*")):
                aside = folder.with_name(f"{folder.name}.before")
                logger.info("%s is of another run, and moves to %s", folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(key, "utf-8")
        return last_whole_checkpoint(args.output_dir)


def last_whole_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in `folder` that was written to its end, or `None`; a later one that was not is removed."""
    while Path(folder).is_dir() and (last := get_last_checkpoint(folder)) is not None:
        try:
            json.loads((Path(last) / "trainer_state.json").read_text("utf-8"))  # what the trainer writes last
            return last
        except (OSError, ValueError):
            logger.info("%s was cut while it was written, and is removed", last)
            shutil.rmtree(last)
    return None


def freeze_except(model: torch.nn.Module, prefixes: list[str]) -> dict[str, int]:
    """
    Leave only the parameters under `prefixes` trainable; `lora` stands for the language model's LoRA weights.

    Returns:
        `dict[str, int]`: How many parameters each prefix names.

    Raises:
        ConfigError: If a prefix names no parameter, or there is none.

    """
    found = dict.fromkeys(prefixes, 0)
    for name, parameter in model.named_parameters():
        matches = [p for p in prefixes if (".lora_" in name if p == "lora" else name.startswith(p))]
        parameter.requires_grad_(bool(matches))
        for prefix in matches:
            found[prefix] += parameter.numel()
    for prefix, count in found.items():
        if not count:
            raise ConfigError(f"`trainable` {prefix!r} names no parameter.")
    if not found:
        raise ConfigError("`trainable` is empty: it must name the parameters that learn.")
    logger.info("trainable parameters: %s", found)
    return found
