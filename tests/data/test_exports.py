"""What is exported is what the tools hold, by hand, and what our readers read back."""

import json

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from test_shapes import a, u

from trl_instruct.cli import main
from trl_instruct.data.exports import FORMATS, export
from trl_instruct.data.preferences import as_rankings, load_either
from trl_instruct.data.rankings import load_rankings
from trl_instruct.errors import InputError

STRICT = [
    {"prompt": "Reed?", "responses": ["Read.", "Sedge.", "芦苇\n"], "ranks": [3, 1, 2]},
    {"prompt": "Reed?", "responses": ["Read.", "Sedge.", "芦苇\n"], "ranks": [1, 2, 3]},
    {"prompt": "Fern?", "responses": ["<b>Fir</b>", "Bracken."], "ranks": [2, 1]},
    {"prompt": "Reed?", "responses": ["Rush.", "Read."], "ranks": [1, 2]},
]
STRICT = [{**row, "labeler": name} for row, name in zip(STRICT, "xyxx", strict=True)]
TIED = {"prompt": "Moss?", "responses": ["A.", "B.", "C."], "ranks": [2, 1, 2], "labeler": "7"}
TALK = [
    {"prompt": [u("Hi"), a("Hello."), u("Reed?")], "responses": [[a("No.")], [a("Sedge.")]]}
    | {"ranks": [2, 1], "labeler": "x"}
]


def exported(rows, path, to):
    return export(load_rankings(Dataset.from_list(rows)), path, to)


def read_back(path):
    return sorted(map(ranking, as_rankings(load_either(path))), key=repr)


def ranking(record):
    """A ranking, whatever the order in which its responses are listed."""
    replies = zip(record["ranks"], record["responses"], strict=True)
    return record["prompt"], sorted(replies, key=repr), record.get("labeler")


@pytest.mark.parametrize("to", sorted({*FORMATS} - {"pairs", "label-studio-pairwise"}))
@pytest.mark.parametrize("rows", [STRICT, [*STRICT, TIED], TALK], ids=["strict", "ties", "chat"])
def test_rankings_come_back_as_they_were(rows, to, tmp_path):
    path = tmp_path / f"a.json{'' if '-' in to else 'l'}"
    told = exported(rows, path, to)
    held = rows
    if rows[-1] is TIED and to in ("label-studio-ranker", "argilla-ranking"):
        held, tool = STRICT, to.rpartition("-")[0]
        assert told.endswith(f": 1 ranking with ties (--to {tool}-rating holds them)")
    else:
        assert "not held" not in told
    assert read_back(path) == sorted(map(ranking, held), key=repr)


def test_pairwise_holds_every_pair_with_a_winner(tmp_path):
    path = tmp_path / "a.json"
    told = exported([STRICT[0], TIED], path, "label-studio-pairwise")
    assert told == f"{path}: 5 tasks; not held there: ties, which pairs are one ranking"
    pairs = [("Sedge.", "Read."), ("芦苇\n", "Read."), ("Sedge.", "芦苇\n")]
    reed = [("Reed?", [(1, best), (2, other)], "x") for best, other in pairs]
    moss = [("Moss?", [(1, "B."), (2, other)], "7") for other in ("A.", "C.")]
    assert read_back(path) == sorted(reed + moss, key=repr)
    told = exported(STRICT[2:], tmp_path / "two.json", "label-studio-pairwise")
    assert told.endswith("two.json: 2 tasks")
    assert read_back(tmp_path / "two.json") == sorted(map(ranking, STRICT[2:]), key=repr)


def test_pairs_of_rankings_and_of_pairs(tmp_path):
    told = exported(STRICT[2:], tmp_path / "a.jsonl", "pairs")
    assert told == f"{tmp_path / 'a.jsonl'}: 2 pairs; not held there: labeler"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").open(encoding="utf-8")]
    assert lines == [
        {"prompt": "Fern?", "chosen": "Bracken.", "rejected": "<b>Fir</b>"},
        {"prompt": "Reed?", "chosen": "Rush.", "rejected": "Read."},
    ]
    pairs = Dataset.from_list([{**lines[0], "margin": 2.0}])
    assert export(pairs, tmp_path / "b.jsonl", "pairs") == f"{tmp_path / 'b.jsonl'}: 1 pair"
    assert json.loads((tmp_path / "b.jsonl").read_text()) == pairs[0]


def test_a_folder_that_the_hub_can_show(tmp_path):
    told = exported(STRICT, tmp_path / "mine", "rankings")
    assert told.startswith(f"{tmp_path / 'mine' / 'train.jsonl'}: {len(STRICT)} ranking")
    data = load_dataset(str(tmp_path / "mine"), split="train")
    assert data["ranks"][:] == [row["ranks"] for row in STRICT]
    card = DatasetCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "unknown" and "| ranks | one for each response" in card.text
    with pytest.raises(InputError, match="it exists"):
        exported(STRICT, tmp_path / "mine", "rankings")


def test_what_label_studio_gets(tmp_path):
    """The shapes of its Ranker, Pairwise and Rating tags (docs/source/tags)."""
    user = {"id": "x", "email": "x"}

    def task(to):
        exported(STRICT[2:3], tmp_path / f"{to}.json", f"label-studio-{to}")
        (one,) = json.loads((tmp_path / f"{to}.json").read_text())
        (annotation,) = one["annotations"]
        assert annotation["completed_by"] == user
        return one["data"], annotation["result"]

    listed = [("response_1", "<b>Fir</b>"), ("response_2", "Bracken.")]
    data, (result,) = task("ranker")
    items = [{"id": name, "title": name, "body": text} for name, text in listed]
    assert data == {"prompt": "Fern?", "items": items}
    order = {"ranker": {"rank": ["response_2", "response_1"]}}
    assert result == {**{"from_name": "rank", "to_name": "items", "type": "ranker", "value": order}}
    data, (result,) = task("pairwise")
    assert data == {"prompt": "Fern?", "left": "<b>Fir</b>", "right": "Bracken."}
    tag = {"from_name": "comparison", "to_name": "comparison", "type": "pairwise"}
    assert result == {**tag, "value": {"selected": "right"}}
    data, results = task("rating")
    assert data == {"prompt": "Fern?", **dict(listed)}
    assert results == [
        {"from_name": f"{name}_rating", "to_name": name, "type": "rating", "value": {"rating": n}}
        for name, n in (("response_1", 1), ("response_2", 2))
    ]


def test_what_argilla_gets(tmp_path):
    """The records that its `to_json` writes."""
    exported([STRICT[2]], tmp_path / "a.json", "argilla-ranking")
    (record,) = json.loads((tmp_path / "a.json").read_text())
    fields = {"prompt": "Fern?", "response_1": "<b>Fir</b>", "response_2": "Bracken."}
    order = {"value": ["response_2", "response_1"], "user_id": "x"}
    assert record == {"fields": fields, "responses": {"ranking": [order]}}
    exported([TIED], tmp_path / "b.json", "argilla-rating")
    (record,) = json.loads((tmp_path / "b.json").read_text())
    assert record["responses"] == {
        f"response_{n}_rating": [{"value": stars, "user_id": "7"}]
        for n, stars in ((1, 1), (2, 2), (3, 1))
    }


def test_what_is_not_held_is_said(tmp_path):
    rows = [{**row, "weight": 2.0, "gold_scores": [0.0] * len(row["ranks"])} for row in STRICT]
    told = exported([*rows, {**TIED, "weight": 1.0}], tmp_path / "a.json", "argilla-ranking")
    assert told == (
        f"{tmp_path / 'a.json'}: 4 tasks; not held there: gold_scores, weight, 1 ranking "
        "with ties (--to argilla-rating holds them)"
    )


def test_what_cannot_be_exported(tmp_path):
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(InputError, match="as argilla-rating: it exists. Name a new file"):
        exported(STRICT, tmp_path / "there.json", "argilla-rating")
    with pytest.raises(InputError, match=r"as pairs: its name does not end with .jsonl"):
        exported(STRICT, tmp_path / "a.json", "pairs")
    with pytest.raises(InputError, match="holds no ties, and each of the 1 rankings has some"):
        exported([TIED], tmp_path / "a.json", "label-studio-ranker")
    talk = [{**TALK[0], "responses": [[a("No."), u("?"), a("No.")], [a("Sedge.")]]}]
    with pytest.raises(InputError, match="hold one text: use --to rankings"):
        exported(talk, tmp_path / "a.json", "argilla-ranking")
    assert (tmp_path / "there.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_the_command(tmp_path, capsys):
    source = tmp_path / "words.jsonl"
    row = {"question": "Reed?", "responses": ["Read.", "Sedge."], "ratings": ["poor", "good"]}
    source.write_text(json.dumps(row))
    options = ["--columns", "prompt=question", "--rating_order", "good", "poor"]
    main(["export", str(source), str(tmp_path / "a.json"), "--to", "argilla-ranking", *options])
    assert f"{tmp_path / 'a.json'}: 1 task; not held there: scores" in capsys.readouterr().out
    assert read_back(tmp_path / "a.json") == [("Reed?", [(1, "Sedge."), (2, "Read.")], None)]
    with pytest.raises(SystemExit):
        main(["export", str(source), str(tmp_path / "b.json"), "--to", "csv"])
    assert "invalid choice: 'csv'" in capsys.readouterr().err
