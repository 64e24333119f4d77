"""How often a reply has a sticker: the shift of `[IMG1]`'s score that makes it a wished share of the turns."""

import torch

from modeling_pegs import PegsModel, PegsProcessor


@torch.no_grad()
def sticker_logits(
    model: PegsModel, processor: PegsProcessor, contexts: list[list[dict]], batch_size: int = 16, seed: int = 0
) -> torch.Tensor:
    """
    Log-odds of a sticker at the end of sampled replies, by the model's own generation config and without shift.

    Args:
        model ([`PegsModel`]): Its generation config says how to sample.
        processor ([`PegsProcessor`]): Its processor.
        contexts (`list[list[dict]]`): Messages in the chat format, each list ending with a user's.
        batch_size (`int`, *optional*, defaults to 16): Replies a batch.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling.

    Returns:
        `torch.Tensor` of shape `(n,)`: One a reply that came to its end; replies that were cut are left out.

    """
    torch.manual_seed(seed)  # noqa: TID251  entry point
    logits = []
    for start in range(0, len(contexts), batch_size):
        inputs = processor.apply_chat_template(
            contexts[start : start + batch_size], add_generation_prompt=True, tokenize=True, return_tensors="pt"
        )
        logits.append(model.generate(**inputs.to(model.device), sticker_bias=0.0).sticker_logit.cpu())
    flat = torch.cat(logits)
    return flat[~flat.isnan()]


def fit_sticker_bias(logits: torch.Tensor, rate: float, temperature: float = 1.0) -> float:
    """
    Shift `b` for which the mean of `sigmoid((logits + b) / temperature)` is `rate`.

    Args:
        logits (`torch.Tensor` of shape `(n,)`): From [`sticker_logits`].
        rate (`float`): Wished share of replies with a sticker, in `(0, 1)`.
        temperature (`float`, *optional*, defaults to 1.0): Temperature that replies are sampled at.

    Returns:
        `float`.

    Raises:
        ValueError: If `rate` is not between 0 and 1 or there are no logits.

    """
    if not 0 < rate < 1 or not len(logits):
        raise ValueError(f"Need 0 < rate < 1 and at least one reply, got rate {rate} and {len(logits)} replies.")
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if torch.sigmoid((logits.double() + middle) / temperature).mean() < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
