"""From the hidden states of the generation tokens to the image decoder's prompt embeddings."""

import torch
from torch import nn


class FeatureMapper(nn.Module):
    """
    Two linear layers around an encoder-decoder transformer with learned queries (StickerConv, eq. 9).

    Args:
        input_dim (`int`): Hidden size d of the language model.
        hidden_size (`int`): Width of the transformer.
        num_layers (`int`): Layers of its encoder, and of its decoder.
        num_heads (`int`): Attention heads.
        intermediate_size (`int`): Width of its feed-forward layers.
        prompt_length (`int`): Number L of queries, one a prompt embedding.
        prompt_dim (`int`): Size D of a prompt embedding.

    """

    def __init__(
        self,
        input_dim: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        prompt_length: int,
        prompt_dim: int,
    ) -> None:
        super().__init__()
        self.input_projection = nn.Linear(input_dim, hidden_size)
        self.queries = nn.Parameter(torch.randn(1, prompt_length, hidden_size))
        self.transformer = nn.Transformer(
            hidden_size,
            num_heads,
            num_layers,
            num_layers,
            intermediate_size,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.output_projection = nn.Linear(hidden_size, prompt_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Map hidden states to prompt embeddings.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, r - k, d)`): Hidden states of the generation tokens.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.

        """
        source = self.input_projection(hidden_states)
        target = self.transformer(source, self.queries.expand(len(source), -1, -1))
        return self.output_projection(target)


__all__ = ["FeatureMapper"]
