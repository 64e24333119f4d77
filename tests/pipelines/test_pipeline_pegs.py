from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from pipelines.pipeline_pegs import PegsPipeline, Retrieved
from tests.fixtures import tiny


class Pack:
    def __init__(self):
        colors = {"red": "anger", "green": "neutral", "blue": "sadness"}
        self.by_id = {
            name: SimpleNamespace(
                id=name, emotion=emotion, recommendation=f"Send {name}.", caption=f"{name}, {emotion}"
            )
            for name, emotion in colors.items()
        }

    def image(self, sticker_id):
        return tiny.picture(sticker_id)


def encode_captions(captions):
    return torch.stack(
        [torch.randn(5, 24, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in captions]
    )


@pytest.fixture
def pipeline(model, processor, decoder):
    vectors = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    return PegsPipeline(model, processor, Pack(), vectors, decoder, encode_captions)


FAST = {
    "num_inference_steps": 2,
    "max_new_tokens": 5,
    "forced_eos_token_id": tiny.EOS,
    "sticker_bias": torch.inf,
    "size": 32,
    "floor": 0.0,
}


@pytest.mark.parametrize("variant", ["ret", "gen", "rag"])
def test_every_variant_answers_and_repeats_itself_by_seed(pipeline, variant):
    one, two = (pipeline(tiny.dialogue(), variant=variant, seed=7, **FAST) for _ in range(2))
    assert one.text == two.text and one.sticker.tobytes() == two.sticker.tobytes()
    assert one.variant == variant and one.why
    assert (one.sticker_id is not None) == (variant == "ret")


def test_seeds_do_not_touch_the_global_generator(pipeline):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pipeline(tiny.dialogue(), variant="gen", seed=1, do_sample=True, **FAST)
    assert torch.equal(torch.rand(1), expected)


def test_no_sticker_where_the_model_sends_none(pipeline):
    reply = pipeline(tiny.dialogue(), **{**FAST, "sticker_bias": -torch.inf})
    assert reply.sticker is None and reply.retrieved == [] and reply.sticker_id is None


def test_retrieval_equals_brute_force_and_skips_what_was_sent(pipeline):
    query = torch.nn.functional.normalize(torch.ones(16), dim=-1)
    expected = (pipeline.pack_embeds @ query).argsort(descending=True)
    ids = [pipeline.pack_ids[i] for i in expected]
    assert [item.id for item in pipeline.retrieve(query, top_k=3)] == ids
    assert [item.id for item in pipeline.retrieve(query, top_k=3, exclude=[ids[0]])] == ids[1:]


def test_a_sticker_that_is_clearly_asked_for_is_the_one_meant(processor, decoder, monkeypatch):
    model = tiny.make_tiny_model(retrieval_dim=24, retrieval_text_encoder="of captions and prompts")
    vectors = torch.nn.functional.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    pipeline = PegsPipeline(model, processor, Pack(), vectors, decoder, encode_captions)
    near = pipeline(tiny.dialogue(), variant="ret", clarity=2.0, **FAST).sticker_id
    row = (pipeline.pack_ids.index(near) + 1) % 3
    asked, generate = pipeline.pack_ids[row], model.generate

    def ask_for(vector):
        def generate_and_ask(**kwargs):
            output = generate(**kwargs)
            output.sticker_prompt_embeds = torch.zeros(1, 5, 24)
            output.sticker_prompt_embeds[:, :2] = vector  # the rest is padding
            return output

        monkeypatch.setattr(model, "generate", generate_and_ask)

    ask_for(vectors[row] * 3)
    assert pipeline(tiny.dialogue(), variant="ret", **FAST).sticker_id == asked
    assert pipeline(tiny.dialogue(), variant="ret", clarity=2.0, **FAST).sticker_id == near
    plans = []
    plan = pipeline.plan
    monkeypatch.setattr(pipeline, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    reply = pipeline(tiny.dialogue(), variant="gen", condition="mixed", num_candidates=4, **FAST)
    assert reply.retrieved[0].id == asked and len(reply.retrieved) == 3
    drawn = [(c.condition, [n.id for n in c.neighbours]) for c in plans[-1]]
    assert drawn == [("generation", [asked]), ("caption", [asked])] * 2, "nothing but what was asked for"
    pipeline(tiny.dialogue(), variant="rag", condition="pooled", num_neighbours=3, **FAST)
    assert len(plans[-1][0].neighbours) == 3, "unless more is wanted"
    reply = pipeline(tiny.dialogue(), variant="ret", exclude=[asked], **FAST)
    assert reply.sticker_id == near, "what was sent before is not what is asked for"
    ask_for(vectors.sum(dim=0))
    assert pipeline(tiny.dialogue(), variant="ret", **FAST).sticker_id == near
    model.config.retrieval_text_encoder = None
    ask_for(vectors[row])
    assert pipeline(tiny.dialogue(), variant="ret", **FAST).sticker_id == near, "other prompts, other space"


def test_a_model_that_only_draws_reads_nothing_from_its_prompts(processor, decoder):
    model = tiny.make_tiny_model(
        retrieval_dim=24, retrieval_text_encoder="of captions", num_retrieval_tokens=0, variant="gen"
    )
    processor = tiny.make_tiny_processor(model.config)
    pipeline = PegsPipeline(model, processor, Pack(), torch.zeros(3, 0), decoder)
    assert pipeline(tiny.dialogue(), **FAST).sticker is not None


def test_a_generation_config_says_how_long_a_text_is(pipeline, monkeypatch):
    lengths, encode = [], pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda messages, room: lengths.append(room) or encode(messages, room))
    settings = GenerationConfig(max_new_tokens=9, min_new_tokens=9, eos_token_id=tiny.EOS)
    pipeline(tiny.dialogue(), generation_config=settings)
    pipeline(tiny.dialogue())
    pipeline(tiny.dialogue(), max_new_tokens=3)
    assert lengths == [9, 64, 3] and settings.max_new_tokens == 9


def test_what_a_decoder_without_alpha_draws_is_cut_out(pipeline):
    pipeline.decoder = tiny.make_tiny_decoder(channels=3)
    assert pipeline(tiny.dialogue(), variant="gen", **FAST).sticker.mode == "RGBA"


def blocking(decoder, monkeypatch, verdicts):
    """The decoder with a safety check that gives `verdicts`."""
    from pipelines import pipeline_sticker

    monkeypatch.setattr(pipeline_sticker, "check_images", lambda images, *_: verdicts[: len(images)])
    return decoder


def test_a_blocked_drawing_is_replaced_by_the_retrieved_sticker(pipeline, monkeypatch):
    blocking(pipeline.decoder, monkeypatch, ["nsfw (test)"])
    reply = pipeline(tiny.dialogue(), variant="gen", **FAST)
    assert reply.blocked == "nsfw (test)" and reply.sticker_id == reply.retrieved[0].id
    assert reply.why.startswith("The drawing was blocked (nsfw (test)); instead")
    assert reply.sticker.tobytes() == tiny.picture(reply.sticker_id).tobytes()
    assert pipeline.counts == {"replies": 1, "stickers": 1, "retrieved": 1, "blocked": 1}


def test_a_blocked_candidate_is_passed_over(pipeline, monkeypatch):
    free = pipeline(tiny.dialogue(), variant="gen", num_candidates=2, **FAST)
    first, second = (pipeline(tiny.dialogue(), variant="gen", seed=seed, **FAST) for seed in (0, 1))
    other = first if free.sticker.tobytes() == second.sticker.tobytes() else second
    verdicts = ["nsfw (test)", None] if other is second else [None, "nsfw (test)"]
    blocking(pipeline.decoder, monkeypatch, verdicts)
    reply = pipeline(tiny.dialogue(), variant="gen", num_candidates=2, **FAST)
    assert reply.blocked is None and reply.sticker.tobytes() == other.sticker.tobytes()
    assert pipeline.counts["blocked"] == 1


def test_without_a_sticker_to_retrieve_a_blocked_drawing_says_so(pipeline, monkeypatch):
    blocking(pipeline.decoder, monkeypatch, ["nsfw (test)"])
    reply = pipeline(tiny.dialogue(), variant="gen", exclude=list(pipeline.pack_ids), **FAST)
    assert reply.sticker is None and reply.blocked and "no sticker to retrieve instead" in reply.why


def test_with_no_sticker_left_to_draw_over_rag_draws_freely(pipeline):
    everything = list(pipeline.pack_ids)
    rag, gen = (pipeline(tiny.dialogue(), variant=variant, exclude=everything, **FAST) for variant in ("rag", "gen"))
    assert rag.sticker.tobytes() == gen.sticker.tobytes()
    assert rag.why == "Drawn from the reply's own generation tokens."


def test_a_drawing_below_the_floor_is_replaced_by_the_retrieved_sticker(pipeline):
    reply = pipeline(tiny.dialogue(), variant="rag", **{**FAST, "floor": 1.1})
    assert reply.sticker_id == reply.retrieved[0].id and 0 <= reply.rank <= 1
    assert "resembles the reply" in reply.why and "instead" in reply.why
    assert pipeline.counts["below_floor"] == 1 and "drawn" not in pipeline.counts


def test_the_best_of_the_candidates_is_sent(pipeline):
    alone = [pipeline(tiny.dialogue(), variant="gen", seed=seed, **FAST) for seed in range(3)]
    best = pipeline(tiny.dialogue(), variant="gen", seed=0, num_candidates=3, **FAST)
    drawings = pipeline.embed_images([reply.sticker for reply in alone])
    inputs = pipeline.processor.apply_chat_template(
        tiny.dialogue(), add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    query = pipeline.model.generate(
        **inputs, max_new_tokens=5, forced_eos_token_id=tiny.EOS, sticker_bias=torch.inf
    ).sticker_queries[0]
    intended = pipeline.intended_emotion(best.retrieved)
    choice = pipeline.selector.choose(drawings, query, intended, [True] * 3)
    assert best.sticker.tobytes() == alone[choice.index].sticker.tobytes()
    assert best.why.endswith("the best of 3.") and best.rank == pytest.approx(choice.rank)


def test_conditions_and_neighbours_change_the_drawing(pipeline):
    drawings = {
        (condition, k): pipeline(
            tiny.dialogue(), variant="rag", condition=condition, num_neighbours=k, **FAST
        ).sticker.tobytes()
        for condition in ("generation", "caption", "pooled")
        for k in (1, 3)
    }
    assert len(set(drawings.values())) == 5  # with one neighbour the pooled caption is the nearest one's


def test_mixed_candidates_are_drawn_from_the_reply_and_from_captions_by_turns(pipeline):
    retrieved = [Retrieved("red", 0.5, "anger"), Retrieved("blue", 0.4, "sadness")]
    planned = pipeline.plan("mixed", retrieved, num_candidates=6)
    told = [(candidate.condition, candidate.neighbours[0].id) for candidate in planned]
    assert told[::2] == [("generation", "red")] * 3
    assert told[1::2] == [("caption", "red"), ("caption", "blue"), ("caption", "red")]
    captions = pipeline.plan("caption", retrieved, num_neighbours=2, num_candidates=2)
    assert [candidate.neighbours for candidate in captions] == [tuple(retrieved), tuple(retrieved[1:])]


@pytest.mark.parametrize("variant", ["gen", "rag"])
def test_a_caption_draws_the_same_among_others_as_alone(pipeline, variant):
    everything = list(pipeline.pack_ids)
    settings = FAST | {"condition": "caption", "variant": variant}
    best = pipeline(tiny.dialogue(), num_candidates=3, **settings)
    found = [item.id for item in best.retrieved]
    alone = [
        pipeline(tiny.dialogue(), seed=i, exclude=[x for x in everything if x != found[i]], **settings)
        for i in range(3)
    ]
    chosen = [reply.sticker.tobytes() for reply in alone].index(best.sticker.tobytes())
    assert best.why.startswith(f"Drawn from the caption of {found[chosen]}")
    assert (f" over {found[chosen]}" in best.why) == (variant == "rag")


def test_captions_are_encoded_on_any_device_and_drawn_on_the_models(pipeline):
    pipeline._encode_captions = lambda captions: encode_captions(captions).double()  # as on another device
    reply = pipeline(tiny.dialogue(), variant="gen", condition="mixed", num_candidates=2, **FAST)
    assert reply.sticker is not None


def test_of_a_dialogue_that_is_too_long_the_oldest_exchanges_are_not_read(pipeline, monkeypatch):
    short = tiny.dialogue()
    long = [*tiny.dialogue()[:2], *short]
    config = pipeline.model.config.text_config
    read = pipeline.encode(short, 5)["input_ids"]
    monkeypatch.setattr(config, "max_position_embeddings", read.shape[1] + 5 + pipeline.model.config.num_img_tokens)
    assert torch.equal(pipeline.encode(long, 5)["input_ids"], read)
    persona = {"role": "system", "content": [{"type": "text", "text": "Be Bob."}]}
    with monkeypatch.context() as patch:
        told = pipeline.encode([persona, *short], 5)["input_ids"]
        patch.setattr(config, "max_position_embeddings", told.shape[1] + 5 + pipeline.model.config.num_img_tokens)
        assert torch.equal(pipeline.encode([persona, *long], 5)["input_ids"], told)
    calls, template = [], pipeline.processor.apply_chat_template
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.processor, "apply_chat_template", lambda *args, **rest: calls.append(1) or template(*args, **rest))  # fmt: skip
        assert torch.equal(pipeline.encode([*short[:2] * 60, *short], 5)["input_ids"], read)
    assert len(calls) < 10
    with pytest.raises(ValueError, match=r"The last message has \d+ tokens, and the model can read 3\."):
        pipeline.encode(short[-1:], config.max_position_embeddings - pipeline.model.config.num_img_tokens - 3)


def test_the_decoder_says_what_is_drawn_from_unless_told_otherwise(pipeline):
    plain = pipeline(tiny.dialogue(), variant="gen", **FAST)
    pipeline.decoder = tiny.make_tiny_decoder(default_condition="caption")
    captioned = pipeline(tiny.dialogue(), variant="gen", **FAST)
    told = pipeline(tiny.dialogue(), variant="gen", condition="generation", **FAST)
    assert plain.why == told.why == "Drawn from the reply's own generation tokens."
    assert captioned.why == f"Drawn from the caption of {captioned.retrieved[0].id}."
    captionless = PegsPipeline(
        pipeline.model, pipeline.processor, pipeline.pack, pipeline.pack_embeds, pipeline.decoder
    )
    assert captionless(tiny.dialogue(), variant="gen", **FAST).why == plain.why


def test_mixed_latents_are_the_weighted_mean(pipeline):
    neighbours = [Retrieved("red", 0.5, "anger"), Retrieved("blue", 0.4, "sadness")]
    weights = torch.softmax(torch.tensor([0.5, 0.4]) / 0.07, dim=0)
    red, blue = (pipeline.decoder.encode_image([tiny.picture(name)]) for name in ("red", "blue"))
    torch.testing.assert_close(pipeline.mix_latents(neighbours), weights[0] * red + weights[1] * blue)
    assert pipeline.intended_emotion(neighbours) == "anger"


def test_emotion_changes_the_drawing_alone(pipeline):
    from pipelines.emotions import EmotionStates

    states = EmotionStates(["anger", "neutral", "sadness"], 24)
    torch.nn.init.normal_(states.means, generator=torch.Generator().manual_seed(1))
    pipeline.decoder = tiny.make_tiny_decoder()
    pipeline.decoder.emotion_states = states
    plain, angry, furious = (
        pipeline(tiny.dialogue(), variant="gen", emotion=emotion, emotion_scale=scale, **FAST)
        for emotion, scale in ((None, 1.0), ("anger", 1.0), ("anger", 2.0))
    )
    assert plain.text == angry.text == furious.text
    assert len({reply.sticker.tobytes() for reply in (plain, angry, furious)}) == 3


def test_size_and_outline_reach_what_is_sent(pipeline):
    drawn = pipeline(tiny.dialogue(), variant="gen", **{**FAST, "size": 96}).sticker
    retrieved = pipeline(tiny.dialogue(), variant="ret", outline=0.1, **FAST)
    assert drawn.size == (96, 96)
    assert retrieved.sticker.size == (40, 40)
    assert retrieved.sticker.tobytes() != tiny.picture(retrieved.sticker_id).tobytes()


def test_replies_at_the_same_time_do_not_disturb_each_other(pipeline):
    pipeline.decoder = tiny.make_tiny_decoder()
    pipeline.decoder.set_scheduler("dpm++")  # it remembers earlier steps

    def ask(seed):
        return pipeline(tiny.dialogue(), variant="gen", seed=seed, **{**FAST, "num_inference_steps": 25}).sticker

    one_by_one = [ask(seed).tobytes() for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert [image.tobytes() for image in pool.map(ask, range(3))] == one_by_one


def test_what_cannot_be_served_is_refused_before_anything_is_said(pipeline, monkeypatch):
    with pytest.raises(ValueError, match="must be one of ret, gen, rag"):
        pipeline(tiny.dialogue(), variant="fax")
    with pytest.raises(ValueError, match="`condition` must be one of generation, caption, pooled, mixed, got 'x'"):
        pipeline(tiny.dialogue(), variant="gen", condition="x")
    with pytest.raises(ValueError, match="`num_neighbours` must be at least 1"):
        pipeline(tiny.dialogue(), variant="rag", num_neighbours=0)
    for wrong in ({"num_candidates": 0}, {"strength": 0}, {"emotion": "joy"}):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            patch.setattr(pipeline.model, "generate", None)
            pipeline(tiny.dialogue(), variant="gen", **wrong)
    captionless = PegsPipeline(
        pipeline.model, pipeline.processor, pipeline.pack, pipeline.pack_embeds, pipeline.decoder
    )
    with pytest.raises(ValueError, match="needs `encode_captions`"):
        captionless(tiny.dialogue(), variant="rag", condition="caption")
    pipeline.decoder = None
    with pytest.raises(ValueError, match="no sticker decoder"):
        pipeline(tiny.dialogue(), variant="gen")


def test_a_decoder_that_the_mapper_was_not_trained_for_is_refused(pipeline):
    with pytest.raises(ValueError, match="gives 5 prompt embeddings of size 24 .* takes 7 of size 24"):
        PegsPipeline(
            pipeline.model,
            pipeline.processor,
            pipeline.pack,
            pipeline.pack_embeds,
            tiny.make_tiny_decoder(prompt_length=7),
        )
