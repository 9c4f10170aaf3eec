"""Weights sharded over processes (FSDP, DeepSpeed), gathered where they must be whole."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, unset_hf_deepspeed_config
from trl.models import unwrap_model_for_generation

from trl_instruct.errors import InputError

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's names


def launched_sharded() -> bool:
    """Whether `accelerate launch` was told to shard weights; known before models are loaded."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(parse_flag_from_env(name) for name in names)


def load_unsharded() -> None:
    """Load all later models whole, each for one role.

    With ZeRO-3, transformers loads only shards once TrainingArguments or a Trainer exist.
    """
    unset_hf_deepspeed_config()


def check_saving(accelerator: Accelerator) -> None:
    """InputError if a stage would save only shards at its end."""
    kind, setting, whole = accelerator.distributed_type, "zero3_save_16bit_model: true", True
    if kind == DistributedType.FSDP:
        setting = "fsdp_state_dict_type: FULL_STATE_DICT"
        whole = "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
    elif is_zero3(accelerator):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        whole = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    if not whole:
        raise InputError(
            f"With the launcher's settings of {kind.value} a stage would not save a whole model. "
            f"Set {setting} (recipes/accelerate has configs that do)."
        )


def check_launch(accelerator: Accelerator, models: list[nn.Module], config: Any) -> None:
    """InputError if PPO cannot run as it was launched, with these models (policy and value)."""
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM:
        raise InputError("MEGATRON_LM is not supported; use a config of recipes/accelerate.")
    if kind not in SHARDED:
        return
    weights = [w for model in models for w in model.parameters()]
    averages = config.ema_decay is not None or config.stop_when_exploited
    shared = len(set(map(id, weights))) < len(weights)
    faults = {
        "fsdp_version 1; set it to 2": kind == DistributedType.FSDP and not accelerator.is_fsdp2,
        "fsdp_cpu_ram_efficient_loading, which loads the weights of reference and reward model in "
        "one process only; set it to false": kind == DistributedType.FSDP
        and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading,
        "models that were loaded as shards; load them before PPOConfig is made, or call ppo()": any(
            hasattr(weight, "ds_id") for weight in weights
        ),
        "ema_decay or stop_when_exploited; leave them out": averages,
        "value_warmup_iterations and weight_decay, which would change the policy; leave one out": (
            kind == DistributedType.DEEPSPEED
            and config.value_warmup_iterations > 0 < config.weight_decay
        ),
        "weights that policy and value share; set share_base to false, omit value_head": shared,
        "weights of 8 or 4 bit; load them in full precision": not all(
            weight.is_floating_point() for weight in weights
        ),
    }
    for fault, applies in faults.items():
        if applies:
            raise InputError(
                f"PPO was launched with {kind.value}, which shards weights over the processes. "
                f"That does not work with {fault}."
            )


def configure(accelerator: Accelerator, *, episodes: int, max_grad_norm: float) -> None:
    """Before `prepare`: tell DeepSpeed, which clips and steps on its own, what a step is; have FSDP
    add up gradients, and return values, in float32, where accelerate has it round both to 16 bit.

    `episodes` are those of an optimizer step in this process. Otherwise a no-op.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=episodes,
            train_batch_size=episodes * accelerator.num_processes,
            gradient_accumulation_steps=1,  # the loop's losses are already means over a step
            gradient_clipping=max_grad_norm,
        )


def cast_like_sharded(accelerator: Accelerator, frozen: nn.Module) -> None:
    """Round an unsharded model's weights as FSDP and DeepSpeed round sharded ones.

    Under mixed precision they compute with 16-bit weights, but a whole model keeps float32: the
    reference would differ from the policy that it copies. Buffers stay unchanged, as the policy's.
    """
    dtype = MIXED.get(accelerator.mixed_precision)
    if accelerator.distributed_type in SHARDED and dtype is not None:
        for weight in frozen.parameters():
            weight.data = weight.data.to(dtype)


def mark_fsdp_root(model: nn.Module) -> None:
    """Make a prepared model FSDP's root (the first module called) by calling its empty `no_op`."""
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "no_op")
        with torch.no_grad():
            cast(Any, model).no_op()
        model.reshard()  # after a pass, the root's own weights stay gathered


@contextmanager
def gathered_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of a prepared model; passes need no communication."""
    if isinstance(model, FSDPModule):
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        model.set_reshard_after_forward(False)
        for shard in shards:
            shard.unshard()
        try:
            yield
        finally:
            model.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)
            for shard in shards:
                shard.reshard()
    elif is_zero3(accelerator):
        with unwrap_model_for_generation(model, accelerator):
            yield
    else:
        yield


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the weights, not only gradients or optimizer states."""
    sharing = accelerator.distributed_type == DistributedType.DEEPSPEED
    return sharing and accelerator.state.deepspeed_plugin.zero_stage == 3


def micro_batch(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Any:
    """Around a prepared model's passes: gradients are exchanged in a step's last micro-batch.

    FSDP exchanges them in each: until then a process keeps the whole gradient, not its shard.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last  # its backward then also takes the step
    elif not last and not isinstance(model, FSDPModule):
        return accelerator.no_sync(model)
    return nullcontext()


def gathered_states(
    accelerator: Accelerator, model: nn.Module, *names: str
) -> list[dict[str, Tensor] | None]:
    """The weights of a prepared model's parts, for the process that saves them; all call it.

    None for a part whose own `state_dict` holds them all.
    """
    if accelerator.distributed_type not in SHARDED:
        return [None] * len(names)
    state: dict[str, Tensor] = accelerator.get_state_dict(model) or {}
    heads = [f"{name}." for name in names]
    return [{k.removeprefix(h): w for k, w in state.items() if k.startswith(h)} for h in heads]


def load_shards(accelerator: Accelerator, model: nn.Module, checkpoint: Path) -> None:
    """Load DeepSpeed's part of a complete checkpoint, with its optimizer; otherwise a no-op."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed_load_checkpoint(model, str(checkpoint))
