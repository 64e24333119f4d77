"""The commands `pegs stickers`: one function a verb, no logic."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from pegs.errors import InputError


if TYPE_CHECKING:
    from dataset_builders.stickers.pack import StickerPack


stickers_app = typer.Typer(help="Sticker packs.", no_args_is_help=True)

DeviceOption = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, mps.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of the --model on the Hub.")
]
StickersOption = Annotated[str, typer.Option("--stickers", help="Sticker pack: a name, a folder or a Hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PackOption = Annotated[Path, typer.Option("--pack", help="Folder of the pack.")]
LlmModelOption = Annotated[str, typer.Option("--model", help="Its model.")]
ExtraBodyOption = Annotated[
    str, typer.Option("--extra-body", metavar="JSON", help="Object whose fields go into the body of every request.")
]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Requests at once.")]
BudgetOption = Annotated[float | None, typer.Option(help="Stop before the cost passes this; needs prices.")]
PriceInOption = Annotated[float, typer.Option(help="US dollars for a million prompt tokens.")]
PriceOutOption = Annotated[float, typer.Option(help="US dollars for a million answer tokens.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
LanguageOption = Annotated[Literal["en", "zh"], typer.Option(help="Language of the prompts and texts.")]


@contextmanager
def pack_errors() -> Iterator[None]:
    """Turn what is wrong with a pack, or with its pictures, and a package that is missing into one line."""
    from dataset_builders.stickers.pack import PackError

    try:
        yield
    except (FileNotFoundError, PackError) as error:
        raise InputError(str(error)) from error
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'stickerconv[chat,stickers]'.") from error


def open_pack(folder: Path) -> "StickerPack":
    """The pack in a folder.

    Raises:
        InputError: If there is none, or a broken one.

    """
    from dataset_builders.stickers.pack import StickerPack

    with pack_errors():
        return StickerPack.load(folder)


def check_folder(out: Path) -> None:
    """
    See, before any work is done, that `out` is a folder or can become one.

    Raises:
        InputError: If it, or a folder above it, is a file.

    """
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--out {out}: {there} is a file, not a folder.")


def report(result: dict, as_json: bool, shown: tuple[str, ...]) -> None:
    """Print a result; what failed is told line by line, and ends the command with 1: the same command tries it again."""
    failed = result.get("failed", {})
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        for name, reason in failed.items():
            typer.echo(f"failed {name}: {reason}", err=True)
        typer.echo(", ".join(f"{key.replace('_', ' ')}: {result[key]}" for key in shown))
    if failed:
        raise typer.Exit(1)


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

    check_folder(out)
    given = {"name": name, "licence": licence, "attribution": attribution}
    with pack_errors(), Console(stderr=True).status("building") as status:
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
        typer.echo(f"skipped {skipped.file}: {skipped.reason}", err=True)
    typer.echo(f"{result.stickers} stickers in {out} (licence {result.info.licence}; {result.info.attribution})")


@stickers_app.command(
    "filter",
    epilog="Example: pegs stickers filter --pack packs/cats --out packs/kept --llm http://127.0.0.1:8000/v1 --model llava",
)
def stickers_filter(
    pack: PackOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the smaller pack.")],
    llm: Annotated[str, typer.Option(help="Address of an OpenAI-compatible endpoint with image input.")],
    model: LlmModelOption,
    extra_body: ExtraBodyOption = "",
    concurrency: ConcurrencyOption = 16,
    budget_usd: BudgetOption = None,
    price_in: PriceInOption = 0.0,
    price_out: PriceOutOption = 0.0,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Keep the stickers that a vision-language model finds fit for casual chat, three times of five at least."""
    from agent_generation.engine import Prices
    from pegs.endpoint import Endpoint, parse_extra_body
    from pegs.sticker_tools import filter_pack

    check_folder(out)
    extra, prices = parse_extra_body(extra_body), Prices(price_in, price_out)
    endpoint = Endpoint(llm, model, concurrency, budget_usd, prices, language, extra)
    with pack_errors():
        result = filter_pack(open_pack(pack), endpoint, out)
    report(result, as_json, ("stickers", "refused", "ties", "unknown_answers"))


@stickers_app.command(
    "annotate",
    epilog="Example: OPENAI_API_KEY=... pegs stickers annotate --pack packs/cats --llm https://api.openai.com/v1 --model gpt-5-mini",
)
def stickers_annotate(
    pack: PackOption,
    llm: Annotated[
        str,
        typer.Option(
            help="Address of an OpenAI-compatible endpoint with image input; without it, the embedded model."
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="Its model; without --llm, a PEGS checkpoint.")] = "",
    extra_body: ExtraBodyOption = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the annotated pack.", show_default="the same")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also those that are annotated.")] = False,
    concurrency: ConcurrencyOption = 16,
    budget_usd: BudgetOption = None,
    price_in: PriceInOption = 0.0,
    price_out: PriceOutOption = 0.0,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Write emotion, description, feeling, recommendation and tags for the stickers that have none."""
    from agent_generation.engine import Prices
    from pegs.endpoint import Endpoint, parse_extra_body
    from pegs.sticker_tools import annotate_pack, annotate_pack_locally

    if llm and not model:
        raise InputError("--model is needed with --llm.")
    if extra_body and not llm:
        raise InputError("--extra-body needs --llm.")
    extra = parse_extra_body(extra_body)
    out = out or pack
    check_folder(out)
    with pack_errors():
        opened = open_pack(pack)
        if llm:
            endpoint = Endpoint(llm, model, concurrency, budget_usd, Prices(price_in, price_out), language, extra)
            result = annotate_pack(opened, endpoint, out, again)
        else:
            from pegs.places import DEFAULT_MODEL, load_pack

            result = annotate_pack_locally(opened, load_pack("openmoji"), model or str(DEFAULT_MODEL), out, again)
    report(result, as_json, ("annotated",))


@stickers_app.command("split", epilog="Example: pegs stickers split --pack packs/cats --databases 10")
def stickers_split(
    pack: PackOption,
    databases: Annotated[int, typer.Option(help="How many databases; the last fifth serves the test split.")],
    seed: Annotated[int, typer.Option(help="Seed of the deal.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Deal a pack into small databases with the same emotions each."""
    from dataset_builders.stickers.pack import write_databases
    from dataset_builders.stickers.split import split_databases

    stickers = open_pack(pack).stickers
    emotions = {sticker.id: sticker.emotion for sticker in stickers if sticker.emotion}
    if len(emotions) < len(stickers):
        raise InputError(f"{pack}: {len(stickers) - len(emotions)} stickers have no emotion; annotate the pack first.")
    if not 1 <= databases <= len(emotions):
        raise InputError(f"--databases {databases}: must be from 1 to {len(emotions)}, the pack's size.")
    write_databases(pack, split_databases(emotions, databases, seed))
    report({"pack": str(pack), "databases": databases, "stickers": len(emotions)}, as_json, ("stickers", "databases"))


@stickers_app.command(
    "search", epilog='Example: pegs stickers search "a gentle hug" --pack packs/cats --emotion sadness --prefer -k 5'
)
def stickers_search(
    query: Annotated[str, typer.Argument(help="What the sticker should say or show.")],
    pack: PackOption,
    emotion: Annotated[str, typer.Option(help="Only this emotion.")] = "",
    prefer: Annotated[bool, typer.Option("--prefer", help="Prefer --emotion instead of finding no other.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    encoder: Annotated[str, typer.Option(help="Sentence encoder: folder or Hub id.")] = "all-MiniLM-L6-v2",
    as_json: JsonOption = False,
) -> None:
    """Find stickers by what is said of them."""
    from dataset_builders.schema import EMOTIONS
    from dataset_builders.stickers.search import open_search
    from pegs.encoder import load_encoder

    if emotion and emotion not in EMOTIONS:
        raise InputError(f"--emotion {emotion}: must be one of {', '.join(EMOTIONS)}.")
    opened = open_pack(pack)
    hits = open_search(pack, opened, load_encoder(encoder)).by_text(
        query, k, emotion or None, "prefer" if prefer else "only"
    )
    found = [
        {
            "id": hit.id,
            "score": round(hit.score, 4),
            "matched": hit.matched,
            "emotion": opened.by_id[hit.id].emotion,
            "description": opened.by_id[hit.id].description,
        }
        for hit in hits
    ]
    if as_json:
        typer.echo(json.dumps({"query": query, "hits": found}, ensure_ascii=False))
        return
    for hit in found:
        typer.echo(
            f"{hit['score']:.2f}  {hit['id']}  {hit['emotion'] or '-'}  ({hit['matched']})  {hit['description']}"
        )


@stickers_app.command("export", epilog="Example: pegs stickers export --pack packs/cats --to whatsapp --out exported")
def stickers_export(
    pack: PackOption,
    to: Annotated[Literal["telegram", "whatsapp"], typer.Option(help="Messenger.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the archives.")],
    i_have_rights: Annotated[bool, typer.Option("--i-have-rights", help="I may pass these pictures on.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write archives that a messenger takes, with attribution."""
    from dataset_builders.stickers.export import LicenceError, export_telegram, export_whatsapp

    check_folder(out)
    export = export_telegram if to == "telegram" else export_whatsapp
    with pack_errors(), Console(stderr=True).status("encoding") as status:
        try:
            done = export(open_pack(pack), out, i_have_rights, lambda n: status.update(f"{n} stickers"))
        except LicenceError as error:
            raise InputError(f"{pack}: {error}; if you hold the rights, say --i-have-rights.") from error
    result = {"files": [str(file) for file in done.files], "stickers": done.stickers, "failed": dict(done.skipped)}
    report(result, as_json, ("stickers", "files"))


@stickers_app.command("publish", epilog="Example: pegs stickers publish ines/cats --pack packs/cats")
def stickers_publish(
    repo_id: Annotated[str, typer.Argument(help="Hub id: user/name.")],
    pack: PackOption,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    i_have_rights: Annotated[bool, typer.Option("--i-have-rights", help="I may pass these pictures on.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a pack as a dataset on the Hub, with its card."""
    from hub_cards.push import push_sticker_pack
    from pegs.cli_hub import hub_errors

    open_pack(pack)
    with hub_errors(pack, repo_id), Console(stderr=True).status("pushing"):
        url = push_sticker_pack(pack, repo_id, private, i_have_rights)
    report({"url": url}, as_json, ("url",))


@stickers_app.command(
    "show", epilog="Example: pegs stickers show --stickers openmoji --out sheet.png --emotion sadness"
)
def stickers_show(
    out: Annotated[Path, typer.Option("--out", help="PNG file to write.")],
    stickers: StickersOption = "openmoji",
    emotion: Annotated[str, typer.Option(help="Only this emotion.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Write a contact sheet of a pack."""
    from dataset_builders.stickers.sheet import contact_sheet
    from pegs.places import load_pack

    with pack_errors():
        pack = load_pack(stickers)
        chosen = [sticker for sticker in pack.stickers if emotion in ("", sticker.emotion)]
        if not chosen:
            raise InputError(f"--emotion {emotion}: the pack has no such stickers.")
        labels = [sticker.id for sticker in chosen]
        sheet = contact_sheet([pack.image(i) for i in labels], labels, footer=pack.info.attribution)
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: expected a PNG file in a folder that is there ({error}).") from error
    report({"stickers": len(labels), "out": str(out)}, as_json, ("stickers", "out"))
