"""What the reward model trains and is evaluated on: rankings or pairs, split by prompt."""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value

from trl_instruct.configs import RewardConfig
from trl_instruct.console import get_logger, plural
from trl_instruct.data.conversion import mixed, read
from trl_instruct.data.pairs import canonical_pairs, split_by_prompt
from trl_instruct.data.rankings import RankingCounts, canonical_rankings
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.records import form_of, load_demonstrations
from trl_instruct.data.shapes import PAIR
from trl_instruct.data.sources import Record, first_record, iterate, map_records
from trl_instruct.errors import InputError

logger = get_logger(__name__)


class Preferences(NamedTuple):
    """Rankings or pairs to train on, rankings to evaluate on, demonstrations to score 0."""

    train: Dataset
    held_out: Dataset | None
    demonstrations: Dataset | None
    counts: RankingCounts  # of all records in the training source


def load_preferences(
    dataset: Any,
    held_out: Any,
    demonstrations: Any,
    config: RewardConfig,
    fits: Callable[[Record], Any] = lambda record: None,
) -> Preferences:
    """Load the preferences to train and to evaluate on.

    For training, rankings stay rankings and pairs stay pairs. Held-out pairs, and all pairs if
    prompts may be cut, become rankings of K = 2. All rankings of a prompt stay on one side; without
    `held_out`, `config.eval_size` of the prompts are. `fits` checks each record that is read after
    training; if bad records are left out, all.
    """
    counts, reading = RankingCounts(), Reading.of(config)
    train = load_either(dataset, config.dataset_train_split, reading, counts)
    left_out = set(config.leave_out_labelers or ())
    train = _without(train, left_out, reading, strict=True)
    if reading.skips or (config.eval_size and held_out is None):
        train = reading.checked(train, fits)
    test, others = None, reading.of_another()
    if held_out is not None:
        test = load_either(held_out, config.dataset_test_split or "train", others)
        test = others.checked(_without(test, left_out, others), fits)
    elif config.eval_size:
        try:
            train, test = split_by_prompt(train, config.eval_size, seed=config.seed)
        except InputError as error:
            raise InputError(
                f"eval_size holds out prompts to measure the accuracy on: {error} Or give an "
                "eval_dataset, or set eval_size to 0."
            ) from None
    for purpose, rows in (("to train on", train), ("held out", test)):
        if rows is not None and not count_pairs(rows):
            raise InputError(
                f"None of the {len(rows)} rankings {purpose} has a pair with a winner: all are "
                "ties. Give more rankings."
            )
    if config.truncate_prompt:
        if "margin" in train.column_names:
            raise InputError(
                "truncate_prompt and pairs with a `margin` do not go together: TRL, which trains "
                "with margins, cuts no prompts. Remove the column or the option."
            )
        train = as_rankings(train)
    shown = None
    if demonstrations is not None:
        others = reading.of_another()
        shown = load_demonstrations(demonstrations, reading=others)
        forms = form_of(shown[0]), form_of(train[0])
        if forms[0] != forms[1]:
            raise InputError(
                f"The demonstrations are {forms[0]} and the preferences {forms[1]}, so their "
                "scores could not be compared. Write both in one format."
            )
        shown = others.checked(shown, fits)
    return Preferences(train, None if test is None else as_rankings(test), shown, counts)


def count_pairs(preferences: Dataset) -> int:
    """Comparisons with a winner: C(K,2) of each ranking, ties left out."""
    if "ranks" not in preferences.column_names:
        return len(preferences)
    every = iterate(preferences, "ranks")
    return sum(a != b for ranks in every for a, b in combinations(ranks, 2))


def as_rankings(preferences: Dataset, *, mixture: bool = False) -> Dataset:
    """Pairs as rankings of K = 2, chosen first; rankings, also those in a mixture, as they are."""
    if "responses" in preferences.column_names and not mixture:
        return preferences
    kinds = {name: kind for name, kind in preferences.features.items() if name not in PAIR}
    kinds |= {"responses": List(preferences.features["chosen"]), "ranks": List(Value("int64"))}

    def ranked(row: Record) -> dict[str, Any]:
        pair = {"responses": [row[name] for name in PAIR], "ranks": [1, 2]}
        return {} if row.get("ranks") else pair

    return map_records(preferences, ranked, remove_columns=[*PAIR], features=Features(kinds))


def _without(rows: Dataset, labelers: set[str], reading: Reading, strict: bool = False) -> Dataset:
    """The records not by these labelers (`strict`: who must be there); tells what is left out."""
    source, none = reading.source, "all {} records are by labelers that leave_out_labelers names."
    named = iterate(rows, "labeler") if "labeler" in rows.column_names else ()
    found = {str(name) for name in named if name is not None}
    if strict and (unknown := sorted(labelers - found)):
        there = f"there are {', '.join(sorted(found))}" if found else "no record has a `labeler`"
        raise InputError(
            f"{source.name}: leave_out_labelers names {unknown[0]!r}, but {there}. Name one of "
            "them, or leave the option out."
        )
    if not labelers & found:
        return rows
    kept = reading.keep(rows, lambda row, _: str(row["labeler"]) not in labelers, source, none)
    told = plural(len(rows) - len(kept), "record"), ", ".join(sorted(labelers & found))
    logger.warning("%s: left out: %s by %s", source.name, *told)
    return kept


def load_either(
    source: Any,
    split: str = "train",
    reading: Reading = AS_PUBLISHED,
    counts: RankingCounts | None = None,
) -> Dataset:
    """Load rankings or pairs, as the columns say; arguments as `load_rankings`."""
    if isinstance(source, list):
        load = partial(load_either, reading=reading, counts=counts)
        rows = mixed(lambda entry, part, _: load(entry, part), source, streaming=False)
        both = {"responses", *PAIR} <= set(rows.column_names)
        return as_rankings(rows, mixture=True) if both else rows
    rows, where, _ = read(source, split, False, "ranking", reading)
    first = first_record(rows, where)
    if "responses" in first:
        return canonical_rankings(rows, where, reading, counts)
    if "chosen" in first:
        return canonical_pairs(rows, where, reading, counts)
    raise InputError(
        f"{where.name}: rm needs rankings (`prompt`, `responses`, `ranks` or `scores`) or pairs "
        f"(`prompt`, `chosen`, `rejected`), not: {', '.join(first)}. Name them: --columns OURS=COL."
    )
