"""The order of a ranking's responses: dense ranks from `ranks`, `scores`, `ratings` or the list."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from trl_instruct.data.sources import NAMES, Record
from trl_instruct.errors import InputError, kind_of

ORDERS = ("ranks", "scores", "ratings")
LIKE_ORDERS = NAMES["like_orders"].split()


def canonical_order(
    record: Record, rating_order: Sequence[Any] | None = None
) -> tuple[list[int], list[float] | None]:
    """Dense ranks of the K `responses` (1 = best, equal = tie), from whichever field has them.

    Also `scores` or `ratings` as numbers, higher = better; None if only an order is known.
    InputError for a field that is null, not one per response, not finite or contradictory; and for
    a column that looks like an order under another name.
    """
    responses = record.get("responses")
    if not isinstance(responses, list):
        raise InputError(f"`responses` is {kind_of(responses)}; a list of K >= 2 is needed.")
    if len(responses) < 2:
        raise InputError(
            f"`responses` has K = {len(responses)}; a ranking needs at least 2. Add another "
            "response or delete the record."
        )
    present = [field for field in ORDERS if field in record]
    given = {f: _numbers(record, f, rating_order) for f in present if record[f] is not None}
    if present and not given:
        raise InputError(
            f"`{'`, `'.join(present)}` null: the ranking is not filled in. Write one number per "
            "response or delete the record; if all responses are best first, remove the field."
        )
    if not present:
        _refuse_unread_order(record)
    orders = {
        field: dense_ranks(numbers if field == "ranks" else [-score for score in numbers])
        for field, numbers in given.items()
    }
    (first, ranks), *others = orders.items() or [("responses", list(range(1, len(responses) + 1)))]
    for field, other in others:
        if other != ranks:
            raise InputError(
                f"`{first}` and `{field}` contradict each other: {first} {record[first]} put the "
                f"responses in the order {ranks}, {field} {record[field]} in {other}. Keep one."
            )
    return ranks, next((numbers for field, numbers in given.items() if field != "ranks"), None)


def _refuse_unread_order(record: Record) -> None:
    """InputError for a column that looks like the order of the responses but is not read."""
    for name, value in record.items():
        one_each = isinstance(value, list) and len(value) == len(record["responses"])
        numbers = one_each and all(isinstance(v, Real) for v in value)
        if value is not None and (numbers or name.lower() in LIKE_ORDERS):
            raise InputError(
                f"`{name}` is {kind_of(value)}, which looks like the order of the responses, but "
                "that name is not read. Rename it to `ranks` (1 = best) or `scores` (higher = "
                "better), one number per response; if the responses are best first, remove it."
            )


def dense_ranks(values: Sequence[float]) -> list[int]:
    """Ranks without gaps, the smallest value first."""
    position = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return [position[value] for value in values]


def _numbers(record: Record, field: str, rating_order: Sequence[Any] | None) -> list[float]:
    """The numbers of a field in ORDERS; labels count from 0 = worst in `rating_order`."""
    values, count, known = record[field], len(record["responses"]), list(rating_order or ())
    if not isinstance(values, list):
        raise InputError(f"`{field}` is {kind_of(values)}; a list of {count} is needed.")
    if len(values) != count:
        raise InputError(
            f"`{field}` has {len(values)} values for {count} responses: {values}; give one each."
        )
    labels = field != "ranks" and any(isinstance(v, str) for v in values)
    labels = labels or (field == "ratings" and rating_order is not None)
    needed = f"rating_order has {known}" if labels else "a finite number is needed"
    if field == "ranks":
        needed = "a whole number >= 1 is needed (1 = best, equal ranks are a tie)"
    for index, value in enumerate(values):
        if labels and rating_order is None:
            raise InputError(
                f"`{field}[{index}]` is the label {value!r}, but the order of labels is not known. "
                'Give it, best first: rating_order=["good", "ok", "fair", "poor"].'
            )
        fits = value in known if labels else is_number(value)
        if not fits or (field == "ranks" and (value < 1 or value % 1)):
            raise InputError(f"`{field}[{index}]` is {kind_of(value)}; {needed}.")
    return [float(len(known) - 1 - known.index(v)) if labels else float(v) for v in values]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number_of(value: Any) -> float | None:
    """A number that may be text; None if it is none, as "N/A", or not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
