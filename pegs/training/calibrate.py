"""How often a reply has a sticker: what `sticker_rate` needs to know of the model, measured on its own replies."""

import torch

from modeling_pegs import PegsModel, PegsProcessor


CUT = -100.0  # log-odds that stand for a reply that was cut, which never has a sticker


@torch.no_grad()
def sticker_logits(
    model: PegsModel,
    processor: PegsProcessor,
    contexts: list[list[dict]],
    batch_size: int = 16,
    seed: int = 0,
    **generate_kwargs,
) -> torch.Tensor:
    """
    The model's own log-odds of a sticker at the end of replies that it writes by its generation config.

    Contexts of like length share a batch, so that little is computed on padding.

    Args:
        model ([`PegsModel`]): Its generation config says how to sample.
        processor ([`PegsProcessor`]): Its processor.
        contexts (`list[list[dict]]`): Messages in the chat format, each list ending with a user's.
        batch_size (`int`, *optional*, defaults to 16): Replies a batch.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling.
        **generate_kwargs: More arguments of [`PegsModel.generate`].

    Returns:
        `torch.Tensor` of shape `(n,)`: In the order of `contexts`; NaN for a reply that was cut.

    """
    torch.manual_seed(seed)  # noqa: TID251  entry point
    logits = torch.zeros(len(contexts))
    for rows in batches_of_like_length(processor, contexts, batch_size):
        inputs = processor.apply_chat_template(
            [contexts[row] for row in rows], add_generation_prompt=True, tokenize=True, return_tensors="pt"
        )
        output = model.generate(**inputs.to(model.device), sticker_rate="model", **generate_kwargs)
        logits[rows] = output.sticker_logit.float().cpu()
    return logits


def batches_of_like_length(processor: PegsProcessor, contexts: list[list[dict]], batch_size: int) -> list[list[int]]:
    """Rows of `contexts` in batches, the longest contexts first."""
    texts = processor.apply_chat_template(contexts, add_generation_prompt=True)
    lengths = [len(text) + 4 * processor.num_query_tokens * text.count(processor.image_token) for text in texts]
    order = sorted(range(len(contexts)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def logit_quantiles(logits: torch.Tensor, count: int = 100) -> list[float]:
    """
    What a generation config keeps as `sticker_logit_quantiles`, so that any rate can be asked for later.

    Args:
        logits (`torch.Tensor` of shape `(n,)`): From [`sticker_logits`], on dialogues that the model was not trained on.
        count (`int`, *optional*, defaults to 100): How many; value `i` is the quantile `(i + 0.5) / count`.

    Returns:
        `list[float]`: Ascending.

    Raises:
        ValueError: If there are no logits.

    """
    if not len(logits):
        raise ValueError("Quantiles need at least one reply, got none.")
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = torch.quantile(logits.double().nan_to_num(nan=CUT), places)
    return [round(value, 3) for value in values.tolist()]
