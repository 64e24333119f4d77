"""
Stage `sft_generation`: the feature mapper alone, on hidden states that are computed once.

With everything below it frozen, the generation tokens' hidden states never change, so thousands of steps cost little more than one pass of the
language model over the data.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from dataset_builders.schema import Sticker
from dataset_builders.stickers.openmoji import cached_pack, cldr_name, list_hexcodes
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from pegs.training.build import load_checkpoint
from pegs.training.cache import digest, kept, without_pictures
from pegs.training.dialogues import sent_stickers
from pegs.training.language import training_dialogues
from pegs.training.loop import LoopArguments, train_loop
from pegs.training.text_states import encode_captions


logger = logging.getLogger(__name__)


@dataclass
class GenerationArguments(LoopArguments):
    """
    Parameters of stage `sft_generation`.

    Args:
        init_from (`str`): Checkpoint that the stage starts from.
        openers (`bool`): Whether the openers are dialogues too, beside StickerConv-mini's.
        parts (`tuple[float, float, float]`): Shares of the samples that are stickers of the training dialogues, requests for stickers of the pack, and names of
            other OpenMoji drawings, of which no picture is needed (appendix C.1).
        noise (`float`): Standard deviation of the noise on the hidden states, relative to theirs.

    """

    init_from: str = ""
    openers: bool = False
    parts: tuple[float, float, float] = (0.4, 0.3, 0.3)
    noise: float = 0.1


class HiddenStates(Dataset):
    """Pairs of hidden states `(r - k, d)` and caption states `(L, D)` from groups of them; an index maps to one fixed random draw."""

    def __init__(self, hidden: list[torch.Tensor], states: list[torch.Tensor], args: GenerationArguments) -> None:
        self.hidden, self.states, self.args = hidden, states, args

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        group = int(rng.choice(len(self.hidden), p=self.args.parts))
        i = int(rng.integers(len(self.hidden[group])))
        return {"hidden": self.hidden[group][i], "states": self.states[group][i]}


@torch.no_grad()
def generation_hidden_states(
    model: PegsModel, processor: PegsProcessor, dialogues: list[list[dict]], batch_size: int
) -> torch.Tensor:
    """Hidden states of the generation tokens of every sticker that an assistant sends, `(S, r - k, d)`, in order."""
    states = []
    for start in range(0, len(dialogues), batch_size):
        chunk = dialogues[start : start + batch_size]
        inputs = processor.apply_chat_template(chunk, tokenize=True, return_tensors="pt").to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model(**inputs, logits_to_keep=1).last_hidden_state.float()
        states.append(model.get_img_hidden_states(inputs["input_ids"], hidden)[:, model.config.num_retrieval_tokens :])
    return torch.cat(states)


@torch.no_grad()
def own_replies(model: PegsModel, processor: PegsProcessor, requests: list[str], batch_size: int) -> list[str]:
    """What the model says to each request, greedily: a sticker comes after these words, and is drawn from what they left."""
    replies = []
    for start in range(0, len(requests), batch_size):
        chunk = [[{"role": "user", "content": [{"type": "text", "text": r}]}] for r in requests[start : start + batch_size]]  # fmt: skip
        inputs = processor.apply_chat_template(
            chunk, add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40, sticker_bias=-math.inf)
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        replies += [processor.decode(ids, skip_special_tokens=True).strip() for ids in new_ids]
    return replies


def sticker_requests(sticker: Sticker) -> list[str]:
    """Ways to ask for a sticker, by what its pack says of it."""
    return [sticker.caption, sticker.tags[0], sticker.description, ", ".join(sticker.tags[:3])]


@dataclass
class Drawn:
    """
    Where PEGS draws a sticker: in the training dialogues, when asked for one of the pack, and when asked for another drawing of OpenMoji.

    Args:
        hidden (`torch.Tensor` of shape `(S, r - k, d)`): Hidden states of the generation tokens.
        captions (`list[str]`): What each should draw.
        groups (`list[int]`): How many of them are of each kind, in this order.

    """

    hidden: torch.Tensor
    captions: list[str]
    groups: list[int]


def gather_drawn(
    model: PegsModel, processor: PegsProcessor, pack: StickerPack, cache: Path, openers: bool = False
) -> Drawn:
    """Every place where a sticker should be drawn; hidden states are computed once and kept in `cache`."""
    dialogues = [dialogue for dialogue in training_dialogues("", openers, pack) if sent_stickers(dialogue)]
    dialogues.sort(key=len)  # alike in length, so that batches are padded little
    sent = [sticker_id for dialogue in dialogues for sticker_id in sent_stickers(dialogue)]
    asked = [(request, sticker.caption) for sticker in pack.split("train") for request in sticker_requests(sticker)]
    in_pack = {sticker.image_path.removesuffix(".png") for sticker in pack.stickers}
    others = {cldr_name(hexcode) for hexcode in list_hexcodes() if hexcode not in in_pack} - {None}
    asked += [(name, name) for name in sorted(others)]

    def compute() -> dict[str, torch.Tensor]:
        blank = pack.images[sent[0]]  # what the assistant sends comes after the span, so it cannot matter
        replies = own_replies(model, processor, [request for request, _ in asked], 32)
        requests = [
            [
                {"role": "user", "content": [{"type": "text", "text": request}]},
                {"role": "assistant", "content": [{"type": "text", "text": reply}, {"type": "image", "image": blank}]},
            ]
            for (request, _), reply in zip(asked, replies, strict=True)
        ]
        long = generation_hidden_states(model, processor, dialogues, 4)
        return {"hidden": torch.cat([long, generation_hidden_states(model, processor, requests, 32)])}

    key = digest(below_the_heads(model), without_pictures(dialogues), asked)
    captions = [pack.by_id[i].caption for i in sent] + [caption for _, caption in asked]
    return Drawn(kept(cache, key, compute)["hidden"], captions, [len(sent), len(asked) - len(others), len(others)])


def below_the_heads(model: PegsModel) -> dict[str, torch.Tensor]:
    """The weights that hidden states depend on."""
    heads = ("feature_mapper", "retrieval_head", "timing_head")
    return {name: tensor for name, tensor in model.state_dict().items() if name.partition(".")[0] not in heads}


def train_generation(args: GenerationArguments) -> None:
    """Train the feature mapper by MSE to caption states (eq. 9) and save the whole checkpoint."""
    model, processor = load_checkpoint(args.init_from)
    cache = Path(args.output_dir) / "state" / "hidden.safetensors"
    drawn = gather_drawn(model, processor, cached_pack(), cache, args.openers)
    states = encode_captions(drawn.captions, model.config.prompt_length)
    spread = drawn.hidden.std(dim=0, keepdim=True)
    logger.info(
        "stickers of dialogues, of requests, of names: %s; variance of the targets %.4f",
        drawn.groups,
        states.var(0).mean(),
    )

    def loss_fn(mapper: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(batch["hidden"].shape, generator=generator, device=batch["hidden"].device)
        output = mapper(batch["hidden"] + args.noise * spread.to(noise.device) * noise)
        return F.mse_loss(output.float(), batch["states"])

    dataset = HiddenStates(list(drawn.hidden.split(drawn.groups)), list(states.split(drawn.groups)), args)
    train_loop(args, model.feature_mapper, dataset, loss_fn)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
