"""Chat in the terminal."""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from modeling_pegs.processing_pegs import StickerImageError, load_sticker
from pipelines.pipeline_pegs import PegsPipeline, TooLongError


HELP = "Type a message. /sticker FILE sends a picture with your next message, /clear starts over, /quit ends."


def run_terminal(pipeline: PegsPipeline, variant: str, sticker_rate: float | None = None) -> None:
    """
    Read messages from standard input until it ends or `/quit`; stickers are saved as PNG files, and their paths shown.

    Args:
        pipeline ([`PegsPipeline`]): Answers.
        variant (`str`): `"ret"`, `"gen"` or `"rag"`.
        sticker_rate (`float`, *optional*): Share of replies with a sticker, defaults to the model's.

    """
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="pegs-stickers-"))
    console.print(f"{HELP}\n{pipeline.pack.info.attribution}", style="dim")
    cache = pipeline.model.new_cache()
    messages: list[dict] = []
    sent: list[str] = []
    pending: list[dict] = []
    while True:
        try:
            line = console.input("[bold]you[/bold]  ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/clear":
            messages, sent, pending = [], [], []
        elif line.startswith("/sticker "):
            try:
                pending = [{"type": "image", "image": load_sticker(line.removeprefix("/sticker ").strip())}]
            except StickerImageError as error:
                console.print(str(error), style="red", markup=False)
        elif line:
            messages.append({"role": "user", "content": [{"type": "text", "text": line}, *pending]})
            try:
                reply = pipeline(
                    messages,
                    variant=variant,
                    seed=len(messages) - 1,
                    exclude=sent,
                    sticker_rate=sticker_rate,
                    past_key_values=cache,
                )
            except TooLongError as error:
                console.print(str(error), style="red", markup=False)
                messages.pop()
                continue
            pending = []
            content: list[dict] = [{"type": "text", "text": reply.text}]
            console.print("[bold]pegs[/bold]", escape(reply.text))
            if reply.sticker is not None:
                file = folder / f"sticker-{len(messages)}.png"
                reply.sticker.save(file)
                content.append({"type": "image", "image": reply.sticker})
                sent += [reply.sticker_id] if reply.sticker_id else []
                console.print(f"     {file}  {reply.why}", style="dim", markup=False)
            messages.append({"role": "assistant", "content": content})
