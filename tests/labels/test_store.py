"""The store of labels: what is saved stays, counts once, and is shared out as the overlap says."""

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset

from trl_instruct.configs import RewardConfig
from trl_instruct.data import labels
from trl_instruct.data.labels import LabelStore, check_label
from trl_instruct.data.preferences import load_preferences
from trl_instruct.data.rankings import load_rankings
from trl_instruct.errors import InputError

RECORDS = [
    {"prompt": f"Q{row}", "responses": [f"a{row}", f"b{row}", f"c{row}"]} for row in range(4)
]
RANKS = {"ranks": [2, 1, 2]}


@pytest.fixture
def store(tmp_path):
    store = LabelStore(tmp_path / "labels.db")
    store.add(RECORDS)
    return store


def label(store, labeler, answer_id, **overlap):
    item = store.next_item(labeler, **overlap)
    assert store.save(answer_id, item.key, labeler, "label", RANKS)
    return item.prompt


def test_the_same_items_are_added_once_and_new_ones_beside_them(store):
    assert store.add([*RECORDS, {"prompt": "new", "responses": ["a", "b"]}]) == 1
    assert [item.prompt for item in store.items()] == ["Q0", "Q1", "Q2", "Q3", "new"]
    # Other responses to a known prompt are another item: labels keep their meaning.
    assert store.add([{"prompt": "Q0", "responses": ["x", "y"]}]) == 1
    assert store.items()[0].responses == ["a0", "b0", "c0"]


def test_nobody_gets_an_item_twice_and_all_are_shared_out(store):
    seen = [(who, label(store, who, f"{who}{row}")) for row in range(2) for who in "xy"]
    assert [prompt for _, prompt in seen] == ["Q0", "Q1", "Q2", "Q3"]
    assert store.next_item("x") is None and store.next_item("y") is None


def test_an_open_item_is_reserved_for_its_labeler_for_a_while(store, monkeypatch):
    assert store.next_item("x").prompt == "Q0"
    assert store.next_item("y").prompt == "Q1"
    assert store.next_item("x").prompt == "Q0"  # the page was loaded again
    monkeypatch.setattr(labels.time, "time", lambda: 1e12)  # much later
    assert store.next_item("z").prompt == "Q0"
    item = store.items()[0].key
    assert store.save("z", item, "z", "label", RANKS)
    # What somebody has worked on is kept even then.
    assert store.save("x", item, "x", "label", RANKS)
    assert [answer.labeler for answer in store.answers()] == ["x", "z"]


@pytest.mark.parametrize("overlap", [1, 2, 3])
def test_labelers_at_once_never_get_more_than_the_overlap(tmp_path, overlap):
    store = LabelStore(tmp_path / "labels.db")
    store.add({"prompt": str(row), "responses": ["a", "b", "c"]} for row in range(6))

    def work(labeler):
        own, done = LabelStore(tmp_path / "labels.db"), []
        while (item := own.next_item(labeler, overlap)) is not None:
            own.save(f"{labeler}{item.prompt}", item.key, labeler, "label", RANKS)
            done.append(item.prompt)
        return done

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, "wxyz"))
    assert all(len(set(prompts)) == len(prompts) for prompts in done)
    everything = sorted(prompt for prompts in done for prompt in prompts)
    assert everything == sorted(str(row) for row in range(6) for _ in range(overlap))


def test_an_answer_that_is_sent_again_is_stored_once(store):
    item = store.next_item("x")
    assert store.save("same", item.key, "x", "label", RANKS)
    assert store.save("same", item.key, "x", "label", RANKS)
    assert len(store.answers()) == 1
    # From another window, where the item is still open.
    assert not store.save("other", item.key, "x", "label", {"ranks": [1, 2, 3]})
    assert store.answers()[0].content == RANKS


def test_a_skipped_item_goes_to_somebody_else(store):
    item = store.next_item("x")
    store.save("1", item.key, "x", "skip", {"flag": True, "note": "not a question"})
    assert store.next_item("x").prompt == "Q1"
    assert store.next_item("y").prompt == "Q0"
    with pytest.raises(InputError, match="none of 4 prompts is labelled"):
        store.records()


def test_taking_back_is_an_answer_too(store):
    first, second = label(store, "x", "1"), label(store, "x", "2")
    taken = store.undo("3", "x")
    assert (taken.item.prompt, taken.action, taken.content) == (second, "label", RANKS)
    assert store.undo("3", "x").item.prompt == second  # sent again
    assert store.next_item("y").prompt == "Q2"  # it is reserved
    assert store.next_item("x").prompt == second
    store.save("4", taken.item.key, "x", "label", {"ranks": [1, 1, 1]})
    assert [answer.content["ranks"] for answer in store.answers()] == [[2, 1, 2], [1, 1, 1]]
    assert store.undo("5", "x").item.prompt == second
    assert store.undo("6", "x").item.prompt == first
    assert store.undo("7", "x") is None
    assert store.answers() == []
    history = sqlite3.connect(store.address).execute("select action from answers order by number")
    done = [action for (action,) in history if action != "open"]
    assert done == ["label", "label", "undo", "label", "undo", "undo"]


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_saved(tmp_path):
    address = tmp_path / "labels.db"
    LabelStore(address).add({"prompt": str(row), "responses": ["a", "b", "c"]} for row in range(99))
    script = (
        "import sys; from trl_instruct.data.labels import LabelStore\n"
        "store = LabelStore(sys.argv[1])\n"
        "while item := store.next_item('x'):\n"
        "    store.save(item.prompt, item.key, 'x', 'label', {'ranks': [2, 1, 2]})\n"
        "    print(item.prompt, flush=True)\n"
    )
    told = []
    for count in (1, 7, 20):
        command = [sys.executable, "-c", script, str(address)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            told += [child.stdout.readline().strip() for _ in range(count)]
            os.kill(child.pid, signal.SIGKILL)
            told += child.stdout.read().split()
    saved = [answer.item.prompt for answer in LabelStore(address).answers()]
    assert set(told) <= set(saved) and len(set(saved)) == len(saved)
    assert len(set(told)) == len(told) >= 28
    settings = sqlite3.connect(address).execute("pragma journal_mode").fetchone()
    assert settings == ("wal",)


def test_labels_are_rankings_for_the_reward_model(store, tmp_path, caplog):
    store.add([{"prompt": "T", "responses": ["a", "b"], "topic": "t"}], "test")
    store.add([{"prompt": "Q9", "responses": ["a", "b", "c"], "number": 0}])
    label(store, "x", "1", labels_per_prompt=2)
    label(store, "y", "2", labels_per_prompt=2)
    item = store.items()[-1]
    more = {"overall": [7, None, 1], "checks": {"harmful?": [True, False, False]}, "note": "hm"}
    store.save("3", item.key, "x", "label", {"ranks": [3, 1, 2], **more, "flag": False})
    rankings = load_rankings(store.address)
    assert load_rankings(Path(store.address).parent)[:] == rankings[:]
    assert "2 of 5 prompts labelled, by 2 labelers" in caplog.text
    assert rankings["number"] == [None, None, 0]  # a column of the item
    assert rankings["labeler"] == ["x", "y", "x"]
    assert rankings["ranks"] == [[2, 1, 2], [2, 1, 2], [3, 1, 2]]
    assert rankings["overall"] == [None, None, [7, None, 1]]
    assert rankings["note"] == [None, None, "hm"]
    assert "flag" not in rankings.column_names  # nobody used it
    with pytest.raises(InputError, match="no split 'dev'; there are test, train"):
        load_rankings(store.address, "dev")
    kept = [
        {k: record[k] for k in ("prompt", "responses", "ranks", "labeler")}
        for record in store.records()
    ]
    config = RewardConfig(output_dir=str(tmp_path / "rm"), eval_size=0, report_to=[])
    both = [
        load_preferences(source, None, None, config)
        for source in (store.address, Dataset.from_list(kept))
    ]
    columns = ("prompt", "responses", "ranks", "labeler")
    assert both[0].train.select_columns(columns)[:] == both[1].train.select_columns(columns)[:]
    assert both[0].counts == both[1].counts


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "`ranks` must be 3 whole numbers from 1 to 3: None"),
        ({"ranks": [1, 2]}, "`ranks` must be 3"),
        ({"ranks": [1, 2, 4]}, "`ranks` must be 3"),
        ({"ranks": [1, 2, True]}, "`ranks` must be 3"),
        ({"ranks": [1, 2, [1]]}, "`ranks` must be 3"),
        ({"ranks": [1, 2, 3], "overall": [1, 8, None]}, "ratings from 1 to 7 or null"),
        ({"ranks": [1, 2, 3], "checks": {"rude?": [1, 0, 0]}}, "yes or no to 'rude\\?'"),
    ],
)
def test_a_label_must_fit_its_responses(store, content, message):
    with pytest.raises(InputError, match=message):
        store.save("1", store.items()[0].key, "x", "label", content)
    assert store.answers() == []


def test_any_ranks_with_ties_fit():
    for ranks in ([1, 1, 1], [1, 2, 2], [3, 2, 1]):
        check_label({"ranks": ranks, "overall": [7, None, 1]}, 3)


def test_any_text_is_stored_as_it_is(store):
    hostile = ["<script>alert(1)</script>", "\x1b[2J", "\u202edcba", "\0", "\ud800", "x" * 10**6]
    store.add([{"prompt": "say it", "responses": hostile}])
    assert store.items()[-1].responses == hostile


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "notes.db"
    path.write_text("my notes, which are no database, and long enough to be read as one\n" * 50)
    with pytest.raises(InputError, match="cannot be used as a store of labels"):
        LabelStore(path)
    assert path.read_text().startswith("my notes")
    with pytest.raises(InputError, match="no such file"):
        load_rankings(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()


def test_two_stores_in_one_place_have_one_token(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        tokens = set(pool.map(lambda _: LabelStore(tmp_path / "labels.db").token, range(4)))
    assert len(tokens) == 1 and len(tokens.pop()) == 32
    assert (tmp_path / "labels.db").stat().st_mode & 0o077 == 0
