"""A reward model on held-out rankings: accuracy, best of K, calibration, length."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import softplus

from trl_instruct.data.pairs import content_key, prompt_key, ranking_to_pairs
from trl_instruct.data.rankings import Ranking
from trl_instruct.data.rendering import ARGUMENTS
from trl_instruct.data.sources import iterate
from trl_instruct.data.ties import wins
from trl_instruct.errors import InputError
from trl_instruct.intervals import Interval, share_interval
from trl_instruct.reward_trainer.labelers import Labeled, agreement
from trl_instruct.rewards.function import RewardFunction, as_text, call_reward
from trl_instruct.types import Tokenizer

MOST_BINS, LEAST_PAIRS = 10, 30
DRAWS = 200  # of a perfect model's rankings


class RewardEvaluation(NamedTuple):
    """The metrics by name, and the score and token count of each distinct response."""

    metrics: dict[str, Any]
    scores: list[float]
    lengths: list[int]


class Numbered(NamedTuple):
    """Rankings, and what belongs to each of their R distinct responses.

    prompts, prompt_numbers, responses; arguments: what their chat template reads beside them.
    """

    rankings: list[Labeled]
    prompts: list[Any]
    prompt_numbers: list[int]
    responses: list[Any]
    arguments: list[dict[str, Any]]


class Comparisons(NamedTuple):
    """The N pairs of the rankings that have a winner; every field is `(N,)`.

    margins: score of the winner minus score of the loser; longer: the same for tokens; gold: for
    the labeler's noiseless scores, NaN if unknown; weights: of the ranking (these four float64);
    prompts: number of the prompt; k: responses in the ranking; distances: difference of the ranks;
    winners, losers: places of the two in all rankings one after the other.
    """

    margins: Tensor
    longer: Tensor
    gold: Tensor
    weights: Tensor
    prompts: Tensor
    k: Tensor
    distances: Tensor
    winners: Tensor
    losers: Tensor

    def accuracy(self, differences: Tensor) -> Interval:
        """How often a difference `(N,)` is positive; 0 counts one half."""
        return share_interval(wins(0, differences, ties="half"), self.prompts, self.weights)

    def above_length(self) -> Interval:
        """Accuracy of the scores minus that of the lengths, by the share (1 + difference) / 2."""
        gained = wins(0, self.margins, ties="half") - wins(0, self.longer, ties="half")
        share = share_interval((1 + gained) / 2, self.prompts, self.weights)
        return Interval(*(2 * end - 1 for end in share))

    def expected(self) -> Tensor:
        """`(N,)` probability that the response with the higher score wins, by the scores."""
        return torch.sigmoid(self.margins.abs())

    def ceiling(self) -> float | None:
        """Accuracy of the labeler's noiseless scores on their own ranking: the noise ceiling."""
        known = self.where(~self.gold.isnan())
        return known.accuracy(known.gold).mean if len(known.gold) else None

    def where(self, chosen: Tensor) -> "Comparisons":
        """The pairs that a mask or index selects."""
        return Comparisons(*(field[chosen] for field in self))


def evaluate_reward(
    reward: RewardFunction, rankings: Dataset, tokenizer: Tokenizer
) -> RewardEvaluation:
    """Measure a reward on rankings that it was not trained on. Each response is scored once.

    A pair has its ranking's weight. Intervals take a prompt as one measurement. Ties are skipped.

    Args:
        rankings: from `load_rankings`, with at least one strict pair; `weight`, `labeler` and
            `gold_scores` are used if present.
        tokenizer: counts the tokens of a response.

    Returns:
        Metrics: accuracy, accuracy_low, accuracy_high (95 %); the same for length_accuracy (the
        response with more tokens wins) and for above_length (the difference); log_loss, the mean of
        -log sigmoid(margin), nats; calibration (see there); calibration_error, calibration_floor,
        calibration_floor_high (see `calibration_errors`); length_correlation (see
        `within_prompt_correlation`); by_k, by_distance and by_labeler, accuracies by size of the
        ranking, difference of ranks and, if there are several, labeler; see `best_of_k`,
        `spreads`; if known, ceiling (accuracy of `gold_scores`) and agreement (see `agreement`);
        eval_prompts, eval_rankings, eval_pairs.
    """
    held_out = numbered(rankings)
    ids = response_ids(held_out.responses, tokenizer)
    scores, lengths = response_scores(reward, held_out, ids), list(map(len, ids))
    pairs = comparisons(held_out.rankings, scores, lengths)
    metrics: dict[str, Any] = {
        **_named("accuracy", pairs.accuracy(pairs.margins)),
        **_named("length_accuracy", pairs.accuracy(pairs.longer)),
        **_named("above_length", pairs.above_length()),
        **best_of_k(held_out.rankings, scores),
        **spreads(held_out.rankings, scores),
        "log_loss": _mean(softplus(-pairs.margins), pairs.weights),
        **calibration_errors(pairs),
        "length_correlation": within_prompt_correlation(scores, lengths, held_out.prompt_numbers),
        "eval_prompts": len(set(held_out.prompt_numbers)),
        "eval_rankings": len(held_out.rankings),
        "eval_pairs": len(pairs.margins),
        "by_k": _broken_down(pairs, pairs.k),
        "by_distance": _broken_down(pairs, pairs.distances),
        "by_labeler": _by_labeler(held_out.rankings, scores, lengths),
        "calibration": calibration(pairs),
    }
    known = {"ceiling": pairs.ceiling(), "agreement": agreement(held_out.rankings)}
    metrics |= {name: value for name, value in known.items() if value is not None}
    return RewardEvaluation(metrics, scores, lengths)


def response_scores(
    reward: RewardFunction, held_out: Numbered, ids: list[list[int]]
) -> list[float]:
    """A reward's scores of all distinct responses, whose tokens (`response_ids`) are given."""
    columns: dict[str, list[Any]] = {"completion_ids": ids}
    for name in {name for given in held_out.arguments for name in given}:
        columns[name] = [given.get(name) for given in held_out.arguments]
    return call_reward(reward, held_out.prompts, held_out.responses, columns)


def evaluate_members(
    rewards: Sequence[RewardFunction], rankings: Dataset, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Accuracy of the mean of several rewards, and `by_dissent`; else as `evaluate_reward`."""
    held_out = numbered(rankings)
    ids = response_ids(held_out.responses, tokenizer)
    members = [response_scores(reward, held_out, ids) for reward in rewards]
    mean = [statistics.fmean(scores) for scores in zip(*members, strict=True)]
    pairs, *own = (comparisons(held_out.rankings, s, [0] * len(ids)) for s in (mean, *members))
    margins = torch.stack([one.margins for one in own])
    accuracy = pairs.accuracy(pairs.margins)._asdict()
    return {"accuracy": accuracy, "by_dissent": by_dissent(pairs, margins)}


def by_dissent(pairs: Comparisons, margins: Tensor) -> list[dict[str, Any]]:
    """How often the members' mean is wrong, by how many of them say so: does doubt tell of error?

    `margins` `(M, N)` are the members', `pairs` have those of their mean. For each number of
    members that prefer the other response of a pair (dissent): error (1 - accuracy, 95 %
    interval), disagreement (standard deviation of the M margins, mean over the pairs), pairs.
    """
    apart, rows = margins.std(dim=0, correction=0), []
    dissent = (margins.sign() * pairs.margins.sign() < 0).sum(dim=0)
    for number in dissent.unique().tolist():
        part = pairs.where(dissent == number)
        row: dict[str, Any] = {"dissent": number, "pairs": len(part.margins)}
        row["error"] = part.accuracy(-part.margins)._asdict()
        rows.append({**row, "disagreement": apart[dissent == number].mean().item()})
    return rows


def spreads(labeled: Sequence[Labeled], scores: Sequence[float]) -> dict[str, float]:
    """Mean difference of the scores of two responses to a prompt: of tied ones, and of others.

    A good model gives tied responses nearly the same. Weighted as in `evaluate_reward`; tied_spread
    is missing without ties, untied_spread without other pairs.

    >>> ranking = Labeled(0, [0, 1, 2], [1, 1, 2], 1.0, None, None)
    >>> spreads([ranking], scores=[1.0, 0.5, -1.0])
    {'tied_spread': 0.5, 'untied_spread': 1.75}
    """
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for one in labeled:
        given = zip(one.ranks, [scores[response] for response in one.responses], strict=True)
        for (rank, score), (other, beside) in combinations(given, 2):
            found[rank == other].append((abs(score - beside), one.weight))
    named = {"tied_spread": found[True], "untied_spread": found[False]}
    return {k: _mean(*torch.tensor(rows).double().T) for k, rows in named.items() if rows}


def comparisons(
    labeled: Sequence[Labeled], scores: Sequence[float], lengths: Sequence[int]
) -> Comparisons:
    """All strict pairs, with the scores and lengths of R responses; InputError if there is none."""
    rows, place = [], 0
    for one in labeled:
        ranking = Ranking(None, one.responses, one.ranks, None, 0)
        for winner, loser in ranking_to_pairs(ranking):
            better, worse = one.responses[winner], one.responses[loser]
            margin, longer = scores[better] - scores[worse], lengths[better] - lengths[worse]
            distance = one.ranks[loser] - one.ranks[winner]
            gold = one.gold[winner] - one.gold[loser] if one.gold else math.nan
            known = one.prompt, len(one.ranks), distance, place + winner, place + loser
            rows.append((margin, longer, gold, one.weight, *known))
        place += len(one.ranks)
    if not rows:
        raise InputError("No ranking to evaluate on has a pair with a winner; give more rankings.")
    columns = torch.tensor(rows, dtype=torch.float64).T
    return Comparisons(*columns[:4], *columns[4:].long())


def best_of_k(labeled: Sequence[Labeled], scores: Sequence[float]) -> dict[str, float]:
    """How often the top score goes to the response that the labeler put first, with its ranking's
    weight. Chance is 1 / K.

    If several have the top score, the share of them that was put first counts. If several were put
    first, each of them is right, and chance is their share of K. A ranking without a pair with a
    winner is skipped. Returns best_of_k, best_of_k_low, best_of_k_high (95 %, a prompt is one
    measurement) and best_of_k_chance, the mean.
    """
    rows = []
    for one in (one for one in labeled if max(one.ranks) > 1):
        given, first = [scores[r] for r in one.responses], [float(r == 1) for r in one.ranks]
        top = [right for right, score in zip(first, given, strict=True) if score == max(given)]
        rows.append((statistics.fmean(top), statistics.fmean(first), one.prompt, one.weight))
    right, chance, prompts, weights = torch.tensor(rows, dtype=torch.float64).T
    measured = _named("best_of_k", share_interval(right, prompts, weights))
    return {**measured, "best_of_k_chance": _mean(chance, weights)}


def calibration(pairs: Comparisons) -> list[dict[str, float]]:
    """How often the response that the model prefers wins, against how often the model expects it.

    It expects a win with probability sigmoid(|r_a - r_b|) for scores r, between one half and 1.
    Pairs are sorted by it and cut into up to 10 bins of equal size, each of at least 30 pairs; of
    each bin: mean expected rate, observed rate (95 % interval), number of pairs.
    """
    bins, result = _bins(pairs), []
    for number in bins.unique():
        part = pairs.where(bins == number)
        rate, low, high = part.accuracy(part.margins)
        cell = {"expected": _mean(part.expected(), part.weights), "observed": rate}
        result.append({**cell, "low": low, "high": high, "pairs": len(part.margins)})
    return result


def calibration_errors(pairs: Comparisons) -> dict[str, float]:
    """Expected calibration error, and that of a perfect model on these pairs: noise alone.

    The error is |expected - observed| on average over the pairs of all bins; the floor is that of
    200 sets of rankings drawn from the model's own probabilities, with a fixed seed. With Gumbel
    noise added to all scores, a response is above another with probability sigmoid(r_a - r_b), and
    the pairs of a ranking fit together as a labeler's do (Plackett-Luce). Returns
    calibration_error; calibration_floor and calibration_floor_high: its mean, 95 % quantile.
    """
    expected, bins = pairs.expected(), _bins(pairs)

    def error(differences: Tensor) -> float:
        preferred_wins = wins(0, differences * pairs.margins.sign(), ties="half")
        off = torch.bincount(bins, weights=pairs.weights * (expected - preferred_wins))
        return (off.abs().sum() / pairs.weights.sum()).item()

    generator, count = torch.Generator().manual_seed(0), int(torch.cat(pairs[-2:]).max()) + 1
    drawn = []
    for _ in range(DRAWS):
        noise = -expected.new_empty(count).exponential_(generator=generator).log()
        drawn.append(error(pairs.margins + noise[pairs.winners] - noise[pairs.losers]))
    return {
        "calibration_error": error(torch.ones_like(pairs.margins)),
        "calibration_floor": statistics.fmean(drawn),
        "calibration_floor_high": statistics.quantiles(drawn, n=20)[-1],
    }


def within_prompt_correlation(
    scores: Sequence[float], lengths: Sequence[float], prompts: Sequence[int]
) -> float:
    """Spearman's correlation of score and length among the responses to the same prompt.

    Over all prompts it would also measure whether prompts that ask for long answers get higher
    scores, which no comparison shows. So ranks within a prompt (equal values share the mean rank),
    less their mean, are correlated over all prompts. All arguments have one value per distinct
    response. The result is NaN if scores or lengths never differ within a prompt.
    """
    groups = defaultdict(list)
    for score, length, prompt in zip(scores, lengths, prompts, strict=True):
        groups[prompt].append((score, length))
    deviations = []
    for group in groups.values():
        both = torch.tensor(group, dtype=torch.float64).T
        above = (both.unsqueeze(2) - both.unsqueeze(1)).sign()
        deviations.append(above.sum(dim=2))  # twice the ranks less their mean
    a, b = torch.cat(deviations, dim=1)
    return ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()).item()


def response_ids(responses: Sequence[Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each response (text or messages), without special tokens."""
    texts = list(map(as_text, responses))
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def numbered(*rankings: Dataset) -> Numbered:
    """Number the prompts and responses of rankings, so that each response is scored once."""
    result = Numbered([], [], [], [], [])
    prompts: dict[str, int] = {}
    responses: dict[tuple[str, ...], int] = {}
    for record in chain.from_iterable(map(iterate, rankings)):
        asked, ranked = content_key(record["prompt"]), []
        number = prompts.setdefault(prompt_key(record["prompt"]), len(prompts))
        arguments = {name: record[name] for name in ARGUMENTS if record.get(name) is not None}
        for response in record["responses"]:
            key = asked, content_key(response), str(arguments)
            if key not in responses:
                responses[key] = len(responses)
                result.prompts.append(record["prompt"])
                result.prompt_numbers.append(number)
                result.responses.append(response)
                result.arguments.append(arguments)
            ranked.append(responses[key])
        weight = 1.0 if record.get("weight") is None else float(record["weight"])
        gold = record.get("gold_scores")
        if gold is not None and len(gold) != len(ranked):
            gold = None  # repeated responses were removed; which ones is unknown
        one = Labeled(number, ranked, record["ranks"], weight, record.get("labeler"), gold)
        result.rankings.append(one)
    return result


def _bins(pairs: Comparisons) -> Tensor:
    """`(N,)` number of each pair's bin, in the order of the expected rates."""
    order, size = pairs.expected().argsort(stable=True), len(pairs.margins)
    return order.argsort() * max(1, min(MOST_BINS, size // LEAST_PAIRS)) // size


def _broken_down(pairs: Comparisons, key: Tensor) -> dict[str, dict[str, float]]:
    """Accuracy, length accuracy and ceiling of the pairs for each value of the key."""
    result: dict[str, dict[str, float]] = {}
    for value in key.unique().tolist():
        part = pairs.where(key == value)
        cell = _named("accuracy", part.accuracy(part.margins))
        cell |= {"length_accuracy": part.accuracy(part.longer).mean, "pairs": len(part.margins)}
        ceiling = part.ceiling()
        result[str(value)] = cell if ceiling is None else {**cell, "ceiling": ceiling}
    return result


def _by_labeler(
    labeled: Sequence[Labeled], scores: Sequence[float], lengths: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Accuracy of the pairs of each labeler; {} if there are fewer than two."""
    groups = defaultdict(list)
    for one in labeled:
        if one.labeler is not None and max(one.ranks) > 1:
            groups[str(one.labeler)].append(one)
    parts = {name: comparisons(group, scores, lengths) for name, group in groups.items()}
    found = {name: _named("accuracy", p.accuracy(p.margins)) for name, p in parts.items()}
    return found if len(found) > 1 else {}


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _mean(values: Tensor, weights: Tensor) -> float:
    return ((values * weights).sum() / weights.sum()).item()
