"""The commands `pegs dataset`: one function a verb, no logic."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pegs.cli_hub import PrivateOption, RightsOption, TagOption, hub_errors
from pegs.cli_stickers import JsonOption, StickersOption, check_folder
from pegs.errors import InputError


dataset_app = typer.Typer(help="The StickerConv dataset.", no_args_is_help=True)
FolderArgument = Annotated[Path, typer.Argument(help="Folder of a built dataset.")]


@contextmanager
def told(label: str) -> Iterator[Callable[[int], object]]:
    """Show progress on a terminal, and turn what is wrong with the input into one line."""
    from dataset_builders.stickerconv.sessions import SessionError
    from dataset_builders.stickers.pack import PackError

    try:
        with Console(stderr=True).status(label) as status:
            yield lambda count: status.update(f"{label}: {count} sessions") if count % 100 == 0 else None
    except (SessionError, PackError, FileNotFoundError) as error:
        raise InputError(str(error)) from error
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'stickerconv[chat,dataset]'.") from error


@dataset_app.command(
    "build", epilog="Example: pegs dataset build runs/monday runs/tuesday --stickers packs/cats --out stickerconv"
)
def dataset_build(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR...",
            help="Run folders with a sessions.jsonl, files or folders of released StickerConv or MOD, or the word mini.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the dataset.")],
    stickers: StickersOption = "openmoji",
    images: Annotated[str, typer.Option(help="SER30K tree with the pictures of the released StickerConv.")] = "",
    licence: Annotated[str, typer.Option(help="Licence of the dialogues (SPDX).", show_default="the pack's")] = "",
    language: Annotated[str, typer.Option(help="Language of the dialogues (ISO 639).", show_default="en")] = "",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave rows that are wrong out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the dataset from sessions: parquet for sessions, turns and stickers, and a card. Every row is checked."""
    from dataset_builders.stickerconv.build import build_dataset

    check_folder(out)
    if stickers != "openmoji" and not Path(stickers).exists():
        from pegs.places import find_pack

        stickers = str(find_pack(stickers))
    with told("building") as on_row:
        info, bad = build_dataset(runs, out, stickers, images or None, licence, language, skip_bad, on_row)
    rows = {config: {split: size.rows for split, size in sizes.items()} for config, sizes in info.sizes.items()}
    if as_json:
        typer.echo(json.dumps({"dataset": str(out), "rows": rows, "left_out": bad}, ensure_ascii=False))
        return
    for line in bad:
        typer.echo(f"left out {line}", err=True)
    for config, splits in rows.items():
        typer.echo(f"{config}: {', '.join(f'{count} {split}' for split, count in splits.items())}")


@dataset_app.command("stats", epilog="Example: pegs dataset stats stickerconv --tokenizer lmsys/vicuna-7b-v1.5")
def dataset_stats(
    folder: FolderArgument,
    tokenizer: Annotated[
        str, typer.Option(help="Folder or Hub id, to count tokens by.", show_default="the embedded mini model")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Write statistics (Table 5, sticker rates, variety, duplicates, leaks), Figures 4 to 6 and the card into a dataset."""
    from dataset_builders.stickerconv.statistics import token_counter
    from hub_cards.dataset import STATISTICS_FILE, describe_dataset

    if not tokenizer:
        import modeling_pegs  # noqa: F401  tells transformers of the embedded model
        from pegs.places import DEFAULT_MODEL

        tokenizer = str(DEFAULT_MODEL)
    try:
        count_tokens = token_counter(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {tokenizer}: {str(error).splitlines()[0]}") from error
    with told("counting") as on_row:
        statistics = describe_dataset(folder, Path(tokenizer).name, count_tokens, on_row)
    if as_json:
        typer.echo(json.dumps(statistics, ensure_ascii=False))
        return
    for split, row in statistics["table_5"].items():
        typer.echo(f"{split}: {', '.join(f'{count:,} {what}'.replace('_', ' ') for what, count in row.items())}")
    typer.echo(f"the rest is in {folder / STATISTICS_FILE} and {folder / 'README.md'}")


@dataset_app.command("push", epilog="Example: pegs dataset push stickerconv ines/stickerconv --tag v1")
def dataset_push(
    folder: FolderArgument,
    repo_id: Annotated[str, typer.Argument(help="Hub id: user/name.")],
    private: PrivateOption = False,
    tag: TagOption = "",
    i_have_rights: RightsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a built dataset on the Hub, with its card; run it again to go on after a cut."""
    from dataset_builders.stickerconv.build import DatasetFolder
    from hub_cards.push import push_folder

    with hub_errors(folder, repo_id), told("pushing"):
        DatasetFolder.load(folder)
        url = push_folder(folder, repo_id, private, i_have_rights, tag)
    typer.echo(json.dumps({"url": url}) if as_json else f"url: {url}")
