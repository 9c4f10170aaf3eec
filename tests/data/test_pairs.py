import json
import math
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from trl_instruct.data.pairs import (
    load_pairs,
    ranking_to_pairs,
    rankings_to_pairs,
    split_by_prompt,
)
from trl_instruct.data.rankings import RankingCounts, canonical_ranking, load_rankings
from trl_instruct.errors import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"
RANKED = {"prompt": "?", "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]}


def chat(content):
    return [{"role": "user", "content": content}]


def reply(content):
    return [{"role": "assistant", "content": content}]


def expand(*records, **options):
    pairs = rankings_to_pairs(Dataset.from_list(list(records)), **options)
    return [pair["chosen"] + pair["rejected"] for pair in pairs]


def indices(ranks, **options):
    responses = [f"r{index}" for index in range(len(ranks))]
    ranking = canonical_ranking({"prompt": "?", "responses": responses, "ranks": ranks})
    return ranking_to_pairs(ranking, **options)


def real(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} lies in ../shared/data on the developers' machines only")
    return DATA / name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "ab ac ad bd cd"),
        ({"which": "adjacent"}, "ab ac bd cd"),
        ({"which": "best_vs_rest"}, "ab ac ad"),
        ({"ties": "half"}, "ab ac ad bc cb bd cd"),
        ({"which": "adjacent", "ties": "half"}, "ab ac bc cb bd cd"),
        ({"which": "best_vs_rest", "ties": "half"}, "ab ac ad"),
    ],
)
def test_which_pairs_by_hand(options, expected):
    assert expand(RANKED, **options) == expected.split()


def test_two_best_are_each_against_the_rest():
    record = {"prompt": "?", "responses": ["a", "b", "c"], "ranks": [2, 1, 1]}
    assert expand(record, which="best_vs_rest") == ["ba", "ca"]
    assert expand(record, which="best_vs_rest", ties="half") == ["ba", "ca", "bc", "cb"]


def test_the_margin_is_the_difference_of_scores():
    record = {"prompt": "?", "responses": ["a", "b", "c"], "scores": [0.5, 2.0, 0.5]}
    pairs = rankings_to_pairs(Dataset.from_list([record]), margin=True, ties="half")
    rows = [(row["chosen"] + row["rejected"], row["margin"]) for row in pairs]
    assert rows == [("ba", 1.5), ("ac", 0.0), ("ca", 0.0), ("bc", 1.5)]
    assert pairs.column_names == ["prompt", "chosen", "rejected", "margin"]


rank_lists = st.lists(st.integers(1, 6), min_size=2, max_size=9)


@given(rank_lists)
def test_there_are_k_choose_2_pairs_less_the_ties(ranks):
    ties = sum(math.comb(count, 2) for count in Counter(ranks).values())
    everything = math.comb(len(ranks), 2)
    assert len(indices(ranks)) == everything - ties
    assert len(indices(ranks, ties="half")) == everything + ties


@given(rank_lists)
def test_nothing_is_lost(ranks):
    pairs = indices(ranks)
    expected = {(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b}
    assert set(pairs) == expected
    assert len(pairs) == len(expected)


@given(rank_lists, st.sampled_from(["all", "adjacent"]), st.sampled_from(["drop", "half"]))
def test_reversed_ranks_swap_chosen_and_rejected(ranks, which, ties):
    swapped = {(j, i) for i, j in indices(ranks, which=which, ties=ties)}
    assert set(indices([7 - rank for rank in ranks], which=which, ties=ties)) == swapped


@pytest.mark.slow
@given(
    rank_lists,
    st.sampled_from(["all", "adjacent", "best_vs_rest"]),
    st.sampled_from(["drop", "half"]),
    st.sampled_from([None, 1, 3]),
    st.randoms(use_true_random=False),
)
def test_the_order_of_responses_does_not_matter(ranks, which, ties, max_pairs, random):
    rows = [(f"r{index}", rank) for index, rank in enumerate(ranks)]

    def pairs(rows):
        responses, ranks = map(list, zip(*rows, strict=True))
        ranking = canonical_ranking({"prompt": "?", "responses": responses, "ranks": ranks})
        drawn = ranking_to_pairs(ranking, which=which, ties=ties, max_pairs=max_pairs)
        return {(responses[i], responses[j]) for i, j in drawn}

    assert pairs(rows) == pairs(random.sample(rows, len(rows)))


@given(rank_lists, st.integers(1, 5), st.integers(0, 3))
def test_at_most_max_pairs_drawn_from_all(ranks, max_pairs, seed):
    everything = indices(ranks, ties="half")
    drawn = indices(ranks, ties="half", max_pairs=max_pairs, seed=seed)
    assert set(drawn) <= set(everything)
    compared = {frozenset(pair) for pair in everything}
    assert len({frozenset(pair) for pair in drawn}) == min(max_pairs, len(compared))


def test_the_seed_draws():
    ranks = list(range(1, 10))
    drawn = {tuple(indices(ranks, max_pairs=4, seed=seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert indices(ranks, max_pairs=4, seed=3) == indices(ranks, max_pairs=4, seed=3)


@pytest.mark.slow
def test_streaming_gives_the_same_pairs(tmp_path):
    rows = [{**RANKED, "prompt": f"{n}?", "labeler": "x"} for n in range(600)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = RankingCounts()
    stream = rankings_to_pairs(load_rankings(path, streaming=True), counts=counts)
    assert isinstance(stream, IterableDataset)
    assert stream.column_names == ["prompt", "chosen", "rejected"]
    assert list(stream) == rankings_to_pairs(load_rankings(path)).to_list()
    assert counts == RankingCounts(600, 2400, 3000, 600, 0, 0)


def test_conversational_pairs():
    record = {"prompt": chat("2+2="), "responses": ["4", "5"]}
    expected = [{"prompt": chat("2+2="), "chosen": reply("4"), "rejected": reply("5")}]
    assert rankings_to_pairs(Dataset.from_list([record])).to_list() == expected
    record["responses"] = [reply("4"), reply("5")]
    assert rankings_to_pairs(Dataset.from_list([record])).to_list() == expected


def test_the_count_is_logged(caplog):
    with caplog.at_level("INFO", logger="trl_instruct"):
        expand(RANKED)
    assert "1 ranking -> 5 pairs (all; 1 tie: drop)" in caplog.text


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (RANKED, {"which": "some"}, "which='some'; one of all, adjacent, best_vs_rest is needed"),
        (RANKED, {"ties": "keep"}, "ties='keep'; one of drop, half is needed"),
        (RANKED, {"max_pairs": 0}, "max_pairs=0; a number >= 1"),
        (RANKED, {"margin": True}, "row 1: margin=True needs `scores`"),
        ({**RANKED, "ranks": [1, 1, 1, 1]}, {}, "no ranking has a pair with a winner"),
        ({**RANKED, "ranks": [1]}, {}, "row 1: `ranks` has 1 values for 4 responses"),
        ({"prompt": "?"}, {}, "`responses` missing"),
    ],
)
def test_faults(record, options, message):
    with pytest.raises(InputError, match=message):
        expand(record, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_load_pairs_splits_off_the_prompt(tmp_path, streaming):
    rows = [
        {"chosen": chat("?") + reply("a"), "rejected": chat("?") + reply("b"), "id": 1},
        {"chosen": chat("!") + reply("c"), "rejected": chat("!") + reply("d"), "id": 2},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs(path, streaming=streaming)
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected", "id"}
    assert list(pairs) == [
        {"prompt": chat("?"), "chosen": reply("a"), "rejected": reply("b"), "id": 1},
        {"prompt": chat("!"), "chosen": reply("c"), "rejected": reply("d"), "id": 2},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_load_pairs_counts_what_it_leaves_out(caplog, streaming):
    rows = [{"prompt": "p", "chosen": "a", "rejected": r} for r in "aba"]
    dataset = Dataset.from_list(rows)
    counts = RankingCounts()
    pairs = load_pairs(dataset.to_iterable_dataset() if streaming else dataset, counts=counts)
    assert list(pairs) == rows[1:2]
    assert counts == RankingCounts(3, 4, 1, 0, 2, 2)
    assert "row 1: chosen equals rejected; such pairs are left out" in caplog.text


def test_load_pairs_faults():
    with pytest.raises(InputError, match="chosen is the same as rejected in all 1 pairs"):
        load_pairs(Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "a"}]))
    with pytest.raises(InputError, match=r"`rejected` missing.*A pair needs"):
        load_pairs(Dataset.from_list([{"prompt": "p", "chosen": "a"}]))
    with pytest.raises(InputError, match=r"row 2: `rejected` is empty"):
        rows = [{"prompt": "p", "chosen": "a", "rejected": r} for r in ("b", "")]
        load_pairs(Dataset.from_list(rows))


@pytest.mark.parametrize("form", [str, chat])
def test_split_by_prompt_keeps_a_prompt_on_one_side(form):
    rows = [{"prompt": form(f"{n % 20}?"), "n": n} for n in range(60)]
    train, test = split_by_prompt(Dataset.from_list(rows), test_size=0.25)
    assert (len(train), len(test)) == (45, 15)
    assert not {str(p) for p in train["prompt"]} & {str(p) for p in test["prompt"]}
    assert sorted([*train["n"], *test["n"]]) == list(range(60))
    backwards = split_by_prompt(Dataset.from_list(rows[::-1]), test_size=0.25)
    assert sorted(backwards[1]["n"]) == sorted(test["n"])
    other = split_by_prompt(Dataset.from_list(rows), test_size=0.25, seed=1)
    assert sorted(other[1]["n"]) != sorted(test["n"])


@pytest.mark.parametrize("form", [str, chat])
def test_split_by_prompt_ignores_white_space_and_takes_a_number(form):
    rows = Dataset.from_list([{"prompt": form(p)} for p in ("a", "a ", "\na", "b")])
    for seed in range(5):
        sides = split_by_prompt(rows, test_size=1, seed=seed)
        assert sorted(len(side) for side in sides) == [1, 3]
        assert [form("b")] in [side["prompt"][:] for side in sides]


@pytest.mark.parametrize(
    ("prompts", "size", "message"),
    [
        ("ab", 0.1, r"test_size=0.1 puts 0 of 2 distinct prompts on the test side"),
        ("ab", 2, r"test_size=2 puts 2 of 2 distinct prompts"),
        ("aaaa", 0.5, r"puts 0 of 1 distinct prompt on"),
    ],
)
def test_split_by_prompt_with_an_empty_side(prompts, size, message):
    with pytest.raises(InputError, match=message):
        split_by_prompt(Dataset.from_list([{"prompt": p} for p in prompts]), size)


def test_split_by_prompt_faults():
    with pytest.raises(InputError, match="`prompt` missing"):
        split_by_prompt(Dataset.from_list([{"text": "a"}]), 0.5)
    with pytest.raises(InputError, match="needs all rows at once"):
        split_by_prompt(Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pairs"),
    [("oasst_zh_human_rankings", 1798), ("alpacaeval_gpt4judge_rankings_train", 32650)],
)
def test_real_rankings(name, pairs):
    rankings = load_rankings(real(f"{name}.jsonl.gz"))
    rows = rankings_to_pairs(rankings, margin=True)
    assert len(rows) == pairs
    assert min(rows["margin"]) > 0
    train, test = split_by_prompt(rankings, 0.1)
    assert not set(train["prompt"]) & set(test["prompt"])


def test_real_pairs():
    assert len(load_pairs(real("hh_helpful_pairs_train.jsonl.gz"))) == 4660


def test_a_tie_is_no_pair_or_one_in_each_order():
    ranking = canonical_ranking({"prompt": "?", "responses": list("abc"), "ranks": [1, 1, 2]})
    assert ranking_to_pairs(ranking) == [(0, 2), (1, 2)]
    assert ranking_to_pairs(ranking, ties="half") == [(0, 1), (1, 0), (0, 2), (1, 2)]
