"""What the questionnaire and the API share as web servers."""

import socket

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pegs.errors import InputError


async def read_body(request: Request, most: int) -> bytes:
    """
    A request's body.

    Args:
        request (`Request`): The request.
        most (`int`): Its most bytes.

    Raises:
        HTTPException: 413, if it has more; the rest is not read.

    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HTTPException(413, f"a body can have {most:,} bytes")
    return bytes(body)


def listen(host: str, port: int) -> socket.socket:
    """
    A socket that waits for connections.

    Raises:
        InputError: If the port is taken, or the host is not this machine's.

    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}.") from None


def address_of(host: str, port: int) -> str:
    """Where a browser finds them."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve_app(app: Starlette, listening: socket.socket) -> None:
    """Serve until interrupted; requests are not logged."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[listening])
