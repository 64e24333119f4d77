"""
Stage `sft_generation`: the feature mapper alone, on hidden states that are computed once.

With everything below it frozen, the generation tokens' hidden states never change, so thousands of steps cost little more than one pass of the
language model over the data.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack, cldr_name, list_hexcodes
from modeling_pegs import PegsModel, PegsProcessor
from pegs.training.dialogues import session_messages
from pegs.training.loop import LoopArguments, train_loop
from pegs.training.text_states import encode_captions


logger = logging.getLogger(__name__)


@dataclass
class GenerationArguments(LoopArguments):
    """
    Parameters of stage `sft_generation`.

    Args:
        init_from (`str`): Checkpoint that the stage starts from.
        dialogue_part (`float`): Share of the samples that are stickers of the training dialogues rather than captions, in `[0, 1]`.
        noise (`float`): Standard deviation of the noise on the hidden states, relative to theirs.
        extra_captions (`bool`): Whether to add the names of the other OpenMoji drawings as captions; no picture is needed (appendix C.1).

    """

    init_from: str = ""
    dialogue_part: float = 0.5
    noise: float = 0.1
    extra_captions: bool = field(default=True)


class HiddenStates(Dataset):
    """Pairs of hidden states `(r - k, d)` and caption states `(L, D)`; an index maps to one fixed random draw."""

    def __init__(
        self, hidden: torch.Tensor, states: torch.Tensor, num_dialogues: int, args: GenerationArguments
    ) -> None:
        self.hidden, self.states, self.num_dialogues, self.args = hidden, states, num_dialogues, args

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        low, high = self.num_dialogues, len(self.hidden)
        if rng.random() < self.args.dialogue_part:
            low, high = 0, self.num_dialogues
        i = int(rng.integers(low, high))
        return {"hidden": self.hidden[i], "states": self.states[i]}


@torch.no_grad()
def generation_hidden_states(
    model: PegsModel, processor: PegsProcessor, dialogues: list[list[dict]], batch_size: int
) -> torch.Tensor:
    """Hidden states of the generation tokens of every sticker that an assistant sends, `(S, r - k, d)`, in order."""
    states = []
    for start in range(0, len(dialogues), batch_size):
        chunk = dialogues[start : start + batch_size]
        inputs = processor.apply_chat_template(chunk, tokenize=True, return_tensors="pt").to(model.device)
        hidden = model(**inputs, logits_to_keep=1).last_hidden_state
        states.append(model.get_img_hidden_states(inputs["input_ids"], hidden)[:, model.config.num_retrieval_tokens :])
    return torch.cat(states)


def train_generation(args: GenerationArguments) -> None:
    """Train the feature mapper by MSE to caption states (eq. 9) and save the whole checkpoint."""
    model = PegsModel.from_pretrained(args.init_from)
    processor = PegsProcessor.from_pretrained(args.init_from)
    pack = cached_pack()
    sessions = load_mini("train")
    sent = [turn.system.sticker.id for s in sessions for turn in s.turns if turn.system.sticker is not None]
    captions = [sticker.caption for sticker in pack.split("train")]
    if args.extra_captions:
        in_pack = {sticker.image_path.removesuffix(".png") for sticker in pack.stickers}
        names = (cldr_name(hexcode) for hexcode in list_hexcodes() if hexcode not in in_pack)
        captions += sorted({name for name in names if name})
    blank = pack.images[sent[0]]  # what the assistant sends comes after the span, so it cannot matter
    requests = [
        [
            {"role": "user", "content": [{"type": "text", "text": caption}]},
            {"role": "assistant", "content": [{"type": "image", "image": blank}]},
        ]
        for caption in captions
    ]
    dialogues = [session_messages(session, pack) for session in sessions]
    dialogues = [d for d, s in zip(dialogues, sessions, strict=True) if any(t.system.sticker for t in s.turns)]
    long, short = (
        generation_hidden_states(model, processor, dialogues, 4),
        generation_hidden_states(model, processor, requests, 32),
    )
    hidden = torch.cat([long, short])
    states = encode_captions([pack.by_id[i].caption for i in sent] + captions, model.config.prompt_length)
    spread = hidden.std(dim=0, keepdim=True)
    logger.info(
        "%d stickers of dialogues, %d captions; variance of the targets %.4f",
        len(sent),
        len(captions),
        states.var(0).mean(),
    )

    def loss_fn(mapper: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(batch["hidden"].shape, generator=generator, device=batch["hidden"].device)
        output = mapper(batch["hidden"] + args.noise * spread.to(noise.device) * noise)
        return F.mse_loss(output.float(), batch["states"])

    train_loop(args, model.feature_mapper, HiddenStates(hidden, states, len(sent), args), loss_fn)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
