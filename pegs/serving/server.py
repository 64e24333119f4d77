"""PEGS behind the OpenAI API: `POST /v1/chat/completions` answers with words and, beside them, a sticker."""

import asyncio
import base64
import binascii
import hashlib
import io
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import StoppingCriteriaList, TextStreamer

from modeling_pegs.processing_pegs import StickerImageError, load_sticker
from pegs.errors import InputError
from pegs.messages import MAX_CHARACTERS
from pegs.serving.caches import ConversationCaches
from pegs.web import read_body, serve_app
from pipelines.pipeline_pegs import PegsPipeline, PegsReply, TooLongError


MOST_BYTES = 32 << 20  # of a request, pictures included
MOST_WAITING = 32  # requests that are answered or wait for it
REFUSED = ("tools", "functions", "stop", "logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "audio")
logger = logging.getLogger(__name__)


class ImageUrl(BaseModel):
    """Where a picture is."""

    url: str


class TextPart(BaseModel):
    """Words."""

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A picture, as a `data:` address."""

    type: Literal["image_url"]
    image_url: ImageUrl


def as_parts(content: Any) -> Any:
    """A text as the one part that it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class StickerNote(BaseModel):
    """Which sticker of the pack was sent."""

    id: str | None = None


class Message(BaseModel):
    """A message of the dialogue; one of the assistant may be the one that came with an earlier reply, `images` and `sticker` included."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part] | None, BeforeValidator(as_parts)] = None
    images: list[ImagePart] | None = None
    sticker: StickerNote | None = None


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool = False


class ChatRequest(BaseModel, extra="allow"):
    """
    The body of `POST /v1/chat/completions`.

    Args:
        model (`str`): The served name.
        messages (`list[Message]`): Maybe a system message, then `user` and `assistant` by turns, a `user` last.
        stream (`bool`): Whether words come as they are found, and the sticker behind them.
        stream_options ([`StreamOptions`], *optional*): With a stream.
        max_tokens, max_completion_tokens (`int`, *optional*): Longest text; the model's unless given, at most half of what it can read.
        temperature (`float`, *optional*): The model's unless given; 0 takes the likeliest tokens.
        top_p (`float`, *optional*): The model's unless given.
        seed (`int`, *optional*): Same seed, same reply and picture; drawn unless given.
        n (`int`): One reply.
        variant (`str`, *optional*): `"ret"`, `"gen"` or `"rag"`.
        sticker_rate (`float`, *optional*): Share of replies with a sticker.
        exclude (`list[str]`): Ids of stickers not to send, beside those of the dialogue.
        emotion (`str`, *optional*): Emotion to draw.

    """

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    n: Literal[1] | None = None
    variant: Literal["ret", "gen", "rag"] | None = None
    sticker_rate: float | None = Field(None, ge=0, le=1)
    exclude: list[str] = []
    emotion: str | None = None

    @model_validator(mode="after")
    def check_extra(self) -> "ChatRequest":
        """Refuse what would change the reply and is not done; all else that is unknown is let be, as other servers do."""
        extra = self.model_extra or {}
        asked = [name for name in REFUSED if extra.get(name)]
        if extra.get("response_format") not in (None, {"type": "text"}):
            asked.append("response_format")
        if asked:
            raise ValueError(f"`{asked[0]}` is not supported")
        return self

    def dialogue(self) -> list[dict]:
        """
        The dialogue in the chat format, every picture loaded.

        Raises:
            RefusedError: If it is none.

        """
        first = int(self.messages[0].role in ("system", "developer"))
        for number, message in enumerate(self.messages[first:], first):
            role = ("user", "assistant")[(number - first) % 2]
            if message.role != role:
                raise RefusedError(
                    f"must be {role!r} (a user begins, roles take turns), got {message.role!r}",
                    f"messages.{number}.role",
                )
        if self.messages[-1].role != "user":
            raise RefusedError("the last message must be a user's", "messages")
        return [read_message(message, f"messages.{number}") for number, message in enumerate(self.messages)]


class RefusedError(Exception):
    """
    A request that is not served.

    Args:
        message (`str`): Why.
        param (`str`, *optional*): The field.
        status (`int`): Of the answer.
        code (`str`, *optional*): As the OpenAI API names it.

    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(f"{param}: {message}" if param else message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """As the OpenAI API tells an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def read_message(message: Message, where: str) -> dict:
    """
    A message in the chat format.

    Raises:
        RefusedError: If it says nothing, too much, or has a picture that cannot be read.

    """
    given = message.content or []
    parts: list[dict] = []
    for number, part in enumerate([*given, *(message.images or [])]):
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
        elif message.role in ("system", "developer"):
            raise RefusedError("a system message is of text", where)
        else:
            field = f"content.{number}" if number < len(given) else f"images.{number - len(given)}"
            parts.append({"type": "image", "image": read_picture(part.image_url.url, f"{where}.{field}")})
    length = sum(len(part.get("text", "")) for part in parts)
    if length > MAX_CHARACTERS:
        raise RefusedError(f"has {length:,} characters, more than {MAX_CHARACTERS:,}", where)
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise RefusedError("is empty", where)
    return {"role": "system" if message.role == "developer" else message.role, "content": parts}


def read_picture(url: str, where: str) -> Any:
    """
    The picture in a `data:` address; no other address is opened, so that nobody reaches this machine's network through it.

    Raises:
        RefusedError: If it is another address, or holds no picture.

    """
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RefusedError("expected data:image/...;base64,... (addresses are not fetched)", where)
    try:
        return load_sticker(base64.b64decode(data, validate=True))
    except (binascii.Error, StickerImageError) as error:
        raise RefusedError(str(error), where) from None


class WordStreamer(TextStreamer):
    """A streamer that hands words on."""

    def __init__(self, tokenizer: Any, put: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hand_on = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand words on."""
        if text:
            self.hand_on(text)


def sticker_fields(reply: PegsReply) -> dict[str, Any]:
    """What a message or a delta says of a sticker; nothing where there is none."""
    if reply.sticker is None:
        return {}
    file = io.BytesIO()
    reply.sticker.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    sent = next((item for item in reply.retrieved if item.id == reply.sticker_id), None)
    return {
        "images": [{"type": "image_url", "index": 0, "image_url": {"url": url}}],
        "sticker": {
            "id": reply.sticker_id,
            "emotion": sent and sent.emotion,
            "variant": reply.variant,
            "why": reply.why,
            "blocked": reply.blocked,
        },
    }


def usage(reply: PegsReply) -> dict[str, int]:
    """Tokens that were read and said."""
    counted = {"prompt_tokens": reply.tokens["prompt"], "completion_tokens": reply.tokens["text"]}
    return {**counted, "total_tokens": sum(counted.values())}


class Answers:
    """
    Answers to requests, one reply at a time: the pipeline has one model.

    Args:
        pipeline ([`PegsPipeline`]): Answers.
        variant (`str`): Unless a request names another.
        sticker_rate (`float`, *optional*): Unless a request names another; the model's where `None`.

    """

    def __init__(self, pipeline: PegsPipeline, variant: str, sticker_rate: float | None) -> None:
        self.pipeline, self.variant, self.sticker_rate = pipeline, variant, sticker_rate
        self.caches = ConversationCaches(pipeline.model)
        self.waiting = 0

    def check(self, request: ChatRequest) -> dict[str, Any]:
        """
        The pipeline's arguments for a request.

        Raises:
            RefusedError: If a value cannot be served.

        """
        arguments: dict[str, Any] = {
            "messages": request.dialogue(),
            "variant": request.variant or self.variant,
            "sticker_rate": self.sticker_rate if request.sticker_rate is None else request.sticker_rate,
            "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
            "emotion": request.emotion,
            "exclude": [*request.exclude, *(m.sticker.id for m in request.messages if m.sticker and m.sticker.id)],
        }
        try:
            self.pipeline.check_inputs(arguments["variant"], emotion=request.emotion)
            model = self.pipeline.model
            model.get_sticker_bias(model.generation_config, request.sticker_rate, None, sampled=True)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        most = request.max_completion_tokens or request.max_tokens
        if most is not None:
            arguments["max_new_tokens"] = min(
                most, self.pipeline.model.config.text_config.max_position_embeddings // 2
            )
        if request.temperature == 0:
            arguments["do_sample"] = False
        elif request.temperature is not None:
            arguments |= {"do_sample": True, "temperature": request.temperature}
        if request.top_p is not None:
            arguments["top_p"] = request.top_p
        return arguments

    def reply(
        self, request: ChatRequest, arguments: dict[str, Any], streamer: Any, ended: threading.Event
    ) -> PegsReply:
        """Answer; where `ended` is set, nobody waits for it any more."""
        said = [hashlib.sha256(message.model_dump_json().encode()).hexdigest() for message in request.messages]
        cache = self.caches.take(tuple(said[:-2]))
        stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), ended.is_set(), device=ids.device)])  # fmt: skip
        reply = self.pipeline(**arguments, past_key_values=cache, streamer=streamer, stopping_criteria=stop)
        self.caches.keep(tuple(said), cache)
        return reply

    async def events(self, request: ChatRequest, ended: threading.Event) -> AsyncIterator[str | PegsReply]:
        """
        Words, if the request is for a stream, then the reply.

        Raises:
            RefusedError: If the request cannot be served, now or ever.

        """
        if self.waiting >= MOST_WAITING:
            raise RefusedError(f"{MOST_WAITING} requests wait already", status=503)
        arguments = await run_in_threadpool(self.check, request)
        loop, words = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def put(text: str) -> None:
            loop.call_soon_threadsafe(words.put_nowait, text)

        def finish(_: asyncio.Future) -> None:
            self.waiting -= 1
            words.put_nowait(None)

        streamer = WordStreamer(self.pipeline.processor.tokenizer, put) if request.stream else None
        self.waiting += 1
        answering = asyncio.ensure_future(run_in_threadpool(self.reply, request, arguments, streamer, ended))
        answering.add_done_callback(finish)
        try:
            while (text := await words.get()) is not None:
                yield text
            yield answering.result()
        except TooLongError as error:
            raise RefusedError(str(error), "messages", code="context_length_exceeded") from None
        finally:
            ended.set()


def make_app(
    pipeline: PegsPipeline, name: str, variant: str, sticker_rate: float | None = None, key: str = ""
) -> Starlette:
    """
    The API as an ASGI app: `/v1/chat/completions`, `/v1/models` and `/health`.

    Args:
        pipeline ([`PegsPipeline`]): Answers; it keeps nothing of a dialogue. What the model has read of the last few stays in memory for their next turn.
        name (`str`): Under which the model is served.
        variant (`str`): Unless a request names another.
        sticker_rate (`float`, *optional*): Unless a request names another, defaults to the model's.
        key (`str`, *optional*): Requests must have it as their bearer token.

    Returns:
        `Starlette`.

    """
    answers, started = Answers(pipeline, variant, sticker_rate), int(time.time())

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(given.encode(), key.encode()):
            raise RefusedError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def models(request: Request) -> Response:
        check_key(request)
        model = {"id": name, "object": "model", "created": started, "owned_by": "stickerconv"}
        return JSONResponse({"object": "list", "data": [model]})

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": answers.waiting, **pipeline.counts})

    async def complete(request: Request) -> Response:
        check_key(request)
        try:
            asked = ChatRequest.model_validate_json(await read_body(request, MOST_BYTES))
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(first["msg"], ".".join(map(str, first["loc"])) or None) from None
        if asked.model != name:
            raise RefusedError(f"{asked.model!r} is not served; {name!r} is", "model", 404, "model_not_found")
        ended = threading.Event()
        events = answers.events(asked, ended)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if asked.stream:
            first_event = await anext(events)  # what is refused is told by the status
            return StreamingResponse(stream(head, first_event, events, asked), media_type="text/event-stream")
        coming = asyncio.ensure_future(anext(events))
        while not (await asyncio.wait({coming}, timeout=1))[0]:
            if await request.is_disconnected():
                ended.set()
        reply = coming.result()
        assert isinstance(reply, PegsReply)
        message = {"role": "assistant", "content": reply.text, **sticker_fields(reply)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
        done = {**head, "object": "chat.completion", "choices": [choice], "usage": usage(reply), "seed": reply.seed}
        return JSONResponse(done)

    async def stream(
        head: dict, first: str | PegsReply, events: AsyncIterator[str | PegsReply], asked: ChatRequest
    ) -> AsyncIterator[str]:
        def chunk(delta: dict, reason: str | None = None, **more: Any) -> str:
            choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
            told = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"

        yield chunk({"role": "assistant", "content": ""})
        event: str | PegsReply | None = first
        try:
            while isinstance(event, str):
                yield chunk({"content": event})
                event = await anext(events, None)
            if isinstance(event, PegsReply):
                if fields := sticker_fields(event):
                    yield chunk(fields)
                yield chunk({}, finish_reason(event), seed=event.seed)
                if asked.stream_options and asked.stream_options.include_usage:
                    yield chunk({}, choices=[], usage=usage(event))
        except Exception:
            logger.exception("a reply could not be finished")
            yield f"data: {json.dumps(RefusedError('the reply could not be finished', status=500).body())}\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        yield "data: [DONE]\n\n"

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 503 else None)

    def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        told = str(error.detail) if isinstance(error, HTTPException) else "the reply could not be made"
        return JSONResponse(RefusedError(told, status=status).body(), status)

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    handlers: dict[Any, Any] = {RefusedError: refused, HTTPException: failed, Exception: failed}
    return Starlette(routes=routes, exception_handlers=handlers)


def finish_reason(reply: PegsReply) -> str:
    """As the OpenAI API names how a text ended."""
    return "length" if reply.was_cut else "stop"


def serve_api(pipeline: PegsPipeline, name: str, variant: str, host: str, port: int, sticker_rate: float | None, key: str) -> None:  # fmt: skip
    """
    Serve the API until interrupted.

    Raises:
        InputError: If the address is not to be had.

    """
    try:
        serve_app(make_app(pipeline, name, variant, sticker_rate, key), host, port)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}.") from None
