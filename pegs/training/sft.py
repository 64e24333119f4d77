"""Stages that fine-tune a bare language model on chats, by TRL: the baselines of section 6.2, and the agents of the embedded writer."""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from agent_generation.llm import Request
from agent_generation.tool import Toolbox
from dataset_builders.schema import Session
from dataset_builders.stickers.encoder import TextEncoder
from pegs.adapters import EMBEDDED, load_language_model, save_adapter
from pegs.agent_tools import load_toolbox
from pegs.evaluation.baselines import baseline_chat
from pegs.places import load_pack, load_sessions
from pegs.training.agent_examples import Replay
from pegs.training.language import LogLine, checkpoint_of
from pegs.training.loop import run_key
from pegs.training.stages import ConfigError, check_dtype, reading


logger = logging.getLogger(__name__)

FORMS = ("FreeIntention", "DueIntention", "Query", "Choice", "StickerReview", "DialogueReview")
# SmolLM2's chat template, with marks around what an assistant says; TRL has those of other families
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class SftArguments:
    """
    Parameters of the stages `baseline_text`, `baseline_tool` and `sft_agents`.

    Args:
        data (`str`): `"text"` or `"tool"` (see [`baseline_chat`]), or `"agents"`.
        output_dir (`str`): Where the adapter goes.
        sessions (`str`): The sessions, see [`load_sessions`].
        stickers (`str`): The pack that they use, by name, folder or Hub id.
        language_model (`dict`): What is trained; see [`find_language_model`].
        chat_template (`str`): Jinja file of its chat template, which marks what the assistant says (`{% generation %}`); its own if empty. It is saved with the adapter.
        dtype (`str`): Of the language model, `"float32"`, or `"bfloat16"` with the trainer's `bf16`; the adapter's weights are float32.
        init_from (`str`): PEGS checkpoint whose adapter is merged into the language model first; none if empty.
        lora (`dict`): Arguments of `peft.LoraConfig`.
        shares (`dict[str, float]`): Of `"agents"`: how many of a session's questions are learned, by the form of their answer.
        seed (`int`): Seed of the draws, data order and dropout.
        trainer (`dict`): Arguments of `trl.SFTConfig`; longer chats than its `max_length` are left out, since their answer would be cut off.

    """

    data: str
    output_dir: str
    sessions: str = "mini"
    stickers: str = "openmoji"
    language_model: dict = field(default_factory=lambda: dict(EMBEDDED))
    chat_template: str = ""
    dtype: str = "float32"
    init_from: str = ""
    lora: dict = field(default_factory=dict)
    shares: dict = field(default_factory=dict)
    seed: int = 0
    trainer: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the types do not say."""
        if self.data not in ("text", "tool", "agents"):
            raise ValueError(f"`data` must be text, tool or agents, got {self.data!r}.")
        check_dtype(self.dtype, self.trainer)
        if not isinstance(self.trainer.get("max_length"), int):
            raise ValueError("`trainer` needs a `max_length` in tokens.")
        unknown = sorted(map(str, set(self.shares) - set(FORMS)))
        if unknown:
            raise ValueError(f"`shares` are of {', '.join(FORMS)}, got {unknown[0]!r}.")


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, with logits only where there is something to learn: a tenth of the tokens, of a vocabulary that costs more than the layers."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of the answers; padding is at the end, where causal attention needs no mask to leave it out, and is faster without."""
        labels = inputs["labels"][:, 1:]
        learned = labels != -100
        head = self.accelerator.unwrap_model(model).get_base_model().get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, states: (states[0][:, :-1][learned],))
        try:  # by the wrapper's own forward, which on several GPUs averages the gradients
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
        finally:
            hook.remove()
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[learned], reduction="sum")
        if num_items_in_batch is None:
            loss = loss / learned.sum()
        else:  # counted over all processes, whose gradients are then averaged
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, {"loss": loss}) if return_outputs else loss


def agent_chats(session: Session, toolbox: Toolbox, shares: dict[str, float], seed: int) -> Iterator[list[dict]]:
    """
    Some of the questions that a session answers, as chats.

    Of the messages of either side one is drawn: its question holds those before it as what the agent said.
    """
    rng = random.Random(f"{seed}/{session.session_id}")
    sides: dict[str, list[tuple[Request, str]]] = {"user": [], "system": []}
    for request, answer in Replay(session, toolbox).examples():
        if request.answer is None:
            sides[request.role].append((request, answer))
        elif rng.random() < shares.get(request.answer.__name__, 0.0):
            yield [*request.messages, {"role": "assistant", "content": answer}]
    for asked in sides.values():
        request, answer = rng.choice(asked)
        yield [*request.messages, {"role": "assistant", "content": answer}]


def make_chats(args: SftArguments) -> list[list[dict]]:
    """Chats of the training sessions."""
    sessions = load_sessions(args.sessions, "train")
    if args.data == "agents":
        toolbox, _ = load_toolbox(args.stickers, TextEncoder())
        return [chat for session in sessions for chat in agent_chats(session, toolbox, args.shares, args.seed)]
    pack = load_pack(args.stickers)
    with reading("sessions or stickers"):
        return [baseline_chat(session, pack, with_tool=args.data == "tool") for session in sessions]


def train_sft(args: SftArguments) -> None:
    """Train an adapter on what the assistant says in chats, and save it in half precision."""
    set_seed(args.seed)
    merged = [Path(args.init_from) / "adapter"] if args.init_from else []
    with reading("language_model or init_from"):
        model, tokenizer = load_language_model(args.language_model, merged, args.dtype)
    with reading(f"chat_template {args.chat_template}"):
        if args.chat_template:
            tokenizer.chat_template = Path(args.chat_template).read_text("utf-8")
        elif args.language_model["hub_id"] == EMBEDDED["hub_id"]:
            tokenizer.chat_template = SMOLLM2_TEMPLATE
    chats = make_chats(args)
    lengths = [len(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    short = [chat for chat, length in zip(chats, lengths, strict=True) if length <= args.trainer["max_length"]]
    logger.info(
        "%d of %d chats are short enough, %d tokens",
        len(short),
        len(chats),
        sum(n for n in lengths if n <= args.trainer["max_length"]),
    )
    key = run_key(args, model, short)
    defaults = {"assistant_only_loss": True, "report_to": "none", "lr_scheduler_type": "cosine"}
    with reading("trainer"):
        config = SFTConfig(
            output_dir=f"{args.output_dir}/trainer",
            seed=args.seed,
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            **{**defaults, **args.trainer},
        )
    if config.n_gpu > 1:
        raise ConfigError("several GPUs take a process each: start it by `accelerate launch`")
    with reading("lora or trainer"):
        trainer = AnswerTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"messages": chat} for chat in short]),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **args.lora),
            callbacks=[LogLine()],
        )
    trainer.train(resume_from_checkpoint=checkpoint_of(key, config))
    assert isinstance(trainer.model, PeftModel)
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, Path(args.output_dir), args.language_model["hub_id"], merged)
        if args.chat_template:
            tokenizer.save_pretrained(args.output_dir)
