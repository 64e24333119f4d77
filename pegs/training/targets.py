"""What the output heads are trained towards, and what frozen parts see: caption states (eq. 9) and vision features (eq. 5) of the stickers."""

import logging
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTextModel

from dataset_builders.stickers.pack import StickerPack
from modeling_pegs import PegsModel, PegsProcessor
from pegs.training.cache import digest, write_tensors
from pegs.training.text_states import encode_captions, load_minilm


logger = logging.getLogger(__name__)


class CaptionStates:
    """
    The image decoder's text condition for captions, `(n, L, D)`.

    Args:
        text_encoder (`str`): Folder or Hub id of a Stable Diffusion pipeline whose `text_encoder` and `tokenizer` make the states; MiniLM's states
            if empty, which the mini decoder takes.
        length (`int`): Number L of states.

    """

    def __init__(self, text_encoder: str, length: int) -> None:
        self.length, self.clip = length, None
        if text_encoder:
            self.tokenizer = AutoTokenizer.from_pretrained(text_encoder, subfolder="tokenizer")
            self.clip = CLIPTextModel.from_pretrained(text_encoder, subfolder="text_encoder").eval()
        else:
            load_minilm()  # once, and before a trainer could share out its weights

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """States `(len(captions), L, D)`; longer captions are cut."""
        if self.clip is None:
            return encode_captions(captions, self.length)
        chunks = []
        for start in range(0, len(captions), 64):
            inputs = self.tokenizer(
                captions[start : start + 64],
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            chunks.append(self.clip(inputs["input_ids"]).last_hidden_state)
        return torch.cat(chunks)


class VisionFeatures:
    """
    What a frozen vision tower sees in each sticker of a pack: computed once, kept on disk, read a sticker at a time.

    Args:
        pack ([`StickerPack`]): The stickers.
        model ([`PegsModel`]): Its vision tower.
        processor ([`PegsProcessor`]): Its processor.

    """

    def __init__(self, pack: StickerPack, model: PegsModel, processor: PegsProcessor) -> None:
        self.rows = {sticker.id: row for row, sticker in enumerate(pack.stickers)}
        self.file = Path(HF_HOME) / "stickerconv" / "vision" / f"{vision_key(pack, model, processor)}.safetensors"
        if not self.file.is_file():
            logger.info("vision features of %d stickers, once, into %s", len(self.rows), self.file)
            write_tensors(self.file, compute_vision(pack, list(self.rows), model, processor))

    def states(self, ids: list[str]) -> torch.Tensor:
        """Vision states `(len(ids), P, p)`."""
        return self._read("states", ids)

    def pooled(self, ids: list[str]) -> torch.Tensor:
        """Pooled vision outputs `(len(ids), p)`."""
        return self._read("pooled", ids)

    def _read(self, name: str, ids: list[str]) -> torch.Tensor:
        with safe_open(self.file, "pt") as file:
            tensor = file.get_slice(name)
            return torch.cat([tensor[self.rows[i] : self.rows[i] + 1] for i in ids])


def vision_key(pack: StickerPack, model: PegsModel, processor: PegsProcessor) -> str:
    """What vision features depend on: the tower's weights, how pictures are prepared, and the pictures."""
    pictures = [(sticker.id, sticker.sha256) for sticker in pack.stickers]
    return digest(processor.image_processor.to_json_string(), model.vision_model.state_dict(), pictures)


@torch.no_grad()
def compute_vision(
    pack: StickerPack, ids: list[str], model: PegsModel, processor: PegsProcessor
) -> dict[str, torch.Tensor]:
    """Vision `states` `(len(ids), P, p)` and `pooled` outputs `(len(ids), p)` of a pack's stickers."""
    states, pooled = [], []
    for start in range(0, len(ids), 64):
        pictures = [pack.image(i) for i in ids[start : start + 64]]
        inputs = processor(["<IMG>"] * len(pictures), pictures, return_tensors="pt")
        vision = model.encode_images(inputs["pixel_values"].to(model.device))
        states.append(vision.last_hidden_state.cpu())
        pooled.append(vision.pooler_output.cpu())
    return {"states": torch.cat(states), "pooled": torch.cat(pooled)}


class StickerTargets:
    """
    Targets of a set of stickers, computed once: the vision tower and the text encoder are frozen.

    Args:
        captions (`dict[str, str]`): Captions of the stickers that may be sent, by id; these stickers are also each other's negatives.
        encode ([`CaptionStates`]): The image decoder's text encoder.
        vision ([`VisionFeatures`]): Their vision features.

    """

    def __init__(self, captions: dict[str, str], encode: CaptionStates, vision: VisionFeatures) -> None:
        self.index = {sticker_id: i for i, sticker_id in enumerate(captions)}
        self.states = encode(list(captions.values()))
        self.vision_features = vision.pooled(list(captions)).float()

    def positives(self, sent: list[str]) -> torch.Tensor:
        """Which sticker is right for each of `sent`: `(S, M)`, bool."""
        return torch.nn.functional.one_hot(self.rows(sent), len(self.index)).bool()

    def prompt_embeds(self, sent: list[str]) -> torch.Tensor:
        """Caption states `(S, L, D)` of `sent`."""
        return self.states[self.rows(sent)]

    def rows(self, sent: list[str]) -> torch.Tensor:
        """Row of each of `sent`."""
        return torch.tensor([self.index[sticker_id] for sticker_id in sent])


class PairTargets:
    """
    Targets of streamed pictures, which are known by their captions.

    Args:
        encode ([`CaptionStates`]): The image decoder's text encoder.

    """

    def __init__(self, encode: CaptionStates) -> None:
        self.encode = encode

    def prompt_embeds(self, sent: list[str]) -> torch.Tensor:
        """Caption states `(S, L, D)` of `sent`."""
        return self.encode(sent)
