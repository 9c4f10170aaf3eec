"""Tokens drawn from a policy, for one batch of prompts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_instruct.errors import InputError
from trl_instruct.logprobs import log_distribution, token_logprobs
from trl_instruct.models.properties import call, evaluating, unwrapped
from trl_instruct.padding import position_ids
from trl_instruct.types import Model, Tokenizer

# The length of a completion that no stop string has ended.
NEVER = 2**31
# Fraction of the rows that must have ended before they are removed from the batch.
ENOUGH = 0.25


@contextlib.contextmanager
def plain_sampling(model: Model) -> Iterator[None]:
    """Hide a model's own generation_config: `generate` would take top_p, repetition_penalty etc.
    from it, and the log-probabilities would no longer be those of the sampler."""
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


class Draw(transformers.LogitsProcessor):
    """Leaves one token of each row, drawn from the softmax of its logits / temperature.

    One random number per row picks from the cumulative distribution. torch.multinomial, as in
    `generate`, draws one per vocabulary token: on a CPU a quarter of a small model's time.
    `logprobs` has the `(B,)` log-probabilities of the tokens of each step, nats.
    """

    def __init__(self, temperature: float):
        if not temperature >= 1e-6:  # NaN neither; the softmax would overflow
            raise InputError(f"temperature is {temperature}; at least 0.000001 is needed.")
        self.temperature = temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`(B, V)` logits -> 0 for the token that is drawn, -infinity for all others."""
        log_probs = log_distribution(scores, temperature=self.temperature)
        below = log_probs.exp().cumsum(dim=-1)
        drawn = torch.rand_like(below[:, :1]) * below[:, -1:]
        token = torch.searchsorted(below, drawn, right=True).clamp(max=below.shape[1] - 1)
        self.logprobs.append(token_logprobs(log_probs, token.squeeze(1)))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class StopStrings(transformers.StoppingCriteria):
    """Ends a completion once its text contains one of the strings, and records its length then.

    Unlike transformers' own, it does not read the prompt, which is padded to `width` tokens.
    """

    def __init__(
        self, strings: Sequence[str], tokenizer: Tokenizer, rows: int, width: int, device: Any
    ):
        self.strings, self.tokenizer, self.width = strings, tokenizer, width
        # A letter takes up to four byte-level tokens; the last token may extend past the string.
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


class EnoughEnded(transformers.StoppingCriteria):
    """Ends all rows once a quarter of them have ended, so that `draw` can drop these.

    The stop strings' criteria, `stops`, must run before this one.
    """

    def __init__(self, eos_token_ids: Tensor, stops: list[StopStrings]):
        self.eos_token_ids, self.stops = eos_token_ids, stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`(B,)` True for the rows that have ended, or for all."""
        ended = torch.isin(input_ids[:, -1], self.eos_token_ids)
        for stop in self.stops:
            ended = ended | (stop.lengths < NEVER)
        return ended | (ended.float().mean() >= ENOUGH)


class Sampling(NamedTuple):
    """How completions of prompts are sampled: at most `response_length`, C, tokens of each.

    max_prompt_length: as in `fit_prompts`. stop_strings end a completion; the token that completes
    one is kept. batch_size: completions per batch of prompts of similar length.
    """

    response_length: int
    max_prompt_length: int | None = None
    stop_strings: Sequence[str] | None = None
    temperature: float = 1.0
    batch_size: int = 64

    @classmethod
    def of(cls, config: Any, batch_size: int = 64) -> "Sampling":
        """The options of a stage's config."""
        lengths = config.response_length, config.max_prompt_length
        return cls(*lengths, config.stop_strings, config.temperature, batch_size)


@torch.no_grad()
def draw(
    policy: Model,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    *,
    eos_token_ids: list[int],
    tokenizer: Any,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `copies` completions of each prompt, `(R, P)` ids and a mask, padded on the left.

    If the model's cache can be cut by rows (`caches_rows`), a prompt is read once for all its
    completions, and `generate` is called repeatedly, without the rows that have ended; else once.
    Within `plain_sampling`. Returns `(B, C)` tokens, B = R * copies, EOS after the end, the `(B,)`
    lengths at which a stop string ended them, or NEVER, and `(B, C)` log-probabilities, nats.
    """
    by_rows = caches_rows(policy)
    cache = read_prompts(policy, ids, mask, copies) if by_rows and copies > 1 else None
    ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
    width, longest, strings = ids.shape[1], sampling.response_length, sampling.stop_strings
    eos = torch.tensor(eos_token_ids, device=ids.device)
    drawn = eos[:1].repeat(len(ids), longest)
    rows = torch.arange(len(ids), device=ids.device)
    stopped, logprobs = torch.full_like(rows, NEVER), torch.zeros(drawn.shape, device=ids.device)
    while True:
        reader = tokenizer, len(rows), width, ids.device
        stops = [StopStrings(strings, *reader)] if strings else []
        ending = [*stops, EnoughEnded(eos, stops)] if by_rows else stops
        settings = transformers.GenerationConfig(
            max_new_tokens=width + longest - ids.shape[1],
            do_sample=False,  # greedy: takes the one token that Draw leaves
            eos_token_id=eos_token_ids,
            pad_token_id=eos_token_ids[0],
            return_dict_in_generate=True,
        )
        drawing = Draw(sampling.temperature)
        output: Any = policy.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            generation_config=settings,
            logits_processor=transformers.LogitsProcessorList([drawing]),
            stopping_criteria=transformers.StoppingCriteriaList(ending),
            synced_gpus=False,  # processes make different numbers of calls; each has all weights
        )
        new, length = output.sequences[:, ids.shape[1] :], output.sequences.shape[1] - width
        now = slice(ids.shape[1] - width, length)
        drawn[rows, now], logprobs[rows, now] = new, torch.stack(drawing.logprobs, dim=1)
        for stop in stops:
            stopped[rows] = stop.lengths
        ended = torch.isin(new, eos).any(dim=1) | (stopped[rows] <= length)
        left = (~ended).nonzero().flatten()
        if length == longest or not len(left):
            break
        # The other rows continue from their cache; `ids` hold all their tokens so far.
        rows, ids, cache = rows[left], output.sequences[left], output.past_key_values
        mask = torch.cat([mask, torch.ones_like(new, dtype=mask.dtype)], dim=1)[left]
        cache.batch_select_indices(left)
    return drawn, stopped, logprobs


def read_prompts(
    policy: Model, ids: Tensor, mask: Tensor, copies: int
) -> transformers.Cache | None:
    """The policy's cache of each prompt but its last token, `copies` times; None if it has one."""
    if ids.shape[1] == 1:
        return None
    backbone = unwrapped(policy).base_model
    given = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": position_ids(mask)}
    known = {name: tensor[:, :-1] for name, tensor in given.items()}
    cache = call(backbone, **known, use_cache=True).past_key_values
    cache.batch_repeat_interleave(copies)
    return cache


_reads_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_caches_rows: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def reads_padding(model: Model) -> bool:
    """Whether padding before a sequence changes the model's output for it.

    The model is tried once, since no class name tells: recurrent ones may leave masked tokens out
    of their state (Mamba) or not (RWKV). Padding after a sequence never matters to a causal model.
    """
    backbone = unwrapped(model).base_model
    if backbone not in _reads_padding:
        ids = torch.tensor([[2, 0, 1]], device=backbone.device)
        text = torch.ones_like(ids)
        padded = torch.tensor([[0, 1, 1]], device=backbone.device)
        with evaluating(backbone):
            alone = _last_state(backbone, ids[:, 1:], text[:, 1:])
            behind_padding = _last_state(backbone, ids, padded) - alone
            behind_text = _last_state(backbone, ids, text) - alone
        # Rounding changes the state too: in half precision about a hundredth as much as a token.
        _reads_padding[backbone] = bool(behind_padding.norm() > 0.1 * behind_text.norm())
    return _reads_padding[backbone]


def _last_state(backbone: Model, input_ids: Tensor, mask: Tensor) -> Tensor:
    positions = position_ids(mask.bool())
    arguments = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    return call(backbone, **arguments, use_cache=False).last_hidden_state[:, -1].float()


@torch.no_grad()
def caches_rows(model: Model) -> bool:
    """Whether the cache can be cut to some of its rows: it holds only keys and values of each text.

    The model is tried once. Recurrent states cannot be cut, nor can caches that hold them beside
    keys and values (Falcon-H1). Prompt tuning adds virtual tokens, which are in no text.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    backbone = unwrapped(model).base_model
    if backbone not in _caches_rows:
        with evaluating(backbone):
            ids = torch.tensor([[0, 1]], device=backbone.device)
            output = call(backbone, input_ids=ids, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        # Subclasses do not count: they may hold more, and leave it uncut.
        _caches_rows[backbone] = isinstance(cache, transformers.Cache) and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        )
    return _caches_rows[backbone]
