"""The client and the server of a reward, with each other and each alone."""

import contextlib
import http.client
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit

import pytest

from trl_instruct import cli, serving
from trl_instruct.errors import InputError
from trl_instruct.rewards import http as http_reward
from trl_instruct.rewards import server as reward_server
from trl_instruct.rewards.function import RewardError, RewardUnreachableError, call_reward
from trl_instruct.rewards.http import HTTPReward, is_loopback
from trl_instruct.rewards.judge import LLMJudge
from trl_instruct.rewards.server import RewardServer

REAL_SLEEP = time.sleep
MAIN = "from trl_instruct.__main__ import main; main()"
PROMPTS = ["one ", "two ", "three "]
COMPLETIONS = ["a", "bb", "ccc"]


def length(prompts, completions, extra=(0, 0, 0)):
    return [float(len(c)) + e for c, e in zip(completions, extra, strict=False)]


@contextmanager
def running(server):
    often = {"poll_interval": 0.01} if isinstance(server, HTTPServer) else {}
    thread = threading.Thread(target=server.serve_forever, kwargs=often)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No waiting between tries; how long it would have been."""
    seen = []
    monkeypatch.setattr(http_reward.time, "sleep", seen.append)
    monkeypatch.delenv("REWARD_SERVER_TOKEN", raising=False)
    return seen


def ask(url, body=None, **headers):
    """Status and content of an answer."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_scores_and_columns_go_through_in_batches():
    seen = []

    def judge(prompts, completions, extra, **columns):
        seen.append((prompts, completions, extra, columns))
        return length(prompts, completions, extra)

    with running(RewardServer(judge)) as server:
        assert server.url.startswith("http://127.0.0.1:")
        reward = HTTPReward(server.url, batch_size=2)
        columns = {"extra": [10, 20, 30], "trainer_state": object(), "word": "abc"}
        assert call_reward(reward, PROMPTS, COMPLETIONS, columns) == [11.0, 22.0, 33.0]
    assert seen == [
        (["one ", "two "], ["a", "bb"], [10, 20], {}),
        (["three "], ["ccc"], [30], {}),
    ]


def test_an_address_of_ip_6():
    try:
        server = RewardServer(length, host="::1")
    except InputError as error:
        pytest.skip(f"no IPv6 on this machine: {error}")
    with running(server):
        assert server.url.startswith("http://[::1]:")
        assert HTTPReward(server.url)(["a"], ["four"]) == [4.0]


def test_messages_and_other_alphabets_go_through():
    def judge(prompts, completions):
        return [
            len(p[0]["content"]) + len(c[0]["content"])
            for p, c in zip(prompts, completions, strict=True)
        ]

    with running(RewardServer(judge)) as server:
        prompt, reply = [{"role": "user", "content": "\u4f60\u597d"}], [{"content": "\U0001f642"}]
        assert HTTPReward(server.url)([prompt], [reply]) == [3]


def test_a_reward_that_fails_on_the_server_is_a_fault_of_the_sample(waits):
    def judge(prompts, completions):
        return [math.nan if "b" in c else 1.0 for c in completions]

    with running(RewardServer(judge)) as server:
        reward = HTTPReward(server.url)
        with pytest.raises(RewardError, match="'judge' gave the score nan.*completion 2"):
            call_reward(reward, PROMPTS, COMPLETIONS, {})
    assert waits == []


def test_a_server_that_stays_away_is_named(waits):
    server = RewardServer(length)
    server.server_close()
    message = f"The server {server.url} gave no answer in 4 tries of 60 seconds: .*refused"
    with pytest.raises(RewardUnreachableError, match=message):
        call_reward(HTTPReward(server.url, retries=3), PROMPTS, COMPLETIONS, {})
    assert waits == [1, 2, 4]


def answering(*answers):
    """A server that gives these (status, body, headers) one after the other."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body, *headers = left.pop(0)
            self.send_response(status)
            for name, value in dict(*headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return HTTPServer(("127.0.0.1", 0), Handler)


def asked(*answers, **options):
    with running(answering(*answers)) as server:
        url = f"http://127.0.0.1:{server.server_port}/score"
        return HTTPReward(url, **options)(PROMPTS, COMPLETIONS)


def test_what_may_pass_is_tried_again(waits):
    good = (200, b'{"scores": [1, 2, 3]}')
    assert asked((503, b""), (429, b""), (408, b""), (500, b""), good) == [1, 2, 3]
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((422, b"too long"), "HTTP 422 .*too long"),
        ((200, b"hello"), "did not answer with JSON: b'hello'"),
        ((200, b'{"score": [1]}'), r'answered \{"score": \[1\]\}; .* with 3 numbers is needed'),
        ((200, b'{"scores": [1, 2]}'), "with 3 numbers is needed"),
        ((200, b"[1, 2, 3]"), "with 3 numbers is needed"),
        ((404, b""), "HTTP 404"),
        ((401, b""), "HTTP 401 .*Set REWARD_SERVER_TOKEN"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    ],
)
def test_what_is_wrong_is_told_at_once(answer, message, waits):
    with pytest.raises(RewardError, match=message):
        asked(answer)
    assert waits == []


@contextmanager
def saying(*parts, pause=0.0):
    """The address of a server that sends these bytes with pauses, whatever it is asked."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    for part in parts:
                        connection.sendall(part)
                        REAL_SLEEP(pause)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(head, monkeypatch):
    """Whatever it sends slowly: the status, the headers, the body."""
    monkeypatch.setattr(http_reward.time, "sleep", REAL_SLEEP)
    slow = [head, *[b"x"] * 100]
    with saying(*slow, pause=0.05) as url, pytest.raises(RewardUnreachableError, match="timed out"):
        start = time.monotonic()
        HTTPReward(url, timeout=0.3, retries=0)(PROMPTS, COMPLETIONS)
    assert time.monotonic() - start < 2


OK = b"HTTP/1.1 200 OK\r\n\r\n"
CLEAR = "\x1b[2J\u202e".encode()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([OK, b'{"scores": [1, 2, 1%s]}' % (b"0" * 400)], "gave the score 1000"),
        ([OK, b'{"scores": [1, 2, 1%s]}' % (b"0" * 5000)], "did not answer with JSON"),
        ([OK, b"[" * 100_000], "did not answer with JSON"),
        ([OK, b'{"scores": ["1", "2", "3"]}'], "gave the score '1'"),
        ([OK, b'{"error": "%s"}' % (rb"\u001b[2J" * 100_000)], "answered .*with 3 numbers"),
        ([OK, CLEAR], "did not answer with JSON"),
        ([b"HTTP/1.1 422 \x1b[2J\x9b31m\r\n\r\n", CLEAR * 100_000], "refused with HTTP 422 "),
        ([b"HTTP/1.1 404 %s\r\n\r\n" % (b"a" * 60_000)], "refused with HTTP 404 aaa"),
        ([b"HTTP/1.1 404 No\r\nContent-Length: 9\r\n\r\nnot"], "refused with HTTP 404 No"),
        ([b"HTTP/1.1 500 \x1b[2J\n\n", CLEAR], "in 1 tries of 5 seconds: HTTP 500"),
        ([CLEAR, b"a" * 60_000, b"\n\n"], "gave no answer in 1 tries"),
    ],
)
def test_a_hostile_answer_is_one_short_line(said, message):
    with saying(*said) as url, pytest.raises(RewardError, match=message) as told:
        call_reward(HTTPReward(url, retries=0, timeout=5), PROMPTS, COMPLETIONS, {})
    assert str(told.value).isprintable() and len(str(told.value)) < 700


@pytest.mark.parametrize("token", ["secret\n", "sec\r\nX-Evil: ret", "secr\u20act", "\x7f"])
def test_a_token_that_no_header_can_hold_is_not_shown(token, monkeypatch):
    makers = [
        lambda: HTTPReward("http://127.0.0.1:1/", token=token),
        lambda: LLMJudge("http://127.0.0.1:1/", "m", "{completion}", low=0, high=1, token=token),
        lambda: RewardServer(length, token=token),
    ]
    for make in makers:
        with pytest.raises(InputError, match="The token for a server is empty, or has") as told:
            make()
        assert "sec" not in str(told.value) and str(told.value).isprintable()
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    with pytest.raises(InputError, match="REWARD_SERVER_TOKEN"):
        HTTPReward("http://127.0.0.1:1/")


@pytest.mark.parametrize(
    "url", ["http://me:pass@127.0.0.1:1/", "http://pa:ss/w@host/", "http://me@h"]
)
def test_an_address_with_a_password_is_refused_and_not_shown(url):
    with pytest.raises(InputError, match="holds a user's name or password") as told:
        HTTPReward(url)
    assert "pa" not in str(told.value).replace("password", "")


@pytest.mark.parametrize(
    "path", ["", "h:99999/", "a b/", "[::1", "h/\xe9", "h/\n", "a..b/", "h\x1b[2J/", "h:port/"]
)
def test_what_is_no_address(path):
    with pytest.raises(InputError, match="is not a server's address"):
        HTTPReward(f"http://{path}")


@pytest.fixture
def proxied(monkeypatch):
    """proxied(url): the environment sends everything through that proxy."""

    def set_proxy(url):
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", url)

    return set_proxy


def test_no_proxy_stands_between_a_run_and_its_own_machine(proxied):
    with running(RewardServer(length)) as server:
        proxied("http://127.0.0.1:1")
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{server.server_port}/score"
            assert HTTPReward(url, retries=0)(PROMPTS, COMPLETIONS) == [1, 2, 3]


def test_a_server_elsewhere_is_reached_through_the_proxy(proxied):
    with running(answering((200, b'{"scores": [1, 2, 3]}'))) as proxy:
        proxied(f"http://127.0.0.1:{proxy.server_port}")
        reward = HTTPReward("http://reward.invalid/score", retries=0)
        assert reward(PROMPTS, COMPLETIONS) == [1, 2, 3]


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1:80", True),
        ("127.8.9.1", True),
        ("[::1]:80", True),
        ("LocalHost", True),
        ("reward.localhost", True),
        ("10.0.0.1", False),
        ("[2001:db8::1]", False),
        ("notlocalhost", False),
        ("127.0.0.1.example", False),
    ],
)
def test_which_addresses_are_the_machines_own(host, own):
    assert is_loopback(urlsplit(f"http://{host}/score").hostname) == own


def test_an_answer_may_not_be_endless(monkeypatch):
    monkeypatch.setattr(http_reward, "MOST_BYTES", 10)
    with pytest.raises(RewardError, match="more than 10 bytes"):
        asked((200, b'{"scores": [1, 2, 3]}'))


def test_what_json_cannot_hold_is_an_error():
    with pytest.raises(RewardError, match="cannot be written as JSON"):
        HTTPReward("http://127.0.0.1:1")(["a"], ["b"], column=[object()])
    with pytest.raises(InputError, match="'127.0.0.1:80' is not a server's address"):
        HTTPReward("127.0.0.1:80")


def test_the_token_is_asked_for(monkeypatch):
    with running(RewardServer(length, token="secret")) as server:
        assert ask(server.url.replace("score", "health"))[0] == 200
        for token in (None, "Secret", "\xe9"):
            with pytest.raises(RewardUnreachableError, match="HTTP 401"):
                HTTPReward(server.url, token=token)(PROMPTS, COMPLETIONS)
        assert HTTPReward(server.url, token="secret")(PROMPTS, COMPLETIONS) == [1, 2, 3]
        monkeypatch.setenv("REWARD_SERVER_TOKEN", "secret")
        assert HTTPReward(server.url)(PROMPTS, COMPLETIONS) == [1, 2, 3]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "Not a JSON object"),
        (b"[1]", 400, "an object is needed"),
        (b"[" * 100_000, 400, "Not a JSON object"),
        (b'{"prompts": ["a"]}', 422, "needs the lists"),
        (b'{"prompts": ["a"], "completions": []}', 422, "`prompts` must be a list as long"),
        (b'{"prompts": ["a"], "completions": ["b"], "x": "c"}', 422, "`x` must be a list"),
        (b'{"prompts": [1], "completions": [2]}', 422, "TypeError"),
        (b'{"prompts": [], "completions": []}', 200, ""),
        (b" " * 200_001, 413, "200000 are allowed"),
    ],
)
def test_what_a_server_refuses(body, status, message):
    def judge(prompts, completions):
        return [float(len(p + c)) for p, c in zip(prompts, completions, strict=True)]

    with running(RewardServer(judge, max_bytes=200_000)) as server:
        told, content = ask(server.url, body)
        assert (told, message in content.get("error", "")) == (status, True)
        assert ask(server.url, b'{"prompts": ["a"], "completions": ["b"]}')[0] == 200


def test_what_is_no_request_and_paths_that_are_not_there():
    with running(RewardServer(length)) as server:
        assert ask(server.url)[0] == 404
        for path in ("s", "/"):
            assert ask(server.url + path, b"{}")[0] == 404
        health = ask(server.url.replace("score", "health"))
        assert health == (200, {"status": "ok", "reward": "length"})
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/score")
        connection.putheader("Content-Length", "-1")
        connection.endheaders()
        assert connection.getresponse().status == 400
        connection.close()
        with pytest.raises(InputError, match="No server can listen at 127.0.0.1"):
            RewardServer(length, port=server.server_port)


def test_a_request_may_come_in_parts_without_a_size():
    """One that is too large is refused before all of it has come."""
    content = json.dumps({"prompts": PROMPTS, "completions": COMPLETIONS}).encode()
    with running(RewardServer(length, max_bytes=1000)) as server:
        for parts, status in ((content[:20], content[20:]), 200), ((b" " * 500,) * 3, 413):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.putrequest("POST", "/score")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            for part in parts:
                connection.send(b"%x\r\n%s\r\n" % (len(part), part))
            if status == 200:  # of the other, the end never comes
                connection.send(b"0\r\n\r\n")
            answer = connection.getresponse()
            told = json.loads(answer.read())
            assert answer.status == status
            assert told.get("scores") == [1, 2, 3] or "1000 are allowed" in told["error"]
            connection.close()


def test_requests_are_scored_one_at_a_time():
    inside = []

    def judge(prompts, completions):
        inside.append(1)
        threading.Event().wait(0.05)
        assert inside == [1]
        inside.pop()
        return [1.0] * len(completions)

    with running(RewardServer(judge)) as server:
        threads = [
            threading.Thread(target=HTTPReward(server.url), args=(PROMPTS, COMPLETIONS))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert HTTPReward(server.url)(PROMPTS, COMPLETIONS) == [1.0] * 3
    assert inside == []


def test_beyond_loopback_a_token_is_needed():
    for host in ("0.0.0.0", "", "::", "10.0.0.1", "[::1]", "example"):
        with pytest.raises(InputError, match="for other machines without a token. Set REWARD_S"):
            RewardServer(length, host=host)
    RewardServer(length, host="0.0.0.0", token="secret").server_close()
    RewardServer(length, host="127.8.9.1").server_close()


def test_an_empty_token_variable_is_no_permission(monkeypatch):
    monkeypatch.setattr(cli, "load_reward", lambda *_, **__: length)
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "")
    with pytest.raises(InputError, match="is empty, .* Check REWARD_SERVER_TOKEN"):
        cli.serve_reward_command(["--reward_model_path", "runs/rm", "--port", "0"])


def test_a_large_request_without_the_token_is_told_so():
    """The server reads on: closing an unread connection resets it, and the answer is lost."""
    with running(RewardServer(length, token="secret")) as server:
        for _ in range(5):
            with pytest.raises(RewardUnreachableError, match="HTTP 401"):
                HTTPReward(server.url, retries=0)(PROMPTS, ["a" * 3_000_000] * 3)


def test_a_client_that_sends_a_byte_now_and_then_is_dropped(monkeypatch):
    monkeypatch.setattr(serving, "PATIENCE", 0.3)
    head = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n"
    with running(RewardServer(length)) as server:
        place = ("127.0.0.1", server.server_port)
        with socket.create_connection(place, timeout=10) as client:
            client.sendall(head)
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(place) as client:
            client.sendall(head)
            began = time.monotonic()
            with pytest.raises(OSError):  # the connection is closed
                while time.monotonic() - began < 2:
                    client.sendall(b"x")
                    REAL_SLEEP(0.02)


def test_clients_that_never_end_their_headers_keep_nobody_from_being_served():
    before = threading.active_count()
    with running(RewardServer(length)) as server, contextlib.ExitStack() as stack:
        for start in (b"", b"POST /score HTTP/1.1\r\nX: ") * 100:
            place = ("127.0.0.1", server.server_port)
            stack.enter_context(socket.create_connection(place)).sendall(start)
        for _ in range(3):
            assert HTTPReward(server.url, retries=0)(PROMPTS, COMPLETIONS) == [1, 2, 3]
        assert threading.active_count() - before <= 2  # the server's, and the one that scores


def test_bodies_are_bounded_and_requests_wait(monkeypatch, capfd):
    monkeypatch.setattr(reward_server, "MOST_REQUESTS", 2)
    scores = []
    with running(RewardServer(length)) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            place = ("127.0.0.1", server.server_port)
            slow = stack.enter_context(socket.create_connection(place))
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n")
        REAL_SLEEP(0.2)
        client = threading.Thread(
            target=lambda: scores.extend(HTTPReward(server.url)(PROMPTS, COMPLETIONS))
        )
        client.start()
        REAL_SLEEP(0.2)
        assert ask(server.url.replace("score", "health"))[0] == 200
        assert scores == []
        slow.close()
        client.join()
    assert scores == [1, 2, 3]
    assert capfd.readouterr().err == ""  # a client that has gone is no fault of the server's


def test_health_is_told_while_a_request_is_scored_and_the_end_waits_for_that_one_alone():
    inside, told, ends = threading.Event(), threading.Event(), []

    def judge(prompts, completions):
        inside.set()
        assert told.wait(10)
        return length(prompts, completions)

    def client():
        try:
            ends.append(HTTPReward(server.url, retries=0)(PROMPTS, COMPLETIONS))
        except RewardUnreachableError as error:
            ends.append("HTTP 503" in str(error) and "The server ends." in str(error))

    with running(RewardServer(judge)) as server:
        clients = [threading.Thread(target=client) for _ in range(2)]
        clients[0].start()
        assert inside.wait(10)
        assert ask(server.url.replace("score", "health"))[0] == 200
        clients[1].start()
        REAL_SLEEP(0.3)
        server.shutdown()
        told.set()
        for each in clients:
            each.join()
    assert [1, 2, 3] in ends and True in ends


def test_64_clients_that_come_at_once_all_get_a_place():
    server = RewardServer(length)  # not yet serving: all of them wait
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            place = ("127.0.0.1", server.server_port)
            stack.enter_context(socket.create_connection(place, timeout=0.5))
    server.server_close()


def test_a_server_whose_own_reward_is_away_is_tried_again(waits):
    message = "HTTP 503 .*127.0.0.1:1/ gave no answer"
    with (
        running(RewardServer(HTTPReward("http://127.0.0.1:1/", retries=0))) as server,
        pytest.raises(RewardUnreachableError, match=message),
    ):
        HTTPReward(server.url, retries=2)(PROMPTS, COMPLETIONS)
    assert waits == [1, 2]


@contextmanager
def serve_reward(*arguments, **environment):
    """`trl-instruct serve-reward` as a process of its own; its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve-reward", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_served_model_is_loaded_as_asked(monkeypatch):
    def load(reward, *, model_config, **options):
        raise InputError(f"{reward} in {model_config.dtype}")

    monkeypatch.setattr(cli, "load_reward", load)
    with pytest.raises(InputError, match="runs/rm in bfloat16"):
        cli.serve_reward_command(["--reward_model_path", "runs/rm", "--dtype", "bfloat16"])


@pytest.mark.parametrize("missing", ["starlette.applications", "uvicorn"])
def test_a_missing_package_is_told_with_the_extra(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("trl_instruct.serving", "trl_instruct.rewards.server"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve-reward", "--reward_model_path", "runs/rm"])
    told = capsys.readouterr().err
    assert told.startswith("serve-reward: error: ") and told.count("\n") == 1
    assert "pip install 'trl-instruct[serve]'" in told


@pytest.mark.slow
def test_only_who_serves_loads_a_web_server():
    code = (
        "import sys, trl_instruct.cli; print(*{'starlette', 'uvicorn'}.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_the_command_serves_any_reward(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text(
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
        "def one(prompts, completions):\n    return [1] * len(completions)\n"
    )
    arguments = ["--reward_model_path", f"{file}:short", f"{file}:one", "--reward_weights", 2, 1]
    with serve_reward(*arguments, "--port", 0, REWARD_SERVER_TOKEN="t") as (_, line):
        url = line.rpartition(" ")[2].strip()
        assert line.startswith("scores of short + one: http://127.0.0.1:")
        assert HTTPReward(url, token="t")(PROMPTS, COMPLETIONS) == [-1, -3, -5]
