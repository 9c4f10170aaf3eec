"""A reward on a server: JSON in and out, over the standard library's HTTP."""

import contextlib
import http.client
import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from trl_instruct.console import brief
from trl_instruct.errors import InputError
from trl_instruct.rewards.function import (
    RewardError,
    RewardUnreachableError,
    Scores,
    Texts,
    is_column,
)

# Holds the token of a reward server: all users of a machine can see a command line.
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
MOST_BYTES = 64 * 2**20
LONGEST_WAIT = 30.0
# Retried like 5xx: timeout, too many requests.
WORTH_ANOTHER_TRY = (408, 429)


class HTTPReward:
    """A reward server, such as `trl-instruct serve-reward`, as a reward function.

    The server gets POST requests `{"prompts": [...], "completions": [...], <column>: [...]}`,
    `completion_ids` among the columns. It answers `{"scores": [...]}`, null where the reward does
    not apply, or `{"error": "..."}` with a status of 400 or more.

    Args:
        url: address for requests, `http://127.0.0.1:8000/score`.
        token: sent as `Authorization: Bearer`; default: the environment's REWARD_SERVER_TOKEN.
        batch_size: completions per request.
        timeout: seconds for the whole answer, after which a try is given up.
        retries: further tries after no answer, 408, 429 or 5xx: 1, 2, 4, ... at most 30 s apart.

    Raises:
        InputError: the address or the token cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        batch_size: int = 64,
        timeout: float = 60.0,
        retries: int = 6,
    ):
        self.url = self.__name__ = check_url(url)
        self.token = check_token(token or os.environ.get(TOKEN_VARIABLE) or None)
        self.batch_size, self.timeout, self.retries = batch_size, timeout, retries

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Scores:
        """Scores of the completions, None where the server's reward does not apply.

        Raises:
            RewardUnreachableError: the server did not answer, or refused the token.
            RewardError: it answered with an error or without scores.
        """
        count = len(completions)
        given = {k: v for k, v in columns.items() if is_column(v, count)}
        given |= {"prompts": prompts, "completions": completions}
        scores: Scores = []
        for start in range(0, count, self.batch_size):
            batch = {k: list(v[start : start + self.batch_size]) for k, v in given.items()}
            scores += self._ask(batch)
        return scores

    def _ask(self, batch: dict[str, list[Any]]) -> Scores:
        answer = post_json(self.url, batch, self.token, self.timeout, self.retries)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(batch["completions"]):
            raise RewardError(
                f"The reward server {self.url} answered {brief(json.dumps(answer))}; "
                f'{{"scores": [...]}} with {len(batch["completions"])} numbers is needed.'
            )
        return scores


def check_url(url: str) -> str:
    """The URL; InputError if it is not an HTTP address, or holds a user's name or password."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and (parts.hostname or "").encode("idna")
        valid = known and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
        secret = "@" in parts.netloc
    except ValueError:
        valid, secret = False, "@" in url
    if secret:
        raise InputError("A server's address holds a user's name or password; use a token instead.")
    if not valid:
        raise InputError(f"{url!r} is not a server's address; http://host:port/... is needed.")
    return url


def check_token(token: str | None) -> str | None:
    """The token; InputError, which does not show it, if it is empty or no header can hold it."""
    if token is not None and not (token.isprintable() and token.strip() and max(token) <= "\xff"):
        raise InputError(
            "The token for a server is empty, or has a line break or another character that no "
            f"HTTP header can hold. Check {TOKEN_VARIABLE}, or token=."
        )
    return token


def post_json(url: str, content: Any, token: str | None, timeout: float, retries: int) -> Any:
    """Send JSON, return the JSON that comes back; the arguments are those of `HTTPReward`.

    A redirect, which would carry the token along, is an error, as are content that JSON cannot
    hold, and an answer that is not JSON or is larger than 64 MiB.
    """
    try:
        body = json.dumps(content, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"The content for {url} cannot be written as JSON: {error}") from error
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request, opener = urllib.request.Request(url, body, headers, method="POST"), _opener(url)
    for attempt in range(retries + 1):
        try:
            with opener.open(request, timeout=timeout) as answer:
                return _read_json(url, answer)
        except urllib.error.HTTPError as error:
            last = _told(error)
            if error.code < 500 and error.code not in WORTH_ANOTHER_TRY:
                raise _refusal(url, error.code, last) from error
        except (OSError, http.client.HTTPException) as error:
            last = brief(str(getattr(error, "reason", "") or error)) or type(error).__name__
        if attempt < retries:
            time.sleep(min(LONGEST_WAIT, 2.0**attempt))
    raise RewardUnreachableError(
        f"The server {url} gave no answer in {retries + 1} tries of {timeout:g} "
        f"seconds: {last}. Start it again, or correct the address."
    )


def until_deadline(file: Any, connection: socket.socket) -> None:
    """Make a socket's file readable only within the socket's timeout from now on.

    The socket's own timeout begins again with every byte.
    """
    read, timeout = file.raw.readinto, connection.gettimeout()
    deadline = time.monotonic() + (timeout or 0.0)

    def readinto(buffer: Any) -> int | None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        try:
            return read(buffer)
        finally:
            connection.settimeout(timeout)  # for what is sent

    file.raw.readinto = readinto


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        until_deadline(self.fp, sock)


class _Once(
    urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPRedirectHandler
):
    """One request, whose answer has a deadline; no redirects."""

    def do_open(self, http_class: Any, *args: Any, **kwargs: Any) -> Any:
        timed: Any = type("Timed", (http_class,), {"response_class": _Answer})
        return super().do_open(timed, *args, **kwargs)

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Uses the environment's proxies, except for this machine's own addresses: a proxy on another
    machine would look for the server there."""
    own = is_loopback(urllib.parse.urlsplit(url).hostname or "")
    direct = (urllib.request.ProxyHandler({}),) if own else ()
    return urllib.request.build_opener(_Once, *direct)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: 127.0.0.0/8, ::1 or localhost.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost.example")
    (True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return f".{host}".lower().endswith(".localhost")


def _told(error: urllib.error.HTTPError) -> str:
    """The status and the beginning of the body; closes the connection."""
    body = ""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        body = error.read(1000).decode(errors="replace")
    return brief(f"HTTP {error.code} {error.reason}: {body}".rstrip(": "), most=400)


def _refusal(url: str, code: int, told: str) -> RewardError:
    """The error for a status of 300 to 499."""
    advice = f" Set {TOKEN_VARIABLE}, or token=." if code in (401, 403) else ""
    away = code < 400 or code in (401, 403, 404, 405)
    kind = RewardUnreachableError if away else RewardError
    return kind(f"The server {url} refused with {told}{advice}")


def _read_json(url: str, answer: Any) -> Any:
    body = answer.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise RewardError(f"The server {url} answered with more than {MOST_BYTES} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"The server {url} did not answer with JSON: {body[:80]!r}") from error
