"""What our servers share: a socket, JSON in and out over starlette, a quiet uvicorn."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trl_instruct.errors import NOT_AS_EXPECTED, InputError

# Seconds for a whole body, after which the client is dropped.
PATIENCE = 30.0


def listen(fault: str, host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its address; an `InputError` that begins with `fault` without one."""
    six = ":" in host
    family, both = (socket.AF_INET6 if six else socket.AF_INET), six and socket.has_dualstack_ipv6()
    try:
        listening = socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        raise InputError(f"{fault} at {host}, port {port}: {error}") from error
    shown = f"[{host}]" if six else host or "0.0.0.0"
    return listening, f"http://{shown}:{listening.getsockname()[1]}"


def http_server(app: Starlette) -> uvicorn.Server:
    """A server that logs nothing but its own faults; h11 comes with every uvicorn."""
    told: Any = {"log_level": "error", "access_log": False, "server_header": False}
    return uvicorn.Server(uvicorn.Config(app, http="h11", proxy_headers=False, **told))


def as_json(status: int, content: Any, **headers: str) -> Response:
    """An answer in ASCII, which any text fits into."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


async def answer(request: Request, most: int, call: Callable[[Any], Any], fault: str) -> Response:
    """What the call, in a thread, makes of a request's JSON, as JSON; its InputError is told.

    So are a body of more than `most` bytes, a slow one and, after `fault`, one that is not as
    expected.
    """
    try:
        body = await asyncio.wait_for(_body(request, most), PATIENCE)
    except (asyncio.TimeoutError, ClientDisconnect):
        told = f"The request did not arrive within {PATIENCE:g} seconds."
        return as_json(408, {"error": told}, Connection="close")
    if len(body) > most:
        size = request.headers.get("content-length", "too many")
        return as_json(413, {"error": f"The request has {size} bytes; {most} are allowed."})
    try:
        return as_json(200, await run_in_threadpool(lambda: call(json.loads(body))))
    except InputError as error:
        told = getattr(error, "fault", str(error))
        return as_json(getattr(error, "http_status", 422), {"error": told})
    except NOT_AS_EXPECTED as error:
        return as_json(400, {"error": f"{fault}: {error!r}"})


async def _body(request: Request, most: int) -> bytearray:
    """The whole body, or more than `most` bytes of it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            break
    return body
