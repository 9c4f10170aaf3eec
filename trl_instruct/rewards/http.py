"""A reward on a server: JSON in and out, over the standard library's HTTP."""

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from trl_instruct.errors import InputError
from trl_instruct.rewards.function import RewardError, RewardUnreachableError, Scores, is_column

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
        timeout: seconds without a byte from the server after which a try is given up.
        retries: further tries after no answer, 408, 429 or 5xx: 1, 2, 4, ... at most 30 s apart.
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
        self.url, self.batch_size = check_url(url), batch_size
        self.token = token or os.environ.get(TOKEN_VARIABLE)
        self.timeout, self.retries = timeout, retries

    @property
    def __name__(self) -> str:
        return self.url

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Scores:
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
        answer = post_json(
            self.url, batch, token=self.token, timeout=self.timeout, retries=self.retries
        )
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(batch["completions"]):
            raise RewardError(
                f"The reward server {self.url} answered {json.dumps(answer)[:80]}; "
                f'{{"scores": [...]}} with {len(batch["completions"])} numbers is needed.'
            )
        return scores


def check_url(url: str) -> str:
    """The URL; InputError if it is not an HTTP address."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is not a server's address; http://host:port/... is needed.")
    return url


def post_json(url: str, content: Any, *, token: str | None, timeout: float, retries: int) -> Any:
    """Send JSON, return the JSON that comes back.

    Args:
        url: a redirect from it, which would carry the token along, is an error.
        token, timeout, retries: as in `HTTPReward`.

    Raises:
        RewardUnreachableError: no answer after all tries, or a refused token.
        RewardError: refused content, or content that JSON cannot hold; an answer that is not JSON
            or is larger than 64 MiB.
    """
    try:
        body = json.dumps(content, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"The content for {url} cannot be written as JSON: {error}") from error
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers, method="POST")
    opener = _opener(url)
    for attempt in range(retries + 1):
        try:
            with opener.open(request, timeout=timeout) as answer:
                return _read_json(url, answer)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in WORTH_ANOTHER_TRY:
                raise _refusal(url, error) from error
            last = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            last = str(getattr(error, "reason", "") or error) or type(error).__name__
        if attempt < retries:
            time.sleep(min(LONGEST_WAIT, 2.0**attempt))
    raise RewardUnreachableError(
        f"The server {url} gave no answer in {retries + 1} tries of {timeout:g} seconds: {last}. "
        "Start it again, or correct the address."
    )


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirects."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Uses the environment's proxies, except for this machine's own addresses: a proxy on another
    machine would look for the server there."""
    direct = (urllib.request.ProxyHandler({}),) if is_loopback(url) else ()
    return urllib.request.build_opener(_Stay, *direct)


def is_loopback(url: str) -> bool:
    """Whether an address is one of this machine's own, 127.0.0.0/8, ::1 or localhost.

    >>> is_loopback("http://127.0.0.1:8000/score"), is_loopback("http://localhost.example/score")
    (True, False)
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _refusal(url: str, error: urllib.error.HTTPError) -> RewardError:
    """The error for a status of 300 to 499."""
    told = error.read(1000).decode(errors="replace").strip()
    message = f"The server {url} refused with HTTP {error.code} {error.reason}: {told}"
    if error.code in (401, 403):
        return RewardUnreachableError(f"{message} Set {TOKEN_VARIABLE}, or token=.")
    if error.code in (404, 405) or error.code < 400:
        return RewardUnreachableError(message)
    return RewardError(message)


def _read_json(url: str, answer: Any) -> Any:
    body = answer.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise RewardError(f"The server {url} answered with more than {MOST_BYTES} bytes.")
    try:
        return json.loads(body)
    except ValueError as error:
        raise RewardError(f"The server {url} did not answer with JSON: {body[:80]!r}") from error
