"""A server for any reward function, which `HTTPReward` talks to."""

import asyncio
import hmac
import threading
from contextlib import AbstractContextManager
from typing import Any

from trl_instruct.errors import InputError, needs_extra
from trl_instruct.rewards import function, http
from trl_instruct.rewards.function import RewardFunction, RewardUnreachableError, Scores
from trl_instruct.rewards.http import LOOPBACK, MOST_REQUEST_BYTES, TOKEN_VARIABLE

with needs_extra("serve"):
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from trl_instruct.serving import answer, as_json, http_server, listen

MOST_REQUESTS = 128  # whose bodies are held at the same time; more wait


class RewardServer(AbstractContextManager["RewardServer"]):
    """Scores over HTTP: `POST /score` as in `HTTPReward`, `GET /health`.

    One request is scored at a time. One that is too large, malformed or without the token is
    refused; a reward that fails gives status 422 with `{"error": ...}`, one that cannot be reached
    503. `url` is the address for requests.

    Args:
        host: address to listen at; other machines reach the server only if it is not loopback.
        port: 0 takes a free one, which is in `url`.
        token: what requests to /score must carry as `Authorization: Bearer`; None on loopback only.
        max_bytes: largest size of a request.

    Raises:
        InputError: the address is in use, or is not one of this machine; other machines reach it,
            and there is no token; the token cannot be used.
    """

    def __init__(
        self,
        reward: RewardFunction,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        token: str | None = None,
        max_bytes: int = MOST_REQUEST_BYTES,
    ):
        self.reward, self.token, self.max_bytes = reward, http.check_token(token), max_bytes
        if token is None and not http.is_loopback(host):
            raise InputError(
                f"A server at {host!r} would score for other machines without a token. Set "
                f"{TOKEN_VARIABLE} (or token=), or listen at {LOOPBACK}."
            )
        self.socket, address = listen("No server can listen", host, port)
        self.server_port, self.url = self.socket.getsockname()[1], f"{address}/score"
        self.lock, self.places = threading.Lock(), asyncio.Semaphore(MOST_REQUESTS)
        routes = [
            Route("/health", self._health),
            Route("/score", self._score, methods=["POST"]),
            Route("/{path:path}", _not_found, methods=["GET", "POST"]),
        ]
        self.server = http_server(Starlette(routes=routes))

    def serve_forever(self) -> None:
        """Serve until `shutdown`, or Ctrl-C; the request that is being scored is answered."""
        self.server.run(sockets=[self.socket.dup()])  # `server_close` may come before its end

    def shutdown(self) -> None:
        """End `serve_forever`, from another thread."""
        self.server.should_exit = True

    def server_close(self) -> None:
        """Stop listening."""
        self.socket.close()

    def __exit__(self, *_: object) -> None:
        self.server_close()

    async def _health(self, _: Request) -> Response:
        return as_json(200, {"status": "ok", "reward": function.reward_name(self.reward)})

    async def _score(self, request: Request) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token and not hmac.compare_digest(given.encode(), self.token.encode()):
            return as_json(401, {"error": "The token is missing or wrong."})
        async with self.places:
            return await answer(request, self.max_bytes, self._scores, "Not a JSON object")

    def _scores(self, request: Any) -> dict[str, Scores]:
        if not isinstance(request, dict):
            raise ValueError("an object is needed")
        prompts, completions = request.pop("prompts", None), request.pop("completions", None)
        if not isinstance(prompts, list) or not isinstance(completions, list):
            raise InputError("A request needs the lists `prompts` and `completions`.")
        for name, values in {"prompts": prompts, **request}.items():
            if not function.is_column(values, len(completions)):
                raise InputError(f"`{name}` must be a list as long as `completions`.")
        with self.lock:
            if self.server.should_exit:
                raise RewardUnreachableError("The server ends.")
            given = self.reward, prompts, completions, request
            scores = function.call_part(*given) if completions else []
        return {"scores": scores}


async def _not_found(_: Request) -> Response:
    return as_json(404, {"error": "Use GET /health or POST /score."})
