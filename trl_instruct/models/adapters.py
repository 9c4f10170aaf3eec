"""LoRA adapters: make one, go on from one, start a reward model from a policy's."""

import copy
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from trl_instruct.errors import InputError
from trl_instruct.models.properties import model_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "base_fingerprint.txt"  # which base an adapter was trained over
SAMPLES, SIZE = 16, 4096  # a digest of all bytes of a large model would take a minute
FINGERPRINT = "base_fingerprint.txt"  # which base an adapter was trained over


POLICY, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"


EVERY_LINEAR = "all-linear"


LINEAR = (nn.Linear, Conv1D)  # GPT-2's


# Options of TRL's ModelConfig that an adapter has already decided on, by its config's names.
DECIDED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def is_adapter(source: Any) -> bool:
    """Whether the source is a folder that holds a PEFT adapter instead of full weights."""
    return not isinstance(source, nn.Module) and (Path(source) / CONFIG).is_file()


def adapter_config(folder: str | os.PathLike) -> PeftConfig:
    """The config of the adapter in a folder; InputError where it is broken or names no base."""
    path = os.fspath(folder)
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{os.path.join(path, CONFIG)!r} is no adapter's config "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Give a folder that peft's "
            "save_pretrained or a stage has written."
        ) from error
    if not config.base_model_name_or_path:
        raise InputError(
            f"The adapter in {path!r} names no base model (base_model_name_or_path in {CONFIG}), "
            "so nothing tells what it belongs on. Name the base there."
        )
    return config


def check_base(folder: str | os.PathLike) -> None:
    """InputError where the base that an adapter names has other weights than in its training."""
    path, base = os.fspath(folder), adapter_config(folder).base_model_name_or_path
    if is_other_base(path, base):
        raise InputError(
            f"The adapter in {path!r} was trained over other weights than lie in {base!r} now: "
            "that model has been trained or made again since. Train the adapter again (or remove "
            f"{FINGERPRINT} if you know better)."
        )


def check_task(folder: str | os.PathLike, needed: str) -> None:
    """InputError where the adapter in a folder is one for another kind of model."""
    task = adapter_config(folder).task_type
    if task not in (needed, None):
        raise InputError(
            f"{os.fspath(folder)!r} holds an adapter for {task}; one for {needed} is needed (a "
            f"policy is {POLICY}, a reward model {CLASSIFIER})."
        )


def peft_config_of(model_config: ModelConfig, task_type: str = POLICY) -> PeftConfig | None:
    """TRL's PEFT config, with targets that work without thought: all linear layers."""
    config = get_peft_config(model_config)
    if config is None:
        return None
    config.task_type = task_type
    if not config.target_parameters:
        config.target_modules = config.target_modules or EVERY_LINEAR
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        # ModelConfig makes a list of one name text, which peft takes for a pattern of whole paths.
        config.target_modules = {config.target_modules}
    if task_type == CLASSIFIER:
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
    return config


def new_adapter_config(
    model: PreTrainedModel, model_config: ModelConfig, task_type: str = POLICY
) -> PeftConfig | None:
    """The config of the adapter that this model is to get; None where it is to get none.

    Raises:
        InputError: `lora_target_modules` of which the model has none.
    """
    config = peft_config_of(model_config, task_type)
    if config is None or isinstance(model, PeftModel):
        return None
    wanted = config.target_modules
    if not wanted or wanted == EVERY_LINEAR:
        return config
    if not any(check_target_module_exists(config, name) for name, _ in model.named_modules()):
        known = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
        raise InputError(
            f"lora_target_modules is {_listed(wanted)}, and {type(model).__name__} has no such "
            f"module. It has {_listed(known)}; leave the option out for all linear layers."
        )
    return config


def with_lora(
    model: PreTrainedModel, model_config: ModelConfig, task_type: str = POLICY
) -> PreTrainedModel:
    """The model with a fresh LoRA adapter, if `model_config` asks for one and it has none.

    Raises:
        InputError: as `new_adapter_config`.
    """
    config = new_adapter_config(model, model_config, task_type)
    return float32_head(get_peft_model(model, config)) if config else model


def on_adapter(
    model: PreTrainedModel, folder: str | os.PathLike, *, trainable: bool = True
) -> PeftModel:
    """A base model with the adapter in a folder on it, in float32 whatever the base is.

    Args:
        model: the adapter's base, of the adapter's kind.
        folder: where the adapter lies.
        trainable: whether the adapter trains; the base never does.

    Raises:
        InputError: an adapter that does not fit this model.
    """
    try:
        adapted = PeftModel.from_pretrained(model, os.fspath(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(folder, model, error) from error
    saved = load_peft_weights(os.fspath(folder), device="cpu")
    _check_names(saved, get_peft_model_state_dict(adapted), folder, model)
    return float32_head(adapted)


def classifier_on_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> PeftModel:
    """A classifier with the LoRA weights of a policy's adapter and a head of its own, to train.

    Args:
        model: a scalar sequence classifier over the adapter's base; its head is kept.
        folder: where the policy's (or another reward model's) adapter lies.

    Raises:
        InputError: an adapter that does not fit this model.
    """
    config = copy.deepcopy(adapter_config(folder))
    config.task_type, config.inference_mode = CLASSIFIER, False
    kept = [name for name in config.modules_to_save or () if name not in ("lm_head", "score")]
    config.modules_to_save = [*kept, "score"]
    weights = load_peft_weights(os.fspath(folder), device="cpu")
    weights = {k: v for k, v in weights.items() if not {"lm_head", "score"} & set(k.split("."))}
    try:
        adapted = get_peft_model(model, config)
        own = get_peft_model_state_dict(adapted)
        _check_names(weights, own, folder, model)
        set_peft_model_state_dict(adapted, {**own, **weights})
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(folder, model, error) from error
    return float32_head(adapted)


def check_decided(folder: str | os.PathLike, model_config: ModelConfig) -> None:
    """InputError for LoRA options that were set and are not those of the adapter to go on from."""
    config, defaults = adapter_config(folder), ModelConfig()
    for option, name in DECIDED.items():
        asked, has = getattr(model_config, option), getattr(config, name, None)
        if asked in (getattr(defaults, option), EVERY_LINEAR) or _same(asked, has):
            continue
        raise InputError(
            f"{option} is {_listed(asked)}, but the adapter in {os.fspath(folder)!r}, which this "
            f"stage goes on from, has {_listed(has)}. Leave {option} out; or, for an adapter of "
            "another form, merge first (trl-instruct merge ADAPTER OUTPUT_DIR) and start from that."
        )


def float32_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let the head of a classifier with an adapter train in float32, as peft lets LoRA weights.

    It leaves the head in the base's precision, and in bfloat16 most updates would be lost.
    """
    head = getattr(model, "score", None)
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapter]
        if head.weight.dtype is not torch.float32:
            head.to(torch.float32)
            head.register_forward_pre_hook(_as_float32)
    return model


def _as_float32(head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(hidden.to(torch.float32) for hidden in given)


def trained_weights(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """What trains, before a trainer of TRL's gets it: for `keep_float32`."""
    return {p: p.data for p in model.parameters() if p.requires_grad}


def keep_float32(model: PreTrainedModel, before: dict[nn.Parameter, Tensor]) -> None:
    """Give what trains beside a frozen base its float32 weights back.

    Over a quantised base TRL's trainers round them to bfloat16, in which most updates at a learning
    rate of 1e-5 would be lost.

    Args:
        model: of the trainer, its optimizer not yet made.
        before: from `trained_weights`; what has come since, a fresh adapter, is made float32.
    """
    if is_quantized(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = before.get(parameter, parameter.data.to(torch.float32))
    float32_head(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or the base under its adapter, has 8- or 4-bit weights."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))


def _check_names(
    weights: Iterable[str], own: Iterable[str], folder: str | os.PathLike, model: nn.Module
) -> None:
    """InputError for weights that the model has no place for: peft would pass over them."""
    if strange := sorted(name for name in set(weights) - set(own) if "lora_" in name):
        raise _misfit(folder, model, f"it has no {strange[0]}")


def _misfit(folder: str | os.PathLike, model: nn.Module, why: Any) -> InputError:
    lines = str(why).strip().splitlines() or [type(why).__name__]
    told = " ".join(line.strip() for line in lines[:2])
    name = model_name(model)
    return InputError(
        f"The adapter in {os.fspath(folder)!r} does not fit the {type(model).__name__} from "
        f"{name!r}: {told}. Was it trained on another model, or has that folder another one since?"
    )


def _same(asked: Any, has: Any) -> bool:
    """Whether an option says what the adapter has, which may name each module by its path."""
    if isinstance(has, list | tuple | set):
        asked = {asked} if isinstance(asked, str) else set(asked or ())
        return asked in (set(has), _last_names(has))
    return asked == has


def _last_names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _listed(value: Any) -> str:
    return ", ".join(sorted(_last_names(value))) if isinstance(value, list | set) else str(value)


def fingerprint(folder: str | os.PathLike) -> str | None:
    """A digest of the weights in a folder; None where there are none (a Hub id).

    Of each safetensors file: its name, its length, its head with the names and shapes of the
    weights, and 16 samples of them, evenly spaced. Training changes nearly every weight, so that
    another model differs in each sample.
    """
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as content:
            for sample in range(SAMPLES + 1):
                content.seek(max(0, length - SIZE) * sample // SAMPLES)
                digest.update(content.read(SIZE))
    return digest.hexdigest()


def keep_fingerprint(adapter: Path, base: str | os.PathLike) -> None:
    """Write down beside an adapter which weights its base has, where they lie in a folder."""
    digest = fingerprint(base)
    if digest is not None:
        (adapter / FINGERPRINT).write_text(f"{digest}\n", encoding="utf-8")


def is_other_base(adapter: str | os.PathLike, base: str | os.PathLike) -> bool:
    """Whether the base's folder holds other weights than when the adapter was saved.

    False where nothing was written down, or no weights lie there.
    """
    kept, now = Path(adapter) / FINGERPRINT, fingerprint(base)
    return kept.is_file() and now is not None and kept.read_text(encoding="utf-8").strip() != now
