"""Cards of models, pipelines, adapters and processors, from what their folders hold."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dataset_builders.cards import BOILERPLATE, somebodys_card
from hub_cards.cards import render_card
from hub_cards.licences import hub_licence


Kind = Literal["dataset", "pack", "space", "adapter", "model", "pipeline", "processor"]
# The first file that is there tells the kind.
MARKS: dict[str, Kind] = {
    "dataset.yaml": "dataset",
    "pack.yaml": "pack",
    "app.py": "space",
    "adapter_config.json": "adapter",
    "config.json": "model",
    "model_index.json": "pipeline",
    "processor_config.json": "processor",
    "tokenizer_config.json": "processor",
}
LIBRARIES = {"model": "transformers", "processor": "transformers", "pipeline": "diffusers", "adapter": "peft"}
LICENCE = "apache-2.0"  # of weights of which nobody tells another
TASKS = {"model": "image-text-to-text", "pipeline": "text-to-image"}


class KindError(ValueError):
    """A folder that holds nothing that can be published."""


@dataclass(frozen=True)
class CardOptions:
    """
    What a checkpoint's folder cannot tell; where it is not given, the card that we made earlier tells it.

    Args:
        licence (`str`, *optional*): Licence of the weights; `"apache-2.0"` if no card tells another.
        config (`Path`, *optional*): The training stage's YAML.
        metrics (`Path`, *optional*): JSON with figures; `figures.json` of the folder if not given.
        data (`tuple[str, ...]`, *optional*): Hub ids of the datasets it was trained on.

    """

    licence: str = ""
    config: Path | None = None
    metrics: Path | None = None
    data: tuple[str, ...] = ()


def kind_of(folder: Path) -> Kind:
    """
    What is in a folder.

    Raises:
        KindError: If it is nothing that can be published.

    """
    for name, kind in MARKS.items():
        if (folder / name).is_file():
            return kind
    raise KindError(f"{folder}: expected one of {', '.join(MARKS)}.")


def own_card(folder: Path) -> ModelCard | None:
    """
    The card of a folder, `None` if there is none or only a library's boilerplate.

    Raises:
        ValueError: If its front matter is broken.

    """
    file = folder / "README.md"
    text = file.read_text("utf-8") if file.is_file() else BOILERPLATE
    try:
        return None if BOILERPLATE in text else ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None


def licence_of(folder: Path, options: CardOptions) -> str:
    """A folder's licence: what somebody's card says, else the options, else the card that we made."""
    card, somebodys = own_card(folder), somebodys_card(folder) is not None
    told = str((card.data.get("license_name") or card.data.get("license") or "") if card else "")
    return (told or options.licence or "not told") if somebodys else (options.licence or told or LICENCE)


def checkpoint_card(folder: Path, repo_id: str, options: CardOptions) -> str:
    """
    The card of a checkpoint, from its configuration, its training's state, its figures and its measured emissions.

    Args:
        folder (`Path`): The checkpoint.
        repo_id (`str`): Where it will be.
        options ([`CardOptions`]): What the folder cannot tell.

    Returns:
        `str`: Markdown with a YAML front matter.

    Raises:
        ValueError: If a JSON file is broken.

    """
    kind = kind_of(folder)
    config = _read_json(folder / "config.json")
    adapter = _read_json(folder / "adapter_config.json")
    base_model = (config.get("language_model") or {}).get("hub_id") or adapter.get("base_model_name_or_path")
    licence, earlier = licence_of(folder, options), own_card(folder)
    told = vars(earlier.data) if earlier else {}
    figures = {result.metric_type: result.metric_value for result in told.get("eval_results") or ()}
    metrics = dict(_flatten(_read_json(options.metrics or folder / "figures.json"))) or figures
    datasets = list(options.data or told.get("datasets") or ())
    stage = re.search(r"\n```yaml\n(.*?)\n```\n", earlier.content if earlier else "", re.DOTALL)
    emissions = _grams_of_carbon(folder / "emissions.csv")
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=hub_licence(licence),
        license_name=licence if hub_licence(licence) == "other" else None,
        language=["en"],
        library_name=LIBRARIES[kind],
        pipeline_tag=TASKS.get(kind),
        base_model=base_model,
        datasets=datasets or None,
        tags=["pegs", "stickers", "empathetic-dialogue"],
        model_name=name,
        eval_results=[
            EvalResult("text-generation", "stickerconv", "StickerConv", key, value) for key, value in metrics.items()
        ]
        or None,
    )
    if emissions:
        data["co2_eq_emissions"] = {"emissions": emissions, "source": "codecarbon"}
    return render_card(
        "checkpoint_card",
        front_matter=data.to_yaml(),
        name=name,
        repo_id=repo_id,
        kind=kind,
        has_decoder=(folder / "model_index.json").is_file(),
        has_processor=(folder / "processor_config.json").is_file(),
        parts={key: value for key, value in config.items() if isinstance(value, str | int | float) and key[0] != "_"},
        training=_training(folder),
        training_config=options.config.read_text("utf-8").strip() if options.config else stage[1] if stage else "",
        data=datasets,
        metrics=metrics,
        emissions=emissions,
        licence=licence,
    )


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object.")
    return values


def _flatten(values: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested figures, by their path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _training(folder: Path) -> dict[str, object]:
    """Steps, epochs and last losses of the furthest state that a `Trainer` left in a folder."""
    files = (file for file in folder.glob("**/trainer_state.json") if "trainer.before" not in file.parts)
    states = [_read_json(file) for file in files]  # of this run, not of the one that it has moved aside
    state = max(states, key=lambda state: state.get("global_step", 0), default={})
    found = {"steps": state.get("global_step"), "epochs": state.get("epoch")}
    for entry in state.get("log_history", ()):
        found |= {key: entry[key] for key in ("loss", "eval_loss", "train_runtime") if key in entry}
    return {key: value for key, value in found.items() if value is not None}


def _grams_of_carbon(file: Path) -> float:
    """What codecarbon's `emissions.csv` adds up to; its unit is kilograms."""
    if not file.is_file():
        return 0.0
    with file.open(encoding="utf-8") as stream:
        return round(1000 * sum(float(row["emissions"]) for row in csv.DictReader(stream)), 3)
