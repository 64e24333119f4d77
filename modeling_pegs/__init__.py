"""PEGS as a transformers model; importing it registers the auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_pegs import PegsConfig
from .generation_pegs import PegsCache, PegsGenerateOutput, StickerStreamer
from .modeling_pegs import PegsModel, PegsOutput
from .processing_pegs import PegsProcessor


AutoConfig.register("pegs", PegsConfig, exist_ok=True)
AutoModel.register(PegsConfig, PegsModel, exist_ok=True)
AutoModelForImageTextToText.register(PegsConfig, PegsModel, exist_ok=True)
AutoProcessor.register(PegsConfig, PegsProcessor, exist_ok=True)

__all__ = [
    "PegsCache",
    "PegsConfig",
    "PegsGenerateOutput",
    "PegsModel",
    "PegsOutput",
    "PegsProcessor",
    "StickerStreamer",
]
