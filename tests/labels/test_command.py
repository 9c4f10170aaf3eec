"""`trl-instruct label`: what it shows, where it keeps labels, and that no stage touches them."""

import json
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset
from test_recipes import DEMONSTRATIONS

from trl_instruct import cli, sft
from trl_instruct.console import table
from trl_instruct.data.labels import LabelStore
from trl_instruct.labels import command
from trl_instruct.labels.comparisons import comparison, comparison_rows

ROOT = Path(__file__).parents[2]
CANDIDATES = [
    {"prompt": f"Q{row}", "responses": ["a", "b", "a", f"c{row}"], "ranks": None, "topic": "t"}
    for row in range(3)
]


@pytest.fixture
def served(monkeypatch):
    """The pages that would have been served."""
    pages = []
    monkeypatch.setattr(command, "serve", lambda page, host, port: pages.append(page))
    return pages


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_candidates_of_a_stage_are_labelled_beside_its_folder(tmp_path, served, capsys):
    write(tmp_path / "candidates" / "train.jsonl", CANDIDATES)
    write(tmp_path / "candidates" / "test.jsonl", [{**CANDIDATES[0], "scores": [4, 3, 4, 1]}])
    (tmp_path / "candidates" / "config.yaml").write_text("seed: 0\n")
    folder = str(tmp_path / "candidates")
    cli.main(["label", folder, "--questions", "rude?", "--labels_per_prompt", "2"])
    assert f"{tmp_path}/labels.db: 3 prompts, 3 of them new" in capsys.readouterr().out
    (page,) = served
    assert (page.questions, page.labels_per_prompt, page.answer) == (("rude?",), 2, None)
    item = page.store.items()[0]
    assert (item.prompt, item.responses, item.columns) == ("Q0", ["a", "b", "c0"], {"topic": "t"})
    # Again, with what is new; the held-out part is a split of its own, without its scores.
    cli.main(["label", f"{folder}/train.jsonl"])
    cli.main(["label", folder, "--split", "test"])
    cli.main(["label", str(tmp_path / "labels.db")])
    assert {Path(page.store.address) for page in served} == {tmp_path / "labels.db"}
    # The test split repeats the first prompt with its answers: it is there already.
    assert [item.split for item in page.store.items()] == ["train"] * 3


def test_a_held_out_part_is_a_split_of_its_own(tmp_path, served):
    write(tmp_path / "c" / "train.jsonl", CANDIDATES[:1])
    write(tmp_path / "c" / "test.jsonl", [{**CANDIDATES[1], "ranks": [1, 2, 1, 4]}])
    cli.main(["label", str(tmp_path / "c")])
    cli.main(["label", str(tmp_path / "c"), "--split", "test"])
    found = [(item.prompt, item.split, item.columns) for item in served[-1].store.items()]
    assert found == [("Q0", "train", {"topic": "t"}), ("Q1", "test", {"topic": "t"})]


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (None, [], "There is nothing to label"),
        (None, ["--models", "a=b"], "There is nothing to label"),
        (None, ["nowhere.db"], "nowhere.db: no such store of labels"),
        (None, ["nowhere.jsonl"], "no such file or folder"),
        (CANDIDATES, ["--labels_per_prompt", "0"], "labels_per_prompt is 0"),
        ([{"prompt": "Q"}], [], "`responses` missing"),
        ([{"prompt": "Q", "responses": ["a", "a"]}], [], "has 1 that differ"),
        ([{"prompt": "Q", "responses": list("abcdefghij")}], [], "has 10 that differ"),
        ([{"prompt": "Q", "responses": ["a", ""]}], [], "line 1: `responses[1]` is empty"),
        (CANDIDATES, ["--split", "test"], "no split 'test'"),
        (CANDIDATES, ["--port", "99999"], "No page can be served at 127.0.0.1, port 99999"),
    ],
)
def test_what_cannot_be_labelled_is_told_in_one_line(
    tmp_path, monkeypatch, capsys, rows, options, message
):
    monkeypatch.chdir(tmp_path)
    source = []
    if rows:
        write(tmp_path / "c.jsonl", rows)
        source = [str(tmp_path / "c.jsonl")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["label", *source, *options])
    *_, last = capsys.readouterr().err.strip().splitlines()  # after the bars of datasets
    assert last.startswith("label: error: ") and message in last
    stores = [tmp_path / "labels.db"] if "--port" in options else []
    assert list(tmp_path.rglob("*.db")) == stores


def test_win_rates_by_hand(tmp_path):
    store = LabelStore(tmp_path / "comparisons.db")
    answers = [("aa", "b"), ("cc", "dd"), ("e", "e"), ("f", "gg")]
    store.add(
        comparison(f"Q{row}", dict(zip(("sft", "ppo"), texts, strict=True)))
        for row, texts in enumerate(answers)
    )
    assert comparison_rows(store) == ("no blind labels", [])
    for labeler, ranks in {"x": [[2, 1], [1, 1], [2, 1]], "y": [[2, 1], [1, 2], [2, 1]]}.items():
        for given in ranks:
            item = store.next_item(labeler, 2)
            content = {"ranks": given, "overall": [3, 5] if labeler == "x" else None}
            store.save(f"{labeler}{item.prompt}", item.key, labeler, "label", content)
    assert store.next_item("x", 2) is None  # nobody is asked about the same answer
    head, rows = comparison_rows(store)
    title, sft, ppo = table(rows)
    assert head == "6 blind labels; the same answer: 1 prompts"
    assert "preferred to sft" in title
    assert sft.split()[:3] == ["sft", "-", "-"] and "3.000 [3.000, 3.000]" in sft
    # ppo: 1 + 1, 1/2 + 0, 1 + 1, and 1/2 for the same answer: 5 of 7.
    assert ppo.split()[1] == "0.714" and "5.000 [5.000, 5.000]" in ppo


def test_checkpoints_are_compared_and_tried(tmp_path, served, policy, tokenizer, capsys):
    for name in ("sft", "ppo"):
        policy.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write(tmp_path / "prompts.jsonl", [{"prompt": f"Q{row}: "} for row in range(3)])
    models = [f"{name}={tmp_path / name}" for name in ("sft", "ppo")]
    data = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--response_length", "4"]
    cli.main(["label", "--models", *models, *data])
    (page,) = served
    assert Path(page.store.address) == tmp_path / "comparisons.db"
    items = page.store.items()
    assert [item.prompt for item in items] == ["Q0: ", "Q1: ", "Q2: "]
    # The same weights and seed answer alike: nobody has to say that they are as good.
    assert all(item.columns["sources"] == [["sft", "ppo"]] for item in items)
    answers = page.ask({"prompt": "Hi"})["answers"]
    assert list(answers) == ["sft", "ppo"] and answers["sft"] == answers["ppo"]
    cli.main(["label", str(tmp_path / "comparisons.db"), "--report"])
    assert len(served) == 1
    assert "labels: 0 in" in capsys.readouterr().out


def test_prompts_are_written_as_the_first_model_was_trained(tmp_path, served, policy, tokenizer):
    policy.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    (tmp_path / "sft" / "config.yaml").write_text("prompt_suffix: '?'\n")
    (tmp_path / "sft" / "metrics.json").write_text('{"stage": "sft"}')
    write(tmp_path / "prompts.jsonl", [{"prompt": "Q"}])
    data = ["--dataset_name", str(tmp_path / "prompts.jsonl"), "--response_length", "4"]
    cli.main(["label", "--models", str(tmp_path / "sft"), *data])
    (item,) = served[0].store.items()
    assert item.prompt == "Q?"


@pytest.mark.slow
def test_no_stage_touches_labels(tmp_path, policy, tokenizer):
    store = LabelStore(tmp_path / "labels.db")
    store.add(CANDIDATES)
    item = store.next_item("x")
    store.save("1", item.key, "x", "label", {"ranks": [1, 2, 3, 4]})
    options = {"max_steps": 1, "report_to": [], "processing_class": tokenizer, "max_length": 64}
    for overwrite in (False, True):
        data = Dataset.from_list(DEMONSTRATIONS)
        sft(policy, data, tmp_path / "sft", overwrite_output_dir=overwrite, **options)
    assert len(LabelStore(tmp_path / "labels.db").answers()) == 1
    with pytest.raises(ValueError, match="holds 'labels.db"):
        sft(policy, data, tmp_path, overwrite_output_dir=True, **options)
    assert len(LabelStore(tmp_path / "labels.db").answers()) == 1


def test_make_clean_keeps_labels(tmp_path):
    for name in ("runs/own/labels.db", "runs/own/labels.db-wal", "runs/own/sft/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    make = ["make", "-f", str(ROOT / "Makefile"), "clean", "CONFIG=own"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["runs/own/labels.db", "runs/own/labels.db-wal"]


def test_make_trains_on_what_people_said():
    make = ["make", "-n", "-B", "-o", "install", "sft", "candidates", "label", "rm", "CONFIG=tiny"]
    told = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line for line in told.splitlines() if "label" in line]
    assert "trl-instruct label runs/tiny/candidates" in lines[0]
    assert "--dataset_name runs/tiny/labels.db" in lines[1] and len(lines) == 2
    assert "labels.db" not in subprocess.run(
        [*make[:5], "sft", "candidates", "rm", "CONFIG=tiny"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_an_answer_that_several_models_gave_is_shown_once():
    shown = comparison("2+2=", {"sft": "4", "ppo": "4", "base": "5"})
    sources = [["sft", "ppo"], ["base"]]
    assert shown == {"prompt": "2+2=", "responses": ["4", "5"], "sources": sources}
