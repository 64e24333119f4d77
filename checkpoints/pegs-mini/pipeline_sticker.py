"""StickerPipeline: prompt embeddings, and an init image if there is one, to a sticker."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .safety import check_images


@dataclass
class StickerPipelineOutput(BaseOutput):
    """
    Output of [`StickerPipeline`].

    Args:
        images (`list[PIL.Image.Image]` or `torch.Tensor`): Stickers; RGBA where the autoencoder has four channels.
        blocked (`list[str | None]`): Why the safety check blocked a sticker, `None` where it did not. A blocked sticker is still in `images`,
            for the caller to replace.

    """

    images: list[Image.Image] | torch.Tensor
    blocked: list[str | None]


class StickerPipeline(DiffusionPipeline):
    r"""
    Draw stickers from PEGS' prompt embeddings (StickerConv, section 4.2: image generation, and retrieval-augmented with `init_image`).

    Args:
        vae (`AutoencoderKL`): Autoencoder of RGB or RGBA pictures.
        unet (`UNet2DConditionModel`): Denoiser.
        scheduler (`SchedulerMixin`): Any scheduler of the Stable Diffusion family.
        text_encoder (`PreTrainedModel`, *optional*): Needed only for `prompt` and, unless the empty prompt is zeros, for guidance.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the text encoder.
        safety_checker (`StableDiffusionSafetyChecker`, *optional*): Used when present, with `feature_extractor`; else open_nsfw is, if installed.
        feature_extractor (`CLIPImageProcessor`, *optional*): Of the safety checker.
        prompt_length (`int`, *optional*, defaults to 77): Number L of prompt embeddings.
        force_zeros_for_empty_prompt (`bool`, *optional*, defaults to `False`): Whether the unconditional embeddings are zeros, and zeros follow
            the end of a prompt.

    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        vae,
        unet,
        scheduler,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        prompt_length: int = 77,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(prompt_length=prompt_length, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the components and this pipeline's own code, so that `DiffusionPipeline.from_pretrained` finds both."""
        super().save_pretrained(save_directory, **kwargs)
        folder, source = Path(save_directory), Path(__file__).parent
        for name in ("pipeline_sticker.py", "safety.py"):
            shutil.copyfile(source / name, folder / name)
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        index["_class_name"] = ["pipeline_sticker", "StickerPipeline"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """The saved configuration; asked by this very class, the code in the folder is not needed and so never run."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    def encode_prompt(self, prompt: str | list[str]) -> torch.Tensor:
        """
        Text encoder output of prompts.

        Args:
            prompt (`str` or `list[str]`): Captions.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.

        Raises:
            ValueError: If the pipeline has no text encoder.

        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "`prompt` needs a text encoder and a tokenizer, which this pipeline does not have; pass `prompt_embeds`."
            )
        inputs = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self.config.prompt_length, return_tensors="pt"
        ).to(self.text_encoder.device)
        if not self.config.force_zeros_for_empty_prompt:
            return self.text_encoder(inputs.input_ids).last_hidden_state
        states = self.text_encoder(**inputs).last_hidden_state
        return states * inputs.attention_mask.unsqueeze(-1)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        strength: float,
    ) -> None:
        """
        Check the arguments of a call.

        Raises:
            ValueError: If there is not exactly one of `prompt` and `prompt_embeds`, an embedding does not fit the UNet, or `strength` is not in
                (0, 1].

        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
        expected = (self.config.prompt_length, self.unet.config.cross_attention_dim)
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and tuple(embeds.shape[1:]) != expected:
                raise ValueError(
                    f"`{name}` must be of shape (B, {expected[0]}, {expected[1]}) for this decoder, got {tuple(embeds.shape)}."
                )
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be in (0, 1], got {strength}.")

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        init_image: Image.Image | list[Image.Image] | None,
        first_timestep: torch.Tensor,
    ) -> torch.Tensor:
        """
        Noise, or the init images' latents with the noise of `first_timestep` on them.

        Returns:
            `torch.Tensor` of shape `(B, latent_channels, h, w)`.

        """
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, size, size)
        noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        if init_image is None:
            return noise * self.scheduler.init_noise_sigma
        images = init_image if isinstance(init_image, list) else [init_image] * batch_size
        pixels = torch.cat([self.preprocess(image) for image in images]).to(self._execution_device, dtype)
        latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return self.scheduler.add_noise(latents, noise, first_timestep.repeat(batch_size))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Picture to an autoencoder input `(1, 3 or 4, H, W)` in `[-1, 1]`: colour on white, and alpha if the autoencoder takes it."""
        side = self.unet.config.sample_size * self.vae_scale_factor
        rgba = image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        array = torch.from_numpy(np.array(rgba, dtype=np.float32)) / 255
        color = array[..., :3] * array[..., 3:] + 1 - array[..., 3:]
        channels = color if self.vae.config.in_channels == 3 else torch.cat([color, array[..., 3:]], dim=-1)
        return (channels.permute(2, 0, 1) * 2 - 1).unsqueeze(0)

    def postprocess(self, pixels: torch.Tensor) -> list[Image.Image]:
        """Autoencoder output `(B, 3 or 4, H, W)` to pictures; with alpha, the white that the colour was laid on is taken off again."""
        if pixels.shape[1] == 3:
            return self.image_processor.postprocess(pixels, output_type="pil")
        array = ((pixels.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        color, alpha = array[..., :3], array[..., 3:]
        alpha = np.clip((alpha - 0.05) / 0.9, 0, 1)  # what is nearly clear or nearly solid was meant to be
        color = np.clip((color - 1 + alpha) / np.maximum(alpha, 1e-3), 0, 1)
        rgba = (np.concatenate([color, alpha], axis=-1) * 255).round().astype(np.uint8)
        return [Image.fromarray(picture, "RGBA") for picture in rgba]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        init_image: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["StickerPipeline", int, int, dict], dict] | None = None,
    ) -> StickerPipelineOutput | tuple:
        r"""
        Draw stickers.

        Args:
            prompt (`str` or `list[str]`, *optional*): Captions, instead of `prompt_embeds`.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): The condition, e.g. `sticker_prompt_embeds` of PEGS.
            negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): What to steer away from, defaults to the empty prompt.
            init_image (`PIL.Image.Image` or a list, *optional*): Sticker to start from (PEGS-RAG); one picture serves the whole batch.
            strength (`float`, *optional*, defaults to 0.6): Share of the steps drawn over `init_image`, in (0, 1].
            num_inference_steps (`int`, *optional*, defaults to 20): Denoising steps.
            guidance_scale (`float`, *optional*, defaults to 2.5): Classifier-free guidance; off at 1 and below.
            generator (`torch.Generator` or a list, *optional*): Source of the noise, one a sticker or one for all.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"` or `"pt"` (raw autoencoder output in `[-1, 1]`, not safety checked).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`StickerPipelineOutput`] or its fields as a tuple.
            callback_on_step_end (`Callable`, *optional*): `(pipeline, step, timestep, {"latents": ...}) -> dict` after each step.

        Returns:
            [`StickerPipelineOutput`] or `tuple`.

        Raises:
            ValueError: On arguments that do not fit; see [`StickerPipeline.check_inputs`].

        """
        self.check_inputs(prompt, prompt_embeds, negative_prompt_embeds, strength)
        device, dtype = self._execution_device, self.unet.dtype
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt)
        prompt_embeds = prompt_embeds.to(device, dtype)
        batch_size = len(prompt_embeds)
        do_guidance = guidance_scale > 1
        if do_guidance:
            if negative_prompt_embeds is None:
                if self.config.force_zeros_for_empty_prompt:
                    negative_prompt_embeds = torch.zeros_like(prompt_embeds[:1])
                else:
                    negative_prompt_embeds = self.encode_prompt("")
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype).expand_as(prompt_embeds)
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        if init_image is not None:
            timesteps = timesteps[len(timesteps) - max(1, round(len(timesteps) * strength)) :]
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(len(self.scheduler.timesteps) - len(timesteps))
        latents = self.prepare_latents(batch_size, dtype, generator, init_image, timesteps[:1])

        with self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                model_input = torch.cat([latents] * 2) if do_guidance else latents
                model_input = self.scheduler.scale_model_input(model_input, timestep)
                noise = self.unet(model_input, timestep, encoder_hidden_states=prompt_embeds).sample
                if do_guidance:
                    unconditional, conditional = noise.chunk(2)
                    noise = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(noise, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, step, timestep, {"latents": latents}).get("latents", latents)
                progress.update()

        pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        self.maybe_free_model_hooks()
        if output_type == "pt":
            images, blocked = pixels, [None] * batch_size
        else:
            images = self.postprocess(pixels)
            blocked = check_images(images, self.safety_checker, self.feature_extractor)
        if not return_dict:
            return images, blocked
        return StickerPipelineOutput(images=images, blocked=blocked)


__all__ = ["StickerPipeline", "StickerPipelineOutput"]
