"""What a stage is about to do: its records as the model sees them, lengths, steps, a first score.

`trl-instruct check STAGE` ends there: `config.faults` is then a list, and nothing is trained.
"""

import math
import statistics
from collections.abc import Iterable, Sequence, Sized
from typing import Any

from datasets import Dataset
from transformers import Trainer

from trl_instruct.console import one_line, plural
from trl_instruct.data.reading import Reading
from trl_instruct.data.rendering import Rendered
from trl_instruct.data.sources import Record
from trl_instruct.generation.engines import begun
from trl_instruct.generation.sampling import Sampling, prompt_tokens, sample_several
from trl_instruct.rewards.function import as_completions, call_reward, place_on
from trl_instruct.types import Tokenizer

SHOWN, HEAD = 2, 50
FEW_STEPS = 10


class StageEnd(Exception):  # noqa: N818 - it is no error
    """What comes before the first step is all: a dry run, or a run that had ended before."""


def shown_tokens(rendered: Rendered, tokenizer: Tokenizer) -> str:
    """A record token by token, white space escaped; what counts in loss or score in brackets."""

    def texts(ids: list[int]) -> list[str]:
        shown = [repr(tokenizer.decode([token]))[1:-1] for token in ids]
        if len(shown) > 2 * HEAD:
            shown[HEAD:-HEAD] = [f" ... {len(shown) - 2 * HEAD} more ... "]
        return shown

    completion = texts(rendered.completion)
    return "|".join(texts(rendered.prompt)) + "".join(f"[{text}]" for text in completion)


def tell_records(run: Any, rendered: Iterable[Rendered], tokenizer: Any) -> None:
    """Show the first records of a dry run."""
    for number, record in zip(range(1, SHOWN + 1), rendered, strict=False):
        counts = f"{len(record.prompt)} + {len(record.completion)} tokens"
        run.say(f"record {number}, {counts}: {shown_tokens(record, tokenizer)}")


def tell_lengths(run: Any, what: str, lengths: Sequence[int], limit: int | None) -> None:
    """Say how long the texts are, and how many exceed the limit."""
    told = f"{what}: {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}"
    if limit:
        beyond = sum(length > limit for length in lengths)
        told += f"; the limit is {limit}, {beyond} of {len(lengths)} exceed it"
    run.say(told)


def fitting(
    prompts: Dataset, tokenizer: Any, policy: Any, reading: Reading, limits: Any
) -> Dataset:
    """Prompts without those that the template refuses or that are too long, if bad ones go."""

    def fits(record: Record) -> None:
        columns = {name: [value] for name, value in record.items()}
        prompt_tokens(columns, tokenizer, policy, limits)

    return reading.checked(prompts, fits) if reading.skips else prompts


def plan_of(trainer: Trainer) -> str:
    """Optimizer steps and passes of a run, in words; few of them teach little."""
    args: Any = trainer.args
    iterations, data = getattr(trainer, "num_iterations", None), trainer.train_dataset
    if iterations is not None:
        steps = args.num_mini_batches * args.num_ppo_epochs * iterations
        prompts, batch = len(data), trainer.batch_size
        plan = (
            f"{prompts:,} prompts in batches of {batch}: {plural(iterations, 'iteration')}, "
            f"{iterations * batch:,} episodes ({_passes(iterations * batch / prompts)}), "
            f"{_steps(steps)}"
        )
    elif hasattr(args, "num_ppo_epochs"):
        return ""  # TRL's PPOTrainer
    elif not isinstance(data, Sized):
        return f"{args.max_steps} optimizer steps on a stream"
    else:
        rows, each = len(data), args.train_batch_size * args.world_size
        batches = max(1, rows // each if args.dataloader_drop_last else math.ceil(rows / each))
        a_pass = math.ceil(batches / args.gradient_accumulation_steps)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(a_pass * args.num_train_epochs)
        plan = (
            f"{rows:,} rows in batches of {each * args.gradient_accumulation_steps}: "
            f"{_steps(a_pass)} a pass, {_steps(steps)} in all ({_passes(steps / a_pass)})"
        )
    if steps >= FEW_STEPS:
        return plan
    return f"{plan}: few; lower gradient_accumulation_steps, or give more data or passes"


def _steps(count: int) -> str:
    return "ONE optimizer step" if count == 1 else plural(count, "optimizer step")


def _passes(count: float) -> str:
    return "1 pass" if count == 1 else f"{count:.3g} passes"


def tell_rewards(run: Any, policy: Any, reward: Any, trainer: Any, prompts: Any) -> None:
    """Call the reward on completions of the first prompts."""
    rows = min(SHOWN, len(prompts))
    given = begun(policy, trainer.processing_class), trainer.prompts[:rows], 1
    drawn = [one for (one,) in sample_several(*given, Sampling.of(run.config))]
    columns = prompts[:rows]
    asked = columns.pop("prompt")
    texts = as_completions(asked, [completion.text for completion in drawn])
    place_on(reward, policy.device)
    columns["completion_ids"] = [completion.ids for completion in drawn]
    scores = call_reward(reward, asked, texts, columns)
    for text, score in zip(texts, scores, strict=True):
        run.say(f"the reward gives {score:.4g} to {one_line(text)[:80]!r}")
