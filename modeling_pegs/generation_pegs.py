"""Generation of text and, in one pass once `[IMG1]` is chosen, of the whole [IMG] span."""

import copy
import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.nn.functional import logsigmoid, softplus
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput


UNSUPPORTED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


@dataclass
class PegsGenerateOutput(ModelOutput):
    """
    Output of [`PegsModel.generate`]; `B` counts the returned sequences.

    Args:
        sequences (`torch.Tensor` of shape `(B, T)`): Prompt, reply, and a whole [IMG] span or none.
        sticker_mask (`torch.Tensor` of shape `(B,)`, bool): Whether the reply has a sticker.
        sticker_queries (`torch.Tensor` of shape `(B, e)`, *optional*): Unit vectors to retrieve with; zero without a sticker.
        sticker_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): The image decoder's condition; zero without a sticker.
        sticker_logit (`torch.Tensor` of shape `(B,)`): The model's own log-odds of `[IMG1]` against the end of the reply where the text ended, before
            any processor or shift; NaN for a reply that was cut.
        past_key_values ([`PegsCache`], *optional*): To pass to the next turn of the conversation; `None` after beam search, for several replies to one prompt,
            and with a static cache.

    """

    sequences: torch.Tensor | None = None
    sticker_mask: torch.Tensor | None = None
    sticker_queries: torch.Tensor | None = None
    sticker_prompt_embeds: torch.Tensor | None = None
    sticker_logit: torch.Tensor | None = None
    past_key_values: "PegsCache | None" = None


@runtime_checkable
class StickerStreamer(Protocol):
    """A streamer that also wants the sticker: after the text's `end()`, `on_sticker` is called once if the reply has one."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids, then each new token of the text."""

    def end(self) -> None:
        """Take notice that the text is over."""

    def on_sticker(self, output: PegsGenerateOutput) -> None:
        """Take the finished output, whose `sticker_queries` and `sticker_prompt_embeds` belong to the sticker."""


class RoomyLayer(DynamicLayer):
    """A layer's keys and values `(B, H, T, D)` with room behind them: without gradients, a step writes its own and copies no others."""

    room = 64  # tokens
    buffers: tuple[torch.Tensor, ...] = ()  # whose beginnings are the keys and values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put those of new tokens behind the others, and give all."""
        if torch.is_grad_enabled():
            self.buffers = ()
            return super().update(key_states, value_states, *args, **kwargs)
        start = self.get_seq_length()
        if not start:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        end = start + key_states.shape[2]
        if not start or not self._has_room(end):
            self._move(end)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.buffers = ()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take other rows."""
        super().reorder_cache(beam_idx)
        self.buffers = ()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only some rows."""
        super().batch_select_indices(indices)
        self.buffers = ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.get_seq_length():
            self._move(self.get_seq_length(), repeats)

    def _has_room(self, end: int) -> bool:
        """Whether there are buffers for `end` tokens, which may be written."""
        if not self.buffers or self.buffers[0].shape[2] < end:
            return False
        if torch.compiler.is_compiling():  # the compiler does not know of inference mode
            return True
        return not self.buffers[0].is_inference() or torch.is_inference_mode_enabled()

    def _move(self, end: int, repeats: int = 1) -> None:
        """Into buffers with room behind `end` tokens, each row `repeats` times."""
        states = (self.keys, self.values)
        rows, heads, length, _ = self.keys.shape
        self.buffers = tuple(old.new_empty(rows * repeats, heads, end + self.room, old.shape[3]) for old in states)
        for buffer, old in zip(self.buffers, states, strict=True):
            buffer[:, :, :length].unflatten(0, (rows, repeats)).copy_(old.unsqueeze(1))
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class PegsCache(DynamicCache):
    """
    The language model's cache, with what it holds, so that a conversation's next turn reuses exactly what still applies.

    Args:
        config (`PreTrainedConfig`): Configuration of the language model.

    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.token_ids: torch.Tensor | None = None  # (B, T), as `identify_tokens` gives them

    def keep_prefix(self, token_ids: torch.Tensor) -> None:
        """Drop everything behind the columns that agree with `token_ids` `(B, T)` in all rows; one column is always left to compute."""
        length, common = self.get_seq_length(), 0
        if self.token_ids is not None and len(self.token_ids) == len(token_ids):
            width = min(length, self.token_ids.shape[1], token_ids.shape[1] - 1)
            agree = (self.token_ids[:, :width] == token_ids[:, :width]).all(dim=0)
            common = int(agree.long().cumprod(dim=0).sum())
        is_image = token_ids < -1
        while common and bool((is_image[:, common - 1] & is_image[:, common]).any()):
            common -= 1  # no picture is half in the cache
        self.token_ids = token_ids[:, :common]
        if common == length:
            return
        try:
            self.crop(common - length)
        except RuntimeError:  # a sliding window has already forgotten what came before
            common = 0
        if not common:  # nothing is left of it, the number of rows neither
            self.reset()
            self.token_ids = None


def identify_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor | None, image_token_id: int
) -> torch.Tensor:
    """
    Ids `(B, T)` in which masked tokens are -1 and each placeholder is a fingerprint, below -1, of its picture.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`): Prompts.
        attention_mask (`torch.Tensor` of shape `(B, T)`): 1 where a token counts.
        pixel_values (`torch.Tensor` of shape `(N, 3, height, width)`, *optional*): Perceived stickers, in order.
        image_token_id (`int`): Id of `<IMG>`.

    """
    ids = input_ids.masked_fill(attention_mask == 0, -1)
    if pixel_values is not None:
        prints = [hashlib.blake2b(p.float().cpu().numpy().tobytes(), digest_size=7).digest() for p in pixel_values]
        values = torch.tensor([-2 - int.from_bytes(p) for p in prints], device=ids.device)
        placeholders = ids == image_token_id
        ids[placeholders] = values.repeat_interleave(int(placeholders.sum()) // len(values))
    return ids


def find_sticker_bias(rate: float, logits: torch.Tensor, sampled: bool) -> float:
    """
    Shift `b` of the log-odds for which a share `rate` of replies gets a sticker.

    When replies are sampled, so is the sticker, with the probability `sigmoid(logit + b)`, whose mean is then `rate`; otherwise it comes where
    `logit + b > 0`, so `-b` is a quantile.

    Args:
        rate (`float`): In `[0, 1]`; the ends mean never and always.
        logits (`torch.Tensor` of shape `(n,)`): Evenly spaced quantiles of the `sticker_logit` of typical replies, ascending.
        sampled (`bool`): Whether the sticker is drawn.

    Returns:
        `float`.

    """
    if rate in (0, 1):
        return torch.inf if rate else -torch.inf
    logits = logits.double()
    if not sampled:
        place = ((1 - rate) * len(logits) - 0.5) / (len(logits) - 1)  # value i is the quantile (i + 0.5) / n
        return -torch.quantile(logits, min(max(place, 0.0), 1.0)).item()
    low, high = -200.0, 200.0
    for _ in range(50):
        middle = (low + high) / 2
        if torch.sigmoid(logits + middle).mean() < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def draw_thresholds(count: int, bias: float, sampled: bool) -> torch.Tensor:
    """
    Log-odds `(count,)` above which each reply gets a sticker.

    Sampled ones are logistic, so that a sticker comes with the probability `sigmoid(logit + bias)`; one uniform number is drawn from each of
    `count` equal strata, in random order, so that a batch is nearer to its expected rate than independent draws are.
    """
    thresholds = torch.full((count,), -bias)
    if sampled:
        uniform = (torch.randperm(count) + torch.rand(count)) / count
        thresholds += uniform.logit(eps=1e-6)
    return thresholds


class StickerLogitsProcessor(LogitsProcessor):
    """
    Lets a reply end, with a sticker or without, and notes which of the two the model would rather have.

    What the model gives `[IMG1]` is added to the end of the reply, in equal parts to all ends' probabilities, and the added tokens are forbidden: whether
    a text is over stays as likely as the model has it, and whether a sticker follows is decided afterwards from what was noted. So neither the rate nor
    what shapes the text (temperature, top-p, beams, penalties) has a say in the other. There is no end before there is text.

    Args:
        img1_id (`int`): Id of `[IMG1]`.
        stop_ids (`list[int]`): Ids that end a reply.
        first_added_id (`int`): Id of the first added token.
        prompt_length (`int`): Length of the prompt.
        notes_log_probs (`bool`, *optional*, defaults to `False`): Whether the log-probabilities of the chosen tokens are noted, too.

    """

    def __init__(
        self, img1_id: int, stop_ids: list[int], first_added_id: int, prompt_length: int, notes_log_probs: bool = False
    ) -> None:
        self.img1_id, self.stop_ids = img1_id, stop_ids
        self.first_added_id, self.prompt_length = first_added_id, prompt_length
        self.notes_log_probs = notes_log_probs
        self.odds: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []  # one behind `odds` until the last token is noted
        self.last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(B, V + 3 + r)` without added tokens."""
        if self.notes_log_probs:
            self.note(input_ids[:, -1])
            self.last = scores.float().log_softmax(dim=-1)
        odds = sticker_odds(scores, self.img1_id, self.stop_ids)
        self.odds.append(odds)
        scores = scores.clone()
        scores[:, self.first_added_id :] = -torch.inf
        for token in self.stop_ids:
            if input_ids.shape[1] == self.prompt_length:
                scores[:, token] = -torch.inf
            else:
                scores[:, token] += softplus(odds)  # log((end + [IMG1]) / end)
        return scores

    def note(self, token_ids: torch.Tensor) -> None:
        """Note how likely the tokens `(B,)` were that came after the last scores."""
        if self.last is not None:
            self.log_probs.append(self.last.gather(1, token_ids.unsqueeze(1)).squeeze(1))


def find_text(new_ids: torch.Tensor, stop_ids: list[int]) -> torch.Tensor:
    """Which of the new tokens `(B, T)` come before the end of a reply."""
    return torch.isin(new_ids, torch.tensor(stop_ids, device=new_ids.device)).cumsum(dim=-1) == 0


def choose_drafts(log_probs: torch.Tensor, is_text: torch.Tensor, drafts: int) -> torch.Tensor:
    """
    Rows `(B,)` of the likeliest drafts by mean log-probability; one that was cut off is chosen only where all were.

    Args:
        log_probs (`torch.Tensor` of shape `(B * drafts, T)`): Of the new tokens.
        is_text (`torch.Tensor` of shape `(B * drafts, T)`): Which of them are the text.
        drafts (`int`): How many a reply has.

    """
    means = (log_probs * is_text).sum(dim=1) / is_text.sum(dim=1)
    means = means - 1e3 * is_text.all(dim=1)
    first = torch.arange(0, len(means), drafts, device=means.device)
    return first + means.view(-1, drafts).argmax(dim=1)


def list_stop_ids(eos_token_id: int | list[int]) -> list[int]:
    """Ids that end a reply, from a generation config's one or several."""
    return list(eos_token_id) if isinstance(eos_token_id, list | tuple) else [eos_token_id]


def sticker_odds(scores: torch.Tensor, img1_id: int, stop_ids: list[int]) -> torch.Tensor:
    """Log-odds `(...)` of `[IMG1]` against the end of the reply, from scores `(..., V + 3 + r)`."""
    return scores[..., img1_id].float() - scores[..., stop_ids].float().logsumexp(dim=-1)


def add_sticker_odds(scores: torch.Tensor, gain: torch.Tensor, img1_id: int, stop_ids: list[int]) -> torch.Tensor:
    """Scores `(..., V + 3 + r)` whose [`sticker_odds`] are higher by `gain` `(...)`; `[IMG1]` and the ends together are as likely as before, and so is each word."""
    odds = sticker_odds(scores, img1_id, stop_ids)
    of_sticker = logsigmoid(odds + gain) - logsigmoid(odds)
    of_end = logsigmoid(-odds - gain) - logsigmoid(-odds)
    changes = torch.stack([of_sticker, *[of_end] * len(stop_ids)], dim=-1)
    return scores.index_add(-1, torch.tensor([img1_id, *stop_ids], device=scores.device), changes.to(scores.dtype))


class PegsGenerationMixin:
    """`generate` of [`PegsModel`]."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sticker_rate: float | str | None = None,
        sticker_bias: float | None = None,
        num_drafts: int | None = None,
        past_key_values: PegsCache | None = None,
        logits_processor: LogitsProcessorList | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = True,
        **kwargs,
    ) -> PegsGenerateOutput | torch.Tensor:
        """
        Write replies, with a sticker where the model chooses one.

        A reply with a sticker ends with the whole span `[IMG1]` ... `[IMGr]`, one without with the end token. Whether a finished text is followed by
        a sticker is decided once it is there; the tokens of the span are fixed, so it is computed in one forward pass instead of `r` steps.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 1 where a token counts.
            pixel_values (`torch.Tensor` of shape `(N, 3, height, width)`, *optional*): Perceived stickers.
            sticker_rate (`float` or `str`, *optional*): Share of replies to have a sticker, in `[0, 1]`, or `"model"` for as many as the model
                has learned; defaults to the generation config's.
            sticker_bias (`float`, *optional*): Instead of a rate, what is added to the log-odds of `[IMG1]` against the end of the reply; `inf` always
                sends a sticker, `-inf` never; defaults to the generation config's.
            num_drafts (`int`, *optional*): How many texts are sampled for each reply, of which the one with the highest mean log-probability is kept: what a small
                model is surest of makes the most sense. Defaults to the generation config's, else 1; always 1 without sampling, for several replies to one
                prompt, with a streamer or with a static cache. The prompt is read once.
            past_key_values ([`PegsCache`], *optional*): The last output's `past_key_values`, for the next turn of the same conversation. `input_ids` and
                `pixel_values` are the whole conversation nonetheless; what does not agree with the cache is computed anew. The cache is changed in place.
            logits_processor (`LogitsProcessorList`, *optional*): More processors.
            streamer (`BaseStreamer`, *optional*): Gets the tokens of the text and its end token; a [`StickerStreamer`] then gets the sticker.
            return_dict_in_generate (`bool`, *optional*, defaults to `True`): With `False`, the sequences alone are returned.
            kwargs: As for `transformers.GenerationMixin.generate`, without assisted decoding and what it returns of each step (`output_scores` and the like).

        Returns:
            [`PegsGenerateOutput`] or `torch.Tensor`.

        Raises:
            ValueError: If placeholders and stickers do not match in number, the rate is none or the checkpoint was not calibrated for rates, a
                cache is no [`PegsCache`] or passed to beam search, for several replies to one prompt or with a static cache, or an argument is not supported.

        """
        others = {name: value for name, value in kwargs.items() if name != "generation_config"}
        settings, _ = self._prepare_generation_config(kwargs.get("generation_config"), **others)
        for name in UNSUPPORTED:
            if kwargs.get(name) or vars(settings).get(name):
                raise ValueError(f"`{name}` is not supported by `PegsModel.generate`.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.check_placeholders(input_ids, pixel_values)
        has_beams = settings.num_beams > 1
        sampled = settings.do_sample and not has_beams
        copies = settings.num_return_sequences
        prompt_length = input_ids.shape[1]
        stop_ids = list_stop_ids(settings.eos_token_id)
        pad_id = stop_ids[0] if settings.pad_token_id is None else settings.pad_token_id
        bias = self.get_sticker_bias(settings, sticker_rate, sticker_bias, sampled)
        thresholds = draw_thresholds(len(input_ids) * copies, bias, sampled).to(input_ids.device)
        added_id, img1_id = self.config.first_new_token_id, self.config.img_token_ids[0]
        drafts = num_drafts or vars(settings).get("num_drafts") or 1
        if not sampled or copies > 1 or streamer is not None or settings.cache_implementation is not None:
            drafts = 1
        restraint = StickerLogitsProcessor(img1_id, stop_ids, added_id, prompt_length, notes_log_probs=drafts > 1)
        is_static = settings.cache_implementation is not None
        if past_key_values is not None and (has_beams or copies > 1 or is_static):
            raise ValueError(
                "`past_key_values` is of one conversation a row; pass `num_beams=1`, `num_return_sequences=1` and no `cache_implementation`, or no cache."
            )
        if not isinstance(past_key_values, PegsCache | None):
            raise ValueError(
                f"`past_key_values` must be a `PegsCache`, which knows its tokens, got {type(past_key_values).__name__}."
            )
        own = {"pad_token_id": pad_id, "return_dict_in_generate": True, "use_cache": True}
        identified, new_pixel_values = None, pixel_values
        if is_static:
            room = settings.max_new_tokens or settings.max_length
            kwargs["max_cache_len"] = prompt_length + room + self.config.num_img_tokens
        elif past_key_values is None and not has_beams and copies == 1:
            past_key_values = PegsCache(self.config.text_config)
        if past_key_values is not None:
            identified = identify_tokens(input_ids, attention_mask, pixel_values, self.config.image_token_id)
            past_key_values.keep_prefix(identified)
            kwargs["past_key_values"] = past_key_values
            new_pixel_values = self._drop_pixel_values(input_ids, pixel_values, int(past_key_values.get_seq_length()))
        if drafts > 1:
            if past_key_values.get_seq_length() < prompt_length - 1:  # the last token is read by each draft
                self._read(input_ids[:, :-1], attention_mask[:, :-1], new_pixel_values, past_key_values)
            past_key_values.token_ids = None  # until there is one row again
            past_key_values.batch_repeat_interleave(drafts)
            new_pixel_values, own["num_return_sequences"] = None, drafts
        if kwargs.get("generation_config") is not None:  # transformers wants all settings in one place
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            kwargs["generation_config"].update(**own)
            own = {}
        output = super().generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=new_pixel_values,
            logits_processor=LogitsProcessorList([restraint, *(logits_processor or [])]),
            streamer=streamer,
            **{**kwargs, **own},
        )
        attention_mask = attention_mask.repeat_interleave(copies, dim=0)
        sequences, step_odds = output.sequences, torch.stack(restraint.odds, dim=1)
        is_text = find_text(sequences[:, prompt_length:], stop_ids)
        if drafts > 1:
            restraint.note(sequences[:, -1])
            best = choose_drafts(torch.stack(restraint.log_probs, dim=1), is_text, drafts)
            past_key_values.batch_select_indices(best)
            sequences, step_odds, is_text = sequences[best], step_odds[best], is_text[best]
        new_ids = sequences[:, prompt_length:]
        ends = prompt_length + is_text.sum(dim=-1)  # (B,) where each text ends
        text_mask = torch.cat([attention_mask, is_text[:, :-1].to(attention_mask.dtype)], dim=1)  # of what was read
        if has_beams:  # the cache holds unfinished beams
            images = self._copy_pixel_values(input_ids, pixel_values, copies)
            cache, odds = self._read_again(sequences[:, :-1], text_mask, images, ends, stop_ids)
        else:
            places = (ends - prompt_length).clamp(max=step_odds.shape[1] - 1)
            cache, odds = output.past_key_values, step_odds.gather(1, places.unsqueeze(1)).squeeze(1)
        was_cut = is_text.all(dim=-1)
        sticker_mask = (odds > thresholds) & ~was_cut
        spans = self.compute_img_span(text_mask, cache)[sticker_mask] if sticker_mask.any() else None
        if identified is not None:
            held = torch.cat([identified, new_ids[:, :-1]], dim=1).masked_fill(text_mask == 0, -1)
            span = torch.tensor(self.config.img_token_ids, device=held.device).expand(len(held), -1)
            span = span.masked_fill(~sticker_mask.unsqueeze(1), -1)
            past_key_values.token_ids = held if spans is None else torch.cat([held, span], dim=1)
        result = PegsGenerateOutput(
            sequences=self._write_spans(sequences, sticker_mask, ends, pad_id),
            sticker_mask=sticker_mask,
            sticker_logit=odds.masked_fill(was_cut, torch.nan),
            past_key_values=past_key_values,
        )
        self._add_sticker_heads(result, spans)
        if isinstance(streamer, StickerStreamer) and bool(sticker_mask.any()):
            streamer.on_sticker(result)
        return result if return_dict_in_generate else result.sequences

    def new_cache(self) -> PegsCache | None:
        """An empty cache to pass at each turn of a conversation; `None` where the generation config asks for beams or a static cache, which keep none."""
        settings = self.generation_config
        if (settings.num_beams or 1) > 1 or settings.cache_implementation is not None:
            return None
        return PegsCache(self.config.text_config)

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None,
        cache: Cache,
    ) -> ModelOutput:
        """Output for what `cache` does not hold of sequences `(B, T)` yet, and it holds them then; `pixel_values` are of that part."""
        read = int(cache.get_seq_length())
        return self(
            input_ids=input_ids[:, read:],
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp(min=0)[:, read:],
            pixel_values=pixel_values,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _read_again(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor | None,
        ends: torch.Tensor,
        stop_ids: list[int],
    ) -> tuple[Cache, torch.Tensor]:
        """Cache of finished sequences `(B, T)`, and the log-odds `(B,)` of a sticker behind the text that ends at `ends`."""
        output = self._read(input_ids, attention_mask, pixel_values, DynamicCache(config=self.config.text_config))
        rows = torch.arange(len(ends), device=ends.device)
        at_end = output.last_hidden_state[rows, (ends - 1).clamp(max=input_ids.shape[1] - 1)]
        return output.past_key_values, sticker_odds(self.score(at_end), self.config.img_token_ids[0], stop_ids)

    def get_sticker_bias(
        self, settings: GenerationConfig, sticker_rate: float | str | None, sticker_bias: float | None, sampled: bool
    ) -> float:
        """
        What is added to the log-odds of a sticker; arguments come before the generation config.

        Args:
            settings (`GenerationConfig`): May hold `sticker_rate` or `sticker_bias`, and for rates `sticker_logit_quantiles`.
            sticker_rate (`float` or `str`, *optional*): As for `generate`.
            sticker_bias (`float`, *optional*): As for `generate`.
            sampled (`bool`): Whether the sticker is drawn.

        Returns:
            `float`.

        Raises:
            ValueError: If both are given, the rate is none, or the checkpoint was not calibrated for rates.

        """
        known = vars(settings)
        if sticker_rate is None and sticker_bias is None:
            sticker_rate, sticker_bias = known.get("sticker_rate"), known.get("sticker_bias")
        elif sticker_rate is not None and sticker_bias is not None:
            raise ValueError(
                f"Pass `sticker_rate` or `sticker_bias`, not both; got {sticker_rate!r} and {sticker_bias!r}."
            )
        if sticker_rate is None:
            return sticker_bias or 0.0
        if sticker_rate == "model":
            return 0.0
        if isinstance(sticker_rate, str) or not 0 <= sticker_rate <= 1:
            raise ValueError(f'`sticker_rate` must be in [0, 1] or "model", got {sticker_rate!r}.')
        quantiles = known.get("sticker_logit_quantiles")
        if quantiles is None and 0 < sticker_rate < 1:
            raise ValueError(
                f"`sticker_rate` {sticker_rate} needs `sticker_logit_quantiles` in the generation config, which this checkpoint lacks; "
                "`pegs.training.calibrate` fits them. `sticker_bias` works without."
            )
        return find_sticker_bias(sticker_rate, torch.tensor(quantiles or []), sampled)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        """As in transformers, with the sticker's processor first: it notes the model's own odds."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(sorted(processors, key=lambda p: not isinstance(p, StickerLogitsProcessor)))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, dict]:
        """As in transformers, except that a row's pictures are repeated together."""
        pixel_values = self._copy_pixel_values(input_ids, kwargs.pop("pixel_values", None), expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, {**kwargs, "pixel_values": pixel_values}

    def _image_places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Row and column `(N, 2)` where each perceived sticker begins."""
        return (input_ids == self.config.image_token_id).nonzero()[:: self.config.num_query_tokens]

    def _copy_pixel_values(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, copies: int
    ) -> torch.Tensor | None:
        """Pictures for rows that are each repeated `copies` times in a row."""
        if pixel_values is None or copies == 1:
            return pixel_values
        per_row = self._image_places(input_ids)[:, 0].bincount(minlength=len(input_ids)).tolist()
        return torch.cat([images for group in pixel_values.split(per_row) for images in [group] * copies])

    def _drop_pixel_values(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, length: int
    ) -> torch.Tensor | None:
        """Pictures that begin at column `length` or behind it."""
        if pixel_values is None or not length:
            return pixel_values
        kept = pixel_values[self._image_places(input_ids)[:, 1] >= length]
        return kept if len(kept) else None

    def _write_spans(
        self, sequences: torch.Tensor, sticker_mask: torch.Tensor, ends: torch.Tensor, pad_id: int
    ) -> torch.Tensor:
        """Sequences with the whole [IMG] span where each text with a sticker ends."""
        if not sticker_mask.any():
            return sequences
        span = torch.tensor(self.config.img_token_ids, device=sequences.device)
        width = max(int(ends[sticker_mask].max()) + len(span), sequences.shape[1])
        written = sequences.new_full((len(sequences), width), pad_id)
        written[:, : sequences.shape[1]] = sequences
        rows = sticker_mask.nonzero()
        written[rows, ends[sticker_mask].unsqueeze(1) + torch.arange(len(span), device=span.device)] = span
        return written

    def compute_img_span(self, text_mask: torch.Tensor, past_key_values: Cache) -> torch.Tensor:
        """
        Hidden states of a whole [IMG] span after each text, in one forward pass; the span is in the cache afterwards.

        Args:
            text_mask (`torch.Tensor` of shape `(B, T)`): 1 for the cached tokens that belong to prompt or text.
            past_key_values (`Cache`): Cache of those `T` tokens.

        Returns:
            `torch.Tensor` of shape `(B, r, d)`.

        """
        span = torch.tensor(self.config.img_token_ids, device=text_mask.device).expand(len(text_mask), -1)
        mask = torch.cat([text_mask, torch.ones_like(span)], dim=1)
        return self.decoder(
            inputs_embeds=self.get_inputs_embeds(span, None),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1)[:, -span.shape[1] :],
            past_key_values=past_key_values,
            use_cache=True,
        ).last_hidden_state

    def _add_sticker_heads(self, result: PegsGenerateOutput, spans: torch.Tensor | None) -> None:
        """Fill in what the output heads make of the hidden states `(S, r, d)` of the replies with a sticker."""
        where, k = result.sticker_mask, self.config.num_retrieval_tokens
        dtype = self.query_tokens.dtype
        if self.retrieval_head is not None:
            result.sticker_queries = torch.zeros(len(where), self.config.retrieval_dim, device=where.device)
            if spans is not None:
                result.sticker_queries[where] = self.retrieval_head.embed_text(spans[:, :k].to(dtype)).float()
        if self.feature_mapper is not None:
            size = (len(where), self.config.prompt_length, self.config.prompt_dim)
            result.sticker_prompt_embeds = torch.zeros(size, device=where.device)
            if spans is not None:
                result.sticker_prompt_embeds[where] = self.feature_mapper(spans[:, k:].to(dtype)).float()


__all__ = ["PegsCache", "PegsGenerateOutput", "PegsGenerationMixin", "StickerStreamer"]
