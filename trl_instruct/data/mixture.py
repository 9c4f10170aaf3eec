"""Several datasets as one, as TRL's `DatasetMixtureConfig` writes them in YAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import concatenate_datasets
from trl.scripts.utils import DatasetConfig

from trl_instruct.data.sources import AnyDataset
from trl_instruct.errors import InputError, explained, kind_of


def mixture_of(entries: Sequence[Any]) -> list[DatasetConfig]:
    """The datasets that a config lists: `path`, `name`, `data_files`, `split`, `columns`, `fraction`.

    InputError for an entry without a path, or with another key.
    """  # noqa: E501
    mixture = []
    for entry in entries:
        with explained(f"datasets has the entry {kind_of(entry)}; a path and options are needed"):
            given = DatasetConfig(**entry) if not isinstance(entry, DatasetConfig) else entry
            if not (given.path and isinstance(given.path, str) and isinstance(given.split, str)):
                raise TypeError("path and split are text")
        mixture.append(given)
    if not mixture:
        raise InputError("datasets is an empty list; give at least one dataset.")
    return mixture


def mixed(load: Callable[..., AnyDataset], entries: Sequence[Any], streaming: bool) -> AnyDataset:
    """Datasets, each read as its own shape, one after the other.

    Each `fraction` is a share of the result, as in TRL: no dataset is repeated, and the first rows
    of each are taken. Columns that not all of them have are null in the others.

    Args:
        load: loads one entry: `load(entry, split, streaming)`.

    Raises:
        InputError: as `load`; text and messages mixed; a fraction for some of them only.
    """
    mixture = mixture_of(entries)
    parts = [load(entry, entry.split, streaming) for entry in mixture]
    shares: list[Any] = [getattr(entry, "fraction", None) for entry in mixture]
    if any(share is not None for share in shares):
        if None in shares or streaming:
            raise InputError("fraction: give it for each of the datasets, and none that streams.")
        whole = sum(shares)
        sizes = zip(parts, shares, strict=True)
        total = min(len(part) * whole / share for part, share in sizes if share > 0)
        counts = [round(share / whole * total) for share in shares]
        parts = [part.select(range(n)) for part, n in zip(parts, counts, strict=True)]
    names = ", ".join(entry.path for entry in mixture)
    with explained(f"The datasets {names} do not go together"):
        return concatenate_datasets(parts)
