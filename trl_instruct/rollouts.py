"""Completions with their log-probabilities, values and scores: one `Rollout`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_instruct.errors import InputError
from trl_instruct.losses import logprobs_by_row
from trl_instruct.masking import (
    left_padded_mask,
    padding_before,
    position_ids,
    right_padded_mask,
    roll_rows,
)
from trl_instruct.models import ValueModel, accepted, disable_dropout, unwrapped
from trl_instruct.recurrent import reads_padding
from trl_instruct.scalar_head import keep_weights


class Rollout(NamedTuple):
    """B episodes. Prompts stand at the right end of their row, completions at the left end.

    prompt_ids `(B, P)`, prompt_lengths `(B,)`; completion_ids `(B, C)`, completion_lengths `(B,)`
    with the EOS counted, ended `(B,)` True where there is one; logprobs, ref_logprobs, values
    `(B, C)` per completion token, 0 behind the end; scores `(B,)`, NaN where the reward failed: no
    token of such an episode counts.
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

    @property
    def mask(self) -> Tensor:
        """`(B, C)` True on completion tokens, EOS included, of episodes that have a score."""
        real = right_padded_mask(self.completion_lengths, self.completion_ids.shape[1])
        return real & self.scored.unsqueeze(1)

    @property
    def scored(self) -> Tensor:
        """`(B,)` False where the reward failed."""
        return ~self.scores.isnan()

    @property
    def by_length(self) -> Tensor:
        """`(B,)` indices of the episodes, the shortest first: neighbours need little padding."""
        return (self.prompt_lengths + self.completion_lengths).argsort()

    def select(self, rows: Tensor) -> "Rollout":
        """The episodes with these indices."""
        return Rollout(*(field[rows] for field in self))


def prompt_batches(
    num_prompts: int, batch_size: int, num_batches: int, *, seed: int
) -> Iterator[list[int]]:
    """Rows of the prompts, a batch at a time; every pass over them is shuffled afresh.

    What a pass leaves over opens the next one, so no prompt is used more than once more often than
    another.

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


def check_same_prompts(before: dict[str, int], now: dict[str, int], checkpoint: Path) -> None:
    """InputError where a run would not take the prompts that the one it goes on with would have.

    Args:
        before, now: what decides which prompts an iteration takes, by name.
        checkpoint: for the message.
    """
    for name, value in now.items():
        if before[name] != value:
            raise InputError(
                f"The checkpoint {str(checkpoint)!r} was made with {name} {before[name]}, this run "
                f"has {value}: it would see other prompts than the run it goes on with. Resume "
                "with the same data and batch sizes, or start the run afresh."
            )


class Sequences(NamedTuple):
    """Prompt and completion side by side, as a model reads them: all `(B, P + C)`."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class PolicyAndValue(nn.Module):
    """The two trained models as one module: what the optimizer sees and processes wrap."""

    policy: PreTrainedModel
    value: ValueModel

    def __init__(self, policy: PreTrainedModel, value: ValueModel):
        super().__init__()
        self.policy = policy
        self.value = value
        self.config = policy.config

    def forward(
        self, sequences: Sequences, width: int, with_values: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Completion logits `(B, C, V)` and values `(B, C)`; `width` is C."""
        with last_hidden_states(self.policy) as seen:
            logits = completion_logits(self.policy, sequences, width)
        if not with_values:
            return logits, None
        if self.one_trunk and seen and not reads_padding(self.policy):
            return logits, self.value.read(seen[-1])[:, -width - 1 : -1]
        return logits, state_values(self.value, sequences, width)

    @property
    def one_trunk(self) -> bool:
        """Whether the value model is a head on the policy: one pass then gives both."""
        return self.value.model.base_model is self.policy.base_model

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP shares out one by one, as transformers names them."""
        models = (self.policy, self.value.model)
        return sorted({name for model in models for name in model._no_split_modules or ()})

    # TRL asks before it generates with ZeRO-3. In eval mode nothing is computed twice.
    is_gradient_checkpointing = False

    def touch(self) -> None:
        """Nothing: see `sharding.find_root`."""

    def gradient_checkpointing_enable(self, checkpoint_kwargs: dict[str, Any] | None) -> None:
        """Recompute activations of both models in the backward pass.

        Args:
            checkpoint_kwargs: for `torch.utils.checkpoint.checkpoint`.
        """
        for model in (self.policy, self.value.model):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs)


def unify_modes(model: PreTrainedModel) -> None:
    """Make the model the same function in training as in eval mode: no dropout, no rescaling.

    The policy that is updated would otherwise differ from the one that sampled.
    """
    disable_dropout(model)
    keep_weights(unwrapped(model))


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, each forward pass adds its `(B, T, H)`; not of models that pass by their backbone."""
    seen: list[Tensor] = []
    backbone = unwrapped(model).base_model
    handle = backbone.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    try:
        yield seen
    finally:
        handle.remove()


def completion_logits(model: PreTrainedModel, sequences: Sequences, width: int) -> Tensor:
    """Logits that predict the last `width` tokens, `(B, width, V)`.

    The unembedding runs on those positions only, where the architecture allows: over a prompt of
    256 tokens it would be most of the memory of the pass.
    """
    if not reads_padding(model):
        return _last_logits(model, sequences, width + 1)[:, :-1]
    before = padding_before(sequences.attention_mask)
    logits = _last_logits(model, _moved(sequences, before), width + 1 + int(before.max()))
    return roll_rows(logits, -before)[:, -width - 1 : -1]


def _last_logits(model: PreTrainedModel, sequences: Sequences, count: int) -> Tensor:
    arguments = accepted(
        unwrapped(model), **sequences._asdict(), use_cache=False, logits_to_keep=count
    )
    return model(**arguments).logits[:, -count:]


def state_values(value: ValueModel, sequences: Sequences, width: int) -> Tensor:
    """Values of the states in which the last `width` tokens were chosen, `(B, width)`."""
    if not reads_padding(value.model):
        return value(*sequences)[:, -width - 1 : -1]
    before = padding_before(sequences.attention_mask)
    return roll_rows(value(*_moved(sequences, before)), -before)[:, -width - 1 : -1]


def _moved(sequences: Sequences, columns: Tensor) -> Sequences:
    """Rows moved to the left by these numbers of columns `(B,)`: no padding in front of them."""
    return Sequences(*(roll_rows(field, columns) for field in sequences))


def join(
    prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, completion_lengths: Tensor
) -> tuple[Sequences, int]:
    """Sequences without columns that are padding in every row, and the width left for completions.

    A micro-batch is as wide as its own longest prompt and completion, not as the whole rollout's.
    """
    longest_prompt, width = int(prompt_lengths.max()), int(completion_lengths.max())
    mask = torch.cat(
        [
            left_padded_mask(prompt_lengths, longest_prompt),
            right_padded_mask(completion_lengths, width),
        ],
        dim=1,
    )
    ids = torch.cat(
        [prompt_ids[:, prompt_ids.shape[1] - longest_prompt :], completion_ids[:, :width]], dim=1
    )
    return Sequences(ids, mask.long(), position_ids(mask)), width


def whole_text(ids: Tensor) -> Sequences:
    """Full rows of text, `(B, T)`, as a model reads them."""
    mask = torch.ones_like(ids)
    return Sequences(ids, mask, position_ids(mask.bool()))


@torch.no_grad()
def completion_logprobs(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    completion_ids: Tensor,
    lengths: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Log-probability of each completion token, `(B, C)` nats, 0 behind the end.

    Arguments as in `Rollout`; the pass over all rows at once is the caller's to split.
    """
    sequences, width = join(prompt_ids, prompt_lengths, completion_ids, lengths)
    logits = completion_logits(model, sequences, width)
    logprobs = logprobs_by_row(logits, completion_ids[:, :width], temperature=temperature)
    return widen(logprobs, lengths, completion_ids.shape[1])


def _logprobs_and_values(
    model: PolicyAndValue,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    completion_ids: Tensor,
    lengths: Tensor,
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """As `completion_logprobs`; and the value of the state in which each token was chosen."""
    sequences, width = join(prompt_ids, prompt_lengths, completion_ids, lengths)
    logits, values = model(sequences, width)
    logprobs = logprobs_by_row(logits, completion_ids[:, :width], temperature=temperature)
    wide = completion_ids.shape[1]
    return widen(logprobs, lengths, wide), widen(values, lengths, wide)


def widen(values: Tensor, lengths: Tensor, width: int) -> Tensor:
    """`(B, c)` per-token values as `(B, width)`, 0 behind each row's length."""
    wide = torch.zeros(values.shape[0], width, device=values.device, dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return torch.where(right_padded_mask(lengths, width), wide, 0.0)


def blank_measurements(completion_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, values and scores of completions that are still to be measured."""
    blank = torch.zeros(completion_ids.shape, device=completion_ids.device)
    return blank, blank, blank, blank[:, 0]


@torch.no_grad()
def measured(
    rollout: Rollout,
    model: PolicyAndValue,
    ref_policy: nn.Module | None,
    *,
    temperature: float,
    batch_size: int,
) -> Rollout:
    """The rollout with log-probabilities under policy and reference, and values.

    Args:
        rollout: B episodes.
        model: policy and value model.
        ref_policy: None: the policy is LoRA, and its base the reference.
        temperature: that of sampling.
        batch_size: episodes per forward pass; those of similar length go together, so that little
            is padding.
    """
    order = rollout.by_length
    parts = []
    for rows in order.split(batch_size):
        tokens = rollout.select(rows)[:4]
        logprobs, values = _logprobs_and_values(model, *tokens, temperature=temperature)
        with model.policy.disable_adapter() if ref_policy is None else nullcontext():
            reference = ref_policy or model.policy
            ref_logprobs = completion_logprobs(reference, *tokens, temperature=temperature)
        parts.append((logprobs, ref_logprobs, values))
    back = order.argsort()
    logprobs, ref_logprobs, values = (torch.cat(p)[back] for p in zip(*parts, strict=True))
    return rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
