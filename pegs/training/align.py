"""
Stage `align`: preference optimisation (DPO, arXiv:2305.18290) of a reply's two decisions about its sticker, whether to send one and which.

A gold reply and one that differs from it in such a decision alone share all that comes before, so the log-ratio of the pair is a difference of two scores
of the same hidden state. With the language model frozen these states never change and are computed once; what learns is the timing head, which moves probability between
`[IMG1]` and the end of a reply, and the replies' projection into the retrieval space. No word becomes more or less likely. (`trl.DPOTrainer` runs each pair as two whole dialogues, and
does not take a model whose output embeddings are two matrices.)
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsConfig, PegsModel, PegsProcessor
from pegs.assemble import embed_pack
from pegs.places import load_pack
from pegs.training.build import load_checkpoint
from pegs.training.cache import digest, kept, without_pictures
from pegs.training.data_collator import DataCollatorForPegs
from pegs.training.dialogues import sent_stickers
from pegs.training.generation import below_the_heads
from pegs.training.language import opener_dialogues, sendable, training_dialogues
from pegs.training.loop import LoopArguments, train_loop
from pegs.training.stages import ConfigError
from pegs.training.targets import VisionFeatures


logger = logging.getLogger(__name__)


@dataclass
class AlignArguments(LoopArguments):
    """
    Parameters of stage `align`.

    Args:
        init_from (`str`): Checkpoint that the stage starts from, which is the reference too.
        stickers (`str`): Annotated sticker pack, by name, folder or Hub id.
        sessions (`str`): The sessions, see [`load_sessions`].
        openers (`bool`): Whether the openers' stickers are learned beside the sessions'; when one is sent is learned from the sessions alone, since openers send them for other
            reasons than replies in mid-talk.
        max_length (`int`): Longest dialogue in tokens; a longer one loses its oldest turns.
        beta (`float`): How much the reference weighs.
        timing_noise (`float`): Standard deviation of the noise on the hidden states at the replies' last words, relative to theirs.
        noise (`float`): The same for those of the retrieval tokens.

    """

    init_from: str = ""
    stickers: str = "openmoji"
    sessions: str = "mini"
    openers: bool = False
    max_length: int = 1024
    beta: float = 0.5
    timing_noise: float = 0.5
    noise: float = 1.0


def find_decisions(input_ids: torch.Tensor, labels: torch.Tensor, config: PegsConfig, end_id: int) -> torch.Tensor:
    """
    Where replies decide: at their last word, after which `[IMG1]` or the end comes.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`): Dialogues.
        labels (`torch.Tensor` of shape `(B, T)`): Ids where the assistant speaks, -100 elsewhere.
        config ([`PegsConfig`]): Knows the added tokens.
        end_id (`int`): Token that ends a reply.

    Returns:
        `torch.Tensor` of shape `(B, T - 1)`: bool.

    """
    following = labels[:, 1:]
    after_sticker = input_ids[:, :-1] >= config.first_new_token_id
    return (following == config.img_token_ids[0]) | ((following == end_id) & ~after_sticker)


@torch.no_grad()
def decision_states(
    model: PegsModel, processor: PegsProcessor, pack: StickerPack, dialogues: list[list[dict]], max_length: int
) -> dict[str, torch.Tensor]:
    """
    What the gold replies' decisions are made from.

    Returns:
        `dict[str, torch.Tensor]`: `ends` `(n, d)`, hidden states at the replies' last words, with `sent` `(n,)`, whether a sticker follows; and `spans`
        `(S, k, d)`, those of the retrieval tokens, with `gold` `(S,)`, the row of the sticker in the pack.

    """
    collator = DataCollatorForPegs(
        processor, model.config, None, max_length, vision=VisionFeatures(pack, model, processor)
    )
    rows = {sticker.id: row for row, sticker in enumerate(pack.stickers)}
    first = model.config.img_token_ids[0]
    found: dict[str, list[torch.Tensor]] = {"ends": [], "sent": [], "spans": [], "gold": []}
    for dialogue in dialogues:
        messages = collator.shorten(dialogue)
        batch = collator([{"messages": messages}]).to(model.device)
        labels = batch.pop("labels")
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model(**batch, logits_to_keep=1).last_hidden_state.float()
        where = find_decisions(batch["input_ids"], labels, model.config, collator.end_id)
        found["ends"].append(hidden[:, :-1][where].cpu())
        found["sent"].append((labels[:, 1:][where] == first).cpu())
        spans = model.get_img_hidden_states(batch["input_ids"], hidden)
        found["spans"].append(spans[:, : model.config.num_retrieval_tokens].cpu())
        found["gold"].append(torch.tensor([rows[i] for i in sent_stickers(messages)], dtype=torch.long))
    return {name: torch.cat(parts) for name, parts in found.items()}


class Decider(nn.Module):
    """
    The weights that decide about stickers, apart from their model, and as they were.

    Args:
        model ([`PegsModel`]): Where they come from.
        vectors (`torch.Tensor` of shape `(M, e)`): Unit vectors of the stickers that may be sent.
        emotions (`torch.Tensor` of shape `(M,)`): Emotion of each, by number.
        beta (`float`): How much the reference weighs.

    """

    def __init__(self, model: PegsModel, vectors: torch.Tensor, emotions: torch.Tensor, beta: float) -> None:
        super().__init__()
        self.temperature, self.beta = model.config.retrieval_temperature, beta
        self.timing = copy.deepcopy(model.timing_head).float()
        self.first_timing = copy.deepcopy(self.timing).requires_grad_(False)
        projection = model.retrieval_head.text_projection.weight.detach().float()
        self.projection = nn.Parameter(projection.clone())
        for name, tensor in {"first_projection": projection, "vectors": vectors, "emotions": emotions}.items():
            self.register_buffer(name, tensor.clone())

    def log_probs(self, spans: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(S, M)` of the stickers, by hidden states `(S, k, d)`."""
        queries = F.normalize(F.linear(spans, projection).mean(dim=1), dim=-1)
        return (queries @ self.vectors.T / self.temperature).log_softmax(dim=-1)

    def forward(self, ends: torch.Tensor, sent: torch.Tensor, spans: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """The loss of decisions `(n, d)` with `(n,)` and `(S, k, d)` with `(S,)`; see [`decision_states`]."""
        when = timing_loss((self.timing(ends) - self.first_timing(ends)).squeeze(-1), sent, self.beta)
        log_probs, reference = self.log_probs(spans, self.projection), self.log_probs(spans, self.first_projection)
        return when + emotion_loss(log_probs, reference, gold, self.emotions, self.beta)

    @torch.no_grad()
    def put_into(self, model: PegsModel) -> None:
        """Give a model these weights."""
        model.timing_head.load_state_dict(self.timing.state_dict())
        model.retrieval_head.text_projection.weight.copy_(self.projection)


def timing_loss(gain: torch.Tensor, sent: torch.Tensor, beta: float) -> torch.Tensor:
    """
    DPO on the gold decision to send a sticker or none, against the other one.

    Args:
        gain (`torch.Tensor` of shape `(n,)`): Log-odds of a sticker, less those of the reference.
        sent (`torch.Tensor` of shape `(n,)`): Whether the gold reply has one, bool.
        beta (`float`): How much the reference weighs.

    Returns:
        `torch.Tensor` of shape `()`.

    """
    return -F.logsigmoid(beta * (sent.float() * 2 - 1) * gain).mean()


def emotion_loss(
    log_probs: torch.Tensor, reference: torch.Tensor, gold: torch.Tensor, emotions: torch.Tensor, beta: float
) -> torch.Tensor:
    """
    DPO on the gold sticker against those of another emotion, each as often as the reference would draw it.

    Args:
        log_probs (`torch.Tensor` of shape `(S, M)`): Log-probabilities of the stickers.
        reference (`torch.Tensor` of shape `(S, M)`): Those of the reference.
        gold (`torch.Tensor` of shape `(S,)`): Which one was sent.
        emotions (`torch.Tensor` of shape `(M,)`): Emotion of each sticker, by number.
        beta (`float`): How much the reference weighs.

    Returns:
        `torch.Tensor` of shape `()`.

    """
    wrong = emotions != emotions[gold].unsqueeze(1)
    drawn = reference.masked_fill(~wrong, -torch.inf).softmax(dim=-1).nan_to_num()  # NaN where all have one emotion
    gain = log_probs - reference
    ratios = gain.gather(1, gold.unsqueeze(1)) - gain
    return -(drawn * F.logsigmoid(beta * ratios)).sum(dim=-1).mean()


class Pairs(Dataset):
    """
    One decision of each kind `(d,)` and `(k, d)` with its gold; an index maps to one fixed random draw. Stickers of all `emotions` `(M,)` come equally often, or the
    commonest would be the safest choice.
    """

    def __init__(self, states: dict[str, torch.Tensor], emotions: torch.Tensor, args: AlignArguments) -> None:
        self.states, self.args = states, args
        found = emotions[states["gold"]]
        self.of_emotion = [(found == emotion).nonzero().flatten().tolist() for emotion in found.unique()]

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        states = self.states
        alike = self.of_emotion[rng.integers(len(self.of_emotion))]
        i, j = int(rng.integers(len(states["ends"]))), alike[rng.integers(len(alike))]
        return {
            "ends": states["ends"][i],
            "sent": states["sent"][i],
            "spans": states["spans"][j],
            "gold": states["gold"][j],
        }


def train_align(args: AlignArguments) -> None:
    """Train the stage and save the whole checkpoint."""
    model, processor = load_checkpoint(args.init_from)
    if not model.config.num_retrieval_tokens:
        raise ConfigError(f"{args.init_from} has no retrieval tokens")
    pack = load_pack(args.stickers)
    weights, ids = below_the_heads(model), [sticker.id for sticker in pack.stickers]

    def states_of(name: str, dialogues: list[list[dict]]) -> dict[str, torch.Tensor]:
        return kept(
            Path(args.output_dir) / "state" / f"{name}.safetensors",
            digest(weights, without_pictures(dialogues), ids, args.max_length),
            lambda: decision_states(model, processor, pack, dialogues, args.max_length),
        )

    states = states_of("sessions", training_dialogues(args.sessions, False, pack))
    if args.openers:
        of_openers = states_of("openers", opener_dialogues(pack))
        states |= {name: torch.cat([states[name], of_openers[name]]) for name in ("spans", "gold")}
    model.add_timing_head()
    logger.info("%d decisions, %d stickers sent", len(states["ends"]), len(states["spans"]))
    allowed = {sticker.id for sticker in sendable(pack)}
    rows = torch.tensor([row for row, sticker in enumerate(pack.stickers) if sticker.id in allowed])
    if not torch.isin(states["gold"], rows).all():
        raise ConfigError("the dialogues send a sticker of the pack's test databases")
    states["gold"] = torch.searchsorted(rows, states["gold"])
    emotions = torch.tensor([EMOTIONS.index(pack.stickers[row].emotion) for row in rows.tolist()])
    vectors = embed_pack(model, processor, pack)[rows]
    decider = Decider(model, vectors, emotions, args.beta)
    noise = {"ends": args.timing_noise, "spans": args.noise}
    spread = {name: size * states[name].std(dim=0) for name, size in noise.items()}

    def loss_fn(decider: nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        for name, size in spread.items():
            noise = torch.randn(batch[name].shape, generator=generator, device=generator.device)
            batch[name] = batch[name] + size.to(generator.device) * noise
        return decider(**batch)

    train_loop(args, decider, Pairs(states, emotions, args), loss_fn)
    decider.put_into(model)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
