import json

import pytest
import torch

from dataset_builders.stickerconv.sessions import load_mini
from dataset_builders.stickers.openmoji import cached_pack
from modeling_pegs.generation_pegs import draw_thresholds, find_sticker_bias
from pegs.training.calibrate import CUT, batches_of_like_length, logit_quantiles, sticker_logits
from tests.fixtures import tiny


def contexts() -> list[list[dict]]:
    return [tiny.dialogue(), tiny.dialogue(stickers=False), tiny.dialogue()[:1], tiny.dialogue(stickers=False)[:1]]


def test_logits_are_in_the_order_of_the_contexts(model, processor):
    settings = {"do_sample": False, "max_new_tokens": 5, "forced_eos_token_id": tiny.EOS}
    together = sticker_logits(model, processor, contexts(), batch_size=2, **settings)
    alone = torch.cat([sticker_logits(model, processor, [context], **settings) for context in contexts()])
    assert together.shape == (4,) and together.unique().numel() == 4
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_contexts_of_like_length_share_a_batch(processor):
    assert batches_of_like_length(processor, contexts(), 2) == [[0, 1], [2, 3]]


def test_quantiles_stand_for_replies_that_were_cut():
    logits = torch.cat([torch.linspace(-4, 4, 800), torch.full((200,), torch.nan)])
    quantiles = logit_quantiles(logits)
    assert len(quantiles) == 100 and quantiles == sorted(quantiles)
    assert json.loads(json.dumps(quantiles)) == quantiles and quantiles[:19] == [CUT] * 19
    for sampled in (False, True):
        bias = find_sticker_bias(0.6, torch.tensor(quantiles), sampled)
        torch.manual_seed(0)
        thresholds = torch.cat([draw_thresholds(8, bias, sampled) for _ in range(125)])
        sent = logits[torch.randperm(1000)] > thresholds  # a reply that was cut has none
        assert sent.float().mean().item() == pytest.approx(0.6, abs=0.02)
    with pytest.raises(ValueError, match="at least one reply"):
        logit_quantiles(torch.zeros(0))


def test_an_exported_model_sends_stickers_at_any_rate(tmp_path):
    from modeling_pegs import PegsModel
    from pegs.training.export import export

    model = tiny.make_tiny_model(lora={"r": 2, "target_modules": ["q_proj"]})
    processor = tiny.make_tiny_processor(model.config)
    model.save_pretrained(tmp_path / "language")
    processor.save_pretrained(tmp_path / "language")
    tiny.make_tiny_decoder().save_pretrained(tmp_path / "decoder")
    sessions = load_mini("validation")[:1]
    export(str(tmp_path / "language"), str(tmp_path / "decoder"), str(tmp_path / "out"), sessions, cached_pack())
    again = PegsModel.from_pretrained(tmp_path / "out")
    golds = [turn.system.sticker is not None for turn in sessions[0].turns]
    assert again.generation_config.sticker_rate == pytest.approx(sum(golds) / len(golds), abs=1e-3)
    assert len(again.generation_config.sticker_logit_quantiles) == 100
    inputs = processor.apply_chat_template(
        [tiny.dialogue()] * 4, add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    for rate, count in ((0.0, 0), (1.0, 4)):
        output = again.generate(**inputs, sticker_rate=rate, max_new_tokens=3, forced_eos_token_id=tiny.EOS)
        assert output.sticker_mask.sum() == count
