"""The questionnaire's web pages (Figure 12): a secret link a rater, every answer saved when it is given."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pegs.evaluation.human import QUESTIONS, AnswerRefused, Study
from pegs.evaluation.templates import render_page
from pegs.web import read_body


MAX_FORM = 4096  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # the link is the key
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
STATIC = {"rate.css": "text/css", "rate.js": "text/javascript"}


class SafeHeaders:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


def make_app(study: Study) -> Starlette:
    """
    The questionnaire as an ASGI app.

    A rater is known by the token in the address alone: a wrong one gets 403, whatever comes after it, and a right one reaches its own pages only.

    Args:
        study ([`Study`]): What is asked.

    Returns:
        `Starlette`.

    """
    attribution = study.value("attribution")

    def rater_of(request: Request) -> int:
        rater = study.rater(request.path_params["token"])
        if rater is None:
            raise HTTPException(403)
        return rater

    def position_of(request: Request, pages: int) -> int:
        text = request.path_params["position"]
        position = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0
        if not 1 <= position <= pages:
            raise HTTPException(404)
        return position

    def welcome(request: Request) -> Response:
        done = study.progress(rater_of(request))
        following = done.index(False) + 1 if False in done else None
        return HTMLResponse(render_page("welcome", token=request.path_params["token"], done=sum(done), total=len(done), following=following, questions=QUESTIONS, attribution=attribution))  # fmt: skip

    def show(request: Request, left: int = 0) -> Response:
        rater = rater_of(request)
        done = study.progress(rater)
        page = study.page(rater, position_of(request, len(done)))
        body = render_page("page", token=request.path_params["token"], page=page, done=sum(done), total=len(done), left=left, attribution=attribution)  # fmt: skip
        return HTMLResponse(body, 422 if left else 200)

    def save(request: Request, form: dict[str, str]) -> Response:
        rater = rater_of(request)
        pages = len(study.progress(rater))
        position = position_of(request, pages)
        try:
            study.save(rater, position, form)
        except AnswerRefused as error:
            return Response(str(error), 400, media_type="text/plain")
        if request.headers.get("x-autosave"):
            return Response(status_code=204)
        page = study.page(rater, position)
        assert page is not None
        if not page.is_done:
            return show(request, len(page.questions) - len(page.scores))
        following = f"/{position + 1}" if position < pages else ""
        return RedirectResponse(f"/r/{request.path_params['token']}{following}", 303)

    async def answer(request: Request) -> Response:
        body = await read_body(request, MAX_FORM)
        try:
            form = dict(parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=bool(body), max_num_fields=20))
        except ValueError:
            form = {"": ""}  # no page asks that: refused, but not before the link was checked
        return await run_in_threadpool(save, request, form)

    def picture(request: Request) -> Response:
        rater_of(request)
        data = study.picture(request.path_params["digest"])
        if data is None:
            raise HTTPException(404)
        return Response(data, media_type="image/png")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404)
        return Response((Path(__file__).parent / "templates" / name).read_bytes(), media_type=STATIC[name])

    def sorry(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return HTMLResponse(render_page("sorry", status=error.status_code), error.status_code)

    handlers: dict[int, Callable[[Request, Exception], Response]] = {code: sorry for code in (403, 404, 405, 413)}
    routes = [
        Route("/static/{name}", static),
        Route("/r/{token}", welcome),
        Route("/r/{token}/picture/{digest}", picture),
        Route("/r/{token}/{position}", show),
        Route("/r/{token}/{position}", answer, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(SafeHeaders)], exception_handlers=handlers)  # type: ignore[arg-type]
