"""The commands `pegs stickers`: one function a verb, no logic."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pegs.errors import InputError


stickers_app = typer.Typer(help="Sticker packs.", no_args_is_help=True)

StickersOption = Annotated[str, typer.Option("--stickers", help="Sticker pack: a name or a folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@stickers_app.command(
    "build", epilog="Example: pegs stickers build my-cats.zip --out packs/cats --licence CC-BY-4.0 --attribution Ines"
)
def stickers_build(
    source: Annotated[
        str,
        typer.Argument(
            help="openmoji, openmoji-all, an SER30K tree, a messenger's export, or a folder or zip of pictures."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the pack.")],
    name: Annotated[str, typer.Option(help="Name of the pack.", show_default="the source's")] = "",
    licence: Annotated[str, typer.Option(help="Licence (SPDX).", show_default="the source's")] = "",
    attribution: Annotated[
        str, typer.Option(help="Line to show with its stickers.", show_default="the source's")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Build a sticker pack; files that cannot be stickers are listed with the reason."""
    from dataset_builders.stickers.build import build_from_source
    from dataset_builders.stickers.folder import SourceError
    from dataset_builders.stickers.images import BadImage

    given = {"name": name, "licence": licence, "attribution": attribution}
    with Console(stderr=True).status("building") as status:
        try:
            result = build_from_source(
                source,
                out,
                {key: value for key, value in given.items() if value},
                lambda n: status.update(f"{n} files"),
            )
        except (SourceError, BadImage) as error:
            raise InputError(f"{source}: {error}") from error
    summary = {"pack": str(out), "stickers": result.stickers, **result.info.model_dump()}
    summary["skipped"] = [{"file": skipped.file, "reason": skipped.reason} for skipped in result.skipped]
    if as_json:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    for skipped in result.skipped:
        typer.echo(f"skipped {skipped.file}: {skipped.reason}", file=sys.stderr)
    typer.echo(f"{result.stickers} stickers in {out} (licence {result.info.licence}; {result.info.attribution})")


@stickers_app.command(
    "show", epilog="Example: pegs stickers show --stickers openmoji --out sheet.png --emotion sadness"
)
def stickers_show(
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")],
    stickers: StickersOption = "openmoji",
    emotion: Annotated[str, typer.Option(help="Only this emotion.")] = "",
) -> None:
    """Write a contact sheet of a pack."""
    from dataset_builders.stickers.sheet import contact_sheet
    from pegs.assemble import load_pack

    pack = load_pack(stickers)
    chosen = [sticker for sticker in pack.stickers if emotion in ("", sticker.emotion)]
    if not chosen:
        raise InputError(f"--emotion {emotion}: the pack has no such stickers.")
    labels = [sticker.id for sticker in chosen]
    contact_sheet([pack.image(i) for i in labels], labels, footer=pack.info.attribution).save(out)
