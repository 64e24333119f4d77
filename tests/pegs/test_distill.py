import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from pegs.training.distill import DecoderLcmArguments, consistency, noise_levels, teacher_step
from pegs.training.stages import ConfigError, build_arguments
from tests.fixtures import tiny


NOISE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def levels():
    return noise_levels(LCMScheduler(**NOISE), 50, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs():
    unet = tiny.make_tiny_decoder().unet
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    return unet, noisy, torch.randn(2, 5, width, generator=generator)


def test_what_only_the_teachers_training_reads_is_unknown():
    values = {"output_dir": "x", "max_steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    for key in ("vae", "unet", "snr_gamma"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            build_arguments(DecoderLcmArguments, {**values, key: ""})


def test_steps_are_those_that_the_scheduler_draws_with(levels):
    scheduler = LCMScheduler(**NOISE, original_inference_steps=50)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == levels.timesteps[-1] == 999
    assert set(scheduler.timesteps.tolist()) <= set(levels.timesteps.tolist())
    assert levels.alphas_cumprod[0] == 1 and levels.alphas_cumprod[-1] == 0


def test_a_teachers_step_is_ddims(levels, inputs):
    unet, noisy, states = inputs
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    index = torch.tensor([30, 30])
    timestep = levels.timesteps[30]
    with torch.no_grad():
        velocity = unet(noisy, timestep, states).sample
    expected = scheduler.step(velocity, timestep, noisy).prev_sample
    torch.testing.assert_close(teacher_step(unet, noisy, index, states, levels, 1.0), expected, atol=1e-4, rtol=1e-4)


def test_guidance_moves_a_teachers_step_away_from_the_unconditional_one(levels, inputs):
    unet, noisy, states = inputs
    index = torch.tensor([30, 30])
    without, given, guided = (teacher_step(unet, noisy, index, states, levels, scale) for scale in (0.0, 1.0, 2.5))
    torch.testing.assert_close(guided, without + 2.5 * (given - without), atol=1e-4, rtol=1e-4)


def test_the_consistency_function_leaves_a_finished_picture_alone(levels, inputs):
    unet, noisy, states = inputs
    with torch.no_grad():
        torch.testing.assert_close(consistency(unet, noisy, torch.tensor([0, 0]), states, levels), noisy)


def test_the_consistency_function_is_what_the_scheduler_denoises_with(levels, inputs):
    unet, noisy, states = inputs
    scheduler = LCMScheduler(**NOISE, original_inference_steps=50)
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[1]
    index = (levels.timesteps == timestep).nonzero().flatten().repeat(2)
    with torch.no_grad():
        velocity = unet(noisy, timestep, states).sample
        ours = consistency(unet, noisy, index, states, levels)
    theirs = scheduler.step(velocity, timestep, noisy, generator=torch.Generator().manual_seed(0)).denoised
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
