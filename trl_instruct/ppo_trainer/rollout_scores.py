"""Scores of a rollout in all processes: a failure in one is known in all."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_instruct.configs import PPOConfig
from trl_instruct.rewards import function

SHOWN = 80


def rollout_scores(
    reward: function.RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: function.Columns,
    *,
    rows: Sequence[int],
    skip: bool,
) -> tuple[list[float], int]:
    """Scores of this process's completions, and how many were skipped in all processes.

    Afterwards a reward's state is merged over the processes (its `merge`), or reset on an error.
    `rows` are the prompts' in the dataset. A reward that failed in one process is a RewardError in
    all; with `skip`, only if it failed on every completion: others have the score NaN.
    """
    before, given = function.states_of(reward), (reward, prompts, completions, columns)
    faults: Mapping[Any, str] = {}
    if skip:
        scores, faults = function.try_reward(*given)
    else:
        try:
            scores = function.call_reward(*given)
        except function.RewardError as error:
            scores, faults = [], {error.row: error.fault}
    told = [_told(fault, row, prompts, rows) for row, fault in faults.items()]
    everywhere = gather_object([(len(rows), told)])
    found = [sentence for _, sentences in everywhere for sentence in sentences]
    if found and (not skip or len(found) == sum(count for count, _ in everywhere)):
        function.load_states(reward, before)
        more = f", and {len(found) - 1} more" if found[1:] else ""
        raise function.RewardError(f"{found[0]}{more}")
    function.merge_states(reward)
    return scores, len(found)


def judged_metrics(
    judge: function.RewardFunction, *given: Any, rows: Sequence[int], iteration: int
) -> dict[str, float]:
    """Mean of a reward that is not trained on over all processes, its standard error, failures.

    {} with a warning if it failed altogether. Arguments as of `rollout_scores`.
    """
    try:
        scores, failed = rollout_scores(judge, *given, rows=rows, skip=True)
    except function.RewardError as error:
        warnings.warn(f"Iteration {iteration}, gold: {error}", stacklevel=3)
        return {}
    known = [s for part in gather_object([scores]) for s in part if not math.isnan(s)]
    found = {"objective/gold": statistics.fmean(known)}
    if len(known) > 1:
        found["objective/gold_se"] = statistics.stdev(known) / math.sqrt(len(known))
    return found | ({"objective/gold_failed": failed} if failed else {})


def without_eos(scores: Tensor, ended: Tensor, args: PPOConfig) -> Tensor:
    """The scores `(B,)`, some NaN, after `missing_eos_penalty` and `missing_eos_score`."""
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * ~ended
    if args.missing_eos_score is not None:
        scores = torch.where(ended | scores.isnan(), scores, args.missing_eos_score)
    return scores


def _told(fault: str, row: int | None, prompts: Sequence[Any], rows: Sequence[int]) -> str:
    if row is None:
        return fault
    text = function.as_text(prompts[row])
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
    return f"{fault} (prompt {rows[row] + 1} of the dataset: {shown!r})"
