"""A random Stable Diffusion at tiny sizes, with a CLIP text encoder: as diffusers saves it, and as one file in the layout of the original code."""

import re
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.fixtures import tiny


LENGTH = 77


def make_tiny_text_encoder(width: int = 24) -> tuple[CLIPTextModel, CLIPTokenizer]:
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=LENGTH)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    return CLIPTextModel(config).eval(), tokenizer


def save_tiny_stable_diffusion(folder: Path) -> StableDiffusionPipeline:
    text_encoder, tokenizer = make_tiny_text_encoder()
    parts = tiny.make_tiny_decoder(channels=3)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        unet=parts.unet,
        scheduler=scheduler,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """The pipeline's weights under the names of the original Stable Diffusion code."""
    unet, vae = pipeline.unet, pipeline.vae
    state = {f"model.diffusion_model.{_unet_name(k, unet.config)}": v for k, v in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        name = _vae_name(key, len(vae.config.block_out_channels))
        is_linear = ".attn_1." in name and value.dim() == 2
        state[f"first_stage_model.{name}"] = value[..., None, None] if is_linear else value
    for key, value in pipeline.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.contiguous() for key, value in state.items()}, file)


def _unet_name(key: str, config) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs)
    kind, block, part, index, rest = re.fullmatch(
        r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    ).groups()
    number, layers = int(index), config.layers_per_block
    if part == "resnets":
        name, end = rest.rsplit(".", 1)
        rest = f"{RESNET[name]}.{end}"
    if kind == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * number}.{rest}"
    if kind == "down":
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{(layers + 1) * int(block) + number + 1}.{int(part == 'attentions')}.{rest}"
    first = (layers + 1) * int(block)
    if part == "upsamplers":
        place = 2 if "CrossAttn" in config.up_block_types[int(block)] else 1
        return f"output_blocks.{first + layers}.{place}.{rest}"
    return f"output_blocks.{first + number}.{int(part == 'attentions')}.{rest}"


def _vae_name(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        name, end = key.split("mid_block.attentions.0.")[1].rsplit(".", 1)
        return f"{key.split('.')[0]}.mid.attn_1.{VAE_ATTENTION[name]}.{end}"
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
