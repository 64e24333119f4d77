import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, TextStreamer

from modeling_pegs import PegsModel, generation_pegs
from modeling_pegs.generation_pegs import (
    PegsCache,
    StickerLogitsProcessor,
    add_sticker_odds,
    draw_thresholds,
    find_sticker_bias,
    sticker_odds,
)
from tests.fixtures import tiny


def prompts(processor, dialogues):
    return processor.apply_chat_template(
        dialogues, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


ALWAYS = {"sticker_bias": torch.inf, "do_sample": False, "max_new_tokens": 6, "forced_eos_token_id": tiny.EOS}


def test_the_img_span_is_whole_or_absent(model, processor):
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)])
    length = inputs["input_ids"].shape[1]
    with_sticker = model.generate(**inputs, **ALWAYS)
    assert with_sticker.sticker_mask.all()
    for row in with_sticker.sequences[:, length:]:
        img = [i for i in row.tolist() if i >= model.config.first_new_token_id]
        assert img == model.config.img_token_ids
    without = model.generate(**inputs, **{**ALWAYS, "sticker_bias": -torch.inf})
    assert not without.sticker_mask.any()
    assert (without.sequences[:, length:] < model.config.first_new_token_id).all()
    assert (without.sticker_queries == 0).all() and (without.sticker_prompt_embeds == 0).all()


def test_one_pass_span_equals_token_by_token(model, processor):
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)])
    output = model.generate(**inputs, **ALWAYS)
    for row, messages in enumerate((tiny.dialogue(), tiny.dialogue(stickers=False))):
        alone = prompts(processor, messages)
        text = output.sequences[row, inputs["input_ids"].shape[1] :]
        text = text[text < model.config.first_new_token_id]
        text = text[text != model.generation_config.pad_token_id]
        ids = torch.cat([alone["input_ids"][0], text, torch.tensor(model.config.img_token_ids)])
        hidden, cache = [], None
        for position in range(len(ids)):  # the slow way: one token a step
            if position == 0:
                first = len(alone["input_ids"][0])
                step = model(input_ids=ids[None, :first], pixel_values=alone.get("pixel_values"), use_cache=True)
            elif position < first:
                continue
            else:
                step = model(input_ids=ids[None, position : position + 1], past_key_values=cache, use_cache=True)
                hidden.append(step.last_hidden_state[:, -1])
            cache = step.past_key_values
        span = torch.stack(hidden[-model.config.num_img_tokens :], dim=1)
        query = model.retrieval_head.embed_text(span[:, : model.config.num_retrieval_tokens])
        prompt = model.feature_mapper(span[:, model.config.num_retrieval_tokens :])
        torch.testing.assert_close(output.sticker_queries[row], query[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.sticker_prompt_embeds[row], prompt[0], atol=1e-4, rtol=1e-4)


def test_a_batch_equals_its_singles(model, processor):
    dialogues = [tiny.dialogue(), tiny.dialogue(stickers=False), tiny.dialogue()[:1]]
    inputs = prompts(processor, dialogues)
    together = model.generate(**inputs, **ALWAYS)
    for row, messages in enumerate(dialogues):
        alone = prompts(processor, messages)
        single = model.generate(**alone, **ALWAYS)
        new = together.sequences[row, inputs["input_ids"].shape[1] :]
        expected = single.sequences[0, alone["input_ids"].shape[1] :]
        assert new[: len(expected)].tolist() == expected.tolist()
        torch.testing.assert_close(together.sticker_queries[row], single.sticker_queries[0], atol=1e-4, rtol=1e-4)


def test_a_sticker_never_comes_before_any_text(model, processor):
    inputs = prompts(processor, tiny.dialogue(stickers=False))
    output = model.generate(**inputs, **ALWAYS)
    assert output.sequences[0, inputs["input_ids"].shape[1]] < model.config.first_new_token_id


def test_sticker_logit_is_the_unbiased_log_odds(model, processor):
    inputs = prompts(processor, tiny.dialogue(stickers=False))
    output = model.generate(**inputs, **ALWAYS)
    text_length = int((output.sequences[0] < model.config.first_new_token_id).sum())
    logits = model(input_ids=output.sequences[:, :text_length]).logits[0, -1]
    expected = logits[model.config.img_token_ids[0]] - logits[model.generation_config.eos_token_id]
    torch.testing.assert_close(output.sticker_logit[0], expected, atol=1e-4, rtol=1e-4)


def test_the_end_takes_over_what_the_sticker_would_get():
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    processor = StickerLogitsProcessor(img1_id=6, stop_ids=[1, 2], first_added_id=5, prompt_length=2)
    before, after = scores.clone(), processor(torch.zeros(3, 4, dtype=torch.long), scores)
    assert torch.equal(scores, before)
    before[:, [5, 7, 8]] = -torch.inf
    old, new = before.softmax(-1), after.softmax(-1)
    torch.testing.assert_close(new[:, [0, 3, 4]], old[:, [0, 3, 4]])
    torch.testing.assert_close(new[:, [1, 2]].sum(-1), old[:, [1, 2, 6]].sum(-1))
    torch.testing.assert_close(new[:, 1] / new[:, 2], old[:, 1] / old[:, 2])
    torch.testing.assert_close(processor.odds[0], (old[:, 6] / old[:, [1, 2]].sum(-1)).log())
    assert (processor(torch.zeros(3, 2, dtype=torch.long), scores)[:, [1, 2, 5, 6, 7, 8]] == -torch.inf).all()


def test_what_the_sticker_gains_the_end_loses():
    generator = torch.Generator().manual_seed(0)
    scores, gain = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, generator=generator)
    before = scores.clone().requires_grad_()
    after = add_sticker_odds(before, gain, img1_id=6, stop_ids=[1, 2])
    old, new = before.softmax(-1), after.softmax(-1)
    words = [0, 3, 4, 5, 7, 8]
    torch.testing.assert_close(new[..., words], old[..., words])
    torch.testing.assert_close(new[..., 1] / new[..., 2], old[..., 1] / old[..., 2])
    torch.testing.assert_close(sticker_odds(after, 6, [1, 2]), sticker_odds(before, 6, [1, 2]) + gain)
    after.square().sum().backward()
    assert before.grad.isfinite().all()
    far = add_sticker_odds(scores, torch.tensor(300.0).expand(2, 3), 6, [1, 2])
    assert far.isfinite().all()


def test_a_timing_head_decides_on_stickers_and_leaves_the_words(processor, tmp_path):
    model = tiny.make_tiny_model()
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)])
    asked = {**ALWAYS, "sticker_bias": 0.0}
    plain = model.generate(**inputs, **asked)
    model.add_timing_head()
    for bias, sends in ((200.0, True), (-200.0, False)):
        torch.nn.init.constant_(model.timing_head.bias, bias)
        model.save_pretrained(tmp_path)
        again = PegsModel.from_pretrained(tmp_path)
        output = again.generate(**inputs, **asked)
        assert texts_of(output, inputs["input_ids"].shape[1], model) == texts_of(
            plain, inputs["input_ids"].shape[1], model
        )
        assert (output.sticker_mask == sends).all()
        torch.testing.assert_close(output.sticker_logit - plain.sticker_logit, torch.full((2,), bias))


def texts_of(output, prompt_length, model):
    """The ids of each reply's text."""
    first, pad = model.config.first_new_token_id, model.generation_config.pad_token_id
    rows = output.sequences[:, prompt_length:].tolist()
    return [[token for token in row if token < first and token not in (pad, tiny.EOS)] for row in rows]


@pytest.fixture
def calibrated():
    model = tiny.make_tiny_model()
    spread = torch.linspace(-3, 3, 100).tolist()
    model.generation_config.update(allow_custom_entries=True, sticker_logit_quantiles=spread)
    return model


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_rate_never_changes_the_text(calibrated, processor, do_sample):
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)] * 4)
    length, texts, masks = inputs["input_ids"].shape[1], [], []
    for rate in (0.0, 0.3, 0.9, 1.0, "model"):
        torch.manual_seed(3)
        output = calibrated.generate(**inputs, sticker_rate=rate, do_sample=do_sample, max_new_tokens=8, forced_eos_token_id=tiny.EOS)  # fmt: skip
        texts.append(texts_of(output, length, calibrated))
        masks.append(output.sticker_mask)
    assert all(text == texts[0] for text in texts)
    assert not masks[0].any() and masks[3].all()
    assert (masks[1] <= masks[2]).all()  # a higher rate only adds stickers


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_rate_is_met_on_replies_like_those_it_was_fitted_on(rate, sampled):
    torch.manual_seed(0)
    logits = torch.randn(4000) * 2 - 3
    quantiles = torch.quantile(logits, (torch.arange(100) + 0.5) / 100)
    bias = find_sticker_bias(rate, quantiles, sampled)
    thresholds = torch.cat([draw_thresholds(16, bias, sampled) for _ in range(250)])
    assert (logits > thresholds).float().mean().item() == pytest.approx(rate, abs=0.012)


def test_a_batch_is_nearer_to_its_rate_than_independent_draws():
    torch.manual_seed(0)
    for _ in range(20):
        sent = (0.0 > draw_thresholds(16, bias=0.4, sampled=True)).sum()
        assert abs(sent - 16 * torch.tensor(0.4).sigmoid()) < 1


def test_a_sampled_sticker_comes_as_often_as_the_model_says():
    torch.manual_seed(0)
    sent = torch.cat([1.5 > draw_thresholds(1, bias=0.0, sampled=True) for _ in range(2000)]).float().mean()
    assert sent.item() == pytest.approx(torch.tensor(1.5).sigmoid().item(), abs=0.03)


def test_impossible_rates_are_refused(model, calibrated, processor):
    inputs = prompts(processor, tiny.dialogue())
    for arguments, message in (
        ({"sticker_rate": 1.2}, r"must be in \[0, 1\] or \"model\", got 1.2"),
        ({"sticker_rate": "often"}, "got 'often'"),
        ({"sticker_rate": 0.5, "sticker_bias": 1.0}, "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrated.generate(**inputs, **arguments)
    with pytest.raises(ValueError, match="needs `sticker_logit_quantiles`"):
        model.generate(**inputs, sticker_rate=0.5)


def test_the_rate_of_the_generation_config_survives_saving(calibrated, processor, tmp_path):
    calibrated.generation_config.update(allow_custom_entries=True, sticker_rate=1.0)
    calibrated.save_pretrained(tmp_path)
    again = type(calibrated).from_pretrained(tmp_path)
    inputs = prompts(processor, tiny.dialogue())
    fast = {"do_sample": False, "max_new_tokens": 6, "forced_eos_token_id": tiny.EOS}
    assert again.generate(**inputs, **fast).sticker_mask.all()
    assert not again.generate(**inputs, **fast, sticker_rate=0.0).sticker_mask.any()
    assert again.generation_config.sticker_logit_quantiles == calibrated.generation_config.sticker_logit_quantiles


def test_penalties_do_not_change_the_odds(model, processor):
    inputs = prompts(processor, tiny.dialogue())
    output = model.generate(**inputs, **ALWAYS, repetition_penalty=1.5)
    length = int((output.sequences[0] < model.config.first_new_token_id).sum() + (inputs["input_ids"][0] >= model.config.first_new_token_id).sum())  # fmt: skip
    logits = model(input_ids=output.sequences[:, :length], pixel_values=inputs["pixel_values"]).logits[:, -1]
    odds = sticker_odds(logits, model.config.img_token_ids[0], [tiny.EOS])
    torch.testing.assert_close(output.sticker_logit, odds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("copies", [1, 2])
def test_beams_read_their_span_as_a_fresh_pass_does(model, processor, copies):
    dialogues = [tiny.dialogue(), [*tiny.dialogue()[:1], *tiny.dialogue()[1:]], tiny.dialogue(stickers=False)]
    dialogues[1][0]["content"].append({"type": "image", "image": tiny.picture("yellow")})
    inputs = prompts(processor, dialogues)
    output = model.generate(**inputs, **ALWAYS, num_beams=3, num_return_sequences=copies)
    assert output.sticker_mask.shape == (3 * copies,) and output.sticker_mask.all()
    for row in range(3 * copies):
        alone = prompts(processor, dialogues[row // copies])
        new = output.sequences[row, inputs["input_ids"].shape[1] :]
        new = new[new != model.generation_config.pad_token_id]
        ids = torch.cat([alone["input_ids"][0], new]).unsqueeze(0)
        assert new[-model.config.num_img_tokens :].tolist() == model.config.img_token_ids
        hidden = model(input_ids=ids, pixel_values=alone.get("pixel_values")).last_hidden_state
        query = model.retrieval_head.embed_text(hidden[:, -5:-3])
        torch.testing.assert_close(output.sticker_queries[row], query[0], atol=1e-4, rtol=1e-4)
        odds = sticker_odds(model.score(hidden[:, -6]), model.config.img_token_ids[0], [tiny.EOS])
        torch.testing.assert_close(output.sticker_logit[row], odds[0], atol=1e-4, rtol=1e-4)


def test_beams_find_a_likelier_text_than_greedy_and_with_any_rate_the_same(calibrated, processor):
    inputs = prompts(processor, tiny.dialogue())
    length = inputs["input_ids"].shape[1]
    outputs = [calibrated.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=6, sticker_rate=r) for r in (0.0, 1.0)]  # fmt: skip
    assert texts_of(outputs[0], length, calibrated) == texts_of(outputs[1], length, calibrated)
    with pytest.raises(ValueError, match="of one conversation a row"):
        calibrated.generate(**inputs, num_beams=3, past_key_values=DynamicCache())


def test_several_samples_a_prompt_see_their_own_pictures(model, processor):
    first = tiny.dialogue()
    first[0]["content"].append({"type": "image", "image": tiny.picture("yellow")})
    inputs = prompts(processor, [first, tiny.dialogue()])
    greedy = {**ALWAYS, "do_sample": True, "top_k": 1}
    output = model.generate(**inputs, **greedy, num_return_sequences=2)
    single = model.generate(**inputs, **greedy)
    assert torch.equal(output.sequences[0], output.sequences[1])
    for row in range(4):
        torch.testing.assert_close(output.sticker_queries[row], single.sticker_queries[row // 2])


class Listener:
    """Writes down what a streamer hears."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.flatten().tolist())

    def end(self):
        self.heard.append("end")

    def on_sticker(self, output):
        self.heard.append(output)


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf])
def test_a_streamer_hears_the_text_then_the_sticker(model, processor, bias):
    inputs, listener = prompts(processor, tiny.dialogue()), Listener()
    output = model.generate(**inputs, **{**ALWAYS, "sticker_bias": bias}, streamer=listener)
    text = texts_of(output, inputs["input_ids"].shape[1], model)[0]
    prompt, *tokens = listener.heard
    assert prompt == inputs["input_ids"][0].tolist()
    assert tokens == [*([token] for token in text), [tiny.EOS], "end", *([output] if bias > 0 else [])]


def test_a_plain_text_streamer_writes_no_sticker_token(model, processor, capsys):
    inputs = prompts(processor, tiny.dialogue())
    model.generate(**inputs, **ALWAYS, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert "IMG" not in capsys.readouterr().out


def conversation(processor, model, output, inputs, reply_image="green"):
    """The next turn's messages, with what the model has just said and sent."""
    said = processor.decode(texts_of(output, inputs["input_ids"].shape[1], model)[0])
    answer = [{"type": "text", "text": said}]
    if output.sticker_mask[0]:
        answer.append({"type": "image", "image": tiny.picture(reply_image)})
    question = [{"type": "text", "text": "Oh?"}, {"type": "image", "image": tiny.picture("black")}]
    return [*tiny.dialogue(), {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


@torch.no_grad()
def test_a_cache_with_room_holds_what_a_growing_one_holds(model):
    config, generator = model.config.text_config, torch.Generator().manual_seed(0)
    size = (config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    roomy, growing = PegsCache(config), DynamicCache(config=config)
    rows = 2
    for change in (40, 1, "repeat", 1, 1, -7, 3, 100, "select", 1, -20, "repeat", 5, "reset", 2, 1):
        if change == "reset":
            roomy.reset()
            growing.reset()
            rows = 3
        elif change == "repeat":
            rows *= 3
            roomy.batch_repeat_interleave(3)
            growing.batch_repeat_interleave(3)
        elif change == "select":
            rows = 2
            for cache in (roomy, growing):
                cache.batch_select_indices(torch.tensor([4, 1]))
        elif change < 0:
            roomy.crop(change)
            growing.crop(change)
        else:
            states = torch.randn(2, rows, size[0], change, size[1], generator=generator)
            for layer in range(config.num_hidden_layers):
                given = roomy.update(*(states + layer), layer), growing.update(*(states + layer), layer)
                assert all(torch.equal(got, wanted) for got, wanted in zip(*given, strict=True))
    for held, wanted in zip(roomy, growing, strict=True):
        assert torch.equal(held[0], wanted[0]) and torch.equal(held[1], wanted[1])


def test_a_step_copies_nothing_that_was_read(model):
    cache, states = PegsCache(model.config.text_config), torch.randn(2, 1, 2, 30, 8)
    with torch.no_grad():
        keys, values = cache.update(*states, 0)
        for _ in range(60):
            longer = cache.update(*states[..., :1, :], 0)
        assert (longer[0].data_ptr(), longer[1].data_ptr()) == (keys.data_ptr(), values.data_ptr())
        cache.batch_repeat_interleave(4)
        repeated = cache.layers[0].keys
        again = cache.update(*states.repeat_interleave(4, dim=1)[..., :1, :], 0)
    assert again[0].data_ptr() == repeated.data_ptr()


def test_a_cache_holds_only_the_rows_it_has(model, processor):
    cache = model.new_cache()
    model.generate(
        **prompts(processor, tiny.dialogue()),
        **{**ALWAYS, "do_sample": True, "sticker_bias": -torch.inf},
        num_drafts=4,
        past_key_values=cache,
    )
    held = {
        tensor.untyped_storage().data_ptr(): tensor
        for layer in cache.layers
        for tensor in (layer.keys, layer.values, *layer.buffers)
    }
    assert all(len(tensor) == 1 for tensor in held.values())
    cache.reset()
    assert not any(layer.buffers for layer in cache.layers)


def test_a_step_of_a_cache_compiles_into_one_graph(model):
    cache, states = PegsCache(model.config.text_config), torch.randn(2, 1, 2, 30, 8)
    step = torch.compile(lambda keys, values: cache.update(keys, values, 0), backend="eager", fullgraph=True)
    with torch.no_grad():
        cache.update(*states, 0)
        keys, _ = step(*states[..., :1, :])
    assert torch.equal(keys, torch.cat([states[0], states[0, ..., :1, :]], dim=2))


def test_gradients_pass_through_a_cache(model):
    cache, ids = model.new_cache(), torch.arange(3, 13)[None]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    embeds, losses = torch.randn(1, 2, model.config.text_config.hidden_size, requires_grad=True), []
    for _ in range(2):
        states = model.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        losses.append(states.sum())
        cache.crop(-2)
    sum(losses).backward()
    assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize("drafts", [1, 4])
def test_an_interrupted_reply_with_drafts_leaves_a_usable_cache(model, processor, drafts):
    def interrupt(ids, scores):
        if ids.shape[1] > length + 1:
            raise KeyboardInterrupt
        return scores

    inputs, cache = prompts(processor, tiny.dialogue()), model.new_cache()
    settings, length = {**ALWAYS, "do_sample": True, "num_drafts": 4}, inputs["input_ids"].shape[1]
    model.generate(**inputs, **settings, past_key_values=cache)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **settings, past_key_values=cache, logits_processor=[interrupt])
    again = model.generate(**inputs, **{**settings, "num_drafts": drafts}, past_key_values=cache)
    assert again.sticker_mask.all()


def test_one_cache_serves_a_whole_conversation(model, processor, monkeypatch):
    inputs, cache = prompts(processor, tiny.dialogue()), model.new_cache()
    first = model.generate(**inputs, **ALWAYS, past_key_values=cache)
    assert first.past_key_values is cache and torch.equal(
        first.sequences, model.generate(**inputs, **ALWAYS).sequences
    )
    again = prompts(processor, conversation(processor, model, first, inputs))
    kept = model.generate(**again, **ALWAYS, past_key_values=cache)
    assert torch.equal(kept.sequences, model.generate(**again, **ALWAYS).sequences)
    for name, value in (("num_beams", 2), ("cache_implementation", "static")):
        with monkeypatch.context() as patch:
            patch.setattr(model.generation_config, name, value)
            assert model.new_cache() is None


def test_a_cache_of_inference_mode_goes_on_outside(model, processor):
    inputs = prompts(processor, tiny.dialogue())
    with torch.inference_mode():
        cache = model.generate(**inputs, **ALWAYS).past_key_values
    cached = model.generate(**inputs, **ALWAYS, past_key_values=cache)
    assert torch.equal(cached.sequences, model.generate(**inputs, **ALWAYS).sequences)


@pytest.mark.parametrize("bias", [torch.inf, -torch.inf])
def test_a_cache_kept_across_turns_gives_what_a_fresh_pass_gives(model, processor, bias, monkeypatch):
    settings = {**ALWAYS, "sticker_bias": bias}
    inputs = prompts(processor, tiny.dialogue())
    first = model.generate(**inputs, **settings)
    messages = conversation(processor, model, first, inputs)
    edited = [{**message, "content": list(message["content"])} for message in messages]
    edited[0]["content"][1] = {"type": "image", "image": tiny.picture("white")}  # another picture in the same place
    cache, lengths = first.past_key_values, []
    forward = model.decoder.forward

    def spy(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.decoder, "forward", spy)
    for turn in (messages, edited):
        again = prompts(processor, turn)
        lengths.clear()
        with_cache = model.generate(**again, **settings, past_key_values=cache)
        computed = lengths[0]
        fresh = model.generate(**again, **settings)
        assert torch.equal(with_cache.sequences, fresh.sequences)
        for name in ("sticker_logit", "sticker_queries", "sticker_prompt_embeds"):
            torch.testing.assert_close(with_cache[name], fresh[name], atol=1e-4, rtol=1e-4)
        kept = again["input_ids"].shape[1] - computed
        cache = with_cache.past_key_values
        if turn is messages:
            said = len(texts_of(first, inputs["input_ids"].shape[1], model)[0])
            span = model.config.num_img_tokens if bias > 0 else 0
            assert kept >= inputs["input_ids"].shape[1] + said + span - 1
        else:
            before = again["input_ids"][0].tolist().index(model.config.image_token_id)
            assert kept == before


def test_a_cache_that_an_interrupted_reply_has_filled_is_not_believed(model, processor):
    inputs, other = prompts(processor, tiny.dialogue()), prompts(processor, tiny.dialogue(stickers=False))
    first = model.generate(**inputs, **ALWAYS)
    cache = first.past_key_values

    class Interrupt(Listener):
        def put(self, value):
            if len(self.heard) == 2:
                raise KeyboardInterrupt
            super().put(value)

    with pytest.raises(KeyboardInterrupt):
        model.generate(**other, **ALWAYS, past_key_values=cache, streamer=Interrupt())
    again = model.generate(**inputs, **ALWAYS, past_key_values=cache)
    assert torch.equal(again.sequences, first.sequences)
    torch.testing.assert_close(again.sticker_queries, first.sticker_queries, atol=1e-4, rtol=1e-4)


def test_a_batch_of_conversations_keeps_its_cache_where_columns_agree(model, processor):
    dialogues = [tiny.dialogue(), tiny.dialogue(stickers=False)]
    inputs = prompts(processor, dialogues)
    first = model.generate(**inputs, **ALWAYS)
    longer = [[*d, {"role": "assistant", "content": [{"type": "text", "text": "Ah."}]}, d[2]] for d in dialogues]
    again = prompts(processor, longer)
    cached = model.generate(**again, **ALWAYS, past_key_values=first.past_key_values)
    fresh = model.generate(**again, **ALWAYS)
    assert torch.equal(cached.sequences, fresh.sequences)
    torch.testing.assert_close(cached.sticker_queries, fresh.sticker_queries, atol=1e-4, rtol=1e-4)


def test_a_cache_of_other_conversations_is_begun_anew(model, processor):
    one, two = (
        prompts(processor, tiny.dialogue()),
        prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)]),
    )
    cache = model.generate(**one, **ALWAYS).past_key_values
    assert torch.equal(
        model.generate(**two, **ALWAYS, past_key_values=cache).sequences, model.generate(**two, **ALWAYS).sequences
    )
    with pytest.raises(ValueError, match="of one conversation a row"):
        model.generate(**one, **{**ALWAYS, "do_sample": True}, num_return_sequences=2, past_key_values=cache)


def test_the_likeliest_of_several_drafts_is_kept(model, processor, monkeypatch):
    monkeypatch.setattr(generation_pegs, "draw_thresholds", lambda count, bias, _: torch.full((count,), -bias))
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)])
    length = inputs["input_ids"].shape[1]
    settings = {"do_sample": True, "max_new_tokens": 6, "sticker_bias": torch.inf, "eos_token_id": [tiny.EOS, 185]}
    torch.manual_seed(3)
    output = model.generate(**inputs, **settings, num_drafts=3)
    torch.manual_seed(3)
    drafts = model.generate(**inputs, **settings, num_return_sequences=3)
    means = []
    texts = [ids[: ids.index(185)] if 185 in ids else ids for ids in texts_of(drafts, length, model)]
    assert 0 < sum(len(ids) == 6 for ids in texts) < 6  # some are whole, some are cut
    for row, said in enumerate(texts):
        mask = inputs["attention_mask"][row // 3].bool()
        prompt = inputs["input_ids"][row // 3][mask]
        read = torch.cat([prompt, torch.tensor(said)])[None]
        images = inputs["pixel_values"] if row < 3 else None
        scores = model(input_ids=read, pixel_values=images).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        cut = len(said) == 6
        means.append(scores.gather(1, torch.tensor(said)[:, None]).mean().item() - 1e3 * cut)
    best = [max(range(3), key=lambda i: means[i]), max(range(3, 6), key=lambda i: means[i])]
    kept = [ids[: ids.index(185)] if 185 in ids else ids for ids in texts_of(output, length, model)]
    assert kept == [texts[i] for i in best]
    assert len(output.sticker_mask) == 2
    cached = model.generate(**inputs, **ALWAYS, past_key_values=output.past_key_values)
    assert torch.equal(cached.sequences, model.generate(**inputs, **ALWAYS).sequences)


def test_a_generation_config_may_be_passed(model, processor):
    inputs = prompts(processor, tiny.dialogue())
    config = GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=tiny.EOS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passed = model.generate(**inputs, generation_config=config, sticker_bias=-torch.inf)
    assert config.use_cache is None or config.pad_token_id is None  # it is the caller's
    written = model.generate(
        **inputs, do_sample=False, max_new_tokens=3, eos_token_id=tiny.EOS, sticker_bias=-torch.inf
    )
    assert torch.equal(passed.sequences, written.sequences)


def test_a_static_cache_gives_what_the_dynamic_one_gives(model, processor):
    inputs = prompts(processor, [tiny.dialogue(), tiny.dialogue(stickers=False)])
    static = model.generate(**inputs, **ALWAYS, cache_implementation="static")
    dynamic = model.generate(**inputs, **ALWAYS)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.sticker_queries, dynamic.sticker_queries, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(static.sticker_prompt_embeds, dynamic.sticker_prompt_embeds, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kwargs", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}, {"cache_implementation": "static"}]
)
def test_only_a_cache_that_knows_its_tokens_is_given_and_taken(model, processor, kwargs):
    inputs = prompts(processor, tiny.dialogue())
    assert model.generate(**inputs, **{**ALWAYS, **kwargs}).past_key_values is None
    kept = model.generate(**inputs, **ALWAYS).past_key_values
    with pytest.raises(ValueError, match="of one conversation a row"):
        model.generate(**inputs, **{**ALWAYS, **kwargs}, past_key_values=kept)
    with pytest.raises(ValueError, match="must be a `PegsCache`.*got DynamicCache"):
        model.generate(**inputs, **ALWAYS, past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "output_scores", "assistant_model"])
def test_what_generate_cannot_do_it_says(model, processor, name):
    with pytest.raises(ValueError, match=f"`{name}` is not supported"):
        model.generate(**prompts(processor, tiny.dialogue()), **ALWAYS, **{name: 4})


def test_without_a_dictionary_there_are_the_sequences_alone(model, processor):
    inputs = prompts(processor, tiny.dialogue())
    sequences = model.generate(**inputs, **ALWAYS, return_dict_in_generate=False)
    assert torch.equal(sequences, model.generate(**inputs, **ALWAYS).sequences)


@pytest.mark.parametrize(
    "heads", [{"variant": "ret", "num_generation_tokens": 0}, {"variant": "gen", "num_retrieval_tokens": 0}]
)
def test_variants_with_one_kind_of_token(heads):
    model = tiny.make_tiny_model(**heads)
    output = model.generate(**prompts(tiny.make_tiny_processor(model.config), tiny.dialogue()), **ALWAYS)
    assert (output.sticker_queries is None) == (heads["variant"] == "gen")
    assert (output.sticker_prompt_embeds is None) == (heads["variant"] == "ret")
