"""PEGS behind the OpenAI API: `POST /v1/chat/completions` answers with words and, beside them, a sticker."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from anyio import CapacityLimiter, to_thread
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import StoppingCriteriaList, TextStreamer

from modeling_pegs.processing_pegs import load_sticker
from pegs.messages import find_fault
from pegs.serving.caches import ConversationCaches
from pegs.web import read_body
from pipelines.pipeline_pegs import PegsPipeline, PegsReply, TooLongError


MOST_BYTES = 32 << 20  # of a request, pictures included
MOST_WAITING = 32  # requests that are answered or wait for it
MOST_MESSAGES, MOST_PICTURES = 256, 64  # that are read of a dialogue, the last ones
PICTURE_SIDE = 384  # pixels, more than a vision tower sees
LEAST_TEMPERATURE = 1e-2  # below, the likeliest tokens: scores divided by less overflow
REFUSED = ("tools", "functions", "stop", "logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "audio")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STREAM_SIGN = 15.0  # seconds without a word after which a stream shows that it lives
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

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """All it says and shows; no empty text."""
        said = [part for part in self.content or [] if isinstance(part, ImagePart) or part.text.strip()]
        return [*said, *(self.images or [])]


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool | None = None


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
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    n: Literal[1] | None = None
    variant: Literal["ret", "gen", "rag"] | None = None
    sticker_rate: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    exclude: list[str] | None = None
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

    @property
    def excluded(self) -> list[str]:
        """Ids of stickers not to send."""
        return [*(self.exclude or []), *(m.sticker.id for m in self.messages if m.sticker and m.sticker.id)]

    def dialogue(self) -> list[dict]:
        """
        The dialogue in the chat format, every picture loaded: messages of one side that follow each other are one, and an empty one of the assistant, a reply that failed or was
        stopped, is none. Of a long one only the end is read, as much as a model can.

        Raises:
            RefusedError: If it is none.

        """
        first = int(self.messages[0].role in ("system", "developer"))
        named = [(f"messages.{number}", message) for number, message in enumerate(self.messages)]
        if named[first:] and named[first][1].role == "assistant" and named[first][1].parts:
            raise RefusedError("must be 'user': a user begins", f"messages.{first}.role")
        turns: list[tuple[str, list[dict]]] = []
        for where, message in recent(named[first:]):
            if message.role not in ("user", "assistant"):
                raise RefusedError("only the first message may be the system's", f"{where}.role")
            if message.role == "assistant" and not (turns and message.parts):
                continue
            parts = read_parts(where, message)
            if turns and turns[-1][0] == message.role:
                turns[-1][1].extend(parts)
            else:
                turns.append((message.role, parts))
        if not turns or turns[-1][0] != "user":
            raise RefusedError("the last message must be a user's", "messages")
        system = [{"role": "system", "content": read_parts(*named[0])}] if first else []
        return [*system, *({"role": role, "content": parts} for role, parts in turns)]


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


class GoneError(Exception):
    """Nobody waits for the reply any more."""


def recent(messages: Sequence[tuple[str, Message]]) -> list[tuple[str, Message]]:
    """The last messages, at most `MOST_MESSAGES` with `MOST_PICTURES`; always the very last."""
    kept: list[tuple[str, Message]] = []
    pictures = 0
    for where, message in reversed(messages):
        pictures += sum(isinstance(part, ImagePart) for part in message.parts)
        if kept and (len(kept) == MOST_MESSAGES or pictures > MOST_PICTURES):
            break
        kept.append((where, message))
    return kept[::-1]


def read_parts(where: str, message: Message) -> list[dict]:
    """
    What a message says and shows, in the chat format.

    Raises:
        RefusedError: If that is nothing or too much, or has a picture that cannot be read.

    """
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    pictures = len(message.parts) - len(texts)
    if fault := find_fault(texts, has_picture=pictures > 0):
        raise RefusedError(fault, where)
    if pictures > MOST_PICTURES:
        raise RefusedError(f"has {pictures:,} pictures, more than {MOST_PICTURES}", where)
    if pictures and message.role in ("system", "developer"):
        raise RefusedError("a system message is of text", where)
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": read_picture(part.image_url.url, where)}
        for part in message.parts
    ]


def read_picture(url: str, where: str) -> Image.Image:
    """
    The picture in a `data:` address, made small; no other address is opened, so that nobody reaches this machine's network through it.

    Raises:
        RefusedError: If it is another address, or holds no picture.

    """
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RefusedError("expected data:image/...;base64,... (addresses are not fetched)", where)
    try:
        picture = load_sticker(base64.b64decode(data, validate=True))
    except ValueError as error:
        raise RefusedError(str(error), where) from None
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


class WordStreamer(TextStreamer):
    """A streamer that hands words on."""

    def __init__(self, tokenizer: Any, put: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hand_on = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand words on."""
        if text:
            self.hand_on(text)


@dataclass(frozen=True)
class Answer:
    """
    A reply as the API tells it.

    Args:
        text (`str`): What is said.
        fields (`dict[str, Any]`): What a message or a delta says of a sticker; nothing where there is none.
        usage (`dict[str, int]`): Tokens that were read and said.
        finish_reason (`str`): `"stop"`, or `"length"` where the text was cut.
        seed (`int`): Of text and drawing.

    """

    text: str
    fields: dict[str, Any]
    usage: dict[str, int]
    finish_reason: str
    seed: int

    @classmethod
    def of(cls, reply: PegsReply) -> "Answer":
        """That of a [`PegsReply`]."""
        usage = {"prompt_tokens": reply.tokens["prompt"], "completion_tokens": reply.tokens["text"]}
        usage["total_tokens"] = sum(usage.values())
        return cls(reply.text, sticker_fields(reply), usage, "length" if reply.was_cut else "stop", reply.seed)


def sticker_fields(reply: PegsReply) -> dict[str, Any]:
    """See [`Answer`]; `images` are as other servers give the pictures that a model makes."""
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
        self.reading, self.replying = CapacityLimiter(1), CapacityLimiter(1)

    def check(self, request: ChatRequest) -> dict[str, Any]:
        """
        The pipeline's arguments for a request.

        Raises:
            RefusedError: If a value cannot be served.

        """
        model = self.pipeline.model
        if request.stream and (model.generation_config.num_beams or 1) > 1:
            raise RefusedError("this model searches beams, which cannot be streamed", "stream")
        arguments: dict[str, Any] = {
            "messages": request.dialogue(),
            "variant": request.variant or self.variant,
            "sticker_rate": self.sticker_rate if request.sticker_rate is None else request.sticker_rate,
            "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
            "emotion": request.emotion,
            "exclude": request.excluded,
        }
        try:
            self.pipeline.check_inputs(arguments["variant"], emotion=request.emotion)
            model.get_sticker_bias(model.generation_config, request.sticker_rate, None, sampled=True)
        except ValueError as error:
            raise RefusedError(str(error)) from None
        most = request.max_completion_tokens or request.max_tokens
        if most is not None:
            arguments["max_new_tokens"] = min(most, model.config.text_config.max_position_embeddings // 2)
        if request.temperature is not None and request.temperature < LEAST_TEMPERATURE:
            arguments["do_sample"] = False
        elif request.temperature is not None:
            arguments |= {"do_sample": True, "temperature": request.temperature}
        if request.top_p is not None:
            arguments["top_p"] = request.top_p
        return arguments

    def answer(
        self, request: ChatRequest, arguments: dict[str, Any], streamer: WordStreamer | None, ended: threading.Event
    ) -> Answer:
        """
        Answer.

        Raises:
            RefusedError: If the last message is too long.
            GoneError: If `ended` is set: nobody waits any more.

        """
        if ended.is_set():
            raise GoneError

        def go_on(decoder: Any, step: int, timestep: Any, values: dict) -> dict:
            if ended.is_set():
                raise GoneError
            return {}

        said = [hashlib.sha256(message.model_dump_json().encode()).hexdigest() for message in request.messages]
        cache = self.caches.take(tuple(said[:-2]))
        stop = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), ended.is_set(), device=ids.device)])  # fmt: skip
        try:
            reply = self.pipeline(
                **arguments,
                past_key_values=cache,
                streamer=streamer,
                stopping_criteria=stop,
                callback_on_step_end=go_on,
            )
        except TooLongError as error:
            raise RefusedError(str(error), "messages", code="context_length_exceeded") from None
        self.caches.keep(tuple(said), cache)
        return Answer.of(reply)


class Coming:
    """
    An answer that is being made.

    Args:
        answers ([`Answers`]): Make it.
        request ([`ChatRequest`]): For a stream, or for the whole.

    Raises:
        RefusedError: If too many wait already.

    """

    def __init__(self, answers: Answers, request: ChatRequest) -> None:
        if answers.waiting >= MOST_WAITING:
            raise RefusedError(f"{MOST_WAITING} requests wait already", status=503)
        answers.waiting += 1
        self.answers, self.request, self.ended = answers, request, threading.Event()
        self.words: asyncio.Queue[str | None] = asyncio.Queue()
        self.making = asyncio.ensure_future(self._make())
        self.making.add_done_callback(self._finish)

    async def _make(self) -> Answer:
        loop, answers = asyncio.get_running_loop(), self.answers

        def put(text: str) -> None:
            loop.call_soon_threadsafe(self.words.put_nowait, text)

        arguments = await to_thread.run_sync(answers.check, self.request, limiter=answers.reading)
        streamer = WordStreamer(answers.pipeline.processor.tokenizer, put) if self.request.stream else None
        return await to_thread.run_sync(
            answers.answer, self.request, arguments, streamer, self.ended, limiter=answers.replying
        )

    def _finish(self, making: asyncio.Future) -> None:
        self.answers.waiting -= 1
        self.words.put_nowait(None)
        if not making.cancelled():
            making.exception()  # else one that nobody waits for is logged

    async def next(self, seconds: float) -> str | Answer | None:
        """
        More words, or behind the last ones the answer; `None` if nothing comes in so many seconds.

        Raises:
            RefusedError: If the request cannot be served.

        """
        try:
            async with asyncio.timeout(seconds):
                text = await self.words.get()
        except TimeoutError:
            return None
        return self.making.result() if text is None else text

    def close(self) -> None:
        """Nobody waits any more: what waits is not begun, what was begun stops."""
        self.ended.set()
        self.making.cancel()


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
        key (`str`, *optional*): Requests to `/v1` must have it as their bearer token.

    Returns:
        `Starlette`.

    """
    answers = Answers(pipeline, variant, sticker_rate)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "stickerconv"}

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(given.encode(), key.encode()):
            raise RefusedError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def check_name(asked: str) -> None:
        if asked != name:
            raise RefusedError(f"{asked!r} is not served; {name!r} is", "model", 404, "model_not_found")

    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        check_key(request)
        check_name(request.path_params["name"])
        return JSONResponse(model)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": answers.waiting, **pipeline.counts})

    async def complete(request: Request) -> Response:
        check_key(request)
        body = await read_body(request, MOST_BYTES)
        try:
            asked = await to_thread.run_sync(ChatRequest.model_validate_json, body, limiter=answers.reading)
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(first["msg"], ".".join(map(str, first["loc"])) or None) from None
        check_name(asked.model)
        coming = Coming(answers, asked)
        while (event := await coming.next(1)) is None:
            if await request.is_disconnected():
                coming.close()
                raise ClientDisconnect
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if asked.stream:  # what is refused was told by the status
            told = stream(head, event, coming)
            return StreamingResponse(told, headers=STREAM_HEADERS, media_type="text/event-stream")
        assert isinstance(event, Answer)
        message = {"role": "assistant", "content": event.text, **event.fields}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
        more = {"choices": [choice], "usage": event.usage, "seed": event.seed}
        return JSONResponse({**head, "object": "chat.completion", **more})

    async def stream(head: dict, event: str | Answer | None, coming: Coming) -> AsyncIterator[str]:
        def chunk(delta: dict, reason: str | None = None, **more: Any) -> str:
            choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
            told = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(told, ensure_ascii=False)}\n\n"

        options = coming.request.stream_options
        try:
            yield chunk({"role": "assistant", "content": ""})
            while not isinstance(event, Answer):
                yield chunk({"content": event}) if event else ": there is more to come\n\n"
                event = await coming.next(STREAM_SIGN)
            if event.fields:
                yield chunk(event.fields)
            yield chunk({}, event.finish_reason, seed=event.seed)
            if options and options.include_usage:
                yield chunk({}, choices=[], usage=event.usage)
        except Exception:
            logger.exception("a reply could not be finished")
            yield f"data: {json.dumps(RefusedError('the reply could not be finished', status=500).body())}\n\n"
        finally:
            coming.close()
        yield "data: [DONE]\n\n"

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 503 else None)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    async def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        told = str(error.detail) if isinstance(error, HTTPException) else "the reply could not be made"
        return JSONResponse(RefusedError(told, status=status).body(), status)

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
    ]
    handlers: dict[Any, Any] = {
        RefusedError: refused,
        ClientDisconnect: gone,
        HTTPException: failed,
        Exception: failed,
    }
    return Starlette(routes=routes, exception_handlers=handlers)
