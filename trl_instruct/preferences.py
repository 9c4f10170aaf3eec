"""What the reward model learns from: rankings or pairs, in training and held-out pairs."""

from itertools import combinations
from typing import Any

from datasets import Dataset

from trl_instruct.configs import RewardConfig
from trl_instruct.errors import InputError
from trl_instruct.pairs import load_pairs, rankings_to_pairs, split_by_prompt
from trl_instruct.rankings import load_rankings
from trl_instruct.sources import Source, first_record, load_records
from trl_instruct.tiny import accuracy_ceiling


def load_preferences(
    dataset: Any, held_out: Any, config: RewardConfig
) -> tuple[Dataset, Dataset | None, float | None]:
    """What to train on, held-out pairs, and the noise ceiling of the latter where it is known.

    Rankings stay rankings for training, pairs stay pairs.

    Args:
        dataset: rankings or pairs, by name or in memory.
        held_out: the same to measure on; None: `config.eval_size` of the prompts.
        config: split and seed.

    Raises:
        InputError: bad records, neither rankings nor pairs, too few prompts to hold any out.
    """
    train = _load(dataset, config.dataset_train_split)
    if held_out is not None:
        test = _load(held_out)
    elif config.eval_size:
        try:
            train, test = split_by_prompt(train, config.eval_size, seed=config.seed)
        except InputError as error:
            raise InputError(
                f"eval_size holds out prompts to measure the accuracy on: {error} Or give an "
                "eval_dataset, or set eval_size to 0."
            ) from None
    else:
        return train, None, None
    return train, _as_pairs(test), _ceiling(test)


def count_pairs(preferences: Dataset) -> int:
    """Comparisons with a winner: C(K,2) of each ranking, ties left out."""
    if "ranks" not in preferences.column_names:
        return len(preferences)
    return sum(a != b for ranks in preferences["ranks"] for a, b in combinations(ranks, 2))


def _load(source: Any, split: str = "train") -> Dataset:
    """Rankings or pairs, whichever the columns say."""
    columns = list(first_record(load_records(source, split), Source.of(source, split)))
    if "responses" in columns:
        return load_rankings(source, split)
    if "chosen" in columns:
        return load_pairs(source, split)
    raise InputError(
        f"{Source.of(source, split).name}: the reward model needs rankings (`prompt`, `responses` "
        "and `ranks` or `scores`) or pairs (`prompt`, `chosen`, `rejected`). Columns found: "
        f"{', '.join(columns)}. Rename them."
    )


def _as_pairs(preferences: Dataset) -> Dataset:
    return (
        rankings_to_pairs(preferences) if "responses" in preferences.column_names else preferences
    )


def _ceiling(rankings: Dataset) -> float | None:
    """The accuracy of the labeler's noiseless scores, where the rankings hold them."""
    if not {"scores", "gold_scores"} <= set(rankings.column_names):
        return None
    known = [
        (row["gold_scores"], row["scores"])
        for row in rankings
        if len(row["gold_scores"]) == len(row["scores"])  # else repeated responses were taken out
    ]
    return accuracy_ceiling(*zip(*known, strict=True)) if known else None
