"""Precision: what frozen models are stored in, and language models' heads in float32."""

import copy
from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_instruct.errors import InputError
from trl_instruct.models.properties import unwrapped
from trl_instruct.option_checks import has_bf16
from trl_instruct.scalar_head import Float32Linear, compute_in_float32
from trl_instruct.types import Model

HALF = (torch.bfloat16, torch.float16)


def rounds_frozen(config: Any) -> bool:
    """Whether weights that do not train are bfloat16 by default: on accelerators, under bf16."""
    return bool(config.bf16) and not config.use_cpu and has_bf16()


def frozen_dtype(config: Any) -> torch.dtype:
    """What a stage's frozen models are stored in: `frozen_dtype`, or its default."""
    default = "bfloat16" if rounds_frozen(config) else "float32"
    return getattr(torch, config.frozen_dtype or default)


def store_in(model: nn.Module, dtype: torch.dtype, shared: Container[nn.Parameter] = ()) -> None:
    """Store a frozen model's linear layers in 16 bit; float32 changes nothing.

    Autocast rounds these weights at each use, so under it the model's output is the same, bit by
    bit. Embeddings and weights tied to them, norms, and a score's head (`Float32Linear`) keep their
    precision, as do `shared` weights: those of models that train.
    """
    if dtype not in HALF:
        return
    kept = {w for m in model.modules() if isinstance(m, nn.Embedding) for w in m.parameters()}
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):  # not those of bitsandbytes
            for weight in module.parameters(recurse=False):
                if weight not in kept and weight not in shared:
                    weight.data = weight.data.to(dtype)


def rounded(model: Model) -> Model:
    """A copy that does not train, its weights in bfloat16, its buffers as they are."""
    weights = {id(w): nn.Parameter(w.bfloat16(), requires_grad=False) for w in model.parameters()}
    return copy.deepcopy(model, weights)


def autocast_of(model: nn.Module) -> AbstractContextManager:
    """Autocast in the 16 bits that a model's linear layers are stored in; nothing for others."""
    for module in model.modules():
        weight: Any = module.weight if type(module) in (nn.Linear, Conv1D) else None
        if weight is not None and weight.dtype in HALF:
            return torch.autocast(weight.device.type, weight.dtype)
    return nullcontext()


def cast_lm_head_to_fp32(model: Model) -> None:
    """Compute a language model's logits in float32, as TRL's GRPOTrainer does (ScaleRL).

    A head that is not tied to the embeddings is stored in float32, too. InputError if it is no
    plain linear layer.
    """
    bare = unwrapped(model)
    head = bare.get_output_embeddings()
    if type(head) not in (nn.Linear, Float32Linear):
        raise InputError(
            f"cast_lm_head_to_fp32 needs an lm_head that is a plain linear layer; that of "
            f"{type(bare).__name__} is {type(head).__name__}. Leave the option out, or lm_head out "
            "of lora_target_modules and lora_modules_to_save."
        )
    if head.weight is not bare.get_input_embeddings().weight:
        head.float()
    compute_in_float32(head)
