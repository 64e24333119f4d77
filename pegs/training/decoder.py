"""Stages `decoder_vae` and `decoder_unet`: the mini scale's sticker decoder, trained from nothing on OpenMoji art."""

import logging
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import Dataset

from dataset_builders.stickers.openmoji import cached_pack
from pegs.training.art import ArtCrops, Drawing, general_caption, load_art, to_rgba_tensor
from pegs.training.build import load_checkpoint
from pegs.training.generation import gather_drawn
from pegs.training.loop import LoopArguments, run_key, train_loop
from pegs.training.stages import reading
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
        hue_weight (`float`): Weight of the squared distance between the pictures' hues; without it rare colours become the nearest frequent one.
        vae (`dict`): Arguments of `diffusers.AutoencoderKL`.
        init_from (`str`): Folder of a trained autoencoder to go on from, instead of from nothing.

    """

    image_size: int = 128
    crop_size: int = 64
    full_size_part: float = 0.2
    kl_weight: float = 2e-7
    edge_weight: float = 0.5
    hue_weight: float = 4.0
    vae: dict = field(default_factory=dict)
    init_from: str = ""


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, edge_weight: float, hue_weight: float
) -> torch.Tensor:
    """
    L1 of pixels and of their horizontal and vertical differences, and the mean square of hues (colour less its mean over the channels).

    Args:
        output (`torch.Tensor` of shape `(B, 4, H, W)`): RGBA as the autoencoder has it.
        target (`torch.Tensor` of shape `(B, 4, H, W)`): RGBA as it should be.
        edge_weight (`float`): Weight of the differences.
        hue_weight (`float`): Weight of the hues.

    Returns:
        `torch.Tensor` of shape `()`.

    """
    error = output - target
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (-1, -2))
    hues = error[:, :3] - error[:, :3].mean(dim=1, keepdim=True)
    return error.abs().mean() + edge_weight * edges + hue_weight * hues.square().mean()


def train_vae(args: DecoderVaeArguments) -> None:
    """Train the autoencoder (RGBA in, 8x smaller latents) and save it with standardised latents."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    with reading(f"init_from {args.init_from}" if args.init_from else "vae"):
        if args.init_from:
            vae = AutoencoderKL.from_pretrained(args.init_from, dtype=torch.float32)
        else:
            vae = AutoencoderKL(sample_size=args.image_size, **args.vae)
    art = load_art(cached_pack(), args.image_size)

    def loss_fn(model: torch.nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        posterior = model.encode(pixels).latent_dist
        output = model.decode(posterior.sample(generator)).sample.float()
        return (
            reconstruction_loss(output, pixels, args.edge_weight, args.hue_weight)
            + args.kl_weight * posterior.kl().mean()
        )

    whole_steps = round(args.full_size_part * args.max_steps)
    crop_steps = args.max_steps - whole_steps
    whole_batch = max(1, args.batch_size * args.crop_size**2 // args.image_size**2)
    phases = (
        ("crops", args.crop_size, crop_steps, args.batch_size, 1.0),
        ("whole", args.image_size, whole_steps, whole_batch, 0.3),
    )
    for name, size, steps, batch_size, rate in phases:
        folder = Path(args.output_dir) / name
        changes = {"max_steps": steps, "batch_size": batch_size, "learning_rate": args.learning_rate * rate}
        phase = replace(args, output_dir=str(folder), **changes)
        crops = ArtCrops(art, size, steps * batch_size, args.seed)
        done, key = folder / "done", run_key(phase, vae, crops[0])
        if not done.is_file() or done.read_text("utf-8") != key:
            if done.is_file():
                logger.info("%s is of another run: the phase starts afresh", folder)
            vae = train_loop(phase, vae, crops, loss_fn)
            vae.save_pretrained(folder)
            done.write_text(key, "utf-8")
        vae = AutoencoderKL.from_pretrained(folder)
    standardise_latents(vae, art)
    vae.save_pretrained(Path(args.output_dir) / "vae")
    for name, *_ in phases:
        shutil.rmtree(Path(args.output_dir) / name)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, art: list[Drawing]) -> None:
    """
    Give every latent channel mean 0 and variance 1 over the drawings, by the 1x1 convolutions around the latents; what is decoded stays the same.

    One `scaling_factor` for all would leave channels of little variance below the denoiser's noise. A channel's variance is that of its samples, so that one the
    autoencoder does not use stays small.
    """
    pictures = torch.stack([to_rgba_tensor(drawing.pixels) for drawing in art])
    posteriors = [vae.encode(chunk).latent_dist for chunk in pictures.split(32)]
    means, variances = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "var"))
    shift = means.mean(dim=(0, 2, 3))
    scale = (means.var(dim=(0, 2, 3)) + variances.mean(dim=(0, 2, 3))).sqrt()
    into, back, channels = vae.quant_conv, vae.post_quant_conv, len(shift)
    into.bias[:channels] = (into.bias[:channels] - shift) / scale
    into.bias[channels:] -= 2 * scale.log()  # the second half are log-variances
    into.weight[:channels] /= scale.view(-1, 1, 1, 1)
    back.bias += back.weight[:, :, 0, 0] @ shift
    back.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_art(vae: AutoencoderKL, art: list[Drawing]) -> torch.Tensor:
    """Latent means of all drawings, `(len(art), latent_channels, H / 8, W / 8)`, unscaled."""
    pictures = torch.stack([to_rgba_tensor(drawing.pixels) for drawing in art])
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures.split(32)])


@dataclass
class DenoiserArguments(LoopArguments):
    """
    What stages `decoder_unet` and `decoder_lcm` have in common.

    Args:
        pegs (`str`): PEGS checkpoint whose feature mapper gives the other half of the conditions.
        pack_part (`float`): Share of the samples drawn from the annotated pack rather than from the other art, in `[0, 1]`.
        drop_part (`float`): Share of the samples without a condition, for classifier-free guidance.
        mapped_part (`float`): Share of the samples whose condition is what PEGS asks for (eq. 9) and not the caption's own states: the mapper is never exact,
            and a denoiser of two thousand drawings does not forgive that by itself.
        general_part (`float`): Share of the samples of faces, cats, people and hearts whose caption names the kind and the emotion alone.
        openers (`bool`): Whether the openers are among the dialogues of `mapped_part`, as they were for `pegs`.
        num_inference_steps (`int`): The saved pipeline's number of steps, without guidance: a caption leaves so little open that four steps of DDIM land
            where twenty with guidance do.
        num_candidates (`int`): How many drawings of the saved pipeline a reply chooses from.
        condition (`str`): What the saved pipeline has them drawn from, see [`PegsPipeline.__call__`]: in the middle of a dialogue the mapper's output is the
            mean of all that might fit, and captions of what fits draw clearer.
        ema_decay (`float`): Decay of the weights' moving average, which is what is saved.
        init_from (`str`): Folder of a trained denoiser whose weights are taken over where they fit.

    """

    pegs: str = ""
    pack_part: float = 0.6
    drop_part: float = 0.1
    mapped_part: float = 0.5
    general_part: float = 0.0
    openers: bool = False
    num_inference_steps: int = 4
    num_candidates: int = 4
    condition: str = "mixed"
    ema_decay: float = 0.9995
    init_from: str = ""

    @property
    def defaults(self) -> dict[str, int | float | str]:
        """How the saved pipeline draws unless told otherwise."""
        return {
            "default_num_inference_steps": self.num_inference_steps,
            "default_guidance_scale": 1.0,
            "default_num_candidates": self.num_candidates,
            "default_condition": self.condition,
        }


@dataclass
class DecoderUnetArguments(DenoiserArguments):
    """
    Parameters of stage `decoder_unet`, beside [`DenoiserArguments`]'.

    Args:
        vae (`str`): Folder of the trained autoencoder.
        snr_gamma (`float`): Min-SNR-gamma (arXiv:2303.09556), on SNR + 1: with zero terminal SNR the first step would else have no weight.
        unet (`dict`): Arguments of `diffusers.UNet2DConditionModel`.

    """

    vae: str = ""
    snr_gamma: float = 5.0
    unet: dict = field(default_factory=dict)


class ConditionedLatents(Dataset):
    """
    Latents with a condition, the states of a caption or what PEGS asks for; an index maps to one fixed random draw.

    Args:
        latents (`torch.Tensor` of shape `(2, n, C, h, w)`): Of the drawings, plain and mirrored.
        states (`torch.Tensor` of shape `(n, L, D)`): Of their captions.
        general (`dict[int, torch.Tensor]`): Of their general captions, `(L, D)`, for those that have one.
        mapped (`list[torch.Tensor]`): What PEGS asks for where it should draw them, `(k, L, D)` each, k may be 0.
        art (`list[Drawing]`): The drawings.
        args ([`DenoiserArguments`]): Shares.

    """

    def __init__(
        self,
        latents: torch.Tensor,
        states: torch.Tensor,
        general: dict[int, torch.Tensor],
        mapped: list[torch.Tensor],
        art: list[Drawing],
        args: DenoiserArguments,
    ) -> None:
        self.latents, self.states, self.general, self.mapped, self.args = latents, states, general, mapped, args
        self.pack = [i for i, drawing in enumerate(art) if drawing.sticker_id]
        self.others = [i for i, drawing in enumerate(art) if not drawing.sticker_id]

    def __len__(self) -> int:
        return self.args.max_steps * self.args.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.args.seed, index))
        among = self.pack if rng.random() < self.args.pack_part else self.others
        i = among[rng.integers(len(among))]
        states, args = self.states[i], self.args
        draw, mapped_from, general_from = rng.random(), args.drop_part, args.drop_part + args.mapped_part
        if draw < mapped_from:
            states = torch.zeros_like(states)
        elif draw < general_from and len(self.mapped[i]):
            states = self.mapped[i][rng.integers(len(self.mapped[i]))].float()
        elif general_from <= draw < general_from + args.general_part and i in self.general:
            states = self.general[i]
        return {"latents": self.latents[rng.integers(2), i], "states": states}


@torch.no_grad()
def mapped_conditions(pegs: str, captions: list[str], openers: bool) -> list[torch.Tensor]:
    """What PEGS' feature mapper gives in all places where it should draw each caption, float16 `(k, L, D)` a caption."""
    model, processor = load_checkpoint(pegs, "pegs")
    cache = Path(pegs) / "state" / "hidden.safetensors"  # left there by the stage that trained the mapper
    drawn = gather_drawn(model, processor, cached_pack(), cache, openers)
    embeds = torch.cat([model.feature_mapper(chunk).half() for chunk in drawn.hidden.split(256)])
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(drawn.captions):
        rows.setdefault(caption, []).append(row)
    return [embeds[rows.get(caption, [])] for caption in captions]


def decoder_dataset(args: DenoiserArguments, vae: AutoencoderKL) -> ConditionedLatents:
    """The training art of the denoiser as latents of `vae`, with its conditions."""
    art = [drawing for drawing in load_art(cached_pack(), vae.config.sample_size) if drawing.caption]
    mirrored = [replace(drawing, pixels=np.ascontiguousarray(drawing.pixels[:, ::-1])) for drawing in art]
    latents = torch.stack([encode_art(vae, art), encode_art(vae, mirrored)]) * vae.config.scaling_factor
    captions = [drawing.caption or "" for drawing in art]
    mapped = mapped_conditions(args.pegs, captions, args.openers)
    prompt_length = mapped[0].shape[1]
    general = {
        i: kind for i, drawing in enumerate(art) if drawing.sticker_id and (kind := general_caption(captions[i]))
    }
    general_states = dict(zip(general, encode_captions(list(general.values()), prompt_length), strict=True))
    return ConditionedLatents(latents, encode_captions(captions, prompt_length), general_states, mapped, art, args)


def train_unet(args: DecoderUnetArguments) -> None:
    """Train the denoiser (v-prediction) on captioned art and save a whole `StickerPipeline` folder."""
    torch.manual_seed(args.seed)  # noqa: TID251  entry point
    with reading(f"vae {args.vae}"):
        vae = AutoencoderKL.from_pretrained(args.vae)
    dataset = decoder_dataset(args, vae)
    channels, size = vae.config.latent_channels, dataset.latents.shape[-1]
    with reading("unet"):
        unet = UNet2DConditionModel(sample_size=size, in_channels=channels, out_channels=channels, **args.unet)
    unet.set_attn_processor(AttnProcessor())  # on a CPU the backward pass of the fused kernel costs a fifth of a step
    if args.init_from:
        take_over(unet, args.init_from)
    average = EMAModel(unet.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
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
        error = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))
        snr_plus_1 = 1 / (1 - scheduler.alphas_cumprod.to(clean.device)[timesteps])
        return (error * (args.snr_gamma + 1) / snr_plus_1.clamp(min=args.snr_gamma + 1)).mean()

    unet = train_loop(args, unet, dataset, loss_fn, [average])
    average.copy_to(unet.parameters())
    pipeline = StickerPipeline(
        vae,
        unet,
        scheduler,
        prompt_length=dataset.states.shape[1],
        force_zeros_for_empty_prompt=True,
        **args.defaults,
    )
    pipeline.save_pretrained(Path(args.output_dir) / "pipeline")


def take_over(model: torch.nn.Module, folder: str) -> None:
    """Copy the weights of the denoiser in `folder` that `model` has under the same name and in the same shape."""
    with reading(f"init_from {folder}"):
        other = UNet2DConditionModel.from_pretrained(folder)
    own = model.state_dict()
    fitting = {n: value for n, value in other.state_dict().items() if n in own and value.shape == own[n].shape}
    logger.info("%d of %d tensors taken over", len(fitting), len(own))
    model.load_state_dict(fitting, strict=False)
