import pytest
from datasets import Dataset, DatasetDict
from test_recipes import DEMONSTRATIONS, PAIRS, RANKINGS, chat, write

from trl_instruct.configs import RewardConfig
from trl_instruct.data.preferences import as_rankings, count_pairs, load_preferences
from trl_instruct.data.rankings import RankingCounts
from trl_instruct.errors import InputError


def load(rows, held_out=None, demonstrations=None, **options):
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    given = held_out and Dataset.from_list(held_out)
    return load_preferences(data, given, demonstrations, RewardConfig(use_cpu=True, **options))


def test_held_out_rankings_stay_whole():
    labelers = [
        {**row, "ranks": ranks, "labeler": name, "weight": 2.0}
        for row in RANKINGS
        for name, ranks in (("x", [3, 1, 2]), ("y", [2, 1, 3]))
    ]
    data = load(labelers, eval_size=0.25)
    assert (len(data.train), len(data.held_out)) == (12, 4)
    sides = [sorted(set(side["prompt"])) for side in (data.train, data.held_out)]
    assert sorted(sides[0] + sides[1]) == sorted(row["prompt"] for row in RANKINGS)
    for side in (data.train, data.held_out):
        for row in side:
            assert row["ranks"] == {"x": [3, 1, 2], "y": [2, 1, 3]}[row["labeler"]]
            assert row["weight"] == 2.0
    assert data.counts == RankingCounts(16, 48, 48, 0, 0, 0)
    assert count_pairs(data.train) == 36


def by_labelers(*names):
    return [{**row, "labeler": name} for row in RANKINGS for name in names]


def test_labelers_are_left_out(caplog):
    rows = by_labelers("anna", "bob", None, "7")
    data = load(rows, rows[:8], leave_out_labelers=["bob", "7"])
    assert data.train["labeler"][:] == ["anna", None] * 8
    assert data.held_out["labeler"][:] == ["anna", None] * 2
    told = [record.message for record in caplog.records if "left out" in record.message]
    assert told == [f"the given Dataset: left out: {n} records by 7, bob" for n in (16, 4)]
    assert load(rows, rows[2:3], leave_out_labelers=["bob"]).held_out["labeler"][:] == [None]


def test_labelers_who_are_not_there():
    with pytest.raises(InputError, match=r"names 'Bob', but there are anna, bob\. Name one of"):
        load(by_labelers("anna", "bob"), leave_out_labelers=["Bob", "anna"])
    with pytest.raises(InputError, match="names 'bob', but no record has a `labeler`"):
        load(RANKINGS, leave_out_labelers=["bob"])
    with pytest.raises(InputError, match="all 8 records are by labelers that leave_out_labelers"):
        load(by_labelers("anna"), leave_out_labelers=["anna"])


def test_a_fault_after_a_labeler_who_is_left_out_is_at_its_line(tmp_path):
    def refuse(record):
        raise InputError(record["labeler"])

    path = write(tmp_path / "a.jsonl", by_labelers("anna", "bob"))
    config = RewardConfig(use_cpu=True, leave_out_labelers=["anna"])
    with pytest.raises(InputError, match=r"a.jsonl, line 2: bob"):
        load_preferences(path, None, None, config, fits=refuse)


def test_pairs_are_trained_on_as_pairs_and_measured_as_rankings_of_two():
    data = load([{**row, "margin": 1.0} for row in PAIRS], eval_size=0.25)
    assert {"chosen", "rejected", "margin"} <= set(data.train.column_names)
    assert (count_pairs(data.train), len(data.held_out)) == (6, 2)
    assert data.held_out["responses"][0] == ["good one", "bad"]
    assert data.held_out["ranks"][0] == [1, 2]
    assert data.counts == RankingCounts(8, 16, 8, 0, 0, 0)


def test_the_split_that_is_held_out():
    splits = DatasetDict(
        {"train": Dataset.from_list(RANKINGS[:6]), "test": Dataset.from_list(RANKINGS[6:])}
    )
    config = RewardConfig(use_cpu=True, dataset_test_split="test")
    data = load_preferences(splits, splits, None, config)
    assert (len(data.train), data.held_out["prompt"][:]) == (6, ["Q6: ", "Q7: "])


@pytest.mark.parametrize("form", [dict, chat])
def test_pairs_as_rankings(form):
    row = form(PAIRS[0])
    (ranking,) = as_rankings(Dataset.from_list([row]))
    both = [row["chosen"], row["rejected"]]
    assert ranking == {"prompt": row["prompt"], "responses": both, "ranks": [1, 2]}


def test_ratings_in_words(tmp_path):
    rows = [
        {"prompt": f"{i}", "responses": ["a", "b", "c"], "ratings": ["fair", "good", "fair"]}
        for i in range(4)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, rows, rating_order=["good", "ok", "fair", "poor"])
    assert data.train["ranks"][:] == [[2, 1, 2]] * 4
    assert data.held_out["ranks"][:] == [[2, 1, 2]] * 4
    assert data.counts.ties == 4
    with pytest.raises(InputError, match=r"a.jsonl, line 1: .*best first: rating_order=\["):
        load(path, rows)


def test_pairs_whose_prompts_may_be_cut_become_rankings():
    data = load(PAIRS, truncate_prompt=True, eval_size=0)
    assert data.train["ranks"][:] == [[1, 2]] * 8
    with pytest.raises(InputError, match="truncate_prompt and pairs with a `margin`"):
        load([{**row, "margin": 1.0} for row in PAIRS], truncate_prompt=True)


def test_what_cannot_be_learnt_from_or_measured():
    ties = [{**row, "ranks": [1, 1, 1]} for row in RANKINGS]
    with pytest.raises(
        InputError, match="None of the 8 rankings to train on has a pair with a winner"
    ):
        load(ties, eval_size=0)
    with pytest.raises(InputError, match="of the 8 rankings held out has a pair with a winner"):
        load(RANKINGS, ties)
    with pytest.raises(InputError, match="eval_size holds out prompts"):
        load(RANKINGS[:1], eval_size=0.1)


def test_demonstrations_of_the_same_form():
    shown = Dataset.from_list(DEMONSTRATIONS)
    assert load(RANKINGS, demonstrations=shown).demonstrations.to_list() == DEMONSTRATIONS
    assert load(RANKINGS).demonstrations is None
    with pytest.raises(InputError, match="demonstrations are text and the preferences messages"):
        load([chat(row) for row in RANKINGS], demonstrations=shown)
