"""Stages `decoder_vae` and `decoder_unet`: the mini scale's sticker decoder, trained from nothing on OpenMoji art."""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import Dataset

from dataset_builders.stickers.openmoji import cached_pack
from pegs.training.art import ArtCrops, Drawing, load_art, to_rgba_tensor
from pegs.training.loop import LoopArguments, train_loop
from pegs.training.text_states import encode_captions
from pipelines.pipeline_sticker import StickerPipeline


logger = logging.getLogger(__name__)


@dataclass
class DecoderVaeArguments(LoopArguments):
    """
    Parameters of stage `decoder_vae`.

    Args:
        image_size (`int`): Side of a sticker in pixels.
        crop_size (`int`): Side of the training crops; the last `full_size_part` of the steps sees whole stickers.
        full_size_part (`float`): Part of the steps on whole stickers, in `[0, 1]`, at `crop_size**2 / image_size**2` of the batch.
        kl_weight (`float`): Weight of the KL term.
        edge_weight (`float`): Weight of the L1 distance between the pictures' gradients, which keeps outlines crisp.
        vae (`dict`): Arguments of `diffusers.AutoencoderKL`.

    """

    image_size: int = 128
    crop_size: int = 64
    full_size_part: float = 0.2
    kl_weight: float = 1e-6
    edge_weight: float = 0.5
    vae: dict = field(default_factory=dict)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """L1 of pixels plus `edge_weight` times the L1 of their horizontal and vertical differences; both `(B, 4, H, W)`."""
    edges = sum((output.diff(dim=axis) - target.diff(dim=axis)).abs().mean() for axis in (-1, -2))
    return (output - target).abs().mean() + edge_weight * edges


def train_vae(args: DecoderVaeArguments) -> None:
    """Train the autoencoder (RGBA in, 8x smaller latents) and save it with `scaling_factor = 1 / std` of its latents."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    vae = AutoencoderKL(sample_size=args.image_size, **args.vae)
    art = load_art(cached_pack(), args.image_size)

    def loss_fn(model: torch.nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        posterior = model.encode(pixels).latent_dist
        output = model.decode(posterior.sample(generator)).sample.float()
        return reconstruction_loss(output, pixels, args.edge_weight) + args.kl_weight * posterior.kl().mean()

    whole_steps = round(args.full_size_part * args.max_steps)
    crop_steps = args.max_steps - whole_steps
    whole_batch = max(1, args.batch_size * args.crop_size**2 // args.image_size**2)
    phases = (
        ("crops", args.crop_size, crop_steps, args.batch_size, 1.0),
        ("whole", args.image_size, whole_steps, whole_batch, 0.3),
    )
    for name, size, steps, batch_size, rate in phases:
        folder = Path(args.output_dir) / name
        if not (folder / "config.json").is_file():
            phase = LoopArguments(str(folder), steps, batch_size, args.learning_rate * rate, seed=args.seed)
            vae = train_loop(phase, vae, ArtCrops(art, size, steps * batch_size, args.seed), loss_fn)
            vae.save_pretrained(folder)
        vae = AutoencoderKL.from_pretrained(folder)
    latents = encode_art(vae, art)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(Path(args.output_dir) / "vae")
    for name, *_ in phases:
        shutil.rmtree(Path(args.output_dir) / name)


@torch.no_grad()
def encode_art(vae: AutoencoderKL, art: list[Drawing]) -> torch.Tensor:
    """Latent means of all drawings, `(len(art), latent_channels, H / 8, W / 8)`, unscaled."""
    pictures = torch.stack([to_rgba_tensor(drawing.pixels) for drawing in art])
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures.split(32)])


@dataclass
class DecoderUnetArguments(LoopArguments):
    """
    Parameters of stage `decoder_unet`.

    Args:
        vae (`str`): Folder of the trained autoencoder.
        prompt_length (`int`): Number L of caption states.
        pack_part (`float`): Share of the samples drawn from the annotated pack rather than from the other art, in `[0, 1]`.
        drop_part (`float`): Share of the samples without a caption, for classifier-free guidance.
        blend_part (`float`): Share of the samples whose caption is blended with another of the same emotion: PEGS' mapper, trained by
            MSE (eq. 9), gives such in-between conditions.
        ema_decay (`float`): Decay of the weights' moving average, which is what is saved.
        unet (`dict`): Arguments of `diffusers.UNet2DConditionModel`.

    """

    vae: str = ""
    prompt_length: int = 32
    pack_part: float = 0.6
    drop_part: float = 0.1
    blend_part: float = 0.3
    ema_decay: float = 0.9995
    unet: dict = field(default_factory=dict)


class CaptionedLatents(Dataset):
    """Latents with caption states; an index maps to one fixed random draw."""

    def __init__(
        self, latents: torch.Tensor, states: torch.Tensor, art: list[Drawing], args: DecoderUnetArguments
    ) -> None:
        self.latents, self.states, self.args = latents, states, args  # latents: (2, n, C, h, w), plain and mirrored
        self.emotions = [drawing.caption.rsplit(", ", 1)[-1] if drawing.sticker_id else None for drawing in art]
        self.pack = [i for i, drawing in enumerate(art) if drawing.sticker_id]
        self.others = [i for i, drawing in enumerate(art) if not drawing.sticker_id]
        self.same_emotion = {e: [i for i in self.pack if self.emotions[i] == e] for e in set(self.emotions) if e}

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        among = self.pack if rng.random() < self.args.pack_part else self.others
        i = among[rng.integers(len(among))]
        states = self.states[i]
        draw = rng.random()
        if draw < self.args.drop_part:
            states = torch.zeros_like(states)
        elif draw < self.args.drop_part + self.args.blend_part and self.emotions[i]:
            others = self.same_emotion[self.emotions[i]]
            states = torch.lerp(states, self.states[others[rng.integers(len(others))]], float(rng.uniform(0, 0.5)))
        return {"latents": self.latents[rng.integers(2), i], "states": states}


def train_unet(args: DecoderUnetArguments) -> None:
    """Train the denoiser (v-prediction) on captioned art and save a whole `StickerPipeline` folder."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    vae = AutoencoderKL.from_pretrained(args.vae)
    art = [drawing for drawing in load_art(cached_pack(), vae.config.sample_size) if drawing.caption]
    mirrored = [replace(drawing, pixels=np.ascontiguousarray(drawing.pixels[:, ::-1])) for drawing in art]
    latents = torch.stack([encode_art(vae, art), encode_art(vae, mirrored)]) * vae.config.scaling_factor
    states = encode_captions([drawing.caption for drawing in art], args.prompt_length)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1], in_channels=latents.shape[2], out_channels=latents.shape[2], **args.unet
    )
    average = EMAModel(unet.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        clean = batch["latents"]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        timesteps = torch.randint(1000, (len(clean),), generator=generator, device=clean.device)
        target = scheduler.get_velocity(clean, noise, timesteps)
        output = model(scheduler.add_noise(clean, noise, timesteps), timesteps, batch["states"]).sample
        return F.mse_loss(output.float(), target)

    dataset = CaptionedLatents(latents, states, art, args)
    unet = train_loop(args, unet, dataset, loss_fn, lambda step: average.step(unet.parameters()), [average])
    average.copy_to(unet.parameters())
    pipeline = StickerPipeline(
        vae, unet, scheduler, prompt_length=args.prompt_length, force_zeros_for_empty_prompt=True
    )
    pipeline.save_pretrained(Path(args.output_dir) / "pipeline")
