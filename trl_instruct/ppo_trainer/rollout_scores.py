"""Scores of a rollout in all processes: what failed anywhere is known everywhere."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_instruct.configs import PPOConfig
from trl_instruct.rewards.function import (
    COUNTED,
    Columns,
    RewardError,
    RewardFunction,
    as_text,
    call_reward,
    counts_of,
    load_states,
    parts_of,
    states_of,
    try_reward,
)

SHOWN = 80


def rollout_scores(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Columns,
    *,
    rows: Sequence[int],
    skip: bool,
) -> tuple[list[float], int]:
    """Scores of this process's completions, and how many were skipped in all processes.

    What a reward remembers is shared by the processes afterwards (its `merge`), and as before the
    call where it failed.

    Args:
        reward, prompts, completions, columns: as in `call_reward`, B completions.
        rows: B, their prompts in the dataset, from 0.
        skip: a completion that the reward fails on gets NaN; else it is an error.

    Raises:
        RewardError: in every process, where the reward failed in one, or on all there are.
        InputError: a reward that takes other parameters.
    """
    before = states_of(reward)
    scores, faults = _scores(reward, prompts, completions, columns, skip=skip)
    told = [_told(fault, row, prompts, rows) for row, fault in faults]
    everywhere = gather_object([(len(rows), told)])
    found = [sentence for _, sentences in everywhere for sentence in sentences]
    if found and (not skip or len(found) == sum(count for count, _ in everywhere)):
        load_states(reward, before)
        raise RewardError(f"{found[0]}, and {len(found) - 1} more" if found[1:] else found[0])
    for part in parts_of(reward):
        if hasattr(part, "merge"):
            part.merge(gather_object([part.state_dict()]))
    return scores, len(found)


def mean_score(
    judge: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Columns,
    *,
    rows: Sequence[int],
    where: str,
) -> tuple[float | None, int]:
    """Mean score of the completions of all processes, and how many have none: a judge's opinion.

    Where it fails on all of them, a warning and no mean.

    Args:
        judge, prompts, completions, columns, rows: as in `rollout_scores`.
        where: what the warning begins with.
    """
    given = (judge, prompts, completions, columns)
    try:
        scores, failed = rollout_scores(*given, rows=rows, skip=True)
    except RewardError as error:
        warnings.warn(f"{where}: {error}", stacklevel=2)
        return None, 0
    everywhere = torch.tensor([score for part in gather_object([scores]) for score in part])
    return float(everywhere.nanmean()), failed


def without_eos(scores: Tensor, ended: Tensor, args: PPOConfig) -> Tensor:
    """The scores `(B,)`, with what a completion without EOS or stop string costs.

    Args:
        scores: NaN where the reward failed.
        ended: `(B,)` whether there is an EOS or stop string.
        args: its `missing_eos_penalty`, `missing_eos_score`.
    """
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * ~ended
    if args.missing_eos_score is not None:
        scores = torch.where(ended | scores.isnan(), scores, args.missing_eos_score)
    return scores


def reward_counts(reward: RewardFunction) -> dict[str, int]:
    """What the parts of a reward have counted, in all processes: `truncated`, `unparsable`."""
    everywhere = gather_object(counts_of(reward))
    return {name: sum(part.get(name, 0) for part in everywhere) for name in COUNTED}


def _scores(
    reward: RewardFunction, *given: Any, skip: bool
) -> tuple[list[float], list[tuple[int | None, str]]]:
    """Scores, and faults with their completions; None where that is not known."""
    if skip:
        scores, faults = try_reward(reward, *given)
        return scores, list(faults.items())
    try:
        return call_reward(reward, *given), []
    except RewardError as error:
        return [], [(error.row, error.fault)]


def _told(fault: str, row: int | None, prompts: Sequence[Any], rows: Sequence[int]) -> str:
    if row is None:
        return fault
    text = as_text(prompts[row])
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return f"{fault} (prompt {rows[row] + 1} of the dataset: {shown!r})"
