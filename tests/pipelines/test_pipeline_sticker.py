import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

from pipelines.pipeline_sticker import StickerPipeline
from tests.fixtures import tiny


def embeds(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 5, 24, generator=torch.Generator().manual_seed(3))


def draw(pipeline, count=1, seed=0, **kwargs):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipeline(prompt_embeds=embeds(count), generator=generators, num_inference_steps=3, **kwargs)


def test_same_seed_same_picture(decoder):
    one, two, other = draw(decoder), draw(decoder), draw(decoder, seed=1)
    assert one.images[0].tobytes() == two.images[0].tobytes() != other.images[0].tobytes()
    assert one.images[0].mode == "RGBA" and one.images[0].size == (32, 32)
    assert one.blocked == [None]


def test_a_batch_equals_its_singles(decoder):
    together = draw(decoder, count=2, output_type="pt").images
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        alone = decoder(
            prompt_embeds=embeds(2)[i : i + 1], generator=generator, num_inference_steps=3, output_type="pt"
        )
        torch.testing.assert_close(together[i : i + 1], alone.images, atol=1e-4, rtol=1e-4)


def test_rag_stays_near_the_init_image_at_low_strength(decoder):
    init = tiny.picture(size=32)
    target = decoder.preprocess(init)
    reconstruction = decoder.vae.decode(decoder.vae.encode(target).latent_dist.mode()).sample

    def distance(strength: float) -> float:
        picture = draw(decoder, init_image=init, strength=strength, guidance_scale=1.0, output_type="pt").images
        return (picture - reconstruction).abs().mean().item()

    assert distance(0.3) < distance(1.0)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers(decoder, scheduler):
    pipeline = tiny.make_tiny_decoder()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    for init in (None, tiny.picture(size=32)):
        array = np.asarray(draw(pipeline, init_image=init).images[0])
        assert array.std() > 0


def test_guidance_and_negative_prompt_change_the_picture(decoder):
    plain = draw(decoder, guidance_scale=1.0).images[0].tobytes()
    guided = draw(decoder, guidance_scale=6.0).images[0].tobytes()
    away = draw(decoder, guidance_scale=6.0, negative_prompt_embeds=torch.ones(1, 5, 24)).images[0].tobytes()
    assert len({plain, guided, away}) == 3


def test_rgb_autoencoders_give_rgb_pictures():
    assert draw(tiny.make_tiny_decoder(channels=3), init_image=tiny.picture()).images[0].mode == "RGB"


def test_transparency_survives_the_way_in_and_out(decoder):
    picture = tiny.picture(size=32)
    again = decoder.postprocess(decoder.preprocess(picture))[0]
    difference = np.abs(np.asarray(again, dtype=int) - np.asarray(picture, dtype=int))
    assert difference[np.asarray(picture)[..., 3] == 255].max() <= 2
    assert (np.asarray(again)[..., 3][np.asarray(picture)[..., 3] == 0] == 0).all()


@pytest.mark.parametrize(("kwargs", "message"), [
    ({}, "exactly one of"),
    ({"prompt": "a cat", "prompt_embeds": torch.zeros(1, 5, 24)}, "exactly one of"),
    ({"prompt_embeds": torch.zeros(1, 77, 768)}, r"must be of shape \(B, 5, 24\) for this decoder, got \(1, 77, 768\)"),
    ({"prompt_embeds": torch.zeros(1, 5, 24), "strength": 0.0}, r"`strength` must be in \(0, 1\], got 0.0"),
    ({"prompt": "a cat"}, "needs a text encoder"),
])  # fmt: skip
def test_bad_arguments_are_named(decoder, kwargs, message):
    with pytest.raises(ValueError, match=message):
        decoder(**kwargs)


def test_save_and_load(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == [
        "pipeline_sticker",
        "StickerPipeline",
    ]
    again = StickerPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert draw(decoder).images[0].tobytes() == draw(again).images[0].tobytes()


def test_a_blocked_picture_says_why(decoder, monkeypatch):
    class Verdict:
        nsfw, is_nsfw = 0.93, True

    class Classifier:
        def classify_batch(self, images):
            assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
            return [Verdict() for _ in images]

    from pipelines import safety

    monkeypatch.setattr(safety, "_open_nsfw", Classifier)
    assert draw(decoder).blocked == ["nsfw (open_nsfw 0.93)"]
