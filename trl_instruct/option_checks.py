"""Checks and defaults of options that several configs share."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from trl_instruct.errors import InputError


def has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16 (a T4 or V100 only emulates it)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()


def line_breaks(text: str) -> str:
    """Line breaks for the `\\n` that is typed in a shell."""
    return text.replace("\\n", "\n")


def check_stop_strings(stop_strings: Sequence[str] | None) -> None:
    """InputError for an empty stop string: every completion would end at once."""
    if stop_strings and not all(stop_strings):
        raise InputError(
            f"stop_strings are {list(stop_strings)}: an empty one ends every completion before its "
            "first token. Remove it."
        )


def check_counts(config: Any, *names: str) -> None:
    """InputError for a count below 1; None is allowed."""
    for name in names:
        count = getattr(config, name)
        if count is not None and count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1.")


def check_training(config: Any) -> None:
    """InputError for what would stop the training, or for what it needs and does not have."""
    for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if isinstance(getattr(config, name), str):
            raise InputError(f"{name} is {getattr(config, name)!r}; a JSON object is needed.")
    if not 0 <= config.learning_rate < math.inf:  # NaN neither
        raise InputError(f"learning_rate is {config.learning_rate}; it must not be negative.")
    if getattr(config, "activation_offloading", False) and not torch.accelerator.is_available():
        raise InputError("activation_offloading moves activations off a GPU; there is none.")
    if getattr(config, "kl_estimator", None) == "k3":
        raise InputError(
            "kl_estimator is 'k3'; as a reward, its gradient is that of KL(policy || ref) - "
            "KL(ref || policy). Use k1; objective/kl_k3 logs the estimate k3."
        )
    check_stop_strings(getattr(config, "stop_strings", None))
    if config.num_train_epochs <= 0 and config.max_steps <= 0:
        epochs = config.num_train_epochs
        raise InputError(f"num_train_epochs is {epochs}; make it above 0, or set max_steps.")
