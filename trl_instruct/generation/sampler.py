"""The one seam for sampling: what draws a policy's completions, and what it returns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_instruct.errors import InputError
from trl_instruct.generation.token_sampling import Sampling


class SamplerError(InputError):
    """A sampler's engine failed: it could not start, or it broke while it drew."""


class Drawn(NamedTuple):
    """Completions of B prompts, `(B, C)` ids with filler after the end.

    completion_lengths `(B,)`, EOS included; ended `(B,)` True if an EOS or stop string ended it;
    logprobs `(B, C)`: the sampler's own, nats at its temperature, NaN where it has none, or None.
    """

    completion_ids: Tensor
    completion_lengths: Tensor
    ended: Tensor
    logprobs: Tensor | None = None


class Sampler(Protocol):
    """What `PPOTrainer` samples with: `begin` once; then `follow` and `draw` in each iteration."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def begin(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Get ready to sample from a policy, on its device; without processes, no accelerator.

        InputError for a policy that this sampler cannot sample from.
        """

    def follow(self) -> None:
        """Take over the policy's weights; whoever changed them has gathered them whole."""

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        copies: int = 1,
        progress: Callable[[int], Any] | None = None,
    ) -> Drawn:
        """Sample `copies` completions of each prompt, a list of tokens, in adjacent rows.

        `progress` is called with the number of completions that were drawn. SamplerError if the
        engine breaks.
        """
