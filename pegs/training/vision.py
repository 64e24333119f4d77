"""Stage `vision`: the mini scale's vision tower, trained on sticker art against MiniLM's text space."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers import openmoji
from modeling_pegs import PegsModel
from modeling_pegs.retrieval_head import info_nce_loss
from pegs.training.art import Drawing, load_art, to_rgba_tensor
from pegs.training.build import build_model, build_processor
from pegs.training.loop import LoopArguments, train_loop
from pegs.training.stages import reading
from pegs.training.text_states import embed_sentences


@dataclass
class VisionArguments(LoopArguments):
    """
    Parameters of stage `vision`.

    Args:
        model (`str`): YAML file of the model.
        chat_template (`str`): Jinja file of its processor.
        temperature (`float`): InfoNCE's tau.
        pack_part (`float`): Share of the samples drawn from the annotated pack, in `[0, 1]`.

    """

    model: str = ""
    chat_template: str = ""
    temperature: float = 0.05
    pack_part: float = 0.5
    emotion_weight: float = 0.3


class VisionAligner(nn.Module):
    """Vision tower and image projection of a PEGS model, seen as one map from pictures to MiniLM's space and to emotions."""

    def __init__(self, pegs: PegsModel) -> None:
        super().__init__()
        self.vision_model, self.projection = pegs.vision_model, pegs.retrieval_head.image_projection
        self.emotion_head = nn.Linear(pegs.config.vision_config.hidden_size, len(EMOTIONS))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors `(B, e)` and emotion scores `(B, 7)` of pictures `(B, 3, H, W)`."""
        pooled = self.vision_model(pixel_values).pooler_output
        return F.normalize(self.projection(pooled).float(), dim=-1), self.emotion_head(pooled).float()


class PictureTexts(Dataset):
    """Pictures with the sentence embedding of their caption; an index maps to one fixed random draw."""

    def __init__(self, art: list[Drawing], args: VisionArguments) -> None:
        self.args = args
        self.pictures = [to_rgba_tensor(drawing.pixels)[:3] for drawing in art]
        self.embeds = embed_sentences([drawing.caption for drawing in art])
        by_id = openmoji.cached_pack().by_id
        labels = [EMOTIONS.index(by_id[d.sticker_id].emotion) if d.sticker_id else -100 for d in art]
        self.emotions = torch.tensor(labels)
        self.pack = [i for i, drawing in enumerate(art) if drawing.sticker_id]
        self.others = [i for i, drawing in enumerate(art) if not drawing.sticker_id]

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        among = self.pack if rng.random() < self.args.pack_part else self.others
        i = int(among[rng.integers(len(among))])
        return {
            "pixels": self.pictures[i],
            "text": self.embeds[i],
            "index": torch.tensor(i),
            "emotion": self.emotions[i],
        }


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Turn (up to 15 degrees), scale (0.8 to 1.15), shift, mirror and tint pictures, then normalise them as the processor does.

    Args:
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): In `[-1, 1]`, white background.
        generator (`torch.Generator`): Source of the random draws.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`.

    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    angle, scale = uniform(-1, 1) * math.pi / 12, 1 / uniform(0.8, 1.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = torch.stack(
        [
            scale * angle.cos() * mirror,
            -scale * angle.sin(),
            uniform(-0.1, 0.1),
            scale * angle.sin() * mirror,
            scale * angle.cos(),
        ],
        dim=1,
    )
    matrix = torch.cat([rows, uniform(-0.1, 0.1).unsqueeze(1)], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    ink = F.grid_sample(
        1 - pixels, grid, align_corners=False
    )  # white is 0, so that what comes in from outside is white
    tinted = (1 - ink) * uniform(0.9, 1.0, 3, 1, 1) + uniform(-0.06, 0.06, 3, 1, 1)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((tinted.clamp(-1, 1) + 1) / 2 - mean) / std


def train_vision(args: VisionArguments) -> None:
    """Train the vision tower of a fresh model and save the model with its processor."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    with reading(f"model {args.model} or chat_template {args.chat_template}"):
        pegs = build_model(args.model)
        processor = build_processor(pegs.config, args.chat_template)
    art = [d for d in load_art(openmoji.cached_pack(), pegs.config.vision_config.image_size) if d.caption]

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        images, emotions = model(augment(batch["pixels"], generator))
        positives = batch["index"].unsqueeze(0) == batch["index"].unsqueeze(1)
        contrast = info_nce_loss(batch["text"], images, positives, args.temperature)
        distance = (1 - (images * batch["text"]).sum(dim=-1)).mean()
        return contrast + distance + args.emotion_weight * F.cross_entropy(emotions, batch["emotion"])

    train_loop(args, VisionAligner(pegs), PictureTexts(art, args), loss_fn)
    pegs.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
