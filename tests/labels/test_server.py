"""The page's server: what a labeler gets and gives, and what strangers do not."""

import json

import pytest
from starlette.testclient import TestClient

from trl_instruct.data.labels import LabelStore
from trl_instruct.errors import InputError
from trl_instruct.labels.progress import progress
from trl_instruct.labels.server import MOST_BYTES, PAGE, LabelPage, label_app

HOST = "127.0.0.1:8017"
OURS = {"host": HOST, "origin": f"http://{HOST}"}
TEXTS = ["one", "two", "three", "four"]


@pytest.fixture
def store(tmp_path):
    store = LabelStore(tmp_path / "labels.db")
    store.add(
        {"prompt": f"Q{row}", "responses": TEXTS, "sources": [["sft"], ["ppo"]], "topic": "secret"}
        for row in range(3)
    )
    return store


def client(store, **options):
    app = label_app(LabelPage(store, **options), 8017, ("labels.example.org",))
    return TestClient(app, base_url=f"http://{HOST}")


@pytest.fixture
def page(store):
    opened = client(store, questions=("rude?",))
    assert opened.get("/", params={"token": store.token}).status_code == 200
    return opened


def post(page, name, given, **headers):
    return page.post(f"/api/{name}", json=given, headers={**OURS, **headers})


def ranks_of(shown, best_first):
    """Ranks, in the order shown, that put the texts in this order."""
    texts = [response[0][1] for response in shown["responses"]]
    return [best_first.index(text) + 1 for text in texts]


def test_what_is_shown_is_shuffled_and_what_comes_back_is_put_in_place(page, store):
    found = post(page, "next", {"labeler": "anna"}).json()
    shown = found["item"]
    assert found["questions"] == ["rude?"] and shown["prompt"] == [["", "Q0"]]
    texts = [response[0][1] for response in shown["responses"]]
    assert sorted(texts) == sorted(TEXTS)
    best_first = ["three", "one", "four", "two"]
    given = {
        "labeler": "anna",
        "id": "answer-1",
        "item": shown["item"],
        "action": "label",
        "ranks": ranks_of(shown, best_first),
        "overall": [7 - texts.index(text) for text in texts],
        "checks": {"rude?": [text == "two" for text in texts]},
        "seconds": 3.21,
        "note": "so",
    }
    assert post(page, "save", given).json()["saved"] is True
    answer = store.answers()[0]
    assert answer.content == {
        "ranks": [2, 4, 1, 3],
        "overall": [7 - texts.index(text) for text in TEXTS],
        "checks": {"rude?": [False, True, False, False]},
        "seconds": 3.2,
        "note": "so",
        "flag": False,
    }
    # Taken back, it comes as it was given.
    taken = post(page, "undo", {"labeler": "anna", "id": "answer-2"}).json()
    assert taken["item"] == shown
    for name in ("ranks", "overall", "checks"):
        assert taken["answer"][name] == given[name]


def test_labelers_see_the_answers_in_orders_of_their_own(store):
    page = client(store, labels_per_prompt=99)
    page.get("/", params={"token": store.token})
    orders = set()
    for name in "abcdefgh":
        shown = post(page, "next", {"labeler": name}).json()["item"]
        again = post(page, "next", {"labeler": name}).json()["item"]
        assert shown == again
        orders.add(tuple(response[0][1] for response in shown["responses"]))
    assert len(orders) > 3


def test_sources_and_other_columns_stay_here(page):
    found = post(page, "next", {"labeler": "anna"}).text
    assert not any(word in found for word in ("sft", "ppo", "secret", "sources", "topic"))


def test_messages_are_shown_with_their_roles(store, page):
    user, reply = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "\ud800"}]
    store.add([{"prompt": user, "responses": [reply, "Hello"]}])
    for row in range(3):
        shown = post(page, "next", {"labeler": "anna"}).json()["item"]
        skip = {"labeler": "anna", "id": f"answer-{row}", "item": shown["item"], "action": "skip"}
        found = post(page, "save", skip).json()["item"]
    assert found["prompt"] == [["user", "Hi"]]
    assert sorted(found["responses"]) == [[["", "Hello"]], [["assistant", "\ud800"]]]


def test_without_the_token_there_is_nothing(store):
    stranger = client(store)
    for path in ("/", "/label.js", "/instructions.md"):
        assert stranger.get(path).status_code == 401
    assert stranger.get("/", params={"token": store.token[:-1]}).status_code == 401
    assert stranger.get("/label.js", params={"token": store.token}).status_code == 401
    assert post(stranger, "next", {"labeler": "x"}).status_code == 401
    assert "set-cookie" not in stranger.get("/").headers
    with pytest.raises(InputError, match="no split"):
        LabelStore(store.address).records("x")


def test_the_cookie_is_for_the_page_alone(store):
    response = client(store).get("/", params={"token": store.token})
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "trl-label-8017=" in cookie
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    # Nothing inline that the policy would have to allow.
    html = (PAGE / "index.html").read_text()
    assert "style=" not in html and "onclick" not in html and html.count("<script") == 2
    script = (PAGE / "label.js").read_text()
    assert "innerHTML" not in script and "insertAdjacent" not in script and "eval(" not in script


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.example:8017", "origin": "http://evil.example:8017"},  # DNS rebinding
        {"host": "", "origin": "http://"},
    ],
)
def test_requests_of_other_sites_are_refused(page, store, headers):
    answer = post(page, "next", {"labeler": "anna"}, **headers)
    assert answer.status_code == 403
    assert "reserved" not in answer.text


def test_a_request_that_changes_something_needs_an_origin(page):
    answer = page.post("/api/next", json={"labeler": "anna"})
    assert answer.status_code == 403
    assert page.get("/api/next").status_code == 405


@pytest.mark.parametrize("host", [HOST, "localhost:8017", "[::1]:8017", "labels.example.org:8017"])
def test_the_names_of_this_machine_are_known(page, host):
    answer = post(page, "next", {"labeler": "anna"}, host=host, origin=f"http://{host}")
    assert answer.status_code == 200


def test_a_request_that_is_too_large_is_refused(page, store):
    note = {"labeler": "anna", "id": "answer-1", "item": store.items()[0].key, "action": "skip"}
    assert post(page, "save", {**note, "note": "x" * MOST_BYTES}).status_code == 413
    assert store.answers() == []
    assert post(page, "save", {**note, "note": "x" * 5000}).status_code == 200


@pytest.mark.parametrize(
    "changed, status, message",
    [
        ({"labeler": ""}, 422, "1 to 40 printable letters"),
        ({"labeler": "a\x1b[2J"}, 422, "1 to 40 printable letters"),
        ({"id": "x"}, 422, "8 to 64 letters"),
        ({"item": "unknown"}, 422, "no such item"),
        ({"ranks": [1]}, 400, "not as the page sends it"),
        ({"ranks": None}, 422, "`ranks` must be"),
        ({"ranks": [1, 2, 3, 9]}, 422, "`ranks` must be"),
        ({"action": "delete"}, 422, "'label' or 'skip'"),
        ({"seconds": "soon"}, 400, "not as the page sends it"),
    ],
)
def test_a_request_that_is_wrong_is_told_and_stores_nothing(page, store, changed, status, message):
    given = {"labeler": "anna", "id": "answer-1", "item": store.items()[0].key, "action": "label"}
    answer = post(page, "save", {**given, "ranks": [1, 2, 3, 4], **changed})
    assert answer.status_code == status and message in answer.json()["error"]
    assert store.answers() == []


def test_what_is_no_json_is_told(page):
    answer = page.post("/api/save", content=b"{", headers=OURS)
    assert answer.status_code == 400


def test_saved_says_whether_it_counts(page, store):
    given = {"labeler": "anna", "id": "answer-1", "item": store.items()[0].key, "action": "skip"}
    assert post(page, "save", given).json()["saved"] is True
    assert post(page, "save", given).json()["saved"] is True  # sent again
    assert post(page, "save", {**given, "id": "answer-2"}).json()["saved"] is False


def label(store, labeler, ranks, **content):
    item = store.next_item(labeler, 9)
    store.save(f"{labeler}-{item.key}", item.key, labeler, "label", {"ranks": ranks, **content})


def test_agreement_by_hand(store):
    label(store, "anna", [1, 2, 3, 3], seconds=4.0)
    label(store, "bob", [1, 3, 2, 2], seconds=8.0)
    # Pairs of the first: alike three times. The second against the others: twice not alike. The
    # last two are a tie.
    found = progress(store.answers(), items=3, labels_per_prompt=2)
    assert found["agreement"] == {"mean": 3 / 5, "low": None, "high": None, "pairs": 5}
    assert "NaN" not in json.dumps(found)
    label(store, "anna", [1, 2, 3, 4], seconds=6.0)
    label(store, "bob", [1, 2, 3, 4], flag=True)
    found = progress(store.answers(), items=3, labels_per_prompt=2)
    assert found["agreement"]["mean"] == pytest.approx(9 / 11)
    assert found["agreement"]["pairs"] == 11
    assert 0 < found["agreement"]["low"] < 9 / 11 < found["agreement"]["high"] < 1
    assert (found["items"], found["done"]) == (3, 2)
    anna, bob = found["labelers"]
    assert (anna["labelled"], anna["seconds"], anna["flagged"]) == (2, 5.0, 0)
    assert (bob["labelled"], bob["seconds"], bob["flagged"]) == (2, 8.0, 1)
    assert anna["agreement"]["mean"] == bob["agreement"]["mean"] == pytest.approx(9 / 11)
    nobody = progress([], items=3, labels_per_prompt=1)
    assert nobody == {"items": 3, "done": 0, "agreement": None, "labelers": []}


def test_trying_checkpoints_needs_checkpoints(store, page):
    assert post(page, "ask", {"prompt": "Hi"}).status_code == 422
    asked = client(store, answer=lambda prompt: {"sft": f"{prompt}!", "ppo": "\ud800"})
    asked.get("/", params={"token": store.token})
    answers = post(asked, "ask", {"prompt": "Hi"}).json()["answers"]
    assert answers == {"sft": "Hi!", "ppo": "\ud800"}


def test_an_old_cookie_is_good_after_a_restart(page, store):
    again = client(LabelStore(store.address))
    again.cookies.update(dict(page.cookies))
    assert post(again, "next", {"labeler": "anna"}).status_code == 200
