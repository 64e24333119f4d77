"""Chat in the browser."""

import gradio as gr
from PIL import Image, ImageOps

from modeling_pegs.processing_pegs import StickerImageError, load_sticker
from pegs.errors import InputError
from pegs.messages import MAX_CHARACTERS
from pegs.serving.caches import ConversationCaches
from pipelines.pipeline_pegs import PegsPipeline, PegsReply


VARIANTS = [("Retrieved", "ret"), ("Drawn", "gen"), ("Drawn over a retrieved one", "rag")]
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
#chat .image-container, #chat img { max-width: 170px !important; max-height: 170px !important; }
#chat .image-frame, #chat .block { background: none !important; border: none !important; box-shadow: none !important; }
#chat .icon-button-wrapper { display: none !important; }
#attribution { opacity: .7; }
#attribution p { font-size: .8rem; }
"""
SHOWN = 200  # of a shelf of the pack
EXAMPLES = [
    "my dog died yesterday",
    "i got the job!!",
    "there is a spider above my bed",
    "my flatmate ate my birthday cake. all of it",
]


def build_chat(pipeline: PegsPipeline, variant: str, sticker_rate: float | None = None) -> gr.Blocks:
    """
    The chat page: text, an uploaded picture or a sticker picked from the pack, variant switch, how often a sticker comes, seed, undo, clear.

    A conversation lives in its browser session alone; the pipeline keeps nothing of it. What the model has read of the last few stays in memory until it is cleared or its
    page closed, so that it is not read again at each turn. Pictures lie in gradio's folder for temporary files until the chat has not shown them for an hour, or ends.

    Args:
        pipeline ([`PegsPipeline`]): Answers.
        variant (`str`): Which variant is chosen at first.
        sticker_rate (`float`, *optional*): Share of replies with a sticker at first, defaults to the model's. A model that was not calibrated for rates, or sends
            as many as it has learned, has no slider for it.

    Returns:
        `gr.Blocks`: Ready to `launch`.

    """
    pack = pipeline.pack
    shelves: dict[str, list[str]] = {}
    for sticker in pack.stickers:
        shelves.setdefault(sticker.emotion or sticker.theme or "stickers", []).append(sticker.id)
    settings = pipeline.model.generation_config
    usual = getattr(settings, "sticker_rate", None) if sticker_rate is None else sticker_rate
    has_slider = getattr(settings, "sticker_logit_quantiles", None) is not None and isinstance(usual, int | float)
    choices = [(label, name) for label, name in VARIANTS if pipeline.serves(name)]
    caches = ConversationCaches(pipeline.model)

    def send(
        text: str,
        upload: str | None,
        picked: str | None,
        history: list[dict],
        kind: str,
        rate: float,
        seed: float,
        shown: list[dict],
        request: gr.Request,
    ):
        """Show the user's message at once, then the reply; an error leaves the conversation, and what was to be sent, as it was."""
        before = [shown, shown, history, text, upload, picked]
        text = (text or "").strip()
        picture = None
        if upload:
            try:
                picture = load_sticker(upload)
            except StickerImageError as error:
                raise gr.Error(str(error)) from None
        elif picked:
            picture = pack.image(picked)
        if not text and picture is None:
            raise gr.Error("Write something, or choose a sticker.")
        if len(text) > MAX_CHARACTERS:
            raise gr.Error(f"A message can have {MAX_CHARACTERS:,} characters; this one has {len(text):,}.")
        content = [{"type": "text", "text": text}] if text else []
        if picture is not None:
            content.append({"type": "image", "image": picture})
        messages = [*(entry["message"] for entry in history), {"role": "user", "content": content}]
        sent = [entry["sticker_id"] for entry in history if entry["sticker_id"]]
        shown = [*shown, *show_user(text, picture)]
        yield shown, shown, history, "", None, None
        session = request.session_hash
        cache = caches.take(session)
        try:
            reply = pipeline(
                messages,
                variant=kind,
                seed=int(seed or 0) + len(messages) - 1,
                exclude=sent,
                sticker_rate=rate if has_slider else sticker_rate,
                past_key_values=cache,
            )
        except Exception as error:  # whatever it was, the conversation goes on
            yield before
            raise gr.Error(str(error)) from error
        caches.keep(session, cache)
        answer = [{"type": "text", "text": reply.text}]
        if reply.sticker is not None:
            answer.append({"type": "image", "image": reply.sticker})
        history = [
            *history,
            {"message": messages[-1], "sticker_id": None},
            {"message": {"role": "assistant", "content": answer}, "sticker_id": reply.sticker_id},
        ]
        shown = [*shown, *show_reply(reply)]
        yield (
            shown,
            shown,
            history,
            gr.skip(),
            gr.skip(),
            gr.skip(),
        )  # the next message may be half typed

    def show_picture(picture: Image.Image) -> gr.Image:
        """A sticker as the chat shows it."""
        return gr.Image(picture, width=170, height=170, format="png", show_label=False, container=False, buttons=[])

    def show_user(text: str, picture) -> list[dict]:
        """The user's message as the chat shows it."""
        parts = [{"role": "user", "content": text}] if text else []
        return parts + ([{"role": "user", "content": show_picture(picture)}] if picture else [])

    def show_reply(reply: PegsReply) -> list[dict]:
        """A reply as the chat shows it; the reason for a sticker folds away under it."""
        parts = [{"role": "assistant", "content": reply.text}]
        if reply.sticker is not None:
            parts.append({"role": "assistant", "content": show_picture(reply.sticker)})
            parts.append(
                {
                    "role": "assistant",
                    "content": reply.why,
                    "metadata": {"title": "Why this sticker", "status": "done"},
                }
            )
        return parts

    def undo(history: list[dict], shown: list[dict]):
        """Take the last exchange back, or the message that still waits for its reply, and put its text into the box."""
        if not shown:
            return shown, shown, history, ""
        waits = shown[-1]["role"] == "user"
        last_user = max(i for i, item in enumerate(shown) if item["role"] == "user")
        while last_user and shown[last_user - 1]["role"] == "user":
            last_user -= 1
        text = shown[last_user]["content"]
        left = shown[:last_user]
        return left, left, history if waits else history[:-2], text if isinstance(text, str) else ""

    def forget(request: gr.Request) -> None:
        """Drop what the model has read of a conversation."""
        caches.forget(request.session_hash)

    def clear(request: gr.Request):
        """Start over."""
        forget(request)
        return [], [], [], "", None, None

    with gr.Blocks(title="PEGS: words and stickers", delete_cache=(600, 3600)) as page:
        history, shown = gr.State([]), gr.State([])  # what is shown is not read back from its files, which do not last
        picked = gr.State(None)
        gr.Markdown("## PEGS\nA companion that answers with words and, now and then, a sticker.")
        with gr.Row():
            with gr.Column(scale=3):
                chatbot = gr.Chatbot(
                    height=520, show_label=False, elem_id="chat", placeholder="Say something.", buttons=["copy"]
                )
                with gr.Row():
                    box = gr.Textbox(
                        show_label=False,
                        placeholder="Type a message and press Enter",
                        scale=8,
                        elem_id="box",
                        autofocus=True,
                    )
                    button = gr.Button("Send", variant="primary", scale=1, min_width=80)
                gr.Examples(EXAMPLES, box, label="Try")
                gr.Markdown(f"Stickers: {pack.info.attribution}", elem_id="attribution")
            with gr.Column(scale=1, min_width=280):
                kind = gr.Radio(choices, value=variant if pipeline.serves(variant) else choices[0][1], label="Sticker")
                rate = gr.Slider(
                    0, 1, value=usual if has_slider else 0, step=0.05, label="How often a sticker comes", visible=has_slider, elem_id="rate"
                )  # fmt: skip
                seed = gr.Number(0, label="Seed", precision=0)
                with gr.Row():
                    undo_button, clear_button = gr.Button("Undo"), gr.Button("Clear")
                upload = gr.Image(label="Send a picture", type="filepath", height=140, image_mode=None)
                with gr.Accordion("Send a sticker of the pack", open=False):
                    shelf = gr.Dropdown(
                        sorted(shelves), value="sadness" if "sadness" in shelves else min(shelves), show_label=False
                    )
                    gallery = gr.Gallery(
                        columns=4, height=260, show_label=False, allow_preview=False, elem_id="gallery"
                    )

        def thumbnails(name: str) -> list:
            """Small pictures of one shelf's stickers."""
            return [ImageOps.contain(pack.image(sticker_id), (96, 96)) for sticker_id in shelves.get(name, [])[:SHOWN]]

        def pick(name: str, event: gr.SelectData):
            """Remember the picked sticker and show it."""
            gr.Info("Picked. It goes out with your next message.")
            return shelves[name][event.index]

        page.load(thumbnails, shelf, gallery)
        page.unload(forget)
        shelf.change(thumbnails, shelf, gallery)
        gallery.select(pick, shelf, picked)
        inputs = [box, upload, picked, history, kind, rate, seed, shown]
        outputs = [chatbot, shown, history, box, upload, picked]
        # one event, so that only one message is under way
        sending = gr.on([box.submit, button.click], send, inputs, outputs)
        undo_button.click(undo, [history, shown], [chatbot, shown, history, box], cancels=[sending])
        clear_button.click(clear, None, outputs, cancels=[sending])
    return page


def serve_chat(pipeline: PegsPipeline, variant: str, host: str, port: int, sticker_rate: float | None = None) -> None:
    """
    Serve the chat page until interrupted; it is never shared publicly.

    Args:
        pipeline ([`PegsPipeline`]): Answers.
        variant (`str`): Which variant is chosen at first.
        host (`str`): Address to listen on.
        port (`int`): Port to listen on.
        sticker_rate (`float`, *optional*): Share of replies with a sticker at first.

    Raises:
        InputError: If the port is taken, or there is none of that number.

    """
    page = build_chat(pipeline, variant, sticker_rate)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            css=CSS,
            theme=gr.themes.Soft(),
            footer_links=[],
            ssr_mode=False,
            max_file_size="20mb",
        )
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: {error}") from None
