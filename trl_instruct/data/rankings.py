"""Rankings of K responses: ranks, scores, ratings and plain order become one canonical form."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value

from trl_instruct.console import get_logger, plural
from trl_instruct.data import orders, records
from trl_instruct.data.conversion import mixed, read
from trl_instruct.data.dialogues import take_off_prompts
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate, map_records
from trl_instruct.errors import InputError, kind_of

logger = get_logger(__name__)


class Ranking(NamedTuple):
    """A validated ranking of K distinct responses."""

    prompt: Any
    responses: list[Any]
    ranks: list[int]
    scores: list[float] | None
    duplicates: int

    @property
    def counts(self) -> "RankingCounts":
        """Its own counts; of its C(K,2) pairs, those of equal rank are ties."""
        responses = len(self.responses)
        ties = sum(math.comb(count, 2) for count in Counter(self.ranks).values())
        strict = math.comb(responses, 2) - ties
        return RankingCounts(1, responses, strict, ties, self.duplicates, int(strict == 0))


@dataclass
class RankingCounts:
    """Counts of a set of rankings, including everything that was left out.

    Fields: `records` read; their distinct `responses`; `pairs` with a winner; `ties`; `duplicates`,
    responses that repeat another of the same ranking; `records_without_pair`.
    """

    records: int = 0
    responses: int = 0
    pairs: int = 0
    ties: int = 0
    duplicates: int = 0
    records_without_pair: int = 0

    def update(self, other: "RankingCounts") -> None:
        """Add other counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        return (
            f"{plural(self.records, 'ranking')} of {plural(self.responses, 'response')}: "
            f"{plural(self.pairs, 'strict pair')}, {plural(self.ties, 'tie')}, "
            f"{plural(self.duplicates, 'repeated response')}, "
            f"{plural(self.records_without_pair, 'ranking')} without a pair"
        )


def load_rankings(
    source: Any,
    split: str = "train",
    streaming: bool = False,
    *,
    rating_order: Sequence[Any] | None = None,
    counts: RankingCounts | None = None,
    reading: Reading = AS_PUBLISHED,
) -> AnyDataset:
    """Load rankings and bring them to one form.

    A record has `prompt` (text or messages), `responses` (K >= 2; text, or for a messages prompt
    also messages) and one of

    - `ranks`: 1 = best, equal = tie;
    - `scores` or `ratings`: higher = better, equal = tie; numbers, or labels in a given order;
    - none of these: the responses are already best first;

    and optionally `labeler` and `weight` (> 0). Each labeler's ranking of a prompt is a record.
    Other columns are kept. A field that is present but null is an error, not an order; so is a
    column that may hold the order under another name (`rank`, `labels`, any K numbers) where none
    of the three is there. Published shapes, pairs too, are read as published
    (docs/bring_your_data.md). InstructGPT ranks K = 4 to 9 responses (section 3.5).

    Args:
        source, split, streaming, reading: as `load_demonstrations`.
        rating_order: the labels of `ratings`, best first: `["good", "ok", "fair", "poor"]`.
        counts: the counts are added to it (when streaming: as rows are read).

    Returns:
        A dataset with `prompt`, `responses` (each a list of messages if the prompt is), `ranks`
        (dense, 1 = best), `scores` if there were numbers or labels (0 = worst label), and the other
        columns. A repeated response keeps its better rank. The counts are logged.

    Raises:
        InputError: a faulty record, with file, line and field.

    >>> load_rankings(Dataset.from_list([
    ...     {"prompt": "2+2=", "responses": ["5", "4", "four"], "scores": [0.0, 2.5, 1.5]}
    ... ]))[0]["ranks"]
    [3, 1, 2]
    """
    reading = replace(reading, rating_order=rating_order or reading.rating_order)
    if isinstance(source, list):
        return mixed(partial(load_rankings, counts=counts, reading=reading), source, streaming)
    dataset, where, _ = read(source, split, streaming, "ranking", reading)
    return canonical_rankings(dataset, where, reading, counts)


def canonical_rankings(
    dataset: AnyDataset, where: Source, reading: Reading, counts: RankingCounts | None
) -> AnyDataset:
    """Rankings that were read, in one form; the rest is as in `load_rankings`."""
    first = first_record(dataset, where)
    if "responses" not in first and {"chosen", "rejected"} <= set(first):
        raise InputError(f"{where.name}: these are pairs; load_pairs reads them, and rm does.")
    records.require_columns(first, where, ("prompt", "responses"), "A ranking")
    dataset = take_off_prompts(dataset, where, ("responses",))
    form, streamed = records.form_of(first), isinstance(dataset, IterableDataset)
    canonical = partial(canonical_ranking, rating_order=reading.rating_order, form=form)
    found = RankingCounts() if counts is None or not streamed else counts

    def convert(record: Record, row: int) -> dict[str, Any]:
        ranking = canonical(record)
        if streamed:  # which has no final log: its first of a kind is told
            if ranking.duplicates and not found.duplicates:
                logger.warning("%s: repeated responses are left out and counted", where.where(row))
            if ranking.counts.records_without_pair and not found.records_without_pair:
                logger.warning("%s: no strict pair; such rankings are counted", where.where(row))
        found.update(ranking.counts)
        return {name: getattr(ranking, name) for name in ("responses", "ranks", "scores")}

    dataset = map_records(
        reading.checked(dataset, canonical, where),
        convert,
        with_indices=True,
        remove_columns=[name for name in orders.ORDERS if name in first],
        features=dataset.features and _canonical_features(dataset.features, form),
    )
    if isinstance(dataset, Dataset):
        noteworthy = found.duplicates or found.records_without_pair
        logger.log(logging.WARNING if noteworthy else logging.INFO, "%s: %s", where.name, found)
        if counts is not None:
            counts.update(found)
        if not any(iterate(dataset, "scores")):  # in a stream, any ranking may have them
            dataset = dataset.remove_columns("scores")
    return dataset


def canonical_ranking(
    record: Record, rating_order: Sequence[Any] | None = None, form: str | None = None
) -> Ranking:
    """Validate a record and bring it to distinct responses with dense ranks.

    Of identical responses the best-ranked one stays; `duplicates` counts the others. Text responses
    to a messages prompt become assistant messages. `form`: what the prompt must be; None: either.
    InputError for a faulty field, which is named, or if all responses are identical.
    """
    form = form or records.form_of(record)
    records.check_prompt(record, form=form)
    ranks, scores = orders.canonical_order(record, rating_order)
    responses = [_reply(index, r, form) for index, r in enumerate(record["responses"])]
    weight = record.get("weight")
    if weight is not None and not (orders.is_number(weight) and weight > 0):
        raise InputError(f"`weight` is {kind_of(weight)}; a finite number > 0 is needed.")
    best: dict[str, int] = {}
    for index in sorted(range(len(responses)), key=ranks.__getitem__):
        best.setdefault(repr(responses[index]), index)
    kept = sorted(best.values())
    if len(kept) < 2:
        raise InputError(
            f"`responses` are {len(responses)} times the same, {kind_of(responses[0])}; a ranking "
            "needs at least 2 that differ. Delete the record."
        )
    return Ranking(
        prompt=record["prompt"],
        responses=[responses[index] for index in kept],
        ranks=orders.dense_ranks([ranks[index] for index in kept]),
        scores=scores and [scores[index] for index in kept],
        duplicates=len(responses) - len(kept),
    )


def _reply(index: int, response: Any, form: str) -> Any:
    field = f"responses[{index}]"
    if form == "messages" and isinstance(response, str):
        records.check_reply(field, response, form="text")
        return [{"role": "assistant", "content": response}]
    records.check_reply(field, response, form=form)
    return response


def _canonical_features(features: Features, form: str) -> Features:
    """Column types of canonical rankings; responses are messages if the prompt is."""
    kept = {name: kind for name, kind in features.items() if name not in orders.ORDERS}
    kept["responses"] = List(records.reply_type(features, form))
    return Features({**kept, "ranks": List(Value("int64")), "scores": List(Value("float64"))})
