"""Generation of text and, in one pass once `[IMG1]` is chosen, of the whole [IMG] span."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput


@dataclass
class PegsGenerateOutput(ModelOutput):
    """
    Output of [`PegsModel.generate`].

    Args:
        sequences (`torch.Tensor` of shape `(B, T)`): Prompt, reply, and a whole [IMG] span or none.
        sticker_mask (`torch.Tensor` of shape `(B,)`, bool): Whether the reply has a sticker.
        sticker_queries (`torch.Tensor` of shape `(B, e)`, *optional*): Unit vectors to retrieve with; zero without a sticker.
        sticker_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): The image decoder's condition; zero without a sticker.
        sticker_logit (`torch.Tensor` of shape `(B,)`): Log-odds of `[IMG1]` against the end of the reply where the text ended, without bias;
            NaN for a reply that was cut.

    """

    sequences: torch.Tensor | None = None
    sticker_mask: torch.Tensor | None = None
    sticker_queries: torch.Tensor | None = None
    sticker_prompt_embeds: torch.Tensor | None = None
    sticker_logit: torch.Tensor | None = None


class StickerLogitsProcessor(LogitsProcessor):
    """
    Lets `[IMG1]` alone of the added tokens be chosen, not before there is text, and shifts its odds against the end of the reply.

    What is shifted between the two is the probability that the text is over, so the shift changes how often there is a sticker and never what is said.

    Args:
        added_ids (`list[int]`): Ids of all added tokens.
        img1_id (`int`): Id of `[IMG1]`.
        stop_ids (`list[int]`): Ids that end a reply.
        prompt_length (`int`): Length of the prompt.
        bias (`float`): Added to the log-odds of `[IMG1]`.

    """

    def __init__(
        self, added_ids: list[int], img1_id: int, stop_ids: list[int], prompt_length: int, bias: float
    ) -> None:
        self.forbidden = [token for token in added_ids if token != img1_id]
        self.img1_id, self.stop_ids, self.prompt_length, self.bias = img1_id, stop_ids, prompt_length, bias

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(B, V + 3 + r)` with the added tokens restrained."""
        scores = scores.clone()
        scores[:, self.forbidden] = -torch.inf
        if input_ids.shape[1] == self.prompt_length:
            scores[:, [self.img1_id, *self.stop_ids]] = -torch.inf
        else:
            ends = scores[:, self.stop_ids].float()
            end = ends.logsumexp(dim=-1)
            over = torch.logaddexp(scores[:, self.img1_id].float(), end)
            odds = torch.where(over.isinf(), 0.0, scores[:, self.img1_id].float() - end) + self.bias
            if math.isinf(self.bias):
                odds = torch.full_like(end, self.bias)  # whatever the scores are
            no_sticker = (over + F.logsigmoid(-odds)).unsqueeze(1)
            shares = ends.log_softmax(dim=-1).nan_to_num(nan=0.0)  # an end that may not come yet has no shares
            scores[:, self.img1_id] = (over + F.logsigmoid(odds)).to(scores.dtype)
            scores[:, self.stop_ids] = (no_sticker + shares).to(scores.dtype)
        return scores


class PegsGenerationMixin:
    """`generate` of [`PegsModel`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sticker_bias: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ) -> PegsGenerateOutput:
        """
        Write replies, with a sticker where the model chooses one.

        The text is generated until the end of the reply or `[IMG1]`; after `[IMG1]` the rest of the span is fixed, so it is
        computed in one forward pass instead of `r` steps.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where a token counts.
            pixel_values (`torch.Tensor` of shape `(N, 3, height, width)`, *optional*): Perceived stickers.
            sticker_bias (`float`, *optional*): Added to the log-odds of `[IMG1]` against the end of the reply; `inf` always sends a sticker, `-inf`
                never, defaults to the generation config's.
            logits_processor (`LogitsProcessorList`, *optional*): More processors, applied before the sticker's.
            kwargs: As for `transformers.GenerationMixin.generate`.

        Returns:
            [`PegsGenerateOutput`].

        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        img_ids = self.config.img_token_ids
        img1_id, prompt_length = img_ids[0], input_ids.shape[1]
        eos = kwargs.pop("eos_token_id", None) or self.generation_config.eos_token_id
        stop_ids = list(eos) if isinstance(eos, list | tuple) else [eos]
        if sticker_bias is None:
            sticker_bias = getattr(self.generation_config, "sticker_bias", 0.0)
        added_ids = list(range(self.config.first_new_token_id, img_ids[-1] + 1))
        sticker_processor = StickerLogitsProcessor(added_ids, img1_id, stop_ids, prompt_length, sticker_bias)
        kwargs.setdefault("pad_token_id", self.generation_config.pad_token_id or stop_ids[0])
        kwargs.update(return_dict_in_generate=True, output_logits=True, use_cache=True)
        output = super().generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            eos_token_id=[*stop_ids, img1_id],
            logits_processor=LogitsProcessorList([*(logits_processor or []), sticker_processor]),
            **kwargs,
        )
        new_ids = output.sequences[:, prompt_length:]
        is_stop = torch.isin(new_ids, torch.tensor([*stop_ids, img1_id], device=new_ids.device))
        before_stop = is_stop.cumsum(dim=-1) == 0
        end = before_stop.sum(dim=-1)  # (B,) length of each text
        was_cut = end == new_ids.shape[1]
        end_ids = new_ids.gather(1, end.clamp(max=new_ids.shape[1] - 1).unsqueeze(1)).squeeze(1)
        sticker_mask = (end_ids == img1_id) & ~was_cut
        logits = torch.stack(output.logits, dim=1)  # (B, new tokens, V + 3 + r), before any processor
        at_end = logits[torch.arange(len(end)), end.clamp(max=logits.shape[1] - 1)].float()
        sticker_logit = at_end[:, img1_id] - at_end[:, stop_ids].logsumexp(dim=-1)
        result = PegsGenerateOutput(
            sequences=output.sequences,
            sticker_mask=sticker_mask,
            sticker_logit=sticker_logit.masked_fill(was_cut, torch.nan),
        )
        hidden_states = None
        if sticker_mask.any():
            text_mask = torch.cat([attention_mask, before_stop.to(attention_mask.dtype)[:, :-1]], dim=1)
            hidden_states = self.compute_img_span(text_mask, output.past_key_values)
            span = torch.tensor(img_ids, device=new_ids.device)
            width = prompt_length + int(end[sticker_mask].max()) + len(img_ids)
            sequences = output.sequences.new_full(
                (len(end), max(width, output.sequences.shape[1])), kwargs["pad_token_id"]
            )
            sequences[:, : output.sequences.shape[1]] = output.sequences
            for row in sticker_mask.nonzero().flatten().tolist():
                start = prompt_length + int(end[row])
                sequences[row, start : start + len(img_ids)] = span
            result.sequences = sequences
        self._add_sticker_heads(result, hidden_states)
        return result

    def compute_img_span(self, text_mask: torch.Tensor, past_key_values: object) -> torch.Tensor:
        """
        Hidden states of a whole [IMG] span after each text, in one forward pass.

        Args:
            text_mask (`torch.Tensor` of shape `(B, T)`): 1 for the cached tokens that belong to prompt or text.
            past_key_values (`Cache`): Cache of those `T` tokens.

        Returns:
            `torch.Tensor` of shape `(B, r, d)`.

        """
        span = torch.tensor(self.config.img_token_ids, device=text_mask.device).expand(len(text_mask), -1)
        mask = torch.cat([text_mask, torch.ones_like(span)], dim=1)
        positions = (mask.cumsum(dim=-1) - 1)[:, -span.shape[1] :]
        output = self(
            input_ids=span,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past_key_values,
            logits_to_keep=1,
        )
        return output.last_hidden_state

    def _add_sticker_heads(self, result: PegsGenerateOutput, hidden_states: torch.Tensor | None) -> None:
        shape, k = (len(result.sticker_mask),), self.config.num_retrieval_tokens
        where = result.sticker_mask
        if self.retrieval_head is not None:
            result.sticker_queries = torch.zeros(*shape, self.config.retrieval_dim, device=where.device)
            if hidden_states is not None:
                result.sticker_queries[where] = self.retrieval_head.embed_text(hidden_states[where, :k]).float()
        if self.feature_mapper is not None:
            size = (self.config.prompt_length, self.config.prompt_dim)
            result.sticker_prompt_embeds = torch.zeros(*shape, *size, device=where.device)
            if hidden_states is not None:
                result.sticker_prompt_embeds[where] = self.feature_mapper(hidden_states[where, k:]).float()


__all__ = ["PegsGenerateOutput", "PegsGenerationMixin", "StickerLogitsProcessor"]
