"""The page in a real browser: `make test-browser`. Chromium is Debian's, or in CHROMIUM."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

pytest.importorskip("playwright")

from datasets import Dataset
from playwright.sync_api import expect, sync_playwright

from trl_instruct.data.labels import LabelStore
from trl_instruct.recipes.rm import rm

SERVE = """
import sys
from trl_instruct.data.labels import LabelStore
from trl_instruct.labels.server import LabelPage, serve
page = LabelPage(LabelStore(sys.argv[1]), questions=("rude?",))
serve(page, "127.0.0.1", int(sys.argv[2]))
"""
expect.set_options(timeout=30_000)  # a busy machine
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Server:
    """The page's server in a process of its own, which can be killed and started again."""

    def __init__(self, address):
        self.store = LabelStore(address)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/?token={self.store.token}"
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVE, self.store.address, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait(self):
        assert self.process.stdout.readline().startswith("label: http")

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "labels.db")
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        yield playwright.chromium.launch(executable_path=path, args=OPTIONS)


@pytest.fixture
def labeler(chromium, server):
    """Opens the page for somebody."""
    contexts = []

    def opened(name):
        contexts.append(chromium.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("dialog", lambda dialog: page.faults.append(dialog.message))
        page.goto(server.url)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        return page

    yield opened
    for context in contexts:
        context.close()


def add(server, count, responses=("Red.", "Blue.", "Green.", "Yellow.")):
    server.store.add(
        {
            "prompt": f"Which colour has number {row}?",
            "responses": [f"{row} {r}" for r in responses],
        }
        for row in range(count)
    )


def order_by_mouse(page):
    """The last answer to the top."""
    cards = page.locator(".card")
    first, last = cards.nth(0).bounding_box(), cards.nth(3).locator(".place").bounding_box()
    page.mouse.move(last["x"] + 5, last["y"] + 5)
    page.mouse.down()
    page.mouse.move(last["x"] + 5, last["y"] - 20)
    page.mouse.move(first["x"] + 20, first["y"] + 8, steps=3)
    page.mouse.up()


def order_by_keys(page, row):
    """The second to the top, tied with the first, or another one down."""
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("7")
    if row % 2:
        page.keyboard.press("ArrowDown")
        page.keyboard.press("=")
    if row % 3 == 0:
        page.keyboard.press("Shift+Digit4")


def shown_ranks(page):
    """What the labeler sees: each answer's place."""
    both = """(cards) => cards.map((card) => [card.querySelector(".text").innerText,
        Number(card.querySelector(".place").innerText)])"""
    return dict(page.locator(".card").evaluate_all(both))


def test_a_hundred_rankings_survive_three_kills(server, labeler, tokenizer, policy, tmp_path):
    add(server, 100)
    mouse, keys = labeler("mouse"), labeler("keys")
    pages, expected = {"mouse": mouse, "keys": keys}, {}
    for page in pages.values():
        expect(page.locator(".card")).to_have_count(4)
    started = time.monotonic()
    for turn in range(100):
        name = ("mouse", "keys")[turn % 2]
        page = pages[name]
        prompt = page.locator("#prompt").inner_text()
        order_by_mouse(page) if name == "mouse" else order_by_keys(page, turn // 2)
        expected[name, prompt] = shown_ranks(page)
        page.click("#save") if name == "mouse" else page.keyboard.press("Enter")
        if turn in (20, 51, 80):
            server.kill()  # while it saves: before, after, or between storing and answering
            server.start()
            server.wait()
        if turn < 98:
            expect(page.locator("#prompt")).not_to_have_text(prompt)
        expect(page.locator("#state")).to_have_text("Saved.")
    seconds = time.monotonic() - started
    for page in pages.values():
        expect(page.locator("#far span")).to_contain_text("100 of 100 · you 50")
        expect(page.locator("#done")).to_be_visible()
        assert page.faults == []
    stored = {}
    for answer in server.store.answers():
        place = answer.labeler, answer.item.prompt
        assert place not in stored
        stored[place] = dict(zip(answer.item.responses, answer.content["ranks"], strict=True))
    assert stored == expected
    assert sum(len(set(ranks.values())) < 4 for ranks in stored.values()) == 17  # ties
    print(f"100 rankings in {seconds:.1f} s")
    assert seconds < 60

    records = server.store.records()
    path = tmp_path / "rankings.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    options = {
        "max_steps": 3,
        "report_to": [],
        "processing_class": tokenizer,
        "save_strategy": "no",
    }
    results = [
        rm(policy, source, tmp_path / name, **options).metrics
        for name, source in {"store": server.store.address, "file": str(path)}.items()
    ]
    assert results[0]["train_loss"] == results[1]["train_loss"]
    assert results[0]["accuracy"] == results[1]["accuracy"]


def test_texts_are_shown_as_they_are(server, labeler):
    hostile = [
        "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>",
        "\x1b[2J\u202egnp.exe",
        "x" * 1_000_000,
        "```python\nprint('<b>')\n```\n- one\n- two\n\n好的。",
    ]
    server.store.add([{"prompt": "<svg onload=alert(2)>", "responses": hostile}])
    page = labeler("<i>anna</i>")
    expect(page.locator("#prompt")).to_have_text("<svg onload=alert(2)>")
    expect(page.locator("#answers")).to_contain_text(hostile[0])
    expect(page.locator("#answers")).to_contain_text("U+001b[2JU+202egnp.exe")
    expect(page.locator("#answers pre")).to_have_text("print('<b>')")
    assert page.locator("#answers li li").all_inner_texts() == ["one", "two"]
    assert page.locator("main img, main script, main svg, main b").count() == 0
    page.click("text=Show all 1,000,000 letters")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#done")).to_be_visible()
    page.click("[data-tab=team]")
    expect(page.locator("#team")).to_contain_text("<i>anna</i>")
    assert page.title() == "Label · <i>anna</i>" and page.faults == []


def test_an_order_that_nobody_touched_is_asked_about(server, labeler):
    add(server, 2)
    page = labeler("anna")
    expect(page.locator(".card")).to_have_count(4)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_contain_text("Save again if it is right")
    assert server.store.answers() == []
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_contain_text("number 1")
    assert [answer.labeler for answer in server.store.answers()] == ["anna"]


def test_undo_skip_flag_note_and_a_draft_over_a_reload(server, labeler):
    add(server, 3)
    page = labeler("anna")
    expect(page.locator(".card")).to_have_count(4)
    page.keyboard.press("f")
    page.locator(".checks input").nth(1).check()
    page.keyboard.press("n")
    page.keyboard.type("not s, f or u")
    page.keyboard.press("Escape")
    page.locator(".card").nth(0).locator("text=▼").click()
    before = shown_ranks(page)
    page.reload()
    expect(page.locator(".card")).to_have_count(4)
    assert shown_ranks(page) == before
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_contain_text("number 1")
    answer = server.store.answers()[0].content
    assert (answer["flag"], answer["note"]) == (True, "not s, f or u")
    assert sorted(answer["checks"]["rude?"]) == [False, False, False, True]
    page.keyboard.press("u")
    expect(page.locator("#prompt")).to_contain_text("number 0")
    assert server.store.answers() == []
    assert shown_ranks(page) == before
    assert page.locator("#note").input_value() == "not s, f or u"
    page.keyboard.press("Shift+Digit3")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_contain_text("number 1")
    page.keyboard.press("s")
    expect(page.locator("#prompt")).to_contain_text("number 2")
    assert [answer.action for answer in server.store.answers()] == ["label", "skip"]
    assert page.faults == []


def test_two_windows_of_one_labeler_and_an_old_one(server, labeler):
    add(server, 3)
    one = labeler("anna")
    expect(one.locator(".card")).to_have_count(4)
    other = one.context.new_page()
    other.goto(server.url)
    expect(other.locator("#prompt")).to_contain_text("number 0")
    for page in (one, other):
        page.keyboard.press("Shift+ArrowDown")
    one.keyboard.press("Enter")
    expect(one.locator("#prompt")).to_contain_text("number 1")
    other.keyboard.press("Enter")
    expect(other.locator("#state")).to_contain_text("answered that prompt in another window")
    assert len(server.store.answers()) == 1
    server.kill()
    server.start()
    server.wait()
    one.keyboard.press("Shift+ArrowDown")  # the old page goes on where it was
    one.keyboard.press("Enter")
    expect(one.locator("#prompt")).to_contain_text("number 2")
    assert len(server.store.answers()) == 2


def test_strangers_and_other_sites_get_nothing(server, chromium, labeler):
    add(server, 1)
    page = chromium.new_page()
    assert page.goto(server.url[:-1]).status == 401
    assert page.goto(server.url.partition("?")[0]).status == 401
    page.close()

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>evil</title>")

        def log_message(self, *_):
            pass

    evil = HTTPServer(("127.0.0.1", 0), Evil)
    Thread(target=evil.serve_forever, daemon=True).start()
    page = labeler("anna")  # who has the cookie
    expect(page.locator(".card")).to_have_count(4)
    key = server.store.items()[0].key
    answer = {"labeler": "anna", "id": "from-evil", "item": key, "action": "skip"}
    for host in ("localhost", "127.0.0.1"):  # another site; another port of the same one
        page.goto(f"http://{host}:{evil.server_port}/")
        for mode in ("no-cors", "cors"):
            sent = page.evaluate(
                """([url, body, mode]) => fetch(url, {method: "POST", body, mode,
                credentials: "include"}).then((r) => r.text(), () => "failed")""",
                [f"http://127.0.0.1:{server.port}/api/save", json.dumps(answer), mode],
            )
            assert sent in ("", "failed")
        framed = page.evaluate(
            """(url) => new Promise((done) => { const f = document.createElement("iframe");
            f.src = url; f.onload = () => { try { done(f.contentDocument?.title ?? "hidden") }
            catch { done("hidden") } }; document.body.append(f) })""",
            server.url,
        )
        assert framed == "hidden"
    assert server.store.answers() == []
    evil.shutdown()


def test_everything_fits_on_a_phone(server, labeler):
    long = ["a" * 300, "b " * 300, "```\n" + "c" * 300 + "\n```"]
    server.store.add([{"prompt": "word " * 50, "responses": long}])
    page = labeler("anna")
    page.set_viewport_size({"width": 360, "height": 640})
    expect(page.locator(".card")).to_have_count(3)
    for tab in ("label", "team", "guide", "keys"):
        page.click(f"[data-tab={tab}]")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, f"{tab} is {wide} pixels wide"


def test_records_of_the_page_are_a_dataset(server, labeler):
    add(server, 1)
    page = labeler("anna")
    expect(page.locator(".card")).to_have_count(4)
    page.keyboard.press("Shift+Digit4")
    page.keyboard.press("Enter")
    expect(page.locator("#done")).to_be_visible()
    dataset = Dataset.from_list(server.store.records())
    assert dataset[0]["labeler"] == "anna" and sorted(dataset[0]["ranks"]) == [1, 2, 3, 4]
