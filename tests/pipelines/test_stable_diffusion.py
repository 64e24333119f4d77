"""Any Stable Diffusion checkpoint is a sticker decoder."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from pipelines.pipeline_sticker import StickerPipeline
from tests.fixtures import tiny
from tests.pipelines.stable_diffusion import make_tiny_text_encoder, save_single_file, save_tiny_stable_diffusion


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "model"
    return folder, save_tiny_stable_diffusion(folder)


@pytest.fixture(scope="module")
def stickers(checkpoint):
    pipeline = StickerPipeline.from_pretrained(
        checkpoint[0], default_num_inference_steps=4, default_guidance_scale=7.5
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_a_checkpoint_draws_what_diffusers_own_pipeline_draws(checkpoint, stickers):
    arguments = {"prompt": "a cat, anger", "negative_prompt": "blurry"}
    theirs = checkpoint[1](**arguments, num_inference_steps=4, guidance_scale=7.5, generator=seeds(3)).images[0]
    ours = stickers(**arguments, generator=seeds(3)).images[0]
    assert ours.mode == "RGB" and ours.tobytes() == theirs.tobytes()


def test_defaults_are_saved(stickers, tmp_path):
    stickers.save_pretrained(tmp_path)
    again = StickerPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    drawn = [pipeline(prompt="a cat", generator=seeds(1)).images[0].tobytes() for pipeline in (stickers, again)]
    assert drawn[0] == drawn[1]
    assert (again.config.default_num_inference_steps, again.config.default_guidance_scale) == (4, 7.5)


def test_prompts_negative_prompts_and_emotions_say_what_is_drawn(stickers):
    def draw(**kwargs):
        return stickers(generator=seeds(0), num_inference_steps=2, **kwargs).images[0].tobytes()

    drawn = [
        draw(prompt="a cat"),
        draw(prompt="a cat", negative_prompt="ugly"),
        draw(prompt="a cat", emotion="anger"),
        draw(prompt="a cat", emotion="anger", emotion_scale=2.0),
        draw(prompt="a cat", emotion="sadness"),
    ]
    assert len(set(drawn)) == 5
    assert drawn[2] == draw(prompt="a cat, anger")
    assert draw(prompt="a cat", emotion="anger", emotion_scale=0.0) == draw(prompt="a cat, neutral")
    assert draw(prompt_embeds=stickers.encode_prompt("a cat")) == drawn[0]
    assert draw(prompt="a cat", negative_prompt_embeds=stickers.encode_prompt("ugly")) == drawn[1]
    with pytest.raises(ValueError, match="pass `prompt`"):
        draw(prompt_embeds=stickers.encode_prompt("a cat"), emotion="anger")


def test_a_batch_of_prompts_equals_its_singles_to_the_byte(stickers):
    prompts = ["a cat", "a very long caption of a dog"]
    together = stickers(prompt=prompts, negative_prompt="ugly", generator=seeds(0, 1), num_inference_steps=2).images
    for i, image in enumerate(together):
        alone = stickers(prompt=prompts[i], negative_prompt="ugly", generator=seeds(i), num_inference_steps=2).images
        assert image.tobytes() == alone[0].tobytes()


def test_a_single_file_equals_the_folder(checkpoint, stickers, tmp_path):
    save_single_file(checkpoint[1], tmp_path / "model.safetensors")
    single = StickerPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(checkpoint[0]), local_files_only=True
    )
    single.set_progress_bar_config(disable=True)
    one, two = (
        pipeline(prompt="a dog", generator=seeds(5), num_inference_steps=2, guidance_scale=3.0).images[0].tobytes()
        for pipeline in (single, stickers)
    )
    assert one == two


def kohya_lora(unet: torch.nn.Module, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of the cross attention's queries and keys in the file format of `lcm-lora-sdv1-5`."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k")):
            key = f"lora_unet_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = torch.randn(rank, module.in_features, generator=generator)
            state[f"{key}.lora_up.weight"] = torch.randn(module.out_features, rank, generator=generator)
            state[f"{key}.alpha"] = torch.tensor(float(rank))
    return state


def test_an_lcm_lora_loads_as_it_is_and_comes_off_again(checkpoint):
    from safetensors.torch import save_file

    pipeline = StickerPipeline.from_pretrained(checkpoint[0])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_scheduler("lcm")

    def draw():
        drawn = pipeline(prompt="a cat", generator=seeds(0), num_inference_steps=4, guidance_scale=1.0)
        return drawn.images[0].tobytes()

    plain = draw()
    file = checkpoint[0].parent / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file(kohya_lora(pipeline.unet), file)
    pipeline.load_lora_weights(str(file.parent))
    assert draw() != plain
    pipeline.unload_lora_weights()
    assert draw() == plain


def test_slicing_and_offloading_are_diffusers_own(stickers):
    plain = stickers(prompt="a cat", generator=seeds(0), num_inference_steps=2, output_type="pt").images
    stickers.enable_attention_slicing()
    stickers.vae.enable_slicing()
    sliced = stickers(prompt="a cat", generator=seeds(0), num_inference_steps=2, output_type="pt").images
    stickers.disable_attention_slicing()
    stickers.vae.disable_slicing()
    torch.testing.assert_close(sliced, plain, atol=1e-4, rtol=1e-4)
    with pytest.raises((RuntimeError, ValueError), match="accelerator"):
        stickers.enable_model_cpu_offload()


def test_the_ground_is_cut_out_if_asked(stickers):
    drawn = stickers(prompt="a cat", generator=seeds(0), num_inference_steps=2, transparent=True).images[0]
    assert drawn.mode == "RGBA"


def test_a_text_encoder_of_another_width_is_refused():
    text_encoder, tokenizer = make_tiny_text_encoder(width=16)
    with pytest.raises(ValueError, match="states of size 16, but `unet` takes states of size 24"):
        tiny.make_tiny_decoder(text_encoder=text_encoder, tokenizer=tokenizer)


def test_stable_diffusions_safety_checker_blocks_and_says_so(stickers):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**size, "image_size": 32, "patch_size": 16, "projection_dim": 8}, projection_dim=8)
    ).eval()
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline = StickerPipeline(**{**stickers.components, "safety_checker": checker, "feature_extractor": extractor})
    pipeline.set_progress_bar_config(disable=True)
    verdicts = []
    for threshold in (2.0, -2.0):  # of a cosine: never, always
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        drawn = pipeline(prompt="a cat", generator=seeds(0), num_inference_steps=1)
        assert isinstance(drawn.images[0], Image.Image) and np.asarray(drawn.images[0]).std() > 0
        verdicts += drawn.blocked
    assert verdicts == [None, "nsfw (stable diffusion safety checker)"]
