"""How alike labelers rank: the pairs of responses that several of them ordered."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch

from trl_instruct.intervals import share_interval


class Labeled(NamedTuple):
    """One labeler's ranking of numbered responses; gold: noiseless scores, if known."""

    prompt: int
    responses: list[int]
    ranks: list[int]
    weight: float
    labeler: Any
    gold: list[float] | None


def agreement(labeled: Sequence[Labeled]) -> dict[str, float] | None:
    """How often two labelers order a pair of responses alike, if neither calls it a tie.

    Only rankings of one prompt by different `labeler`s are compared: without names they may come
    from one person. No bound for the model: one that knows what most labelers think agrees with one
    of them more often than two of them agree (InstructGPT: labelers 72.6 %, model 72.4 %).

    Returns mean, low, high (95 %) and the number of comparisons; None if there are none.
    """
    return _share([(prompt, alike) for prompt, _, alike in _compared(labeled)])


def reliability(labeled: Sequence[Labeled]) -> dict[str, dict[str, float]]:
    """Each labeler's `agreement` with all others, the least alike first.

    By name: rankings, and what `agreement` returns, if somebody else ranked the same pairs. {} if
    there are fewer than two labelers.
    """
    rankings = Counter(str(one.labeler) for one in labeled if one.labeler is not None)
    if len(rankings) < 2:
        return {}
    shared = defaultdict(list)
    for prompt, names, alike in _compared(labeled):
        for name in names:
            shared[str(name)].append((prompt, alike))
    found = {name: {"rankings": n, **(_share(shared[name]) or {})} for name, n in rankings.items()}
    return dict(sorted(found.items(), key=lambda row: row[1].get("mean", 1)))


def _compared(labeled: Sequence[Labeled]) -> Iterator[tuple[int, tuple[Any, Any], float]]:
    """Each pair of responses that two labelers ordered: prompt, labelers, 1 if alike, else 0."""
    by_prompt = defaultdict(list)
    for one in labeled:
        if one.labeler is not None:
            ranks = dict(zip(one.responses, one.ranks, strict=True))
            by_prompt[one.prompt].append((one.labeler, ranks))
    for prompt, rankings in by_prompt.items():
        for (first, mine), (second, theirs) in combinations(rankings, 2):
            shared = combinations(mine.keys() & theirs.keys(), 2) if first != second else ()
            signs = [(mine[a] - mine[b]) * (theirs[a] - theirs[b]) for a, b in shared]
            yield from ((prompt, (first, second), float(sign > 0)) for sign in signs if sign)


def _share(compared: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """The share of alike comparisons, as `agreement` returns it."""
    if not compared:
        return None
    prompts, alike = map(torch.tensor, zip(*compared, strict=True))
    return {**share_interval(alike, prompts)._asdict(), "pairs": len(compared)}
