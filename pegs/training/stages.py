"""The training stages by name, and how a configuration file and `--key value` pairs become a stage's arguments."""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pegs.errors import InputError


def _decoder_vae(values: dict[str, Any]) -> None:
    from pegs.training import decoder

    decoder.train_vae(build_arguments(decoder.DecoderVaeArguments, values))


def _decoder_unet(values: dict[str, Any]) -> None:
    from pegs.training import decoder

    decoder.train_unet(build_arguments(decoder.DecoderUnetArguments, values))


def _decoder_lcm(values: dict[str, Any]) -> None:
    from pegs.training import distill

    distill.train_lcm(build_arguments(distill.DecoderLcmArguments, values))


def _vision(values: dict[str, Any]) -> None:
    from pegs.training import vision

    vision.train_vision(build_arguments(vision.VisionArguments, values))


def _language(values: dict[str, Any]) -> None:
    from pegs.training import language

    language.train_language(build_arguments(language.LanguageArguments, values))


def _sft_generation(values: dict[str, Any]) -> None:
    if "data" in values:  # with the language model in every step, which lets the [IMG] rows learn too, as in the paper
        return _language(values)
    from pegs.training import generation

    generation.train_generation(build_arguments(generation.GenerationArguments, values))


def _align(values: dict[str, Any]) -> None:
    from pegs.training import align

    align.train_align(build_arguments(align.AlignArguments, values))


def _sft(values: dict[str, Any]) -> None:
    from pegs.training import sft

    sft.train_sft(build_arguments(sft.SftArguments, values))


STAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "decoder_vae": _decoder_vae,
    "decoder_unet": _decoder_unet,
    "decoder_lcm": _decoder_lcm,
    "vision": _vision,
    "pretrain_perception": _language,
    "pretrain_retrieval": _language,
    "pretrain_generation": _language,
    "sft_retrieval": _language,
    "sft_text": _language,
    "sft_generation": _sft_generation,
    "joint": _language,
    "joint_ret": _language,
    "joint_gen": _language,
    "joint_rag": _language,
    "align": _align,
    "sft_agents": _sft,
    "baseline_text": _sft,
    "baseline_tool": _sft,
}


class ConfigError(InputError):
    """A configuration that names what is wrong and where."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """
    A context in which something is read that a configuration names.

    Args:
        what (`str`): The key, and what it says.

    Raises:
        ConfigError: If that cannot be read, or is not as expected.

    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        plain = isinstance(error, OSError | ValueError | yaml.YAMLError)
        told = " ".join(str(error if plain else f"{type(error).__name__}: {error}").split())
        raise ConfigError(f"{what}: {told}") from error


def check_dtype(dtype: str, trainer: dict[str, Any]) -> None:
    """
    Check a frozen model's dtype against the arguments of the trainer.

    Raises:
        ValueError: If it is unknown, or half without mixed precision.

    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` must be float32 or bfloat16, got {dtype!r}.")
    if dtype == "bfloat16" and not trainer.get("bf16"):
        raise ValueError("`dtype: bfloat16` is for mixed precision: `trainer` needs `bf16: true`.")


def build_arguments(kind: type, values: dict[str, Any]) -> Any:
    """
    Build a stage's dataclass from plain values.

    Raises:
        ConfigError: On an unknown or missing key, or a value that is not of its type.

    """
    types = get_type_hints(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(types))}")
    for key, value in values.items():
        if types[key] is float and isinstance(value, int | str):
            values[key] = value = _number(key, value)
        if isinstance(types[key], type) and not isinstance(value, types[key]):
            raise ConfigError(f"{key} must be {types[key].__name__}, got {value!r}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"missing key {missing[0]!r}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _number(key: str, value: int | str) -> float:
    try:
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    except ValueError:
        raise ConfigError(f"{key} must be float, got {value!r}") from None


def load_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """
    Read a stage's YAML file and lay `--key value` pairs over it.

    Raises:
        ConfigError: If the file is missing or no mapping, or a pair is incomplete or no YAML.

    """
    if not Path(path).is_file():
        raise ConfigError("no such file")
    with reading("no YAML"):
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    if not isinstance(values, dict):
        values = {}
    if len(overrides) % 2 or any(not key.startswith("--") for key in overrides[::2]):
        raise ConfigError("overrides must be pairs `--key value`")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        with reading(f"{key} is no YAML"):
            values[key[2:]] = yaml.safe_load(value)
    if str(values.get("stage")) not in STAGES:
        raise ConfigError(f"needs `stage:`, one of {', '.join(STAGES)}")
    return values


def main(argv: list[str] | None = None) -> int:
    """Entry point of `train.py`: 0 when done, 2 on a bad configuration."""
    parser = argparse.ArgumentParser(
        description="Train a stage of PEGS.", epilog="Any key of the file can be given as --key value."
    )
    parser.add_argument("--config", required=True, help="configs/<scale>/<stage>.yaml")
    known, overrides = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    try:
        values = load_config(known.config, overrides)
        STAGES[values.pop("stage")](values)
    except InputError as error:
        print(f"train.py: {known.config}: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0
