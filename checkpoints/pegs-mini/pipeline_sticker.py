"""StickerPipeline: prompt embeddings, and an init image if there is one, to a sticker."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, upload_folder
from PIL import Image, ImageOps

from .emotions import EmotionStates
from .finishing import cut_out, finish, to_image
from .safety import check_images


CODE = ("pipeline_sticker.py", "emotions.py", "finishing.py", "safety.py")
EMOTIONS_FOLDER = "emotions"
PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "lcm": LCMScheduler,
}


@dataclass
class StickerPipelineOutput(BaseOutput):
    """
    Output of [`StickerPipeline`].

    Args:
        images (`list[PIL.Image.Image]` or `torch.Tensor`): Stickers; RGBA where the autoencoder has four channels or the ground was cut out.
        blocked (`list[str | None]`): Why the safety check blocked a sticker, `None` where it did not. A blocked sticker is still in `images`,
            for the caller to replace.

    """

    images: list[Image.Image] | torch.Tensor
    blocked: list[str | None]


class StickerPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin, FromSingleFileMixin):
    r"""
    Draw stickers from PEGS' prompt embeddings (StickerConv, section 4.2: image generation, and retrieval-augmented with `init_image`).

    Any Stable Diffusion 1.x or 2.x checkpoint serves as decoder: a folder or Hub id by `from_pretrained`, one file by `from_single_file`. LoRA (`load_lora_weights`),
    offloading (`enable_model_cpu_offload`), attention slicing and the like are diffusers' own.

    On a CPU every sticker of a batch goes through the networks by itself, because there the last bits of a result depend on the size of the batch: so a
    batch equals its singles to the byte.

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
        default_num_inference_steps (`int`, *optional*, defaults to 20): Denoising steps of a call that does not say; few where the denoiser can do with few.
        default_guidance_scale (`float`, *optional*, defaults to 2.5): Guidance of a call that does not say; 1 is off.
        default_num_candidates (`int`, *optional*, defaults to 1): Drawings among which [`PegsPipeline`] chooses one unless told otherwise.
        default_condition (`str`, *optional*, defaults to `"generation"`): What [`PegsPipeline`] has drawn unless told otherwise.

    Raises:
        ValueError: If the text encoder's states do not fit the denoiser.

    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

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
        default_num_inference_steps: int = 20,
        default_guidance_scale: float = 2.5,
        default_num_candidates: int = 1,
        default_condition: str = "generation",
    ) -> None:
        super().__init__()
        if text_encoder is not None and text_encoder.config.hidden_size != unet.config.cross_attention_dim:
            raise ValueError(
                f"`text_encoder` gives states of size {text_encoder.config.hidden_size}, but `unet` takes states of size "
                f"{unet.config.cross_attention_dim} (`cross_attention_dim`)."
            )
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(
            prompt_length=prompt_length,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_num_candidates=default_num_candidates,
            default_condition=default_condition,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._emotion_states: EmotionStates | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the components, the emotion slider if there is one, and this pipeline's own code, so that `DiffusionPipeline.from_pretrained` finds all. What is pushed is the folder."""
        states = self._find_emotion_states()
        pushes = kwargs.pop("push_to_hub", False)  # the base class would upload before the rest is there
        push = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder, source = Path(save_directory), Path(__file__).parent
        for name in CODE:
            shutil.copyfile(source / name, folder / name)
        if states is not None:
            states.save_pretrained(folder / EMOTIONS_FOLDER)
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        index["_class_name"] = ["pipeline_sticker", "StickerPipeline"]
        index.pop("_name_or_path", None)  # a place on this machine
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        if pushes:
            token = push.pop("token", None)
            repo = create_repo(
                push.pop("repo_id", folder.name), exist_ok=True, private=push.pop("private", None), token=token
            ).repo_id
            upload_folder(repo_id=repo, folder_path=folder, token=token, **push)

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """The saved configuration; asked by this very class, the code in the folder is not needed and so never run."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    @property
    def emotion_states(self) -> EmotionStates:
        """
        What the emotion slider knows of captions; read from the pipeline's folder when first asked for. Set it to give a pipeline one.

        Raises:
            ValueError: If there is none.

        """
        states = self._find_emotion_states()
        if states is None:
            raise ValueError(
                "`emotion` with `prompt_embeds` needs `emotion_states`, which this pipeline does not have; see `EmotionStates.measure`."
            )
        return states

    @emotion_states.setter
    def emotion_states(self, states: EmotionStates) -> None:
        self._emotion_states = states

    def _find_emotion_states(self) -> EmotionStates | None:
        if self._emotion_states is None and self.name_or_path:
            place = {}
            snapshot = Path(self.unet.config.get("_name_or_path") or "").parent  # of a repository, when it is from one
            if snapshot.parent.name == "snapshots":
                place = {"revision": snapshot.name, "cache_dir": snapshot.parents[2]}
            try:
                self._emotion_states = EmotionStates.from_pretrained(
                    self.name_or_path, subfolder=EMOTIONS_FOLDER, **place
                )
            except OSError:
                return None
        return self._emotion_states

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance of the call that is going on, for its callback."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is going on, for its callback."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback wants the call that is going on to take no more steps."""
        return self._interrupt

    def set_scheduler(self, name: str) -> None:
        """
        Change the scheduler, keeping what the model was trained with (betas, prediction type).

        Args:
            name (`str`): `"ddim"`, `"dpm++"`, `"euler"` or `"lcm"`.

        Raises:
            ValueError: If the name is unknown.

        """
        if name not in SCHEDULERS:
            raise ValueError(f"`name` must be one of {', '.join(SCHEDULERS)}, got {name!r}.")
        self.scheduler = SCHEDULERS[name].from_config(self.scheduler.config)

    def encode_prompt(
        self, prompt: str | list[str], emotion: str | None = None, emotion_scale: float = 1.0
    ) -> torch.Tensor:
        """
        Text encoder output of prompts.

        Args:
            prompt (`str` or `list[str]`): Captions.
            emotion (`str`, *optional*): Emotion that is named after each caption.
            emotion_scale (`float`, *optional*, defaults to 1.0): 0 for neutral, more than 1 to exaggerate the emotion.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.

        Raises:
            ValueError: If the pipeline has no text encoder.

        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "`prompt` needs a text encoder and a tokenizer, which this pipeline does not have; pass `prompt_embeds`."
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if emotion is not None:
            neutral, named = (self.encode_prompt([f"{p}, {name}" for p in prompts]) for name in ("neutral", emotion))
            return torch.lerp(neutral, named, emotion_scale)
        inputs = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.config.prompt_length, return_tensors="pt"
        ).to(self._execution_device)
        if not self.config.force_zeros_for_empty_prompt:
            return self._each_alone(lambda ids: self.text_encoder(ids).last_hidden_state, inputs.input_ids)

        def encode(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return states * attention_mask.unsqueeze(-1)

        return self._each_alone(encode, inputs.input_ids, inputs.attention_mask)

    def _each_alone(self, function: Callable[..., torch.Tensor], *batches: torch.Tensor) -> torch.Tensor:
        """`function` of whole batches; on a CPU of one row at a time, see the class."""
        if batches[0].device.type != "cpu":  # the pipeline's own device is looked for among all modules
            return function(*batches)
        return torch.cat([function(*rows) for rows in zip(*(batch.split(1) for batch in batches), strict=True)])

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt: str | list[str] | None,
        negative_prompt_embeds: torch.Tensor | None,
        strength: float,
        generator: torch.Generator | list[torch.Generator] | None,
        num_images_per_prompt: int,
        callback_on_step_end_tensor_inputs: list[str],
        output_type: str,
    ) -> None:
        """
        Check the arguments of a call.

        Raises:
            ValueError: If there is not exactly one of `prompt` and `prompt_embeds`, or both of the negative ones, an embedding does not fit the UNet,
                `strength` is not in (0, 1], there are not as many generators as stickers, or a tensor or type is asked for that there is not.

        """
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "pt" or "latent", got {output_type!r}.')
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass exactly one of `prompt` and `prompt_embeds`.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass only one of `negative_prompt` and `negative_prompt_embeds`.")
        expected = (self.config.prompt_length, self.unet.config.cross_attention_dim)
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and tuple(embeds.shape[1:]) != expected:
                raise ValueError(
                    f"`{name}` must be of shape (B, {expected[0]}, {expected[1]}) for this decoder, got {tuple(embeds.shape)}."
                )
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be in (0, 1], got {strength}.")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(prompt_embeds if prompts is None else prompts) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(
                f"`generator` must be one or as many as there are stickers, {count}, got {len(generator)}."
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )

    def prepare_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> torch.Tensor:
        """
        Set the scheduler's timesteps and choose those to draw.

        Args:
            num_inference_steps (`int`): Steps from pure noise.
            strength (`float`): In (0, 1]. Most schedulers draw the last `strength` of their steps; LCM, with few of them, spreads all over the last part of
                its schedule.
            device (`torch.device`): Where to.

        Returns:
            `torch.Tensor` of shape `(steps,)`.

        """
        if "strength" in inspect.signature(self.scheduler.set_timesteps).parameters:
            schedule = self.scheduler.config.original_inference_steps
            steps = max(1, min(num_inference_steps, int(schedule * strength)))
            self.scheduler.set_timesteps(steps, device=device, strength=max(strength, 1 / schedule))
            return self.scheduler.timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if strength == 1:
            return self.scheduler.timesteps
        kept = max(1, round(num_inference_steps * strength))
        start = (num_inference_steps - kept) * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return self.scheduler.timesteps[start:]

    def encode_image(self, images: list[Image.Image]) -> torch.Tensor:
        """Latents `(len(images), C, h, w)` of pictures, scaled as the denoiser knows them."""
        pixels = torch.cat([self.preprocess(image) for image in images]).to(self._execution_device, self.vae.dtype)
        latents = self._each_alone(lambda rows: self.vae.encode(rows).latent_dist.mode(), pixels)
        return latents * self.vae.config.scaling_factor

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        generator: torch.Generator | list[torch.Generator] | None,
        init_image: Image.Image | list[Image.Image] | torch.Tensor | None,
        first_timestep: torch.Tensor,
        num_images_per_prompt: int = 1,
    ) -> torch.Tensor:
        """
        First latents: noise, or the init image with noise.

        Args:
            batch_size (`int`): Stickers B to draw.
            dtype (`torch.dtype`): Of the denoiser.
            generator (`torch.Generator` or a list): Source of the noise.
            init_image (`PIL.Image.Image`, a list, or latents): What to start from, if anything.
            first_timestep (`torch.Tensor` of shape `(1,)`): Where the drawing starts; the noise is made on its device.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Stickers to draw over each picture of a list.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`.

        Raises:
            ValueError: If there are not as many pictures as prompts.

        """
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, size, size)
        noise = randn_tensor(shape, generator=generator, device=first_timestep.device, dtype=dtype)
        if init_image is None:
            return noise * self.scheduler.init_noise_sigma
        latents = init_image
        if not isinstance(init_image, torch.Tensor):
            latents = self.encode_image(init_image if isinstance(init_image, list) else [init_image])
        repeats = batch_size if len(latents) == 1 else num_images_per_prompt
        if len(latents) * repeats != batch_size:
            raise ValueError(
                f"`init_image` must be one or as many as there are prompts, {batch_size // num_images_per_prompt}, got {len(latents)}."
            )
        latents = latents.to(noise).repeat_interleave(repeats, dim=0)
        return self.scheduler.add_noise(latents, noise, first_timestep.repeat(batch_size))

    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Denoiser's output `(B, C, h, w)`, with classifier-free guidance if there are `negative_prompt_embeds` and it is on."""
        if negative_prompt_embeds is None or self.guidance_scale <= 1:
            return self._each_alone(
                lambda x, c: self.unet(x, timestep, encoder_hidden_states=c).sample, latents, prompt_embeds
            )

        def guided(x: torch.Tensor, c: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            both = self.unet(torch.cat([x, x]), timestep, encoder_hidden_states=torch.cat([n, c])).sample
            unconditional, conditional = both.chunk(2)
            return unconditional + self.guidance_scale * (conditional - unconditional)

        return self._each_alone(guided, latents, prompt_embeds, negative_prompt_embeds)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Picture to an autoencoder input `(1, 3 or 4, H, W)` in `[-1, 1]`: colour on white, and alpha if the autoencoder takes it."""
        side = self.unet.config.sample_size * self.vae_scale_factor
        square = ImageOps.pad(image.convert("RGBA"), (side, side), Image.Resampling.LANCZOS, color=(0, 0, 0, 0))
        array = torch.from_numpy(np.array(square, dtype=np.float32)) / 255
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
        return [to_image(*picture) for picture in zip(color, alpha[..., 0], strict=True)]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        init_image: Image.Image | list[Image.Image] | torch.Tensor | None = None,
        strength: float = 0.6,
        emotion: str | None = None,
        emotion_scale: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        transparent: bool = False,
        size: int | None = None,
        outline: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["StickerPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StickerPipelineOutput | tuple:
        r"""
        Draw stickers.

        > Parameters that say what to draw

        Args:
            prompt (`str` or `list[str]`, *optional*): Captions, instead of `prompt_embeds`.
            prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): The condition, e.g. `sticker_prompt_embeds` of PEGS.
            negative_prompt (`str` or `list[str]`, *optional*): What to steer away from, defaults to the empty prompt.
            negative_prompt_embeds (`torch.Tensor` of shape `(B or 1, L, D)`, *optional*): The same as embeddings.
            init_image (`PIL.Image.Image`, a list, or a `torch.Tensor` of shape `(B or 1, C, h, w)`, *optional*): Sticker to start from (PEGS-RAG), or latents of
                [`StickerPipeline.encode_image`]; a single one serves the whole batch.
            strength (`float`, *optional*, defaults to 0.6): How far to go from `init_image`, in (0, 1].
            emotion (`str`, *optional*): Emotion to show instead of the one that the condition names.
            emotion_scale (`float`, *optional*, defaults to 1.0): 0 for neutral, more than 1 to exaggerate the emotion.

        > Parameters that say how

        Args:
            num_inference_steps (`int`, *optional*): Denoising steps, defaults to the saved `default_num_inference_steps`.
            guidance_scale (`float`, *optional*): Classifier-free guidance, off at 1 and below; defaults to the saved `default_guidance_scale`.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Stickers of each prompt, next to each other in the result.
            generator (`torch.Generator` or a list, *optional*): Source of the noise, one a sticker or one for all.
            transparent (`bool`, *optional*, defaults to `False`): Whether to cut out the white ground that decoders without alpha draw on.
            size (`int`, *optional*): Side of the sticker in pixels, defaults to the autoencoder's.
            outline (`float`, *optional*, defaults to 0.0): Width of a white rim as a share of the side.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, or `"pt"` (what the autoencoder gives, in `[0, 1]`) or `"latent"`, which are neither
                safety checked nor finished.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`StickerPipelineOutput`] or its fields as a tuple.
            callback_on_step_end (`Callable`, *optional*): `(pipeline, step, timestep, tensors) -> tensors` after each step; what it returns is gone on with. A
                [`~diffusers.callbacks.PipelineCallback`] says itself which tensors it wants; `pipeline._interrupt = True` leaves the other steps out.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`): Which tensors it gets: `latents`, `prompt_embeds`,
                `negative_prompt_embeds`.

        Returns:
            [`StickerPipelineOutput`] or `tuple`.

        Raises:
            ValueError: On arguments that do not fit; see [`StickerPipeline.check_inputs`].

        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt,
            prompt_embeds,
            negative_prompt,
            negative_prompt_embeds,
            strength,
            generator,
            num_images_per_prompt,
            callback_on_step_end_tensor_inputs,
            output_type,
        )
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        self._guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self._interrupt = False
        device = self._execution_device  # looked for once: it goes through all modules
        dtype = self.unet.dtype
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(prompt, emotion, emotion_scale)
        elif emotion is not None:
            prompt_embeds = self.shift_emotion(prompt_embeds, emotion, emotion_scale)
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        batch_size = len(prompt_embeds)
        if self.guidance_scale <= 1:
            negative_prompt_embeds = None
        else:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self.encode_negative(negative_prompt, prompt_embeds)
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            repeats = batch_size if len(negative_prompt_embeds) == 1 else num_images_per_prompt
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(repeats, dim=0)

        timesteps = self.prepare_timesteps(steps, 1.0 if init_image is None else strength, device)
        self._num_timesteps = len(timesteps)
        latents = self.prepare_latents(batch_size, dtype, generator, init_image, timesteps[:1], num_images_per_prompt)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        with self.progress_bar(total=len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                model_input = self.scheduler.scale_model_input(latents, timestep)
                noise = self.predict_noise(model_input, timestep, prompt_embeds, negative_prompt_embeds)
                latents = self.scheduler.step(noise, timestep, latents, **step_kwargs).prev_sample
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, step, timestep, asked)
                    latents, prompt_embeds, negative_prompt_embeds = (
                        tensors[name] for name in self._callback_tensor_inputs
                    )
                progress.update()

        blocked: list[str | None] = [None] * batch_size
        if output_type == "latent":
            images = latents
        else:
            images = self._each_alone(
                lambda rows: self.vae.decode(rows).sample, latents / self.vae.config.scaling_factor
            )
        if output_type == "pt":
            images = self.image_processor.denormalize(images)
        elif output_type == "pil":
            images = self.postprocess(images)
            blocked = check_images(images, self.safety_checker, self.feature_extractor)
            if transparent:
                images = [cut_out(image) if image.mode == "RGB" else image for image in images]
            images = [finish(image, size, outline) for image in images]
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, blocked
        return StickerPipelineOutput(images=images, blocked=blocked)

    def shift_emotion(self, prompt_embeds: torch.Tensor, emotion: str, emotion_scale: float) -> torch.Tensor:
        """
        Prompt embeddings `(B, L, D)` with another emotion; see [`EmotionStates.shift`].

        Raises:
            ValueError: If the emotion is unknown, the pipeline has no `emotion_states`, or its captions' ends cannot be found.

        """
        if not self.config.force_zeros_for_empty_prompt:
            raise ValueError(
                "`emotion` with `prompt_embeds` needs embeddings that are zero after a caption's end "
                "(`force_zeros_for_empty_prompt`); pass `prompt`."
            )
        return self.emotion_states.shift(prompt_embeds, emotion, emotion_scale)

    def encode_negative(self, negative_prompt: str | list[str] | None, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B or 1, L, D)` of what to steer away from; without a prompt those of the empty one."""
        if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
            return torch.zeros_like(prompt_embeds[:1])
        if self.text_encoder is None:
            raise ValueError(
                "Guidance away from a text needs a text encoder, which this pipeline does not have; pass `negative_prompt_embeds`, or `guidance_scale=1`."
            )
        return self.encode_prompt(negative_prompt or "")


__all__ = ["SCHEDULERS", "StickerPipeline", "StickerPipelineOutput"]
