"""Completions with their log-probabilities, values and scores: one `Rollout`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_instruct.generation.logits import Sequences, at_states, join, spread
from trl_instruct.generation.sampling import decode
from trl_instruct.models.properties import call, disable_dropout, unwrapped
from trl_instruct.padding import right_padded_mask, similar_lengths
from trl_instruct.ppo_trainer.token_statistics import token_statistics
from trl_instruct.scalar_head import compute_in_float32, disable_rescaling, score_head, shift_of

SAME = 1e-4  # nats, of a token


class ValueModel(nn.Module):
    """A scalar reward model read at every token: V(s_t) instead of one score at the end.

    The reward model's shift is subtracted, as it is from the scores that V predicts.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        compute_in_float32(score_head(model))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Value after each token: `(B, T)`, float32. Arguments `(B, T)`."""
        backbone = unwrapped(self.model).base_model
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        output = call(backbone, **tokens, position_ids=position_ids, use_cache=False)
        return self.read(output.last_hidden_state)

    def read(self, hidden: Tensor) -> Tensor:
        """Value after each token, `(B, T)`, from the last hidden states `(B, T, H)`."""
        return score_head(self.model)(hidden).squeeze(-1).float() - shift_of(self.model)


class Rollout(NamedTuple):
    """B episodes. Prompts are padded on the left, completions on the right.

    prompt_ids `(B, P)`, prompt_lengths `(B,)`; completion_ids `(B, C)`, completion_lengths `(B,)`
    with the EOS counted, ended `(B,)` True if there is one; logprobs, ref_logprobs, values `(B, C)`
    per completion token, 0 after the end; scores `(B,)`, NaN if the reward failed: then no token of
    the episode counts. sampler_logprobs `(B, C)` or None are as in `Drawn`.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_lengths: Tensor
    ended: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    sampler_logprobs: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """`(B, C)` True on completion tokens, EOS included, of episodes that have a score."""
        return right_padded_mask(self.counted_lengths, self.completion_ids.shape[1])

    @property
    def counted_lengths(self) -> Tensor:
        """`(B,)` completion tokens that count: 0 for an episode without a score."""
        return self.completion_lengths * self.scored

    @property
    def scored(self) -> Tensor:
        """`(B,)` False where the reward failed."""
        return ~self.scores.isnan()

    @property
    def lengths(self) -> Tensor:
        """`(B,)` tokens of prompt and completion."""
        return self.prompt_lengths + self.completion_lengths

    def texts(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] | None
    ) -> list[str]:
        """The completions' texts, without the EOS or stop string that ended them."""
        tokens = (self.completion_ids, self.completion_lengths, self.ended)
        return decode(*tokens, tokenizer, stop_strings)

    def select(self, rows: Tensor) -> "Rollout":
        """The episodes with these indices."""
        fields: Any = (None if field is None else field[rows] for field in self)
        return Rollout(*fields)


def prompt_batches(
    num_prompts: int, batch_size: int, num_batches: int, *, seed: int
) -> Iterator[list[int]]:
    """Rows of the prompts, one batch at a time; every pass is reshuffled.

    Rows left over from a pass come first in the next: use counts differ by at most one.

    >>> batches = list(prompt_batches(3, 2, 3, seed=0))
    >>> sorted(sum(batches, []))
    [0, 0, 1, 1, 2, 2]
    """
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(num_batches):
        while len(queue) < batch_size:
            queue += torch.randperm(num_prompts, generator=generator).tolist()
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield batch


class PolicyAndValue(nn.Module):
    """The two trained models as one module, for the optimizer and `Accelerator.prepare`."""

    def __init__(self, policy: PreTrainedModel, value: ValueModel):
        super().__init__()
        self.policy = policy
        self.value = value
        self.config = policy.config

    def forward(
        self,
        sequences: Sequences,
        tokens: Tensor,
        temperature: float = 1.0,
        with_values: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`token_statistics` of the tokens, and values, in the N states: `(N,)` each, by rows."""
        with last_hidden_states(self.policy) as seen:
            given = self.policy, sequences, tokens
            logprobs, entropies = token_statistics(*given, temperature=temperature)
        if not with_values:
            return logprobs, entropies, None
        # The value model may be a head on the policy: then one pass gives both.
        one_trunk = self.value.model.base_model is self.policy.base_model
        if one_trunk and seen:
            return logprobs, entropies, at_states(self.value.read(seen[-1]), sequences)
        return logprobs, entropies, state_values(self.value, sequences)

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP shards one by one, as transformers names them."""
        models = (self.policy, self.value.model)
        return sorted({name for model in models for name in model._no_split_modules or ()})

    # TRL reads this before it generates with ZeRO-3. In eval mode nothing is recomputed.
    is_gradient_checkpointing = False

    def no_op(self) -> None:
        """Do nothing: FSDP's root is the module called first (see `sharding.mark_fsdp_root`)."""

    def gradient_checkpointing_enable(self, checkpoint_kwargs: dict[str, Any] | None) -> None:
        """Recompute both models' activations in the backward pass (`torch.utils.checkpoint`)."""
        for model in (self.policy, self.value.model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs)


def disable_dropout_and_rescaling(model: PreTrainedModel) -> None:
    """Make the model the same function in training as in eval mode: no dropout, no rescaling.

    Otherwise the policy that is updated would differ from the one that sampled.
    """
    disable_dropout(model)
    disable_rescaling(unwrapped(model))


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list to which each backbone call adds its `(B, T, H)`; a model may make no such call."""
    seen: list[Tensor] = []
    with unwrapped(model).base_model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    ):
        yield seen


def state_values(value: ValueModel, sequences: Sequences) -> Tensor:
    """Values of the states in which the completions' tokens were chosen: `(N,)`, row by row."""
    return at_states(value(*sequences[:3]), sequences)


@torch.no_grad()
def with_logprobs(
    rollout: Rollout,
    model: PolicyAndValue,
    ref_policy: nn.Module | None,
    *,
    temperature: float,
    batch_size: int,
    by_policy: bool = False,
) -> Rollout:
    """The rollout with log-probabilities under policy and reference, and values.

    `ref_policy` is None if the policy is LoRA, with its base as the reference; the temperature is
    that of sampling. A forward pass has up to `batch_size` episodes of similar length.
    `by_policy`: the policy itself drew; its log-probabilities then stand if a check agrees.
    """
    if by_policy:
        told: Any = rollout.sampler_logprobs
        rollout = rollout._replace(logprobs=told, sampler_logprobs=None)
    known = by_policy and _says_again(rollout, model.policy, temperature)
    batches = similar_lengths(rollout.lengths.tolist(), batch_size)
    order = torch.tensor([row for rows in batches for row in rows])
    parts = [
        _with_logprobs_at_once(rollout.select(part), model, ref_policy, temperature, known)
        for part in order.to(rollout.prompt_ids.device).split([len(rows) for rows in batches])
    ]
    back = order.argsort()
    logprobs, ref_logprobs, values = (torch.cat(p)[back] for p in zip(*parts, strict=True))
    return rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)


def _says_again(rollout: Rollout, policy: Any, temperature: float) -> bool:
    """Whether a forward pass has the rollout's logprobs, in its shortest and longest episode.

    In 16 bits, for instance, the cache that a policy draws with rounds otherwise.
    """
    part = rollout.select(rollout.lengths.argsort()[[0, -1]])
    mask = right_padded_mask(part.completion_lengths, part.logprobs.shape[1])
    given = join(*part[:4]), part.completion_ids[mask]
    again, _ = token_statistics(policy, *given, temperature=temperature)
    return torch.allclose(again, part.logprobs[mask], rtol=0, atol=SAME)


def _with_logprobs_at_once(
    rollout: Rollout,
    model: PolicyAndValue,
    ref_policy: nn.Module | None,
    temperature: float,
    known: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs (those that are `known`), ref_logprobs and values of one batch: `(B, C)` each."""
    tokens, completions = rollout[:4], rollout.completion_ids
    mask = right_padded_mask(rollout.completion_lengths, completions.shape[1])
    # Not model(...): ZeRO-3's hook on that call waits for the other processes, each of which may
    # have another number of batches. Not model.forward: accelerate's is under autocast already.
    read: Any = type(model).forward
    given = join(*tokens), completions[mask]
    if known:
        logprobs, values = rollout.logprobs[mask], state_values(model.value, given[0])
    else:
        logprobs, _, values = read(model, *given, temperature)
    with model.policy.disable_adapter() if ref_policy is None else nullcontext():
        reference: Any = ref_policy or model.policy
        ref_logprobs, _ = token_statistics(reference, *given, temperature=temperature)
    return spread(logprobs, mask), spread(ref_logprobs, mask), spread(values, mask)
