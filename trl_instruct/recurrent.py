"""What a model makes of a batch: RWKV reads padding, and mixes what it remembers of the rows."""

from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trl_instruct.masking import position_ids
from trl_instruct.models import accepted, evaluating, unwrapped

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
