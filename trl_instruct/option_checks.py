"""Checks and defaults of options that several configs share, and those that have no effect."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig

from trl_instruct.errors import InputError


def _by_name(names: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, listed in names.items() for name in listed.split()}


# Options that a stage would ignore, and names that a user may take for options, by the reason why
# they are refused. Those of transformers and TRL that are not here have their effect.
NO_STAGE_HAS = _by_name(
    {
        "SIGTERM saves a checkpoint anyway.": "enable_jit_checkpoint",
        "the weights that are saved would be rounded; use bf16.": "bf16_full_eval fp16_full_eval",
        "it is for a compute_metrics function, which no stage has.": "batch_eval_metrics "
        "include_for_metrics eval_do_concat_batches eval_accumulation_steps prediction_loss_only",
        "a stage knows its columns and their lengths.": "label_names length_column_name",
        "the folder is published once, when it is whole.": "hub_always_push",
        "a stage trains; `evaluate` measures checkpoints.": "do_predict",
        "the model is loaded as dtype, attn_implementation, ... say.": "model_init_kwargs",
    }
)
_EVALUATION = "eval_strategy eval_steps eval_delay eval_on_start eval_use_gather_object "
PRETRAIN_HAS_NOT = _by_name(
    {
        "architecture and architecture_kwargs make the model.": " ".join(vars(ModelConfig())),
        "stage 0 trains all weights and holds nothing out.": _EVALUATION
        + "eval_dataset_name dataset_test_split load_best_model_at_end merge_adapter",
    }
)
SFT_HAS_NOT = _by_name(
    {
        "sft prepares its rows itself, as columns says.": "dataset_text_field dataset_kwargs",
        "sft trains a CAUSAL_LM.": "lora_task_type",
    }
)
PPO_HAS_NOT = _by_name(
    {
        "gold judges each iteration; the result is compared on eval_dataset_name.": _EVALUATION
        + "per_device_eval_batch_size",
        "save_strategy: best keeps the best policy.": "load_best_model_at_end",
        "PPO has a loop, losses and batches of its own.": "label_smoothing_factor debug "
        "neftune_noise_alpha average_tokens_across_devices logging_nan_inf_filter "
        "auto_find_batch_size torch_empty_cache_steps skip_memory_metrics ignore_data_skip "
        "include_num_input_tokens_seen train_sampling_strategy remove_unused_columns "
        "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor",
        "PPO calls parts of its models.": "torch_compile torch_compile_backend torch_compile_mode "
        "use_liger_kernel liger_kernel_config parallelism_config",
        "the policy is a CAUSAL_LM, the value model a SEQ_CLS.": "lora_task_type",
        "the policy is model_name_or_path.": "sft_model_path",
        "completions end at EOS, and at stop_strings.": "stop_token stop_token_id",
        "PPO weighs each sampled token by the policy's own probability; use temperature.": (
            "top_p top_k min_p typical_p repetition_penalty no_repeat_ngram_size"
        ),
    }
)


def check_refused(refused: Mapping[str, str], options: Any) -> None:
    """InputError for an option of a dataclass that is refused, unless it has its default."""
    off: Any = (None, False, "", "no", [], dataclasses.MISSING)  # parsers turn one into another
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = value == field.default or (value in off and field.default in off)
        if field.name in refused and not default:
            raise InputError(f"{field.name} is not an option here: {refused[field.name]}")


def has_bf16() -> bool:
    """Whether an accelerator computes in bfloat16 (a T4 or V100 only emulates it)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.accelerator.is_available()


def check_stop_strings(stop_strings: Sequence[str] | None) -> None:
    """InputError for an empty stop string: every completion would end at once."""
    if stop_strings and not all(stop_strings):
        raise InputError(
            f"stop_strings are {list(stop_strings)}: an empty one ends every completion before its "
            "first token. Remove it."
        )


NEEDED: dict[str, Callable[[Any], bool]] = {
    "be at least 1": lambda number: number >= 1,
    "be above 0": lambda number: number > 0,
    "not be negative": lambda number: number >= 0,
    "be between 0 and 1": lambda number: 0 <= number <= 1,
}


def check_numbers(config: Any, needed: str, *names: str) -> None:
    """InputError for a number that is not as needed, in the words of NEEDED; None is allowed."""
    for name in names:
        value = getattr(config, name)
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
    check_numbers(config, "be at least 1", "per_device_train_batch_size")
    check_numbers(config, "be at least 1", "per_device_eval_batch_size")
    check_numbers(config, "be at least 1", "gradient_accumulation_steps")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs the package liger-kernel; install it.")
    for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if isinstance(getattr(config, name), str):
            raise InputError(f"{name} is {getattr(config, name)!r}; a JSON object is needed.")
    check_numbers(config, "not be negative", "learning_rate")
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        raise InputError("dataloader_persistent_workers needs dataloader_num_workers above 0.")
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
