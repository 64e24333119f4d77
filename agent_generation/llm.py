"""Requests to language models, and the models that answer them."""

import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

from httpx2 import URL, InvalidURL
from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    DefaultAioHttpClient,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
)
from pydantic import BaseModel, ConfigDict, ValidationError


GIVE_UP = 8  # requests that fail one after the other, each after its retries
UNSUPPORTED = ("unsupported_parameter", "unsupported_value")  # codes of a 400 that names a parameter
DISPENSABLE = ("max_tokens", "temperature", "reasoning_effort")  # parameters without which a request is sent again


class AnswerError(ValueError):
    """An answer that cannot be used (empty, cut off, malformed, refused); the message says which."""


class ModelError(RuntimeError):
    """An error that no later request would survive: wrong key, unknown model, nobody listening. It ends the run."""


class Form(BaseModel):
    """Base of the structured answers."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


@lru_cache(maxsize=256)
def schema_of(form: type[BaseModel]) -> dict:
    """JSON schema of a form; not to be changed."""
    return form.model_json_schema()


@lru_cache(maxsize=256)
def schema_length(form: type[BaseModel]) -> int:
    """Characters of a form's JSON schema."""
    return len(json.dumps(schema_of(form)))


@dataclass(frozen=True)
class Request:
    """
    One question to a model.

    Args:
        messages (`Sequence[dict]`): Chat messages in OpenAI's format; content may hold `image_url` parts with `data:` addresses.
        role (`str`): Who asks (`"user"`, `"system"`, `"manager"`, `"annotate"` ...); decides model, temperature and length.
        answer (`type[BaseModel]`, *optional*): Form of a structured answer; free text without it.

    """

    messages: Sequence[dict]
    role: str
    answer: type[BaseModel] | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that is asked."""
        form = schema_of(self.answer) if self.answer else None
        return hashlib.sha256(json.dumps([self.messages, self.role, form], sort_keys=True).encode()).hexdigest()

    def parse(self, text: str) -> Any:
        """
        The answer: text, or an instance of `answer`; a code fence or words around the JSON object are tolerated.

        Raises:
            AnswerError: If `text` is empty or not of that form.

        """
        text = text.strip()
        if not text:
            raise AnswerError("empty answer")
        if self.answer is None:
            return text
        found = re.search(r"\{.*\}", text, re.DOTALL)
        if not found:
            raise AnswerError("malformed answer: no JSON object")
        try:
            return self.answer.model_validate_json(found[0])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise AnswerError(f"malformed answer: {f'{where}: ' if where else ''}{first['msg']}") from error


@dataclass(frozen=True)
class Reply:
    """What a model sent back: text and what it cost in tokens; `complete` is `False` if it was cut off."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    complete: bool = True


class LLM(Protocol):
    """Anything that answers a [`Request`]."""

    async def ask(self, request: Request, seed: int) -> Reply:
        """
        Answer one request.

        Raises:
            AnswerError: If this request failed for good.
            ModelError: If every request would.

        """

    def most_tokens(self, role: str) -> int:
        """Longest answer to a role, in tokens."""

    async def close(self) -> None:
        """Let go of connections; the next question opens new ones."""


@dataclass(frozen=True)
class RoleSettings:
    """
    Model and sampling of a role (the reference implementation's values are in `ROLES`).

    Args:
        temperature (`float`, *optional*, defaults to 0.7): Of several, a request's seed draws one.
        max_tokens (`int`, *optional*, defaults to 150): Of an answer.
        model (`str`, *optional*): The endpoint's default if not given.

    """

    temperature: float | tuple[float, ...] = 0.7
    max_tokens: int = 150
    model: str | None = None

    def temperature_for(self, seed: int) -> float:
        """The temperature of a request with this seed."""
        if isinstance(self.temperature, tuple):
            return self.temperature[seed % len(self.temperature)]
        return self.temperature


ROLES: dict[str, RoleSettings] = {
    "user": RoleSettings(temperature=0.7),
    "system": RoleSettings(temperature=0.5),
    "stronger": RoleSettings(temperature=tuple(tenth / 10 for tenth in range(1, 11))),
    "manager": RoleSettings(temperature=0.0, max_tokens=200),
    "memory": RoleSettings(temperature=0.1, max_tokens=300),
    "profile": RoleSettings(temperature=0.7, max_tokens=500),
    "filter": RoleSettings(temperature=0.2, max_tokens=300),
    "annotate": RoleSettings(temperature=0.2, max_tokens=500),
    "knowledge": RoleSettings(temperature=0.5, max_tokens=300),
}


@dataclass
class OpenAILLM:
    """
    Any OpenAI-compatible endpoint: OpenAI, vLLM, SGLang, llama.cpp, Ollama, `transformers serve`.

    Connection errors, timeouts, 408, 409, 429 and 5xx are retried by the client with backoff and jitter, `Retry-After` heeded.

    Args:
        base_url (`str`): Address up to and with `/v1`.
        model (`str`): Model of every role that names none itself.
        roles (`Mapping[str, RoleSettings]`, *optional*): Settings by role.
        max_retries (`int`, *optional*, defaults to 6): Retries of one request.
        timeout (`float`, *optional*, defaults to 120.0): Seconds for one try.
        api_key (`str`, *optional*): Defaults to `OPENAI_API_KEY`, or to none for an endpoint that asks for none. Never logged or stored.
        extra_body (`Mapping[str, Any]`, *optional*): Fields for the body of every request, in place of ours.

    """

    base_url: str
    model: str
    roles: Mapping[str, RoleSettings] = field(default_factory=lambda: ROLES)
    max_retries: int = 6
    timeout: float = 120.0
    api_key: str | None = field(default=None, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    in_a_row: int = field(default=0, init=False)  # failures since the last answer
    refused: dict[str, set[str]] = field(default_factory=dict, init=False)  # parameters, by model

    @cached_property
    def client(self) -> AsyncOpenAI:
        """The client, with its connection pool."""
        key = self.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        try:
            url, headers = URL(self.base_url), {}
        except InvalidURL:  # it may quote a password
            raise ModelError(
                "the endpoint's address cannot be read: its port must be a number, and / in a password is written %2F."
            ) from None
        if url.userinfo:  # aiohttp takes one authorisation only
            headers["Authorization"] = f"Basic {b64encode(f'{url.username}:{url.password}'.encode()).decode()}"
        return AsyncOpenAI(
            base_url=url.copy_with(userinfo=b""),
            api_key=key,
            default_headers=headers,
            max_retries=self.max_retries,
            timeout=self.timeout,
            http_client=DefaultAioHttpClient(timeout=self.timeout),
        )

    @property
    def address(self) -> str:
        """`base_url` without a password or a key in it."""
        return re.sub(r"//.*@", "//", self.base_url.partition("?")[0])

    def most_tokens(self, role: str) -> int:
        """Longest answer to a role, in tokens."""
        given = [self.extra_body.get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((most for most in given if isinstance(most, int)), default=self.roles[role].max_tokens)

    async def ask(self, request: Request, seed: int) -> Reply:
        """Answer one request; see [`LLM`]."""
        try:
            reply = self.as_reply(await self._complete(request, seed), request)
        except (OpenAIError, ValueError, TypeError) as error:
            raise self.explain(error) from None
        self.in_a_row = 0
        return reply

    async def _complete(self, request: Request, seed: int) -> Any:
        """What the endpoint sends back, asked again without what it refuses."""
        while True:
            body = self.body(request, seed)
            try:
                # as `chat.completions.create` does, without its walks through body and answer: those are a fifth of the client's work
                return await self.client.post("/chat/completions", body=body, cast_to=object)
            except BadRequestError as error:
                if not self.learn(body, error.code, error.param):
                    raise

    def learn(self, body: Mapping[str, Any], code: object, parameter: object) -> bool:
        """Note that a model refuses a parameter of `body`; whether the request can be sent again without it."""
        ours = parameter in DISPENSABLE and parameter in body and parameter not in self.extra_body
        if known := ours and code in UNSUPPORTED:
            self.refused.setdefault(body["model"], set()).add(str(parameter))
        return known

    async def close(self) -> None:
        """Close the client, while the event loop that it belongs to still runs; see [`LLM`]."""
        if client := self.__dict__.pop("client", None):
            await client.close()

    def body(self, request: Request, seed: int) -> dict[str, Any]:
        """A request in OpenAI's format."""
        settings = self.roles[request.role]
        body: dict[str, Any] = {
            "model": settings.model or self.model,
            "messages": list(request.messages),
            "temperature": settings.temperature_for(seed),
            "max_tokens": settings.max_tokens,
            "seed": seed,
        }
        if request.answer:
            form = {"name": request.answer.__name__, "schema": strict_schema(request.answer), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        body.update(self.extra_body)
        if "max_completion_tokens" in self.extra_body:  # endpoints take one of the two
            del body["max_tokens"]
        refused = self.refused.get(body["model"], ())
        if "temperature" in refused:
            del body["temperature"]
        if "max_tokens" in refused:  # a model that reasons: what it thinks would use up the tokens of its answer
            body.setdefault("max_completion_tokens", body.pop("max_tokens"))
            if "reasoning_effort" not in refused:
                body.setdefault("reasoning_effort", "minimal")
        return body

    def as_reply(self, done: Any, request: Request) -> Reply:
        """
        A completion, as its JSON says it, as a reply.

        Raises:
            AnswerError: If it is none.

        """
        try:
            if isinstance(done, str):  # JSON under another content type, which the client leaves as text
                done = json.loads(done)
            choice, usage = done["choices"][0], done.get("usage") or {}
            text = without_thoughts(choice["message"].get("content") or "")
            model = str(done.get("model") or self.roles[request.role].model or self.model)
            (text + model).encode()  # fails at half a surrogate pair, which no file can keep
            return Reply(
                text=text,
                model=model,
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                complete=choice.get("finish_reason") != "length",
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise AnswerError(f"malformed response: {type(error).__name__}") from None

    def explain(self, error: Exception) -> AnswerError | ModelError:
        """What an error of the client means for the run, in words without the key."""
        self.in_a_row += 1
        permanent = isinstance(error, AuthenticationError | PermissionDeniedError | NotFoundError)
        if isinstance(error, APIConnectionError):
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            said = f"no connection to {self.address}{self.without_key(cause)}"
        elif isinstance(error, APIStatusError):
            permanent = permanent or error.code == "insufficient_quota"
            said = f"status {error.status_code}: {self.without_key(error.message)[:200]}"
        elif isinstance(error, AnswerError):
            said = str(error)
        else:  # a body that is no JSON
            said = f"malformed response: {type(error).__name__}"
        if permanent or self.in_a_row >= GIVE_UP:
            where = "" if self.address in said else f"{self.address}: "
            return ModelError(f"{where}{said}" if permanent else f"{where}{said}, {self.in_a_row} times running")
        return AnswerError(said)

    def without_key(self, text: str) -> str:
        """`text`, which an endpoint sent, without anything that looks like a key or cannot be written."""
        key = self.client.api_key
        text = text.encode("utf-8", "replace").decode()
        text = text.replace(key, "***") if len(key) > 4 else text
        return re.sub(r"\b(?:(?:sk|key)[-_]|Bearer\s+)[\w*.-]{6,}", "***", text)


def without_thoughts(text: str) -> str:
    """An answer without the `<think>` block at its head, which some chat templates open themselves."""
    thoughts, ended, said = text.partition("</think>")
    return said if ended and "<think>" not in thoughts.lstrip().removeprefix("<think>") else text


@lru_cache
def strict_schema(answer: type[BaseModel]) -> dict:
    """JSON schema of a form as OpenAI's strict mode wants it: all fields required, no others, no lengths of strings (they are checked here)."""
    schema = deepcopy(schema_of(answer))
    for part in (schema, *schema.get("$defs", {}).values()):
        if part.get("type") == "object":
            part["additionalProperties"] = False
            part["required"] = list(part.get("properties", {}))
            for value in part.get("properties", {}).values():
                for key in ("minLength", "maxLength"):
                    value.pop(key, None)
    return schema
