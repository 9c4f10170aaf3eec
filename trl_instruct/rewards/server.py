"""A server for any reward function, which `HTTPReward` talks to."""

import hmac
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trl_instruct.errors import InputError
from trl_instruct.rewards.function import (
    RewardFunction,
    RewardUnreachableError,
    Scores,
    call_part,
    is_column,
    reward_name,
)
from trl_instruct.rewards.http import TOKEN_VARIABLE, check_token, is_loopback

LOOPBACK = "127.0.0.1"
MOST_BYTES = 16 * 2**20
# Seconds for a whole request, after which the client is dropped.
PATIENCE = 30.0
# Requests at the same time; more wait in the queue of connections.
MOST_THREADS = 128
PATHS = "Use GET /health or POST /score."


class RewardServer(ThreadingHTTPServer):
    """Scores over HTTP: `POST /score` as in `HTTPReward`, `GET /health`.

    One request is scored at a time, a connection carries one. A request that is too large,
    malformed or without the token is refused; a reward that fails gives status 422 with
    `{"error": ...}`, one that cannot be reached 503.

    Args:
        host: address to listen at; other machines reach the server only if it is not loopback.
        port: 0 takes a free one, which is in `url`.
        token: what requests to /score must carry as `Authorization: Bearer`; None on loopback only.
        max_bytes: largest size of a request.

    Raises:
        InputError: the address is in use, or is not one of this machine; other machines reach it,
            and there is no token; the token cannot be used.
    """

    daemon_threads = True
    request_queue_size = 1024  # of connections; the standard library's 5 overflows under 64 clients

    def __init__(
        self,
        reward: RewardFunction,
        *,
        host: str = LOOPBACK,
        port: int = 0,
        token: str | None = None,
        max_bytes: int = MOST_BYTES,
    ):
        self.reward, self.token, self.max_bytes = reward, check_token(token), max_bytes
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if token is None and not is_loopback(host):
            raise InputError(
                f"A server at {host!r} would score for other machines without a token. Set "
                f"{TOKEN_VARIABLE} (or token=), or listen at {LOOPBACK}."
            )
        self.lock, self.threads = threading.Lock(), threading.Semaphore(MOST_THREADS)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"No server can listen at {host}, port {port}: {error}") from error

    @property
    def url(self) -> str:
        """The address for requests."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/score"

    def process_request(self, *connection: Any) -> None:
        """Handle a request in a thread, as soon as one is free."""
        self.threads.acquire()
        super().process_request(*connection)

    def shutdown_request(self, *connection: Any) -> None:
        """End a request, whose thread is free again."""
        super().shutdown_request(*connection)
        self.threads.release()

    def handle_error(self, *connection: Any) -> None:
        """Tell what went wrong, unless a client has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*connection)

    def score(self, /, prompts: Any = None, completions: Any = None, **columns: Any) -> Scores:
        """Scores of a request's completions; InputError if it is malformed or the reward fails."""
        if not isinstance(prompts, list) or not isinstance(completions, list):
            raise InputError("A request needs the lists `prompts` and `completions`.")
        for name, values in {"prompts": prompts, **columns}.items():
            if not is_column(values, len(completions)):
                raise InputError(f"`{name}` must be a list as long as `completions`.")
        with self.lock:
            return call_part(self.reward, prompts, completions, columns) if completions else []


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = PATIENCE
    rfile: Any
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.deadline, self.read_raw = time.monotonic() + self.timeout, self.rfile.raw.readinto
        self.rfile.raw.readinto = self._readinto

    def _readinto(self, buffer: Any) -> int | None:
        """Read until the deadline: the socket's own timeout begins again with every byte."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.connection.settimeout(left)
        try:
            return self.read_raw(buffer)
        finally:
            self.connection.settimeout(self.timeout)  # for what is sent

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"status": "ok", "reward": reward_name(self.server.reward)})
        else:
            self._refuse(404, PATHS)

    def do_POST(self) -> None:
        size, most = self.headers.get("Content-Length", ""), self.server.max_bytes
        if self.path != "/score":
            self._refuse(404, PATHS)
        elif not self._authorised():
            self._refuse(401, "The token is missing or wrong.")
        elif not re.fullmatch("[0-9]{1,12}", size):
            self._refuse(411, "Content-Length is needed.")
        elif int(size) > most:
            self._refuse(413, f"The request has {int(size)} bytes; {most} are allowed.")
        else:
            self._score(self.rfile.read(int(size)))
            return
        while self.rfile.read1():  # what is unread when a connection closes resets it
            pass

    def _score(self, body: bytes) -> None:
        try:
            request = json.loads(body)
            if not isinstance(request, dict):
                raise ValueError("an object is needed")
        except (ValueError, RecursionError) as error:
            self._refuse(400, f"Not a JSON object: {error}")
            return
        try:
            self._answer(200, {"scores": self.server.score(**request)})
        except InputError as error:
            status = 503 if isinstance(error, RewardUnreachableError) else 422
            self._refuse(status, getattr(error, "fault", str(error)))

    def _authorised(self) -> bool:
        token = self.server.token
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token is None or hmac.compare_digest(given.encode(), token.encode())

    def _refuse(self, status: int, fault: str) -> None:
        self._answer(status, {"error": fault})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing: a line per request helps nobody."""
