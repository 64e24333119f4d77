import pytest
import torch

from modeling_pegs.generation_pegs import StickerLogitsProcessor
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


def test_the_bias_moves_only_how_a_text_ends():
    ids = torch.zeros(3, 4, dtype=torch.long)
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    scores[2, [1, 2, 6]] = -torch.inf  # as `min_new_tokens` does
    for bias in (-torch.inf, -3.0, 0.0, 3.0, torch.inf):
        processor = StickerLogitsProcessor([5, 6, 7, 8], 6, [1, 2], prompt_length=2, bias=bias)
        before, after = scores.clone(), processor(ids, scores)
        before[:, [5, 7, 8]] = -torch.inf
        old, new = before.softmax(-1), after.softmax(-1)
        torch.testing.assert_close(new[:, [0, 3, 4]], old[:, [0, 3, 4]])
        over = old[:2, 1] + old[:2, 2] + old[:2, 6]
        odds = torch.log(old[:2, 6] / (old[:2, 1] + old[:2, 2])) + bias
        torch.testing.assert_close(new[:2, 6], over * odds.sigmoid())
        if bias < torch.inf:
            torch.testing.assert_close(new[:2, 1] / new[:2, 2], old[:2, 1] / old[:2, 2])
        assert (new[2, [1, 2, 6]] == 0).all() and not after.isnan().any()


@pytest.mark.parametrize(
    "heads", [{"variant": "ret", "num_generation_tokens": 0}, {"variant": "gen", "num_retrieval_tokens": 0}]
)
def test_variants_with_one_kind_of_token(heads):
    model = tiny.make_tiny_model(**heads)
    output = model.generate(**prompts(tiny.make_tiny_processor(model.config), tiny.dialogue()), **ALWAYS)
    assert (output.sticker_queries is None) == (heads["variant"] == "gen")
    assert (output.sticker_prompt_embeds is None) == (heads["variant"] == "ret")
