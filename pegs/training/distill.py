"""Stage `decoder_lcm`: consistency distillation (arXiv:2310.04378), for a denoiser that needs many steps or guidance; the mini one does not."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from pegs.training.decoder import DenoiserArguments, decoder_dataset, take_over
from pegs.training.loop import train_loop
from pegs.training.stages import reading
from pipelines.pipeline_sticker import StickerPipeline


@dataclass
class DecoderLcmArguments(DenoiserArguments):
    """
    Parameters of stage `decoder_lcm`, beside [`DenoiserArguments`]'.

    Args:
        teacher (`str`): Folder of the trained [`StickerPipeline`].
        guidance_scale (`float`): Classifier-free guidance of the teacher, which the student learns to do without.
        grid_steps (`int`): DDIM steps of the teacher from noise to picture.
        huber_c (`float`): Width of the pseudo-Huber loss.

    """

    teacher: str = ""
    guidance_scale: float = 2.5
    grid_steps: int = 20
    huber_c: float = 0.001


@dataclass
class NoiseLevels:
    """
    Signal and noise at the teacher's steps.

    Args:
        timesteps (`torch.Tensor` of shape `(grid_steps + 1,)`): From 0, the picture, to the last timestep.
        alphas_cumprod (`torch.Tensor` of shape `(grid_steps + 1,)`): The signal's share of the variance there.

    """

    timesteps: torch.Tensor
    alphas_cumprod: torch.Tensor

    def scales(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of signal and noise at steps `(B,)`, `(B, 1, 1, 1)` each."""
        alphas = self.alphas_cumprod[index].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()


def noise_levels(scheduler: LCMScheduler, grid_steps: int, device: torch.device) -> NoiseLevels:
    """The steps that [`LCMScheduler`] takes its own from, and before them the picture itself."""
    stride = scheduler.config.num_train_timesteps // grid_steps
    timesteps = torch.arange(grid_steps + 1, device=device) * stride - 1
    alphas = scheduler.alphas_cumprod.to(device)[timesteps.clamp(min=0)]
    alphas[0] = 1.0
    return NoiseLevels(timesteps.clamp(min=0), alphas)


def consistency(
    model: torch.nn.Module, noisy: torch.Tensor, index: torch.Tensor, states: torch.Tensor, levels: NoiseLevels
) -> torch.Tensor:
    """
    The consistency function: the picture at the end of the path through `noisy`, with the boundary scales of [`LCMScheduler`].

    Args:
        model (`torch.nn.Module`): Denoiser, v-prediction.
        noisy (`torch.Tensor` of shape `(B, C, h, w)`): Latents at steps `index`.
        index (`torch.Tensor` of shape `(B,)`): Steps of `levels`.
        states (`torch.Tensor` of shape `(B, L, D)`): Conditions.
        levels ([`NoiseLevels`]): The steps.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`.

    """
    signal, noise = levels.scales(index)
    velocity = model(noisy, levels.timesteps[index], states).sample.float()
    scaled = levels.timesteps[index].view(-1, 1, 1, 1) * 10.0  # LCMScheduler's timestep_scaling; its sigma_data is 0.5
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return skip * noisy + out * (signal * noisy - noise * velocity)


@torch.no_grad()
def teacher_step(
    teacher: torch.nn.Module,
    noisy: torch.Tensor,
    index: torch.Tensor,
    states: torch.Tensor,
    levels: NoiseLevels,
    guidance_scale: float,
) -> torch.Tensor:
    """One guided DDIM step of the teacher, from steps `index` `(B,)` to those before; latents `(B, C, h, w)`."""
    signal, noise = levels.scales(index)
    both = torch.cat([torch.zeros_like(states), states])
    velocity = teacher(torch.cat([noisy] * 2), levels.timesteps[index].repeat(2), both).sample.float()
    without, given = velocity.chunk(2)
    velocity = without + guidance_scale * (given - without)
    clean, rest = signal * noisy - noise * velocity, signal * velocity + noise * noisy
    signal, noise = levels.scales(index - 1)
    return signal * clean + noise * rest


def train_lcm(args: DecoderLcmArguments) -> None:
    """Distil the teacher into a denoiser of `num_inference_steps` steps and save a whole [`StickerPipeline`] folder."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    with reading(f"teacher {args.teacher}"):
        pipeline = StickerPipeline.from_pretrained(args.teacher)
    dataset = decoder_dataset(args, pipeline.vae)
    teacher, student = pipeline.unet.requires_grad_(False), UNet2DConditionModel.from_config(pipeline.unet.config)
    student.load_state_dict(teacher.state_dict())
    if args.init_from:
        take_over(student, args.init_from)
    for unet in (teacher, student):
        unet.set_attn_processor(AttnProcessor())  # see train_unet
    average = EMAModel(student.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=args.grid_steps)

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        clean, states = batch["latents"], batch["states"]
        teacher.to(clean.device)
        levels = noise_levels(scheduler, args.grid_steps, clean.device)
        index = torch.randint(1, args.grid_steps + 1, (len(clean),), generator=generator, device=clean.device)
        signal, spread = levels.scales(index)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        noisy = signal * clean + spread * noise
        before = teacher_step(teacher, noisy, index, states, levels, args.guidance_scale)
        with torch.no_grad():
            target = consistency(model, before, index - 1, states, levels)
        error = F.mse_loss(consistency(model, noisy, index, states, levels), target, reduction="none")
        return ((error + args.huber_c**2).sqrt() - args.huber_c).mean()

    student = train_loop(args, student, dataset, loss_fn, [average])
    average.copy_to(student.parameters())
    config = {name: pipeline.config[name] for name in ("prompt_length", "force_zeros_for_empty_prompt")}
    fast = StickerPipeline(pipeline.vae, student, scheduler, **config, **args.defaults)
    fast.save_pretrained(Path(args.output_dir) / "pipeline")
