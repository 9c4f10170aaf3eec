"""A reward on a server: JSON in and out, over httpx."""

import contextlib
import ipaddress
import json
import os
import ssl
import time
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from trl_instruct.console import brief
from trl_instruct.errors import InputError
from trl_instruct.rewards import function
from trl_instruct.rewards.function import RewardError, RewardUnreachableError, Scores, Texts

# Holds the token of a reward server: all users of a machine can see a command line.
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
MOST_BYTES = 64 * 2**20  # of an answer
# Of a server: where it listens, what it takes, unless it is told otherwise.
LOOPBACK, MOST_REQUEST_BYTES = "127.0.0.1", 16 * 2**20
LONGEST_WAIT = 30.0
# The system's, read once: that takes longer than a request.
_certificates = cache(ssl.create_default_context)
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
        given = {k: v for k, v in columns.items() if function.is_column(v, count)}
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
        parts = urlsplit(url)
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

    An error: a redirect, which would carry the token along, and an answer larger than 64 MiB.
    """
    try:
        body = json.dumps(content, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"The content for {url} cannot be written as JSON: {error}") from error
    headers = httpx.Headers({"Content-Type": "application/json"}, encoding="latin-1")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    # A proxy on another machine would look for this machine's own addresses there.
    elsewhere = not is_loopback(urlsplit(url).hostname or "")
    options: Any = {"timeout": timeout, "trust_env": elsewhere, "verify": _certificates()}
    for attempt in range(retries + 1):
        try:
            with httpx.Client(**options) as client:
                request = client.build_request("POST", url, content=body, headers=headers)
                # The client's own timeout begins again with every byte.
                return function.within(timeout, partial(_answer, client, request))
        except (httpx.HTTPError, OSError) as error:
            last = brief(str(error), most=400) or type(error).__name__
        if attempt < retries:
            time.sleep(min(LONGEST_WAIT, 2.0**attempt))
    raise RewardUnreachableError(
        f"The server {url} gave no answer in {retries + 1} tries of {timeout:g} "
        f"seconds: {last}. Start it again, or correct the address."
    )


def _answer(client: httpx.Client, request: httpx.Request) -> Any:
    """The answer's JSON; HTTPStatusError for a failure that may pass, RewardError for others."""
    answer, body, url = client.send(request, stream=True), b"", request.url
    code = answer.status_code
    with contextlib.suppress(httpx.HTTPError) if code >= 300 else contextlib.nullcontext():
        for part in answer.iter_bytes():
            body += part
            if len(body) > (1000 if code >= 300 else MOST_BYTES):
                break
    if code >= 300:
        text = body.decode(errors="replace")
        told = brief(f"HTTP {code} {answer.reason_phrase}: {text}".rstrip(": "), most=400)
        failure = httpx.HTTPStatusError(told, request=request, response=answer)
        if code >= 500 or code in WORTH_ANOTHER_TRY:
            raise failure
        advice = f" Set {TOKEN_VARIABLE}, or token=." if code in (401, 403) else ""
        away = code < 400 or code in (401, 403, 404, 405)
        kind = RewardUnreachableError if away else RewardError
        raise kind(f"The server {url} refused with {told}{advice}") from failure
    if len(body) > MOST_BYTES:
        raise RewardError(f"The server {url} answered with more than {MOST_BYTES} bytes.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"The server {url} did not answer with JSON: {body[:80]!r}") from error


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return f".{host}".lower().endswith(".localhost")
