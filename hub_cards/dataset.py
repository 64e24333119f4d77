"""The card of a built dataset, with its statistics and figures."""

import json
from collections.abc import Callable
from pathlib import Path

from dataset_builders.cards import sign_card, somebodys_card
from dataset_builders.stickerconv.build import DatasetFolder, card_data
from dataset_builders.stickerconv.statistics import compute_statistics
from hub_cards.cards import render_card, size_category
from hub_cards.licences import licence_fields


STATISTICS_FILE = "statistics.json"


def describe_dataset(
    folder: Path,
    tokenizer: str = "",
    count_tokens: Callable[[list[str]], int] | None = None,
    on_row: Callable[[int], object] = lambda count: None,
) -> dict:
    """
    Write a built dataset's statistics, figures and card into its folder.

    Args:
        folder (`Path`): The dataset.
        tokenizer (`str`, *optional*): Name of what `count_tokens` counts by.
        count_tokens (`Callable`, *optional*): Number of tokens of some texts.
        on_row (`Callable`, *optional*): Called after every session with how many there are so far.

    Returns:
        `dict`: The statistics, as `statistics.json` holds them.

    Raises:
        SessionError: If `folder` is no built dataset.
        ModuleNotFoundError: If matplotlib or wordcloud is not installed.

    """
    from dataset_builders.stickerconv.figures import draw_figures  # needs matplotlib, which is an extra

    DatasetFolder.load(folder)
    statistics = compute_statistics(folder, count_tokens, on_row) | {"tokenizer": tokenizer}
    statistics["figures"] = draw_figures(statistics, folder / "assets")
    (folder / STATISTICS_FILE).write_text(json.dumps(statistics, ensure_ascii=False, indent=1) + "\n", "utf-8")
    write_dataset_card(folder)
    return statistics


def write_dataset_card(folder: Path, repo_id: str = "") -> None:
    """
    Write `README.md` from the dataset's numbers, which [`describe_dataset`] left there; one that somebody wrote stays.

    Args:
        folder (`Path`): The dataset.
        repo_id (`str`, *optional*): Where it will be; the folder's own name if not given.

    """
    if somebodys_card(folder) is not None:
        return
    info = DatasetFolder.load(folder)
    statistics = json.loads((folder / STATISTICS_FILE).read_text("utf-8"))
    data = card_data(info)
    fields = {
        "language": [info.language],
        "task_categories": ["text-generation", "image-text-to-text"],
        "tags": ["stickers", "stickerconv", "empathetic-dialogue", "emotion", "multimodal"],
        "size_categories": [size_category(statistics["all"]["sessions"])],
        **licence_fields(info.licences),
    }
    for key, value in fields.items():
        data[key] = value
    card = render_card(
        "dataset_card",
        front_matter=data.to_yaml(),
        info=info,
        repo_id=repo_id or info.name,
        rows={name: f"{sum(size.rows for size in sizes.values()):,}" for name, sizes in info.sizes.items()},
        **statistics,
    )
    (folder / "README.md").write_text(sign_card(card), "utf-8")
