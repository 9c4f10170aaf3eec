"""Weights that the processes share out among them (FSDP, DeepSpeed): whole where that is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def launched_sharded() -> bool:
    """Whether `accelerate launch` was told to share them out; known before there are models."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(parse_flag_from_env(name) for name in names)


def load_unsharded() -> None:
    """Models that are loaded from here on are whole, each a role's own.

    With ZeRO-3, transformers loads them in parts once there are TrainingArguments or a Trainer.
    """
    unset_hf_deepspeed_config()


def check_saving(accelerator: Accelerator) -> None:
    """InputError where what a stage saves at its end would not be whole."""
    settings = {
        DistributedType.FSDP: "fsdp_state_dict_type: FULL_STATE_DICT",
        DistributedType.DEEPSPEED: "zero3_save_16bit_model: true",
    }
    kind, whole = accelerator.distributed_type, True
    if kind == DistributedType.FSDP:
        whole = "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
    elif is_zero3(accelerator):
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        whole = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    if not whole:
        raise InputError(
            f"With the launcher's settings of {kind.value} a stage would leave no whole model. "
            f"Set {settings[kind]} (recipes/accelerate has configs that do)."
        )


def check_launch(accelerator: Accelerator, models: list[nn.Module], *, average: bool) -> None:
    """InputError where PPO cannot run in processes as they were launched.

    Args:
        accelerator: of the run.
        models: policy and value model.
        average: whether a moving average of the policy is asked for.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM:
        raise InputError(
            "PPO was launched with MEGATRON_LM, which is not supported. Launch it with a config of "
            "recipes/accelerate."
        )
    if kind not in SHARDED:
        return
    weights = [w for model in models for w in model.parameters()]
    faults = {
        "fsdp_version 1; set it to 2": kind == DistributedType.FSDP and not accelerator.is_fsdp2,
        "fsdp_cpu_ram_efficient_loading, which leaves reference and reward model without weights "
        "in all processes but one; set it to false": kind == DistributedType.FSDP
        and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading,
        "models that were loaded in parts; load them before PPOConfig is made, or call ppo()": any(
            hasattr(weight, "ds_id") for weight in weights
        ),
        "ema_decay; leave it out": average,
        "weights that policy and value model share; set share_base to false, and no value_head": (
            len(set(map(id, weights))) < len(weights)
        ),
        "weights of 8 or 4 bit; load them in full precision": not all(
            weight.is_floating_point() for weight in weights
        ),
    }
    for fault, applies in faults.items():
        if applies:
            raise InputError(
                f"PPO was launched with {kind.value}, where each process holds a part of the "
                f"weights, and that does not go together with {fault}."
            )


def configure_deepspeed(accelerator: Accelerator, *, episodes: int, max_grad_norm: float) -> None:
    """Tell DeepSpeed, which clips and steps by itself, what a step is; nothing otherwise.

    Args:
        accelerator: of the run, before its `prepare`.
        episodes: of one optimizer step, in this process.
        max_grad_norm: 0: gradients are not clipped.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=episodes,
            train_batch_size=episodes * accelerator.num_processes,
            gradient_accumulation_steps=1,  # the loop's losses are means over a step already
            gradient_clipping=max_grad_norm,
        )


def cast_like_sharded(accelerator: Accelerator, frozen: nn.Module) -> None:
    """Round a whole model's weights as FSDP and DeepSpeed round those they share out.

    Under mixed precision these compute with weights of 16 bits, where a whole model keeps float32
    ones: the reference would not be the policy that it is a copy of.

    Args:
        accelerator: of the run.
        frozen: its buffers stay as they are, as the policy's do.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.distributed_type in SHARDED and dtype is not None:
        for weight in frozen.parameters():
            weight.data = weight.data.to(dtype)


def mark_fsdp_root(model: nn.Module) -> None:
    """Let FSDP know which module is the whole: it takes the first that is called for it.

    Args:
        model: as `Accelerator.prepare` gave it, with a method `no_op` that does nothing.
    """
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "no_op")
        with torch.no_grad():
            cast(Any, model).no_op()
        model.reshard()  # the root's own weights stay whole after a pass


@contextmanager
def gathered_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, each process has all weights, and passes need no word from the others.

    Args:
        accelerator: of the run.
        model: as its `prepare` gave it.
    """
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
    """Whether DeepSpeed shares out the weights, and not their gradients or optimizer alone."""
    sharing = accelerator.distributed_type == DistributedType.DEEPSPEED
    return sharing and accelerator.state.deepspeed_plugin.zero_stage == 3


@contextmanager
def micro_batch(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the passes of a micro-batch: gradients are exchanged with the last of a step alone.

    Args:
        accelerator: of the run.
        model: as its `prepare` gave it.
        last: whether it is.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.sync_gradients = last  # its backward then takes the step as well
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def gathered_states(
    accelerator: Accelerator, model: nn.Module, *names: str
) -> list[dict[str, Tensor] | None]:
    """All weights of parts of the model, for the process that saves them; called by all.

    Args:
        accelerator: of the run.
        model: as its `prepare` gave it.
        names: of the parts.

    Returns:
        None for each part whose own `state_dict` holds them.
    """
    if accelerator.distributed_type not in SHARDED:
        return [None] * len(names)
    state: dict[str, Tensor] = accelerator.get_state_dict(model) or {}
    return [
        {k.removeprefix(f"{name}."): w for k, w in state.items() if k.startswith(f"{name}.")}
        for name in names
    ]


def load_shards(accelerator: Accelerator, model: nn.Module, checkpoint: Path) -> None:
    """DeepSpeed's own part of a checkpoint, in which its optimizer is; nothing otherwise.

    Args:
        accelerator: of the run.
        model: as its `prepare` gave it.
        checkpoint: a whole one.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed_load_checkpoint(model, str(checkpoint))
