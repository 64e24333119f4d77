"""What is computed once and kept in a file, as long as what it was computed from stays the same."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)


def digest(*things: Any) -> str:
    """Of tensors, anywhere in nested containers, by their values, and of all else by what `repr` says."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in torch.utils._pytree.tree_leaves(things):
        if isinstance(leaf, torch.Tensor):
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def kept(file: Path, key: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Tensors from `file` if they were kept there under `key`; else they are computed, and kept.

    Args:
        file (`Path`): A safetensors file.
        key (`str`): Of all that they depend on, e.g. a [`digest`].
        compute (`Callable`): Makes them.

    Returns:
        `dict[str, torch.Tensor]`.

    """
    if file.is_file():
        with safe_open(file, "pt") as found:
            if (found.metadata() or {}).get("key") == key:
                return load_file(file)
        logger.info("%s is of other weights or data, and is made anew", file)
    tensors = compute()
    write_tensors(file, tensors, key)
    return tensors


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], key: str = "") -> None:
    """Write a safetensors file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    save_file(tensors, partial, metadata={"key": key})
    partial.replace(file)


def without_pictures(dialogues: list[list[dict]]) -> list[list[dict]]:
    """Dialogues in which stickers are their ids alone."""
    return [
        [{**m, "content": [{**part, "image": None} for part in m["content"]]} for m in messages]
        for messages in dialogues
    ]
