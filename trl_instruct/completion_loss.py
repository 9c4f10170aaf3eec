"""The loss of a language model on demonstrations: what RL costs in it is the alignment tax."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_instruct.batching import pad_rows, similar_lengths
from trl_instruct.errors import InputError
from trl_instruct.models import context_length, evaluating
from trl_instruct.reward_tokens import token_ids
from trl_instruct.rollouts import completion_logprobs
from trl_instruct.sampling import pad_prompts, tokenize_prompts
from trl_instruct.sources import iterate


@torch.no_grad()
def completion_loss(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Dataset,
    *,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> float:
    """Mean -log p(token) over all completion tokens of the demonstrations, EOS included, nats.

    The loss of `sft` on them; exp(loss) is the perplexity. What exceeds the model's context is cut
    from the right, as in training.

    Args:
        policy: the model to measure.
        tokenizer: its tokenizer.
        demonstrations: `prompt`, `completion`; text or messages.
        batch_size: most demonstrations per forward pass.
        progress: told the number of demonstrations of each batch that is done.

    Raises:
        InputError: a prompt that fills the context; messages, and there is no chat template.
    """
    context = context_length(policy)
    rows = demonstration_tokens(demonstrations, tokenizer, context)
    batches = similar_lengths([len(prompt) + len(ids) for prompt, ids in rows], batch_size)
    total, tokens = 0.0, 0
    with evaluating(policy):
        for chosen in batches:
            prompts, completions = zip(*(rows[row] for row in chosen), strict=True)
            lengths = torch.tensor([len(ids) for ids in completions], device=policy.device)
            ids = pad_rows(list(completions), 0).to(policy.device)
            given = (*pad_prompts(prompts, policy.device), ids, lengths)
            total -= completion_logprobs(policy, *given, temperature=1.0).double().sum().item()
            tokens += int(lengths.sum())
            if progress is not None:
                progress(len(prompts))
    return total / tokens


def demonstration_tokens(
    demonstrations: Dataset, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each demonstration as tokens, as TRL's SFTTrainer makes them.

    The completion begins where the tokens of the prompt alone and of both together part.

    Args:
        demonstrations: `prompt`, `completion`.
        tokenizer: the model's.
        context: most tokens of both; None: no limit.
    """
    rows = []
    for number, record in enumerate(iterate(demonstrations), start=1):
        (opening,) = tokenize_prompts([record["prompt"]], tokenizer)
        whole = token_ids(record["prompt"], record["completion"], tokenizer)
        both = zip(opening, whole, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
        completion = whole[shared:context]
        if not shared or not completion:
            raise InputError(
                f"Demonstration {number}: the prompt is {len(opening)} tokens and the model's "
                f"context {context}, so no completion is left to measure. Shorten the prompt."
            )
        rows.append((whole[:shared], completion))
    return rows
