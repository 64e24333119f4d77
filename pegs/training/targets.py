"""What the output heads are trained towards: caption states (eq. 9) and vision features (eq. 5) of the stickers."""

import torch

from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from pegs.training.text_states import encode_captions


class StickerTargets:
    """
    Targets of a set of stickers, computed once: the vision tower and the text encoder are frozen.

    Args:
        pack ([`StickerPack`]): Where the pictures are.
        ids (`list[str]`): The stickers that may be sent; they are also each other's negatives.
        model ([`PegsModel`]): Its vision tower.
        processor ([`PegsProcessor`]): Its processor.

    """

    def __init__(self, pack: StickerPack, ids: list[str], model: PegsModel, processor: PegsProcessor) -> None:
        self.index = {sticker_id: i for i, sticker_id in enumerate(ids)}
        self.states = encode_captions([pack.by_id[i].caption for i in ids], model.config.prompt_length)
        self.vision_features = pooled_features(pack, ids, model, processor)

    def positives(self, sent: list[str]) -> torch.Tensor:
        """Which sticker is right for each of `sent`: `(S, M)`, bool."""
        return torch.nn.functional.one_hot(self.rows(sent), len(self.index)).bool()

    def prompt_embeds(self, sent: list[str]) -> torch.Tensor:
        """Caption states `(S, L, D)` of `sent`."""
        return self.states[self.rows(sent)]

    def rows(self, sent: list[str]) -> torch.Tensor:
        """Row of each of `sent`."""
        return torch.tensor([self.index[sticker_id] for sticker_id in sent])


@torch.no_grad()
def pooled_features(pack: StickerPack, ids: list[str], model: PegsModel, processor: PegsProcessor) -> torch.Tensor:
    """Pooled vision outputs `(len(ids), p)` of a pack's stickers."""
    chunks = []
    for start in range(0, len(ids), 64):
        pictures = ["<IMG>" for _ in ids[start : start + 64]]
        inputs = processor(pictures, [pack.image(i) for i in ids[start : start + 64]], return_tensors="pt")
        chunks.append(
            model.vision_model(inputs["pixel_values"].to(model.device, model.query_tokens.dtype)).pooler_output
        )
    return torch.cat(chunks).float().cpu()
