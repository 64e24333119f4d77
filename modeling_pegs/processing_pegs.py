"""Processor of PEGS: dialogues with stickers to tensors."""

import io
import os
from http.client import HTTPException
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin


MAX_IMAGE_PIXELS = 64_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's decoders of others may start programs (EPS: Ghostscript)
PROCESSOR_ARGUMENTS = (
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "truncation",
    "max_length",
    "return_tensors",
    "add_special_tokens",
)


class StickerImageError(ValueError):
    """A sticker that cannot be read; the message names the file and what is wrong."""


def load_sticker(source: str | os.PathLike | bytes | Image.Image) -> Image.Image:
    """
    Read a sticker as the model sees it: first frame, upright, on white.

    Args:
        source (`str`, `os.PathLike`, `bytes` or `PIL.Image.Image`): A file, an encoded picture, or a picture.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        StickerImageError: If the file is missing, no PNG, JPEG, WebP or GIF, cut short, or larger than 64 megapixels.

    """
    name = "the picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        image = (
            source
            if isinstance(source, Image.Image)
            else Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        )
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise StickerImageError(f"{name}: {image.width}x{image.height} pixels are more than {MAX_IMAGE_PIXELS:,}.")
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise StickerImageError(f"{name}: no such file.") from None
    except UnidentifiedImageError:
        raise StickerImageError(f"{name}: not a readable image (expected PNG, JPEG, WebP or GIF).") from None
    except StickerImageError:
        raise
    except Exception as error:  # decoders raise anything at what is damaged
        raise StickerImageError(f"{name}: not a readable image ({error}).") from None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class PegsProcessor(ProcessorMixin):
    """
    Tokenizer and image processor of PEGS.

    `<IMG>` in a text stands for a perceived sticker and becomes `<Img>`, `num_query_tokens` placeholders and `</Img>`. The chat template
    writes a sticker of the user as `<IMG>`, one of the assistant as the span `[IMG1]` ... `[IMGr]` followed by `<IMG>`, so that the model
    also sees what it has sent.

    Args:
        image_processor: An image processor of transformers.
        tokenizer: A tokenizer that knows the added tokens.
        num_query_tokens (`int`, *optional*, defaults to 32): Placeholders a sticker takes.
        chat_template (`str`, *optional*): Jinja template.

    """

    def __init__(
        self, image_processor=None, tokenizer=None, num_query_tokens: int = 32, chat_template: str | None = None
    ) -> None:
        self.num_query_tokens = num_query_tokens
        self.image_token = "<IMG>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, text: str | list[str], images: list | None = None, **kwargs) -> BatchFeature:
        """
        Make model inputs.

        Truncation, on the tokenizer's `truncation_side`, leaves out a sticker or [IMG] span that would be cut, as a whole; stickers left out are
        not in `pixel_values` either.

        Args:
            text (`str` or `list[str]`): Texts with `<IMG>` where a sticker stands.
            images (`list`, *optional*): The stickers of all texts in order, files or pictures; or a list a text.
            kwargs: As for the tokenizer: `padding`, `padding_side`, `truncation`, `max_length`, `add_special_tokens`, `return_tensors`.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` of shape `(B, T)`, and `pixel_values` `(N, 3, height, width)` if there are stickers.

        Raises:
            ValueError: If the texts, or one of them, have not as many `<IMG>` as there are stickers for them.

        """
        texts = [text] if isinstance(text, str) else list(text)
        if images and all(isinstance(item, list | tuple) for item in images):
            wanted, given = [item.count(self.image_token) for item in texts], [len(item) for item in images]
            if wanted != given:
                raise ValueError(f"The texts have {wanted} {self.image_token}, but there are {given} stickers.")
        flat = [image for item in images or [] for image in (item if isinstance(item, list | tuple) else [item])]
        num_placeholders = sum(item.count(self.image_token) for item in texts)
        if num_placeholders != len(flat):
            raise ValueError(
                f"The texts have {num_placeholders} {self.image_token}, but there are {len(flat)} stickers."
            )
        expanded = f"<Img>{self.image_token * self.num_query_tokens}</Img>"
        return_tensors = kwargs.pop("return_tensors", None)
        padding = {key: kwargs.pop(key) for key in ("padding", "padding_side", "pad_to_multiple_of") if key in kwargs}
        max_length = kwargs.pop("max_length", None)
        truncation = kwargs.pop("truncation", False)
        sequences = self.tokenizer([item.replace(self.image_token, expanded) for item in texts], **kwargs)["input_ids"]
        if truncation and truncation != "do_not_truncate":
            sequences, flat = self._truncate(sequences, flat, max_length or self.tokenizer.model_max_length)
        data = dict(
            self.tokenizer.pad({"input_ids": sequences}, max_length=max_length, **{"padding": False, **padding})
        )
        if flat:
            pictures = [load_sticker(image) for image in flat]
            data["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def _truncate(self, sequences: list[list[int]], images: list, max_length: int) -> tuple[list[list[int]], list]:
        """Sequences of at most `max_length` ids, and the images that are still in them."""
        first = self.tokenizer.convert_tokens_to_ids("<Img>")
        openings = (first, first + 3)  # `<Img>` and `[IMG1]`; behind any other added token a sticker or span goes on
        left = self.tokenizer.truncation_side == "left"
        kept, kept_images, remaining = [], [], list(images)
        for ids in sequences:
            count = ids.count(first)
            own, remaining = remaining[:count], remaining[count:]
            if len(ids) > max_length:
                cut = len(ids) - max_length if left else max_length
                while cut < len(ids) and ids[cut] > first and ids[cut] not in openings:
                    cut += 1 if left else -1
                ids = ids[cut:] if left else ids[:cut]
                count = ids.count(first)
                own = own[len(own) - count :] if left else own[:count]
            kept.append(ids)
            kept_images += own
        return kept, kept_images

    def apply_chat_template(self, conversation: list, chat_template: str | None = None, **kwargs) -> Any:
        """
        Write dialogues as text, or with `tokenize=True` as model inputs.

        Args:
            conversation (`list`): A dialogue `[{"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image", "path": ...}]}, ...]`, or a
                list of them. A sticker is given as `path`, as `image` (a file name, an encoded picture, or a picture), or as `url`.
            chat_template (`str`, *optional*): Another template.
            kwargs: `add_generation_prompt`, `continue_final_message`, `tokenize`, `return_dict`, `return_tensors`, what `__call__` takes, also as a
                dictionary `processor_kwargs`, and variables of the template; `padding` is `True` and `padding_side` `"left"` unless given.

        Returns:
            `str`, `list[str]`, `BatchFeature`, or with `return_dict=False` its `input_ids`: As in transformers; a tokenized single dialogue is a batch of one.

        Raises:
            ValueError: If a sticker is given in no way, or cannot be read.

        """
        is_single = isinstance(conversation[0], dict)
        conversations = [conversation] if is_single else conversation
        is_tokenized, is_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", True)
        options = {"padding": True, "padding_side": "left"}
        options |= {name: kwargs.pop(name) for name in PROCESSOR_ARGUMENTS if name in kwargs}
        options |= kwargs.pop("processor_kwargs", None) or {}
        prompt = self.tokenizer.apply_chat_template(
            [_without_control_tokens(messages, self.tokenizer) for messages in conversations],
            chat_template=chat_template or self.chat_template,
            tokenize=False,
            **kwargs,
        )
        if not is_tokenized:
            return prompt[0] if is_single else prompt
        images = [
            _picture_of(part)
            for messages in conversations
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]
        inputs = self(prompt, images, **{"add_special_tokens": False, **options})
        return inputs if is_dict else inputs["input_ids"]


def _picture_of(part: dict) -> str | os.PathLike | bytes | Image.Image:
    """What an image part of a message gives its sticker as."""
    if isinstance(url := part.get("url"), str) and url.startswith(("http://", "https://")):
        try:
            with urlopen(Request(url, headers={"User-Agent": "pegs"}), timeout=10) as answer:
                return answer.read()
        except (OSError, HTTPException) as error:
            raise StickerImageError(f"{url}: cannot be fetched ({error}).") from error
    for key in ("path", "image", "url"):
        if part.get(key) is not None:
            return part[key]
    raise ValueError(f"An image part of a message needs `path`, `image` or `url`; got {sorted(part)}.")


def _without_control_tokens(messages: list[dict], tokenizer: Any) -> list[dict]:
    """Break up special tokens in what people write, so that a message cannot open a turn or claim a sticker."""

    def clean(text: str) -> str:
        for token in tokenizer.all_special_tokens:
            if len(token) > 1:
                text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
        return text

    cleaned = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{**part, "text": clean(part["text"])} if part["type"] == "text" else part for part in parts]
        cleaned.append({**message, "content": parts})
    return cleaned


PegsProcessor.register_for_auto_class()

__all__ = ["PegsProcessor", "StickerImageError", "load_sticker"]
