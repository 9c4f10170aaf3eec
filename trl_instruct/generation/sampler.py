"""The one seam for sampling: what draws a policy's completions, and what it returns."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from trl_instruct.errors import InputError
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.types import Model, Tokenizer

Rows: TypeAlias = Sequence[Sequence[int]]
T = TypeVar("T")


class SamplerError(InputError):
    """A sampler's engine failed: it could not start, or it broke while it drew."""


class Drawn(NamedTuple):
    """Completions of B prompts: `(B, C)` ids with filler after the end, and `(B,)` as in `Rollout`.

    logprobs `(B, C)`: the sampler's own, nats at its temperature, NaN where it has none, filler
    after the end; or None. by_policy: they are the policy's own, in the precision of its training.
    """

    completion_ids: Tensor
    completion_lengths: Tensor
    ended: Tensor
    logprobs: Tensor | None = None
    by_policy: bool = False


class Sampler:
    """What `PPOTrainer` samples with: `begin` once; then `follow` and `draw` in each iteration.

    A subclass has `generate`, or a `draw` of its own.
    """

    policy: Model
    tokenizer: Tokenizer

    def begin(
        self, policy: Model, tokenizer: Tokenizer, accelerator: Accelerator | None = None
    ) -> None:
        """Get ready to sample from a policy, or InputError. Only a training has an accelerator."""
        self.policy, self.tokenizer, self.accelerator = policy, tokenizer, accelerator
        self.eos_token_ids = eos_token_ids(policy, tokenizer)

    def follow(self) -> None:
        """Take over the policy's weights; whoever changed them has gathered them whole."""

    def draw(
        self,
        prompts: Rows,
        sampling: Sampling,
        *,
        copies: int = 1,
        progress: Callable[[int], Any] | None = None,
    ) -> Drawn:
        """Sample `copies` completions of each prompt, a list of tokens, in adjacent rows.

        `progress` is called with the number of completions that were drawn. SamplerError if the
        engine breaks. Torch's random numbers move on by one.
        """
        asked = [list(prompt) for prompt in prompts for _ in range(copies)]
        seed, device = int(torch.randint(2**31, ())), self.policy.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            rows, logprobs = self.generate(asked, sampling, seed)
        if progress is not None:
            progress(len(asked))
        shape, stops = (len(rows), sampling.response_length), self.eos_token_ids
        ids, own = torch.full(shape, stops[0]), torch.zeros(shape)
        ended, strings = [], sampling.stop_strings or ()
        for place, (row, likely) in enumerate(zip(rows, logprobs, strict=True)):
            ids[place, : len(row)] = torch.tensor(row)
            own[place, : len(row)] = torch.tensor([math.nan if p is None else p for p in likely])
            text = self.tokenizer.decode(row) if strings else ""
            stopped = row[-1] in stops or any(string in text for string in strings)
            ended.append(stopped or len(row) < shape[1])  # engines do not all say why
        lengths, ends = torch.tensor([len(row) for row in rows]), torch.tensor(ended)
        return Drawn(ids.to(device), lengths.to(device), ends.to(device), own.to(device))

    def generate(
        self, asked: list[list[int]], sampling: Sampling, seed: int
    ) -> tuple[Rows, Sequence[Sequence[float | None]]]:
        """A completion of each prompt, and its tokens' log-probabilities if they are known."""
        raise NotImplementedError


def draw_in_all(sampler: Sampler, prompts: Rows, sampling: Sampling) -> Drawn:
    """Completions by new weights, in all processes: if one fails, SamplerError in all."""
    in_all(sampler.follow)
    return in_all(lambda: sampler.draw(prompts, sampling))


def in_all(work: Callable[[], T]) -> T:
    """What `work` returns in this process; if it fails in any, SamplerError in all."""
    found: list[T] = []
    fault = None
    try:
        found.append(work())
    except SamplerError as error:
        fault = str(error)
    for told in gather_object([fault]):
        if told:
            raise SamplerError(told)
    return found[0]


def eos_token_ids(policy: Model, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS first, then the model's own."""
    own = policy.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own] if own is not None else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))
