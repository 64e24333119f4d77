"""MiniLM's token states of captions: the mini decoder's text condition, and the target of the feature mapper (eq. 9)."""

from functools import cache

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dataset_builders.stickers.encoder import packaged_encoder


@cache
def load_minilm() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The packaged MiniLM, loaded once."""
    folder = packaged_encoder()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def encode_captions(captions: list[str], max_length: int) -> torch.Tensor:
    """
    Last hidden states of MiniLM, zero where the caption has ended.

    Args:
        captions (`list[str]`): Texts; cut after `max_length` tokens.
        max_length (`int`): Number of states L.

    Returns:
        `torch.Tensor` of shape `(len(captions), L, 384)`.

    """
    tokenizer, model = load_minilm()
    states = []
    for start in range(0, len(captions), 64):
        chunk = captions[start : start + 64]
        inputs = tokenizer(chunk, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        states.append(hidden * inputs["attention_mask"].unsqueeze(-1))
    return torch.cat(states)


def embed_sentences(texts: list[str]) -> torch.Tensor:
    """Sentence embeddings of all-MiniLM-L6-v2, unit norm, `(len(texts), 384)`."""
    encoder = SentenceTransformer(str(packaged_encoder()), device="cpu")
    return encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False).clone()
