"""Prompts -> completions: tokenised, cut to fit, sampled from the policy, decoded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from trl_instruct.configs import PPOConfig
from trl_instruct.data.rendering import completion_texts, render_prompts
from trl_instruct.errors import InputError
from trl_instruct.generation import token_sampling
from trl_instruct.generation.sampler import Drawn, Rows, Sampler
from trl_instruct.generation.token_sampling import NEVER, Sampling
from trl_instruct.models.precision import rounded
from trl_instruct.models.properties import context_length, evaluating
from trl_instruct.models.sharding import SHARDED
from trl_instruct.option_checks import check_stop_strings
from trl_instruct.padding import completion_lengths, left_padded_mask, pad_rows, unpadded
from trl_instruct.types import Model, Tokenizer


def fit_prompts(
    token_lists: list[list[int]],
    *,
    max_prompt_length: int | None,
    response_length: int,
    context: int | None,
) -> tuple[list[list[int]], int]:
    """Prompts that leave room for their completion, and how many were cut.

    Longer ones than `max_prompt_length` are cut from the left; None: too long ones are an error. Of
    the `context` that the model can attend to (or None), a completion takes `response_length`.
    InputError for an empty prompt, one too long and no limit, or too large a max_prompt_length.
    """
    if [] in token_lists:
        raise InputError(f"Prompt {token_lists.index([]) + 1} has no tokens; it must not be empty.")
    room = None if context is None else context - response_length
    if max_prompt_length is None:
        for row, tokens in enumerate(token_lists):
            if room is not None and len(tokens) > room:
                raise InputError(
                    f"Prompt {row + 1} is {len(tokens)} tokens long; with response_length "
                    f"{response_length} the model's context of {context} leaves {room}. Set "
                    "max_prompt_length to cut long prompts from the left, or lower "
                    "response_length."
                )
        return token_lists, 0
    if room is not None and max_prompt_length > room:
        raise InputError(
            f"max_prompt_length {max_prompt_length} + response_length {response_length} exceed the "
            f"model's context of {context} tokens; lower one of them."
        )
    cut = sum(len(tokens) > max_prompt_length for tokens in token_lists)
    return [tokens[-max_prompt_length:] for tokens in token_lists], cut


def prompt_tokens(
    columns: Mapping[str, Sequence[Any]], tokenizer: Tokenizer, policy: Model, limits: Any
) -> tuple[list[list[int]], int]:
    """Prompts as ids, cut to the policy's context, and how many were cut.

    Columns are `prompt` (texts or messages), and others as in `render_prompts`. The limits are a
    `Sampling`, or a config with its two lengths. InputError as in `fit_prompts`.
    """
    return fit_prompts(
        render_prompts(columns["prompt"], tokenizer, columns),
        max_prompt_length=limits.max_prompt_length,
        response_length=limits.response_length,
        context=context_length(policy),
    )


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists to `(B, P)` ids, padded on the left with 0, and `(B,)` lengths."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return pad_rows(prompts, 0, side="left").to(device), lengths


@torch.no_grad()
def generate(
    policy: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_token_ids: list[int],
    tokenizer: Tokenizer | None = None,
    copies: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Drawn:
    """Sample `copies` completions of each of R prompts from the policy's full distribution.

    Its own sampling settings (top_p, ...) are ignored, and the batch size if it `reads_padding`.
    `progress` is called after each batch with its number of completions. Returns B = R * copies of
    them; tokens and log-probabilities after the end are filler. InputError for an empty stop
    string, or stop strings without the tokenizer, which reads them.
    """
    check_stop_strings(sampling.stop_strings)
    batch_size = sampling.batch_size
    if sampling.stop_strings and tokenizer is None:
        raise InputError("stop_strings need the tokenizer, which reads them. Give tokenizer=.")
    if token_sampling.reads_padding(policy):
        # Even for prompts of equal length: RWKV's cached states mix the rows of a batch
        # (transformers 5.23), and a batch without the cache is slower than single rows.
        batch_size = 1
    if copies > batch_size:
        prompts, copies = [prompt for prompt in prompts for _ in range(copies)], 1
    blank = torch.full((len(prompts), copies, sampling.response_length), eos_token_ids[0])
    completions = blank.to(policy.device)
    stopped = torch.full_like(completions[..., 0], NEVER)
    logprobs = torch.zeros(completions.shape, device=policy.device)
    given: Any = {"eos_token_ids": eos_token_ids, "tokenizer": tokenizer, "copies": copies}
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    at_once = batch_size // copies
    with evaluating(policy), token_sampling.plain_sampling(policy):
        for start in range(0, len(prompts), at_once):
            rows = by_length[start : start + at_once]
            ids, lengths = pad_prompts([prompts[row] for row in rows], policy.device)
            mask = left_padded_mask(lengths, ids.shape[1])
            drawn, ends, likely = token_sampling.draw(policy, ids, mask, sampling, **given)
            completions[rows] = drawn.view(len(rows), copies, -1)
            stopped[rows] = ends.view(len(rows), copies)
            logprobs[rows] = likely.view(len(rows), copies, -1)
            if progress is not None:
                progress(len(drawn))
    completions, stopped = completions.flatten(0, 1), stopped.flatten()
    lengths, ended = completion_lengths(completions, eos_token_ids)
    ends = torch.minimum(lengths, stopped)
    return Drawn(completions, ends, ended | (stopped < NEVER), logprobs.flatten(0, 1))


class TransformersSampler(Sampler):
    """The policy itself draws (`generate`), under mixed precision as in its training.

    Under bf16 on an accelerator, a policy without adapter is rounded to bfloat16 for it: its cache
    takes half as much. (On a CPU it would draw more slowly.)
    """

    rounded: Model | None = None

    def follow(self) -> None:
        """As in `Sampler`."""
        held, whole = self.accelerator, not isinstance(self.policy, PeftModel)
        if held is None or held.distributed_type in SHARDED or held.device.type == "cpu":
            return
        if whole and held.mixed_precision == "bf16":
            self.rounded = rounded(self.policy)

    def draw(self, prompts: Rows, sampling: Sampling, **options: Any) -> Drawn:
        """As in `Sampler`."""
        options |= {"eos_token_ids": self.eos_token_ids, "tokenizer": self.tokenizer}
        policy, self.rounded = self.rounded or self.policy, None
        with self.accelerator.autocast() if self.accelerator else nullcontext():
            drawn = Drawn(*generate(policy, prompts, sampling, **options))
        exact = self.accelerator is None or self.accelerator.mixed_precision == "no"
        return drawn._replace(by_policy=exact and drawn.logprobs is not None)


class Completion(NamedTuple):
    """A sampled completion: its text, its tokens with those that ended it, and whether any did."""

    text: str
    ids: list[int]
    ended: bool


def complete(
    sampler: Sampler, prompts: Sequence[Sequence[int]], sampling: Sampling, **options: Any
) -> list[Completion]:
    """Completions of lists of tokens; `Sampler.draw` takes the options."""
    drawn = sampler.draw(prompts, sampling, **options)[:3]
    texts = decode(*drawn, sampler.tokenizer, sampling.stop_strings)
    return list(map(Completion, texts, unpadded(*drawn[:2]), drawn[2].tolist()))


def sample_several(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[list[Completion]]:
    """Sample `count` completions of each prompt, a list of tokens; progress as in `draw`."""
    rows_at_once = max(1, sampling.batch_size * 4 // count)
    for start in range(0, len(prompts), rows_at_once):
        rows = prompts[start : start + rows_at_once]
        found = complete(sampler, rows, sampling, copies=count, progress=progress)
        yield from (found[first : first + count] for first in range(0, len(found), count))


def decode(
    completion_ids: Tensor,
    lengths: Tensor,
    ended: Tensor,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str] | None = None,
) -> list[str]:
    """Texts of what `generate` returned, each cut before the EOS or stop string that ended it."""
    kept = zip(completion_ids.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    rows = [(ids[:length], ids[: length - end]) for ids, length, end in kept]
    texts = completion_texts([row for _, row in rows], tokenizer)
    if not stop_strings:
        return texts
    # The token that completes a stop string may also hold the last letters before it.
    whole = completion_texts([row for row, _ in rows], tokenizer)
    # Where the first of the strings begins in each text, or None.
    ends = [min((t.index(s) for s in stop_strings if s in t), default=None) for t in whole]
    found = zip(texts, whole, ends, strict=True)
    return [text if end is None else full[:end] for text, full, end in found]


def unused_sampling(policy: Model) -> dict[str, Any]:
    """Settings of the model's own generation_config that sampling ignores."""
    own = policy.generation_config.to_diff_dict()
    return {name: own[name] for name in PPOConfig.REFUSED if own.get(name) is not None}
