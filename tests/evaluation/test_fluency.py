import pytest

from trl_instruct.evaluation.statistics import distinct, ngrams, repetition


def test_repetition_is_the_share_of_4_grams_that_came_before():
    # abcd bcda cdab dabc abcd: 5, one of them twice
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repetition([[7] * 7]) == pytest.approx(3 / 4)  # 4 grams, all the same
    assert repetition([[7, 7, 7, 7]]) == 0.0  # one gram repeats nothing


def test_every_completion_counts_the_same_however_long():
    assert repetition([[7] * 7, [1, 2, 3, 4], [], [1]]) == pytest.approx(3 / 16)


def test_what_two_completions_share_is_no_repetition():
    assert repetition([[1, 2, 3, 4, 5]] * 3) == 0.0


def test_distinct_counts_over_all_completions():
    # words: 1 2 1 | 2 1 3 -> 3 distinct of 6; bigrams 12 21 | 21 13 -> 3 distinct of 4
    completions = [[1, 2, 1], [2, 1, 3]]
    assert distinct(completions, 1) == 3 / 6
    assert distinct(completions, 2) == 3 / 4


def test_no_bigram_spans_two_completions():
    assert distinct([[1], [2]], 2) == 0.0
    assert distinct([[1], [1, 2]], 2) == 1.0
    assert distinct([[]], 1) == 0.0


def test_ngrams_in_order():
    assert ngrams("abc", 2) == [("a", "b"), ("b", "c")]


def test_shares_of_ngrams_by_hand():
    assert repetition(["abababa", "abcde"]) == 0.25  # abab baba abab baba; abcd bcde
    assert distinct(["abab", "ab"], 2) == 0.5  # ab ba ab; ab
