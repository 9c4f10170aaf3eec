"""Checks and defaults of options that several configs share, and those that have no effect."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import is_liger_kernel_available

from trl_instruct.errors import InputError

# By what they are good for, names of options (separated by blanks).
TABLES = yaml.safe_load(
    (Path(__file__).parent / "recipes" / "options.yaml").read_text(encoding="utf-8")
)


def refused_by(stage: str) -> dict[str, str]:
    """Why a stage refuses an option, by the option's name; `all` are those that no stage has."""
    reasons = TABLES["refused"]["all"] | TABLES["refused"][stage]
    return {name: reason for reason, names in reasons.items() for name in names.split()}


def check_refused(refused: Mapping[str, str], options: Any) -> None:
    """InputError for an option of a dataclass that is refused, unless it has its default."""
    off: Any = (None, False, "", "no", [], dataclasses.MISSING)  # parsers turn one into another
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = value == field.default or (value in off and field.default in off)
        if field.name in refused and not default:
            raise InputError(f"{field.name} is not an option here: {refused[field.name]}")


def check_arguments(others: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """InputError for an argument, not None, that only other libraries' trainers have."""
    for name in (name for name, value in others.items() if value is not None):
        told = refused.get(name, "docs/names.md has the names of other libraries.")
        raise InputError(f"{name} is not an argument here: {told}")


def has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16 (a T4 or V100 only emulates it)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()


def check_stop_strings(stop_strings: Sequence[str] | None) -> None:
    """InputError for an empty stop string: every completion would end at once."""
    if stop_strings and not all(stop_strings):
        raise InputError(f"stop_strings are {list(stop_strings)}: an empty one ends every text.")


NEEDED: dict[str, Callable[[Any], bool]] = {
    "be at least 1": lambda number: number >= 1,
    "be above 1": lambda number: number > 1,
    "be above 0": lambda number: number > 0,
    "not be negative": lambda number: number >= 0,
    "be between 0 and 1": lambda number: 0 <= number <= 1,
}


def check_sampler(config: Any) -> None:
    """InputError for an option that the sampler would ignore."""
    for switch, values in TABLES["samplers"].items():
        for reason, names in values.get(getattr(config, switch), {}).items():
            check_refused(dict.fromkeys(names.split(), reason), config)
    half = config.bf16 or config.fp16
    if not (config.use_vllm or config.use_transformers_continuous_batching or half):
        names = [name for name in vars(config) if name.startswith("vllm_importance_sampling_")]
        check_refused(dict.fromkeys(names, "the policy draws without bf16 or fp16."), config)


def check_numbers(config: Any) -> None:
    """InputError for a number that is not as options.yaml says, in the words of NEEDED."""
    for needed, names in TABLES["needed"].items():
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and not NEEDED[needed](value):  # NaN fits nowhere
                raise InputError(f"{name} is {value}; it must {needed}.")


def check_finite(config: Any) -> None:
    """InputError for a number that is NaN or infinite, in any option or inside one."""
    for name, value in vars(config).items():
        try:
            json.dumps(value, default=str, allow_nan=False)
        except ValueError as error:
            raise InputError(f"{name} is {value}; a finite number is needed.") from error


def check_training(config: Any) -> None:
    """InputError for what would stop the training, or for what it needs and does not have."""
    for column in config.columns or ():
        if not all(column.partition("=")):
            raise InputError(f"columns has {column!r}; field=column is needed: prompt=question.")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs the package liger-kernel; install it.")
    for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if isinstance(getattr(config, name), str):
            raise InputError(f"{name} is {getattr(config, name)!r}; a JSON object is needed.")
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        raise InputError("dataloader_persistent_workers needs dataloader_num_workers above 0.")
    if config.load_best_model_at_end and config.eval_strategy == "no":
        named = "load_best_model_at_end (or early_stopping_patience)"
        raise InputError(f"{named} needs an eval_strategy and a save_strategy.")
    for name in ("activation_offloading", "offload_frozen"):
        if getattr(config, name, False) and not torch.accelerator.is_available():
            raise InputError(f"{name} moves memory off a GPU; there is none. Leave it out.")
    if getattr(config, "kl_estimator", None) == "k3":
        raise InputError(
            "kl_estimator is 'k3'; as a reward, its gradient is that of KL(policy || ref) - "
            "KL(ref || policy). Use k1; objective/kl_k3 logs the estimate k3."
        )
    if hasattr(config, "use_vllm"):
        check_sampler(config)
    check_stop_strings(getattr(config, "stop_strings", None))
    if config.num_train_epochs <= 0 and config.max_steps <= 0:
        epochs = config.num_train_epochs
        raise InputError(f"num_train_epochs is {epochs}; make it above 0, or set max_steps.")
