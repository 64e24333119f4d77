from types import SimpleNamespace

import pytest
import torch

from pipelines.pipeline_pegs import PegsPipeline
from tests.fixtures import tiny


class Pack:
    def __init__(self):
        colors = {"red": "anger", "green": "neutral", "blue": "sadness"}
        self.by_id = {
            name: SimpleNamespace(id=name, emotion=emotion, recommendation=f"Send {name}.")
            for name, emotion in colors.items()
        }

    def image(self, sticker_id):
        return tiny.picture(sticker_id)


@pytest.fixture
def pipeline(model, processor, decoder):
    vectors = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    return PegsPipeline(model, processor, Pack(), vectors, decoder)


FAST = {"num_inference_steps": 2, "max_new_tokens": 5, "forced_eos_token_id": tiny.EOS}


@pytest.mark.parametrize("variant", ["ret", "gen", "rag"])
def test_every_variant_answers_and_repeats_itself_by_seed(pipeline, variant):
    one, two = (pipeline(tiny.dialogue(), variant=variant, seed=7, sticker_bias=torch.inf, **FAST) for _ in range(2))
    assert one.text == two.text and one.sticker.tobytes() == two.sticker.tobytes()
    assert one.variant == variant and one.why
    assert (one.sticker_id is not None) == (variant == "ret")


def test_seeds_do_not_touch_the_global_generator(pipeline):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pipeline(tiny.dialogue(), variant="ret", seed=1, do_sample=True, **FAST)
    assert torch.equal(torch.rand(1), expected)


def test_no_sticker_where_the_model_sends_none(pipeline):
    reply = pipeline(tiny.dialogue(), sticker_bias=-torch.inf, **FAST)
    assert reply.sticker is None and reply.retrieved == [] and reply.sticker_id is None


def test_retrieval_equals_brute_force_and_skips_what_was_sent(pipeline):
    query = torch.nn.functional.normalize(torch.ones(16), dim=-1)
    expected = (pipeline.pack_embeds @ query).argsort(descending=True)
    ids = [pipeline.pack_ids[i] for i in expected]
    assert [item.id for item in pipeline.retrieve(query, top_k=3)] == ids
    assert [item.id for item in pipeline.retrieve(query, top_k=3, exclude=[ids[0]])] == ids[1:]


def test_a_blocked_drawing_is_replaced_by_the_retrieved_sticker(pipeline):
    class Blocking:
        def __call__(self, **kwargs):
            return SimpleNamespace(images=[tiny.picture()], blocked=["nsfw (test)"])

    pipeline.decoder = Blocking()
    reply = pipeline(tiny.dialogue(), variant="gen", sticker_bias=torch.inf, **FAST)
    assert reply.blocked == "nsfw (test)" and reply.sticker_id == reply.retrieved[0].id
    assert "blocked" in reply.why


def test_variants_that_cannot_be_served_are_refused(pipeline):
    with pytest.raises(ValueError, match="must be one of ret, gen, rag"):
        pipeline(tiny.dialogue(), variant="fax")
    pipeline.decoder = None
    with pytest.raises(ValueError, match="no sticker decoder"):
        pipeline(tiny.dialogue(), variant="gen")
