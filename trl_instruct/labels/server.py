"""The page's server: items out, answers in, and nothing for strangers."""

import hmac
import ipaddress
import json
import random
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from trl_instruct.console import say
from trl_instruct.data.labels import Item, LabelStore
from trl_instruct.errors import InputError
from trl_instruct.labels.progress import progress
from trl_instruct.serving import answer, as_json, http_server, listen

PAGE = Path(__file__).with_name("page")
MOST_BYTES = 256 * 1024  # of a request
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Given = dict[str, Any]


class LabelPage:
    """What the page asks for; where responses came from never leaves it.

    `labels_per_prompt` labelers label an item of the store, and answer the questions about each
    response with yes or no. `answer`: a prompt -> the answer of each model; None: nothing to try.
    """

    def __init__(
        self,
        store: LabelStore,
        labels_per_prompt: int = 1,
        questions: tuple[str, ...] = (),
        answer: Callable[[str], dict[str, str]] | None = None,
    ):
        self.store, self.labels_per_prompt = store, labels_per_prompt
        self.questions, self.answer = questions, answer
        self.one_at_a_time = threading.Lock()

    def next(self, given: Given) -> Given:
        """The labeler's next item, and what the page must know to show it."""
        labeler = _labeler(given)
        item = self.store.next_item(labeler, self.labels_per_prompt)
        about = {"questions": self.questions, "models": self.answer is not None}
        return {**about, "item": item and _shown(item, labeler)}

    def save(self, given: Given) -> Given:
        """Store an answer, then the next item. `saved`: whether the answer counts."""
        labeler, item = _labeler(given), self.store.item(given["item"])
        content: Given = {"flag": given.get("flag") is True, "note": str(given.get("note") or "")}
        if given.get("seconds") is not None:
            content["seconds"] = round(float(given["seconds"]), 1)
        if given["action"] == "label":
            order = _order(item, labeler)
            label = {name: given.get(name) for name in ("ranks", "overall", "checks")}
            content |= _reordered(label, sorted(range(len(order)), key=order.__getitem__))
        saved = self.store.save(_id(given), item.key, labeler, given["action"], content)
        return {"saved": saved, **self.next(given)}

    def undo(self, given: Given) -> Given:
        """Take the labeler's latest answer back: its item is open again, with that answer."""
        labeler = _labeler(given)
        taken = self.store.undo(_id(given), labeler)
        if taken is None:
            return {"item": None}
        content = _reordered(taken.content, _order(taken.item, labeler))
        return {"item": _shown(taken.item, labeler), "answer": content}

    def progress(self, _: Given) -> Given:
        """How far everybody is."""
        to_label = sum(len(item.responses) > 1 for item in self.store.items())
        return progress(self.store.answers(), to_label, self.labels_per_prompt)

    def ask(self, given: Given) -> Given:
        """The answers of the models to a typed prompt."""
        if self.answer is None:
            raise InputError("There is no model to ask; start with --models.")
        with self.one_at_a_time:
            return {"answers": self.answer(str(given["prompt"]))}


def _labeler(given: Given) -> str:
    name = str(given.get("labeler") or "").strip()
    if not 0 < len(name) <= 40 or not name.isprintable():
        raise InputError(f"The labeler's name is {name!r}; 1 to 40 printable letters are needed.")
    return name


def _id(given: Given) -> str:
    if not re.fullmatch(r"[\w-]{8,64}", str(given.get("id"))):
        raise InputError(f"The answer's id is {given.get('id')!r}; 8 to 64 letters are needed.")
    return str(given["id"])


def _order(item: Item, labeler: str) -> list[int]:
    """Indices of the responses in the order in which a labeler sees them: always the same."""
    order = list(range(len(item.responses)))
    random.Random(f"{labeler}\0{item.key}").shuffle(order)
    return order


def _shown(item: Item, labeler: str) -> Given:
    """An item as a labeler sees it: no columns, no sources."""
    responses = [_turns(item.responses[index]) for index in _order(item, labeler)]
    return {"item": item.key, "prompt": _turns(item.prompt), "responses": responses}


def _turns(content: Any) -> list[tuple[str, str]]:
    """Text, or messages, as (role, text)."""
    if isinstance(content, str):
        return [("", content)]
    return [(m["role"], m.get("content") or json.dumps(m.get("tool_calls"))) for m in content]


def _reordered(content: Any, order: list[int]) -> Any:
    """What an answer holds, with each list of one value per response in another order."""
    if isinstance(content, dict):
        return {name: _reordered(value, order) for name, value in content.items()}
    return [content[place] for place in order] if isinstance(content, list) else content


def label_app(page: LabelPage, port: int, names: tuple[str, ...] = ()) -> Starlette:
    """The page as an ASGI application, for holders of the store's token.

    The port, where it is served, names the cookie: a host's ports share their cookies. `names` of
    this machine, besides its IP addresses and localhost, may stand in the Host header.
    """
    cookie, token = f"trl-label-{port}", page.store.token

    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = _refused(request, cookie, token, names) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    def index(request: Request) -> Response:
        response = FileResponse(PAGE / "index.html")
        response.set_cookie(cookie, token, httponly=True, samesite="strict")
        return response

    routes = [Route("/", index)]
    for path in PAGE.iterdir():
        routes.append(Route(f"/{path.name}", lambda _, path=path: FileResponse(path)))
    given: Any = {"most": MOST_BYTES, "fault": "The request is not as the page sends it"}
    for call in (page.next, page.save, page.undo, page.progress, page.ask):
        endpoint = partial(answer, call=call, **given)
        routes.append(Route(f"/api/{call.__name__}", endpoint, methods=["POST"]))
    return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)])


def _refused(request: Request, cookie: str, token: str, names: tuple[str, ...]) -> Response | None:
    """The answer to a request that is not from the page itself, with the token; None if it is.

    A Host that is a name of somebody else's is DNS rebinding; a foreign Origin is another site.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    given = request.cookies.get(cookie) or ""
    opens = request.url.path == "/" and request.method == "GET"
    if opens:
        given = request.query_params.get("token", given)
    same_site = request.headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    if not _is_ours(host, names):
        return as_json(403, {"error": f"The host {host!r} is not this server's."})
    if not (opens or same_site) or (origin and urlsplit(origin).netloc != host):
        return as_json(403, {"error": "Requests of other sites are refused."})
    if request.method == "POST" and not origin:
        return as_json(403, {"error": "A request that changes something needs an Origin."})
    if not hmac.compare_digest(given.encode(), token.encode()):
        told = "The token is missing or wrong. Open the address that `trl-instruct label` printed."
        return as_json(401, {"error": told})
    return None


def _is_ours(host: str, names: tuple[str, ...]) -> bool:
    """Whether a Host header names this machine: no site can point an address to itself."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", *names) or bool(ipaddress.ip_address(name))
    return False


def serve(page: LabelPage, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, or Enter in a terminal; its address is printed."""
    listening, address = listen("No page can be served", host, port)
    port = listening.getsockname()[1]
    app = label_app(page, port, (host.lower(), socket.gethostname().lower()))
    server = http_server(app)

    def wait_for_enter() -> None:
        server.should_exit = bool(sys.stdin.readline())

    in_terminal = sys.stdin.isatty()
    if in_terminal:
        threading.Thread(target=wait_for_enter, daemon=True).start()
    say(f"label: {address}/?token={page.store.token}", secret=True)
    say(f"Press {'Enter' if in_terminal else 'Ctrl-C'} when the labelling is done.")
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
