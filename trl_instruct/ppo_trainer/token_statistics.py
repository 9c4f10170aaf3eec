"""Log-probabilities and entropies of a language model at given tokens.

On accelerators, with TRL >= 1.15, a kernel multiplies hidden states and unembedding in tiles and
keeps running sums: neither the logits `(N, V)` nor their gradient are ever whole. On CPU it is
slower, and not used.
"""

import importlib.util
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from trl_instruct.generation.logits import Sequences, completion_logits
from trl_instruct.logprobs import entropy, log_distribution, logprobs_in_parts, token_logprobs
from trl_instruct.models.properties import evaluating, unwrapped
from trl_instruct.scalar_head import Float32Linear

KERNEL_ON = {"cuda", "xpu"}  # kinds of devices
TILE = 32_768  # tokens of the vocabulary at once, as in TRL
TOKENS_AT_ONCE = 4096  # states at once: TRL's


def token_statistics(
    model: PreTrainedModel, sequences: Sequences, tokens: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy, `(N,)` nats each, of the N tokens that follow the states.

    Entropies have no gradient; without gradients at all, there are none.
    """
    head = unwrapped(model).get_output_embeddings()
    if not _tiles(model, head):
        logits = completion_logits(model, sequences)
        if not torch.is_grad_enabled():
            return logprobs_in_parts(logits, tokens, temperature=temperature), None
        log_probs = log_distribution(logits, temperature=temperature)
        del logits  # as large as log_probs, and not needed for the gradient
        return token_logprobs(log_probs, tokens), entropy(log_probs.detach())
    from trl.kernels import ChunkedLogProbFunction

    states = _read_by(head, model, sequences)
    exact = isinstance(head, Float32Linear)
    with torch.autocast(states.device.type, enabled=False) if exact else nullcontext():
        states = states.float() if exact else states
        given = states, head.weight, head.bias, tokens, temperature, TILE, None, 1.0, ("entropy",)
        logprobs, entropies, *_ = ChunkedLogProbFunction.apply(*given)
    return logprobs, entropies.detach()


def _read_by(head: nn.Module, model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The hidden states `(N, H)` that the head reads, in place of being called."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    vars(head)["forward"] = keep
    try:
        completion_logits(model, sequences)
    finally:
        del vars(head)["forward"]
    return seen[0].squeeze(0)


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _tiles(model: PreTrainedModel, head: Any) -> bool:
    """Whether the kernel is there and fits: a linear head whose output is the model's logits.

    A model that scales or caps them (Gemma, Cohere) is found by trying it once.
    """
    bare = unwrapped(model)
    if type(head) not in (nn.Linear, Float32Linear) or "forward" in vars(head):
        return False
    if head.weight.device.type not in KERNEL_ON or not importlib.util.find_spec("trl.kernels"):
        return False
    # Their hooks gather the weight only while the head itself is called.
    if hasattr(head.weight, "ds_id") or any(isinstance(m, FSDPModule) for m in bare.modules()):
        return False
    if bare not in _plain:
        found: list[Tensor] = []
        hook = head.register_forward_hook(lambda module, given, output: found.append(output))
        with torch.no_grad(), evaluating(bare), hook:
            logits = bare(torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)).logits
        _plain[bare] = len(found) == 1 and torch.equal(found[0].float(), logits.float())
    return _plain[bare]
