"""Replies in batches of like length: in the order of their contexts, and each as it would be alone."""

import torch

from pegs.evaluation.replies import write_replies
from pipelines.pipeline_pegs import PegsPipeline
from tests.fixtures import tiny
from tests.pegs.evaluation import make


GREEDY = {"do_sample": False, "sticker_bias": torch.inf, "forced_eos_token_id": tiny.EOS}


def make_pipeline(model, processor) -> PegsPipeline:
    pack = make.make_pack()
    return PegsPipeline(model, processor, pack, torch.zeros(len(pack.stickers), 16))


def test_batches_equal_singles_in_the_order_of_the_contexts(model, processor):
    pipeline = make_pipeline(model, processor)
    contexts = [tiny.dialogue()[:1], tiny.dialogue(), tiny.dialogue(stickers=False)]
    together = write_replies(pipeline, contexts, batch_size=2, **GREEDY)
    for context, reply in zip(contexts, together, strict=True):
        (alone,) = write_replies(pipeline, [context], **GREEDY)
        assert (reply.text, reply.sends) == (alone.text, True)
        torch.testing.assert_close(reply.query, alone.query, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(reply.prompt_embeds, alone.prompt_embeds, rtol=1e-3, atol=1e-4)


def test_the_seed_decides_and_the_callers_generator_is_left_alone(model, processor):
    pipeline = make_pipeline(model, processor)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sampled = [write_replies(pipeline, [tiny.dialogue()] * 4, seed, do_sample=True) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = ([reply.text for reply in replies] for replies in sampled)
    assert first == same != other
