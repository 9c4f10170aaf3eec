"""Tokens drawn from a policy, for one batch of prompts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_instruct.models.properties import accepted, evaluating, unwrapped
from trl_instruct.padding import position_ids

NEVER = 2**31
"""The length of a completion that no stop string has ended."""


ENOUGH = 0.25
"""Share of the rows that must have ended before they are taken out of the batch."""


@contextlib.contextmanager
def plain_sampling(model: PreTrainedModel) -> Iterator[None]:
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


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from the softmax of its logits / temperature.

    By one random number a row and the cumulative distribution. torch.multinomial, which `generate`
    would call, draws one for each token of the vocabulary: on a CPU, a quarter of all its time with
    a small model.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(B, V)` logits -> 0 for the token that is drawn, -infinity for all others."""
        below = (scores.float() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.rand_like(below[:, :1]) * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp(max=below.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class StopStrings(StoppingCriteria):
    """Ends a completion where its text holds one of the strings, and remembers where that was.

    Unlike transformers' own `stop_strings` it reads the completion alone, not the prompt.

    Args:
        strings: that end a completion.
        tokenizer: the policy's.
        rows: of the batch.
        width: of the prompts, in tokens.
        device: that the batch is on.
    """

    def __init__(
        self,
        strings: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        width: int,
        device: torch.device,
    ):
        self.strings, self.tokenizer, self.width = strings, tokenizer, width
        # A letter may be up to four byte-level tokens; the last token may hold more than the end.
        self.tail = 4 * max(map(len, strings)) + 1
        self.lengths = torch.full((rows,), NEVER, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`(B,)` True for the rows that have ended."""
        count = input_ids.shape[1] - self.width
        texts = self.tokenizer.batch_decode(input_ids[:, -min(count, self.tail) :])
        found = [any(string in text for string in self.strings) for text in texts]
        ended = torch.tensor(found, device=self.lengths.device)
        self.lengths = torch.where(ended, self.lengths.clamp(max=count), self.lengths)
        return self.lengths <= count


class EnoughEnded(StoppingCriteria):
    """Ends all rows once a quarter of them has ended, so that these are not computed any further.

    Args:
        eos_token_ids: tokens that end a completion, one of which is the filler behind its end.
        stops: the stop strings, which have been looked for before.
    """

    def __init__(self, eos_token_ids: Tensor, stops: list[StopStrings]):
        self.eos_token_ids, self.stops = eos_token_ids, stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`(B,)` True for the rows that have ended, or for all."""
        ended = torch.isin(input_ids[:, -1], self.eos_token_ids)
        for stop in self.stops:
            ended = ended | (stop.lengths < NEVER)
        return ended | (ended.float().mean() >= ENOUGH)


class SamplingOptions(NamedTuple):
    """How completions are drawn: as in `sampling.generate`."""

    max_new_tokens: int
    eos_token_ids: list[int]
    stop_strings: Sequence[str] | None
    tokenizer: PreTrainedTokenizerBase | None
    temperature: float


@torch.no_grad()
def draw(
    policy: PreTrainedModel, ids: Tensor, mask: Tensor, copies: int, sampling: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """Some completions of each prompt.

    Where the model's cache can be cut by rows (`caches_rows`), a prompt is read once for all its
    completions, and `generate` is called again and again, without those that have ended by then;
    elsewhere once.

    Args:
        policy: in eval mode, within `plain_sampling`.
        ids, mask: `(R, P)` prompts, padded on the left.
        copies: completions of each.
        sampling: how.

    Returns:
        `(B, C)` tokens with B = R * copies, those of a prompt side by side, EOS or filler behind
        the end; and `(B,)` the length at which a stop string has ended it, or NEVER.
    """
    by_rows = caches_rows(policy)
    cache = read_prompts(policy, ids, mask, copies) if by_rows and copies > 1 else None
    ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
    width, longest = ids.shape[1], sampling.max_new_tokens
    eos = torch.tensor(sampling.eos_token_ids, device=ids.device)
    drawn = eos[:1].repeat(len(ids), longest)
    rows = torch.arange(len(ids), device=ids.device)
    stopped = torch.full_like(rows, NEVER)
    while True:
        stops = _stop_strings(sampling, len(rows), width, ids.device)
        ending = [*stops, EnoughEnded(eos, stops)] if by_rows else stops
        output = _continue(policy, ids, mask, cache, sampling, width, ending)
        new, length = output.sequences[:, ids.shape[1] :], output.sequences.shape[1] - width
        drawn[rows, ids.shape[1] - width : length] = new
        for stop in stops:
            stopped[rows] = stop.lengths
        ended = torch.isin(new, eos).any(dim=1) | (stopped[rows] <= length)
        left = (~ended).nonzero().flatten()
        if length == longest or not len(left):
            break
        # The rest goes on from its cache: `ids` grow from call to call, as columns of `drawn`.
        rows, ids, cache = rows[left], output.sequences[left], output.past_key_values
        mask = torch.cat([mask, torch.ones_like(new, dtype=mask.dtype)], dim=1)[left]
        cache.batch_select_indices(left)
    return drawn, stopped


def _stop_strings(
    sampling: SamplingOptions, rows: int, width: int, device: torch.device
) -> list[StopStrings]:
    if not sampling.stop_strings or sampling.tokenizer is None:
        return []
    return [StopStrings(sampling.stop_strings, sampling.tokenizer, rows, width, device)]


def _continue(
    policy: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: Cache | None,
    sampling: SamplingOptions,
    width: int,
    ending: list[StoppingCriteria],
) -> Any:
    """One call of transformers' `generate`; `width` is that of the prompts within `ids`."""
    return policy.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        past_key_values=cache,
        generation_config=GenerationConfig(
            max_new_tokens=width + sampling.max_new_tokens - ids.shape[1],
            do_sample=False,  # the one token that Draw leaves is the best
            eos_token_id=sampling.eos_token_ids,
            pad_token_id=sampling.eos_token_ids[0],
            return_dict_in_generate=True,
        ),
        logits_processor=LogitsProcessorList([Draw(sampling.temperature)]),
        stopping_criteria=StoppingCriteriaList(ending),
        synced_gpus=False,  # each process makes calls of its own number; it has all weights
    )


def read_prompts(policy: PreTrainedModel, ids: Tensor, mask: Tensor, copies: int) -> Cache | None:
    """What the policy remembers of all but the last token of each prompt, so many times over.

    Args:
        policy, ids, mask, copies: as in `draw`.

    Returns:
        None for prompts of one token.
    """
    if ids.shape[1] == 1:
        return None
    backbone = unwrapped(policy).base_model
    given = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}
    known = {name: tensor[:, :-1] for name, tensor in given.items()}
    cache = backbone(**accepted(backbone, **known, use_cache=True)).past_key_values
    cache.batch_repeat_interleave(copies)
    return cache


_reads_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


_caches_rows: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def reads_padding(model: PreTrainedModel) -> bool:
    """Whether padding in front of a sequence changes what the model makes of it.

    The model itself is asked, once, since no name or class tells: some recurrent architectures
    leave masked tokens out of their state (Mamba), some do not (RWKV). Padding behind a sequence
    never matters to a causal model.
    """
    backbone = unwrapped(model).base_model
    if backbone not in _reads_padding:
        _reads_padding[backbone] = _try_padding(backbone)
    return _reads_padding[backbone]


@torch.no_grad()
def _try_padding(backbone: PreTrainedModel) -> bool:
    """Read two tokens alone, behind padding, and behind a third token."""
    ids = torch.tensor([[2, 0, 1]], device=backbone.device)
    mask = torch.ones_like(ids)
    padded = torch.tensor([[0, 1, 1]], device=backbone.device)
    with evaluating(backbone):
        alone = _last_state(backbone, ids[:, 1:], mask[:, 1:])
        behind_padding = _last_state(backbone, ids, padded)
        behind_text = _last_state(backbone, ids, mask)
    # Rounding moves the state too: in half precision by about a hundredth of what a token does.
    return bool((behind_padding - alone).norm() > 0.1 * (behind_text - alone).norm())


def _last_state(backbone: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    positions = position_ids(mask.bool())
    arguments = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    output = backbone(**accepted(backbone, **arguments, use_cache=False))
    return output.last_hidden_state[:, -1].float()


@torch.no_grad()
def caches_rows(model: PreTrainedModel) -> bool:
    """Whether a cache of past tokens can be cut to some of its rows: keys and values of each text.

    The model is asked, once. Recurrent states cannot be cut, nor what holds them beside keys and
    values (Falcon-H1); and prompt tuning puts tokens into the cache that no text has.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    backbone = unwrapped(model).base_model
    if backbone not in _caches_rows:
        with evaluating(backbone):
            ids = torch.tensor([[0, 1]], device=backbone.device)
            output = backbone(**accepted(backbone, input_ids=ids, use_cache=True))
        cache = getattr(output, "past_key_values", None)
        # Not their subclasses, which may remember more and leave that as it is.
        _caches_rows[backbone] = isinstance(cache, Cache) and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        )
    return _caches_rows[backbone]
