"""The commands `pegs push` and `pegs card`: one function a verb, no logic."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from pegs.cli_stickers import JsonOption
from pegs.errors import InputError


PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
RightsOption = Annotated[bool, typer.Option("--i-have-rights", help="I may publish this.")]
TagOption = Annotated[str, typer.Option("--tag", help="Name for this version, to load it by as revision=.")]
LicenceOption = Annotated[
    str,
    typer.Option("--licence", help="Licence of the weights (SPDX).", show_default="the card's, else apache-2.0"),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, help="YAML of the training stage, for the card."),
]
MetricsOption = Annotated[
    Path | None,
    typer.Option(
        "--metrics",
        exists=True,
        dir_okay=False,
        help="JSON of figures for the card.",
        show_default="the folder's figures.json",
    ),
]
DataOption = Annotated[list[str] | None, typer.Option("--data", help="Hub id of a dataset it was trained on.")]


@contextmanager
def hub_errors(folder: Path, repo_id: str) -> Iterator[None]:
    """
    Turn what a Hub refuses, and what it failed at, into one line.

    Raises:
        InputError: If it is no use to try again.
        typer.Exit: With 1 if the same command may finish what was begun.

    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from dataset_builders.stickers.export import LicenceError

    try:
        yield
    except LicenceError as error:
        raise InputError(f"{folder}: {error}; if you hold the rights, say --i-have-rights.") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"{repo_id}: {str(error).splitlines()[0]}") from error
    except ModuleNotFoundError as error:  # of a dataset's figures
        raise InputError(f"{error.name} is not installed: pip install 'stickerconv[chat,dataset]'.") from error
    except ValueError as error:  # the folder, its files, or the repository's name
        raise InputError(str(error)) from error
    except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError else error  # the client wraps what an upload failed at
        if not isinstance(cause, HfHubHTTPError | httpx2.TransportError):
            raise
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 503
        if 400 <= status < 500 and status not in (408, 429):
            raise InputError(f"{repo_id}: {reason}") from error
        typer.echo(f"pegs: {repo_id}: {reason}; run the same command again to go on.", err=True)
        raise typer.Exit(1) from error
    except FileNotFoundError as error:
        raise InputError(str(error)) from error


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="Model, processor, pipeline, adapter, Space, dataset or pack.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="HUB_ID", help="user/name.")],
    private: PrivateOption = False,
    tag: TagOption = "",
    licence: LicenceOption = "",
    config: ConfigOption = None,
    metrics: MetricsOption = None,
    data: DataOption = None,
    i_have_rights: RightsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder on the Hub, with its card; run it again to go on after a cut."""
    from hub_cards.checkpoints import CardOptions
    from hub_cards.push import push_folder

    options = CardOptions(licence, config, metrics, tuple(data or ()))
    with hub_errors(folder, repo_id), Console(stderr=True).status("pushing"):
        url = push_folder(folder, repo_id, private, i_have_rights, tag, options)
    typer.echo(json.dumps({"url": url}) if as_json else f"url: {url}")


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What the card is for; with --space, where to write.")],
    repo_id: Annotated[str, typer.Option("--id", help="Hub id it will have.", show_default="the folder's name")] = "",
    licence: LicenceOption = "",
    config: ConfigOption = None,
    metrics: MetricsOption = None,
    data: DataOption = None,
    space: Annotated[str, typer.Option("--space", help="Write a Space that chats with this published model.")] = "",
    stickers: Annotated[str, typer.Option("--stickers", help="Its sticker pack: openmoji or a Hub id.")] = "openmoji",
    variant: Annotated[Literal["ret", "gen", "rag"], typer.Option("--variant", help="Its first variant.")] = "ret",
    as_json: JsonOption = False,
) -> None:
    """Write the card of a folder from its own numbers, or a whole Space."""
    from hub_cards.checkpoints import CardOptions
    from hub_cards.push import write_card
    from hub_cards.space import write_space

    with hub_errors(folder, repo_id):
        if space:
            write_space(folder, space, stickers, variant)
        else:
            write_card(folder, repo_id, CardOptions(licence, config, metrics, tuple(data or ())))
    file = str(folder / "README.md")
    typer.echo(json.dumps({"card": file}) if as_json else file)
