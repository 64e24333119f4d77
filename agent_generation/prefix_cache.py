"""Prompts that begin like an earlier one are read from where they differ (prefix caching), and answers grow without a copy of what was read."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


TOGETHER = 8  # prompts that are read in one pass


class RoomyLayer(DynamicLayer):
    """
    A layer's keys and values with room behind them: a step writes its own and copies no others.

    Args:
        buffers (`torch.Tensor` of shape `(2, B, H, room, D)`): For keys and values.
        tokens (`int`): How much of the room is taken.

    """

    def __init__(self, buffers: torch.Tensor, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(*buffers)
        self.buffers = buffers
        self.keys, self.values = self.buffers[..., :tokens, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put those of new tokens behind the others, and give all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = self.buffers[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows."""
        tokens = self.get_seq_length()
        self.buffers = self.buffers[:, indices]
        self.keys, self.values = self.buffers[..., :tokens, :]


class PrefixCache:
    """
    The keys and values of the prompts that a model read last.

    Args:
        model (`PreTrainedModel`): A causal language model on one device.
        most_bytes (`int`, *optional*, defaults to 512 MiB): Of all that is kept: 22,000 tokens of SmolLM2-135M in bfloat16.

    Raises:
        ValueError: If not all layers of the model attend to everything.

    """

    def __init__(self, model: PreTrainedModel, most_bytes: int = 512 << 20) -> None:
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
            raise ValueError(f"{type(model).__name__}: not all of its layers attend to everything")
        self.model, self.most_bytes = model, most_bytes
        # tokens (T,) and states (layers, 2, H, T, D)
        self.kept: OrderedDict[bytes, tuple[np.ndarray, torch.Tensor]] = OrderedDict()
        config = model.config.get_text_config(decoder=True)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = config.num_hidden_layers, 2, heads, 0, size
        self.nothing = torch.empty(shape, dtype=model.dtype, device=model.device)

    def read(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], room: int
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """
        Read prompts but for their last tokens.

        Args:
            prompts (`Sequence[Sequence[int]]`): Tokens of each.
            rows (`Sequence[int]`): Which prompt each of B rows goes on from.
            room (`int`): Most tokens that follow, the last ones of the prompts among them.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, DynamicCache]`: `input_ids` of shape `(B, 1)`, the last tokens; `attention_mask` of shape `(B, T)` with padding at the
            left; and the keys and values of the T - 1 columns before.

        """
        states = self._states([np.array(prompt[:-1]) for prompt in prompts])
        width = max(known.shape[-2] for known in states)
        buffers = self._zeros(len(rows), width + room)
        mask = torch.zeros(len(rows), width + 1, dtype=torch.long, device=self.nothing.device)
        for row, prompt in enumerate(rows):
            start = width - states[prompt].shape[-2]
            buffers[:, :, row, :, start:width] = states[prompt]
            mask[row, start:] = 1
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer(layer, width) for layer in buffers]
        return torch.tensor([prompts[row][-1:] for row in rows], device=mask.device), mask, cache

    def _zeros(self, rows: int, tokens: int) -> torch.Tensor:
        """Keys and values `(layers, 2, rows, H, tokens, D)` to write into."""
        layers, two, heads, _, size = self.nothing.shape
        return self.nothing.new_zeros(layers, two, rows, heads, tokens, size)

    def _states(self, prompts: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Those of all tokens of each prompt, which are kept for later batches; what was not used for longest goes."""
        states = [self._find(prompt) for prompt in prompts]
        missing = [len(prompt) - known.shape[-2] for prompt, known in zip(prompts, states, strict=True)]
        order = sorted((n for n in range(len(prompts)) if missing[n]), key=missing.__getitem__)
        for start in range(0, len(order), TOGETHER):
            part = order[start : start + TOGETHER]
            read = self._read([prompts[n] for n in part], [states[n] for n in part])
            for n, found in zip(part, read, strict=True):
                states[n] = found
                self.kept[prompts[n].tobytes()] = prompts[n], found
        while sum(found.nbytes for _, found in self.kept.values()) > self.most_bytes:
            self.kept.popitem(last=False)
        return states

    def _find(self, prompt: np.ndarray) -> torch.Tensor:
        """States of the tokens that some kept prompt begins with too."""
        best, most = b"", 0
        for key, (tokens, _) in self.kept.items():
            shorter = min(len(prompt), len(tokens))
            differs = prompt[:shorter] != tokens[:shorter]
            length = int(differs.argmax()) if differs.any() else shorter
            if length > most:
                best, most = key, length
        if not most:
            return self.nothing
        self.kept.move_to_end(best)
        return self.kept[best][1][..., :most, :]

    def _read(self, prompts: Sequence[np.ndarray], known: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """States of all tokens, given those of the first ones; what is padded stands left of what is known and of what is read."""
        lengths = [states.shape[-2] for states in known]
        most = max(lengths)
        width = most + max(len(prompt) - length for prompt, length in zip(prompts, lengths, strict=True))
        joined = self._zeros(len(prompts), most)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            joined[:, :, row, :, most - length :] = known[row]
            columns = [*range(most - length, most), *range(width - len(prompt) + length, width)]
            ids[row, columns] = torch.from_numpy(prompt)
            mask[row, columns] = 1
        ids, mask = ids.to(joined.device), mask.to(joined.device)
        cache = DynamicCache([tuple(layer) for layer in joined], config=self.model.config)
        self.model.base_model(  # without the head, which would copy itself for each row
            input_ids=ids[:, most:],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, most:],
            past_key_values=cache,
        )
        states = torch.stack([torch.stack([keys, values]) for keys, values, _ in cache])
        return [states[:, :, row][..., real, :] for row, real in enumerate(mask.bool())]
