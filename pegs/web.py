"""What the questionnaire and the API share as web servers."""

import socket

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request


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


def serve_app(app: Starlette, host: str, port: int) -> None:
    """
    Serve until interrupted; requests are not logged.

    Raises:
        OSError: If the port is taken, or the host is not this machine's.

    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)  # uvicorn itself would end the process
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
