"""The command `pegs`: one function a verb, no logic."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pegs.cli_agents import generate, profiles_app
from pegs.cli_dataset import dataset_app
from pegs.cli_evaluate import evaluate_app
from pegs.cli_hub import card, push
from pegs.cli_stickers import DeviceOption, HostOption, JsonOption, RevisionOption, StickersOption, stickers_app
from pegs.errors import InputError
from pegs.quiet import quiet_libraries


app = typer.Typer(
    help="Chat that answers with words and stickers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(stickers_app, name="stickers")
app.add_typer(dataset_app, name="dataset")
app.add_typer(profiles_app, name="profiles")
app.add_typer(evaluate_app, name="evaluate")
app.command(
    epilog="Example: pegs generate --profiles profiles.jsonl --out runs/demo -n 100 --llm http://127.0.0.1:8000/v1 --model qwen3"
)(generate)
app.command(epilog="Example: pegs push checkpoints/pegs-mini ines/pegs-mini --tag v1")(push)
app.command(epilog="Example: pegs card outputs/mini/joint --id ines/pegs --config configs/mini/joint.yaml")(card)
errors = Console(stderr=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", help="Folder or Hub id of a PEGS checkpoint.", show_default="the embedded mini model")
]


def check_variant(variant: str) -> str:
    """`variant` if it is one.

    Raises:
        typer.BadParameter: If it is not.

    """
    if variant not in ("ret", "gen", "rag"):
        raise typer.BadParameter(f"must be ret, gen or rag, got {variant!r}.")
    return variant


VariantOption = Annotated[
    str,
    typer.Option(
        "--variant", help="ret: retrieved, gen: drawn, rag: drawn over a retrieved one.", callback=check_variant
    ),
]


RateOption = Annotated[
    float | None,
    typer.Option(
        "--sticker-rate",
        min=0.0,
        max=1.0,
        help="Share of replies with a sticker.",
        show_default="the rate of the model's training dialogues",
    ),
]


@app.command(epilog="Example: pegs respond messages.json --out reply --variant ret --json")
def respond(
    messages: Annotated[Path, typer.Argument(help="Dialogue in the multimodal chat format.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for response.json and sticker.png.")],
    model: ModelOption = "",
    revision: RevisionOption = None,
    variant: VariantOption = "ret",
    stickers: StickersOption = "openmoji",
    sticker_rate: RateOption = None,
    seed: Annotated[int, typer.Option(help="Same seed, same reply and sticker.")] = 0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Answer one dialogue and write the reply into a folder."""
    from pegs.messages import read_messages

    dialogue = read_messages(messages)
    started = time.perf_counter()
    from pegs.assemble import check_rate, load_pipeline
    from pegs.places import DEFAULT_MODEL
    from pegs.serving.respond import write_reply
    from pipelines.pipeline_pegs import TooLongError

    pipeline = load_pipeline(model or DEFAULT_MODEL, stickers, variant, device, revision)
    check_rate(pipeline.model, sticker_rate)
    load_seconds = time.perf_counter() - started
    try:
        reply = pipeline(dialogue, variant=variant, seed=seed, sticker_rate=sticker_rate)
    except TooLongError as error:
        raise InputError(f"{messages}: {error}") from error
    response = write_reply(reply, out, load_seconds)
    if as_json:
        typer.echo(json.dumps(response, ensure_ascii=False))
    else:
        typer.echo(response["text"])
        if response["sticker"]:
            typer.echo(f"[sticker] {out / response['sticker']}")


@app.command(epilog="Example: pegs chat --variant rag --port 7860")
def chat(
    terminal: Annotated[bool, typer.Option("--terminal", help="Chat in the terminal.")] = False,
    model: ModelOption = "",
    revision: RevisionOption = None,
    variant: VariantOption = "ret",
    stickers: StickersOption = "openmoji",
    sticker_rate: RateOption = None,
    device: DeviceOption = "cpu",
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
) -> None:
    """Chat in the browser, or in the terminal."""
    from pegs.assemble import check_rate, load_pipeline
    from pegs.places import DEFAULT_MODEL

    pipeline = load_pipeline(model or DEFAULT_MODEL, stickers, variant if terminal else None, device, revision)
    check_rate(pipeline.model, sticker_rate)
    if terminal:
        from pegs.serving.terminal import run_terminal

        run_terminal(pipeline, variant, sticker_rate)
    else:
        from pegs.serving.chat import serve_chat

        serve_chat(pipeline, variant, host, port, sticker_rate)


@app.command(epilog="Example: pegs serve --port 8000 --sticker-rate 0.4")
def serve(
    model: ModelOption = "",
    revision: RevisionOption = None,
    variant: VariantOption = "ret",
    stickers: StickersOption = "openmoji",
    sticker_rate: RateOption = None,
    device: DeviceOption = "cpu",
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve PEGS as an OpenAI-compatible API; with PEGS_API_KEY in the environment, requests must have it."""
    from pegs.assemble import check_rate, load_pipeline
    from pegs.places import DEFAULT_MODEL
    from pegs.serving.server import make_app
    from pegs.web import address_of, listen, serve_app

    listening = listen(host, port)
    pipeline = load_pipeline(model or DEFAULT_MODEL, stickers, None, device, revision)
    check_rate(pipeline.model, sticker_rate)
    if not pipeline.serves(variant):
        raise InputError(f"--variant {variant}: this model, or its decoder, does not serve it.")
    folder = Path(model or DEFAULT_MODEL)
    name = folder.resolve().name if folder.is_dir() else model
    typer.echo(f"{address_of(host, port)}/v1 answers as {name}", err=True)
    serve_app(make_app(pipeline, name, variant, sticker_rate, os.environ.get("PEGS_API_KEY", "")), listening)


def main() -> None:
    """Entry point: 0 when done, 2 on bad input with one line, 130 on Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING)
    quiet_libraries()
    try:
        app()
    except ValueError as error:
        if not isinstance(error, InputError):
            from dataset_builders.stickers.pack import PackError  # of a picture that is read late; slow to import

            if not isinstance(error, PackError):
                raise
        errors.print(f"pegs: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
