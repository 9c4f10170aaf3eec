"""Prompts -> completions, log-probabilities, values, scores: one `Rollout`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_instruct.errors import InputError
from trl_instruct.losses import token_logprobs
from trl_instruct.masking import (
    completion_lengths,
    left_padded_mask,
    padding_before,
    position_ids,
    right_padded_mask,
    roll_rows,
)
from trl_instruct.models import ValueModel, accepted, disable_dropout, evaluating, unwrapped
from trl_instruct.recurrent import reads_padding
from trl_instruct.scalar_head import keep_weights


class Rollout(NamedTuple):
    """B episodes. Prompts stand at the right end of their row, completions at the left end.

    prompt_ids `(B, P)`, prompt_lengths `(B,)`; completion_ids `(B, C)`, completion_lengths `(B,)`
    with the EOS counted, ended `(B,)` True where there is one; logprobs, ref_logprobs, values
    `(B, C)` per completion token, 0 behind the end; scores `(B,)`.
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
        """`(B, C)` True on completion tokens, EOS included."""
        return right_padded_mask(self.completion_lengths, self.completion_ids.shape[1])

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

    def forward(self, sequences: Sequences, width: int) -> tuple[Tensor, Tensor]:
        """Completion logits `(B, C, V)` and values `(B, C)`; `width` is C."""
        logits = completion_logits(self.policy, sequences, width)
        return logits, state_values(self.value, sequences, width)

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


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists to `(B, P)` ids, padded on the left with 0, and `(B,)` lengths."""
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, ids.shape[1] - len(prompt) :] = torch.tensor(prompt)
    return ids.to(device), lengths


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


@contextlib.contextmanager
def _plain_sampling(model: PreTrainedModel) -> Iterator[None]:
    """Hide a model's own generation_config: `generate` would fill top_p, repetition_penalty and
    the like from it, and the log-probabilities would no longer be those of the sampler."""
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


@torch.no_grad()
def generate(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: list[int],
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one completion per prompt from the policy's full distribution.

    Args:
        policy: the model; its sampling settings (top_p, ...) are not used.
        prompts: B token lists.
        max_new_tokens: C, the longest completion.
        eos_token_ids: tokens that end a completion.
        temperature: above 0.
        batch_size: prompts per call; batches are made of prompts of similar length. A model to
            which padding is text gets one prompt per call.

    Returns:
        completion_ids `(B, C)` (filler behind the end), completion_lengths `(B,)`, ended `(B,)`.
    """
    device = policy.device
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos_token_ids,
        pad_token_id=eos_token_ids[0],
    )
    completions = torch.full((len(prompts), max_new_tokens), eos_token_ids[0], device=device)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    if reads_padding(policy):
        # Not even prompts of equal length: RWKV's cached states mix the rows of a batch
        # (transformers 5.23), and without its cache it is slower than one by one.
        batch_size = 1
    with evaluating(policy), _plain_sampling(policy):
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            ids, lengths = pad_prompts([prompts[row] for row in rows], device)
            mask = left_padded_mask(lengths, ids.shape[1]).long()
            output = policy.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
            sampled = output[:, ids.shape[1] :]
            completions[rows, : sampled.shape[1]] = sampled
    return completions, *completion_lengths(completions, eos_token_ids)


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
    logprobs = token_logprobs(logits, completion_ids[:, :width], temperature=temperature)
    return widen(logprobs, lengths, completion_ids.shape[1])


@torch.no_grad()
def completion_values(
    value: ValueModel,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    completion_ids: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Value of the state in which each completion token was chosen, `(B, C)`, 0 behind the end.

    Arguments as in `Rollout`.
    """
    sequences, width = join(prompt_ids, prompt_lengths, completion_ids, lengths)
    values = state_values(value, sequences, width)
    return widen(values, lengths, completion_ids.shape[1])


def widen(values: Tensor, lengths: Tensor, width: int) -> Tensor:
    """`(B, c)` per-token values as `(B, width)`, 0 behind each row's length."""
    wide = torch.zeros(values.shape[0], width, device=values.device, dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return torch.where(right_padded_mask(lengths, width), wide, 0.0)


def tokenize_prompts(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts, each a text or a list of messages, to token ids.

    Messages go through the tokenizer's chat template, with the opening of the assistant's turn.

    Raises:
        InputError: messages, and the tokenizer has no chat template.
    """
    if not prompts or isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"] if prompts else []
    if tokenizer.chat_template is None:
        raise InputError(
            "The prompts are messages, but the tokenizer has no chat template. Train the policy "
            "with `sft(..., chat_template_path=...)`, or give prompts as text."
        )
    return [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"]
        for p in prompts
    ]


def fit_prompts(
    token_lists: list[list[int]],
    *,
    max_prompt_length: int | None,
    response_length: int,
    context: int | None,
) -> tuple[list[list[int]], int]:
    """Prompts that leave room for their completion, and how many were cut.

    Args:
        token_lists: the prompts.
        max_prompt_length: longer prompts lose their beginning; None: they are an error.
        response_length: tokens to leave for the completion.
        context: tokens the model can attend to, or None.

    Raises:
        InputError: an empty prompt; one that does not fit, and no (or too large a)
            max_prompt_length.
    """
    if [] in token_lists:
        raise InputError(
            f"Prompt {token_lists.index([]) + 1} has no tokens; a prompt must not be empty."
        )
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


def decode(
    completion_ids: Tensor, lengths: Tensor, ended: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Texts of the completions, without the EOS that ended them and what follows it."""
    kept = (lengths - ended.long()).tolist()
    rows = [ids[:n] for ids, n in zip(completion_ids.tolist(), kept, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def eos_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS first, then the model's own."""
    own = policy.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own] if own is not None else []
    return list(dict.fromkeys([tokenizer.eos_token_id, *own]))
