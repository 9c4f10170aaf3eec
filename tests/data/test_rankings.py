import json
import math
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_instruct.data.orders import canonical_order, dense_ranks
from trl_instruct.data.rankings import Ranking, RankingCounts, canonical_ranking, load_rankings
from trl_instruct.errors import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"
ORDER = ["good", "ok", "fair", "poor"]
CHAT = [{"role": "user", "content": "2+2="}]


def reply(content):
    return [{"role": "assistant", "content": content}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 2, 3]),
        ({"ranks": [2, 1, 3]}, [2, 1, 3]),
        ({"ranks": [1, 1, 3]}, [1, 1, 2]),
        ({"ranks": [7.0, 5.0, 7.0]}, [2, 1, 2]),
        ({"scores": [0.5, 2, -1]}, [2, 1, 3]),
        ({"scores": [1, 1, 1]}, [1, 1, 1]),
        ({"ratings": [7, 1, 7]}, [1, 2, 1]),
        ({"ratings": ["fair", "good", "poor"]}, [2, 1, 3]),
        ({"scores": ["fair", "good", "fair"]}, [2, 1, 2]),
        ({"ranks": [2, 1, 3], "scores": [0.1, 0.2, 0.0]}, [2, 1, 3]),
        ({"ranks": None, "scores": [1, 2, 3]}, [3, 2, 1]),
    ],
)
def test_every_field_gives_dense_ranks(fields, expected):
    order = ORDER if "fair" in str(fields) else None
    assert canonical_order({"responses": ["a", "b", "c"], **fields}, order)[0] == expected


def test_the_order_of_numbers_can_be_given_too():
    record = {"responses": ["a", "b", "c"], "ratings": [1, 3, 2]}
    assert canonical_order(record, rating_order=[1, 2, 3])[0] == [1, 3, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"responses": None}, "`responses` is null or absent; a list of K >= 2"),
        ({"responses": "ab"}, "`responses` is str 'ab'; a list of K >= 2"),
        ({"responses": []}, "`responses` has K = 0; a ranking needs at least 2"),
        ({"responses": ["a"]}, "`responses` has K = 1; a ranking needs at least 2"),
        ({"responses": ["a", " "]}, r"`responses\[1\]` is empty \(' '\)"),
        ({"responses": ["a", None]}, r"`responses\[1\]` is null"),
        ({"responses": ["a", reply("b")]}, r"`responses\[1\]` is messages, but `prompt` is text"),
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": None}, "`prompt` is null"),
        ({"ranks": None}, "`ranks` null: the ranking is not filled in. Write one number"),
        ({"ranks": None, "scores": None}, "`ranks`, `scores` null: the ranking is not filled in"),
        ({"ranks": [1]}, r"`ranks` has 1 values for 2 responses: \[1\]"),
        ({"ranks": []}, "`ranks` has 0 values for 2 responses"),
        ({"scores": [1, 2, 3]}, "`scores` has 3 values for 2 responses"),
        ({"ranks": 1}, "`ranks` is int 1; a list of 2 is needed"),
        ({"ranks": [0, 1]}, r"`ranks\[0\]` is int 0; a whole number >= 1"),
        ({"ranks": [1, 1.5]}, r"`ranks\[1\]` is float 1.5; a whole number >= 1"),
        ({"ranks": [1, None]}, r"`ranks\[1\]` is null"),
        ({"ranks": [1, math.nan]}, r"`ranks\[1\]` is float nan"),
        ({"ranks": [True, 2]}, r"`ranks\[0\]` is bool True"),
        ({"ranks": ["1", 2]}, r"`ranks\[0\]` is str '1'"),
        ({"scores": [math.nan, 1]}, r"`scores\[0\]` is float nan; a finite number"),
        ({"scores": [1, math.inf]}, r"`scores\[1\]` is float inf; a finite number"),
        ({"scores": [1, None]}, r"`scores\[1\]` is null"),
        ({"ratings": ["good", "bad"]}, r"`ratings\[1\]` is str 'bad'; rating_order has \['good',"),
        ({"ranks": [1, 2], "scores": [0, 1]}, r"`ranks` and `scores` contradict .* \[2, 1\]"),
        ({"ranks": [1, 1], "scores": [0, 1]}, "contradict"),
        ({"weight": 0}, "`weight` is int 0; a finite number > 0"),
        ({"weight": -1.0}, "`weight` is float -1.0"),
        ({"weight": math.nan}, "`weight` is float nan"),
        ({"weight": math.inf}, "`weight` is float inf"),
        ({"weight": "2"}, "`weight` is str '2'"),
    ],
)
def test_a_faulty_ranking_is_named(fields, message):
    record = {"prompt": "2+2=", "responses": ["a", "b"], **fields}
    with pytest.raises(InputError, match=message):
        canonical_ranking(record, ORDER)


@pytest.mark.parametrize(
    "field",
    [
        {"rank": [3, 2, 1]},
        {"Rewards": [0.1, 0.2, 0.7]},
        {"labels": ["poor", "ok", "good"]},
        {"correct": [False, False, True]},
        {"winner": "c"},
    ],
)
def test_an_order_under_another_name_is_not_taken_for_best_first(field):
    record = {"prompt": "2+2=", "responses": ["a", "b", "c"], **field}
    (name,) = field
    with pytest.raises(InputError, match=f"`{name}` is .*Rename it to `ranks`"):
        canonical_ranking(record)
    assert canonical_ranking({**record, "ranks": [3, 2, 1]}).ranks == [3, 2, 1]


def test_columns_that_are_no_order_stay_with_best_first():
    record = {
        "prompt": "2+2=",
        "responses": ["a", "b"],
        "models": ["x", "y"],
        "id": 7,
        "rank": None,
    }
    assert canonical_ranking(record).ranks == [1, 2]


def test_labels_without_an_order():
    record = {"prompt": "2+2=", "responses": ["a", "b"], "ratings": ["good", "ok"]}
    with pytest.raises(InputError, match=r"the label 'good', .*rating_order=\["):
        canonical_ranking(record)


def test_labels_count_as_scores_from_the_worst():
    record = {"prompt": "2+2=", "responses": ["a", "b"], "ratings": ["fair", "good"]}
    assert canonical_ranking(record, ORDER) == Ranking("2+2=", ["a", "b"], [2, 1], [1.0, 3.0], 0)


def test_a_repeated_response_keeps_its_better_rank():
    record = {"prompt": "?", "responses": ["a", "b", "a", "c"], "scores": [1.0, 2.0, 3.0, 0.5]}
    assert canonical_ranking(record) == Ranking("?", ["b", "a", "c"], [2, 1, 3], [2.0, 3.0, 0.5], 1)


def test_text_responses_to_messages_become_messages():
    ranking = canonical_ranking({"prompt": CHAT, "responses": ["4", reply("5")]})
    assert ranking.responses == [reply("4"), reply("5")]


ranks = st.lists(st.integers(1, 9), min_size=2, max_size=9)


@given(ranks)
def test_dense_ranks_keep_the_order_and_have_no_gaps(values):
    dense = dense_ranks(values)
    assert set(dense) == set(range(1, len(set(values)) + 1))
    for a, x in zip(values, dense, strict=True):
        for b, y in zip(values, dense, strict=True):
            assert (a < b) == (x < y)


@given(ranks)
def test_pairs_and_ties_are_all_pairs(values):
    responses = [str(index) for index in range(len(values))]
    ranking = canonical_ranking({"prompt": "?", "responses": responses, "ranks": values})
    ties = sum(a == b for i, a in enumerate(values) for b in values[:i])
    assert ranking.counts.ties == ties
    assert ranking.counts.pairs == len(values) * (len(values) - 1) // 2 - ties


@pytest.mark.slow
@given(ranks, st.randoms(use_true_random=False))
def test_the_form_does_not_depend_on_the_order_of_responses(values, random):
    rows = [(f"r{index % 5}", value) for index, value in enumerate(values)]
    shuffled = random.sample(rows, len(rows))

    def form(rows):
        responses, ranks = zip(*rows, strict=True)
        record = {"prompt": "?", "responses": list(responses), "ranks": list(ranks)}
        ranking = canonical_ranking(record)
        return dict(zip(ranking.responses, ranking.ranks, strict=True)), ranking.duplicates

    assert form(rows) == form(shuffled)


@given(ranks)
def test_ranks_and_negated_scores_are_the_same(values):
    responses = [str(index) for index in range(len(values))]
    scores = [-float(value) for value in values]
    assert canonical_order({"responses": responses, "ranks": values}) == (
        canonical_order({"responses": responses, "scores": scores})[0],
        None,
    )


ROWS = [
    {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 1], "labeler": "x", "weight": 2},
    {"prompt": "p", "responses": ["a", "b", "a"], "scores": [0, 1, 2], "labeler": "y"},
    {"prompt": "r", "responses": ["a", "b"], "ranks": [1, 1]},
]
COUNTS = RankingCounts(3, 7, 3, 2, 1, 1)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_counts_reports_and_keeps(tmp_path, caplog, streaming):
    counts = RankingCounts()
    path = write(tmp_path / "a.jsonl", ROWS)
    with caplog.at_level("INFO", logger="trl_instruct"):
        rows = list(load_rankings(path, streaming=streaming, counts=counts))
    assert [row["prompt"] for row in rows] == ["p", "p", "r"]
    assert [row["ranks"] for row in rows] == [[2, 1, 1], [2, 1], [1, 1]]
    assert [row["scores"] for row in rows] == [None, [1.0, 2.0], None]
    assert [row["labeler"] for row in rows] == ["x", "y", None]
    assert [row["responses"] for row in rows][1] == ["b", "a"]
    assert counts == COUNTS
    assert "repeated response" in caplog.text
    if not streaming:
        assert str(COUNTS) in caplog.text


def test_loading_twice_changes_nothing(tmp_path):
    once = load_rankings(write(tmp_path / "a.jsonl", ROWS[:2]))
    counts = RankingCounts()
    assert load_rankings(once, counts=counts).to_list() == once.to_list()
    assert counts == RankingCounts(2, 5, 3, 1, 0, 0)


def test_the_report_reads_as_a_line():
    assert str(COUNTS) == (
        "3 rankings of 7 responses: 3 strict pairs, 2 ties, 1 repeated response, "
        "1 ranking without a pair"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("responses", [["4", "5"], [reply("4"), reply("5")]])
def test_conversational_rankings(tmp_path, streaming, responses):
    path = write(tmp_path / "a.jsonl", [{"prompt": CHAT, "responses": responses}])
    (row,) = load_rankings(path, streaming=streaming)
    assert (row["prompt"], row["responses"]) == (CHAT, [reply("4"), reply("5")])


def test_csv_and_parquet(tmp_path):
    csv = tmp_path / "a.csv"
    csv.write_text('prompt,responses,ratings\nq,"[""a"", ""b""]","[""ok"", ""good""]"\n')
    expected = [{"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1], "scores": [2.0, 3.0]}]
    assert load_rankings(csv, rating_order=ORDER).to_list() == expected
    Dataset.from_list(expected).to_parquet(tmp_path / "a.parquet")
    assert load_rankings(tmp_path / "a.parquet").to_list() == expected


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "q", "responses": ["a", "b"]}, "`ranks` null: the ranking is not filled in"),
        ({"prompt": "q", "responses": ["a"], "ranks": [1]}, "`responses` has K = 1"),
        ({"prompt": CHAT, "responses": ["a", "b"], "ranks": [1, 2]}, "`prompt` is messages, but"),
        ({"prompt": "q", "ranks": [1, 2]}, "`responses` is null or absent"),
        ({"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]}, "`responses` are 2 times the"),
    ],
)
def test_a_fault_names_its_line(tmp_path, bad, message, streaming):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], bad])
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: " + message):
        list(load_rankings(path, streaming=streaming))


def test_a_csv_with_labelers_and_weights(tmp_path):
    head = "prompt,responses,labeler,weight\n"
    row = 'q,"[""a"", ""b""]"'
    path = tmp_path / "a.csv"
    path.write_text(f"{head}{row},7,2\n{row},y,0.5\n{row},z,\n")
    rows = load_rankings(path).to_list()
    assert [(row["labeler"], row["weight"]) for row in rows] == [("7", 2), ("y", 0.5), ("z", None)]
    path.write_text(f"{head}{row},x,2\n{row},y,-1\n")
    with pytest.raises(InputError, match=r"row 2: `weight` is int -1; a finite number > 0"):
        load_rankings(path)


def test_wrong_columns():
    with pytest.raises(InputError, match=r'rename_column\("completions", "responses"\)'):
        load_rankings(Dataset.from_list([{"prompt": "q", "completions": ["a", "b"]}]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("oasst_zh_human_rankings", RankingCounts(772, 1984, 1798, 0, 0, 0)),
        ("alpacaeval_gpt4judge_rankings_train", RankingCounts(1693, 11005, 32650, 88, 0, 0)),
    ],
)
def test_real_rankings(name, expected):
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} lies in ../shared/data on the developers' machines only")
    counts = RankingCounts()
    assert len(load_rankings(path, counts=counts)) == expected.records
    assert counts == expected


def test_rankings_and_their_counts_by_hand():
    labels = {"responses": ["a", "b", "c"], "ratings": ["ok", "good", "ok"]}
    assert canonical_order(labels, rating_order=["good", "ok", "poor"]) == (
        [2, 1, 2],
        [1.0, 2.0, 1.0],
    )
    assert canonical_order({"responses": ["a", "b"]}) == ([1, 2], None)
    assert (dense_ranks([1, 1, 3]), dense_ranks([-0.5, -2.0, -0.5])) == ([1, 1, 2], [2, 1, 2])
    record = {"prompt": "2+2=", "responses": ["4", "5", "4"], "ranks": [3, 2, 1]}
    assert canonical_ranking(record) == Ranking("2+2=", ["5", "4"], [2, 1], None, 1)
    counts = RankingCounts()
    responses = ["4", "four", "5", "4"]
    ranking = canonical_ranking({"prompt": "?", "responses": responses, "ranks": [1, 1, 2, 1]})
    counts.update(ranking.counts)
    told = "1 ranking of 3 responses: 2 strict pairs, 1 tie, 1 repeated response, "
    assert str(counts) == told + "0 rankings without a pair"
