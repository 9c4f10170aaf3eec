"""Load and save the four roles: policy, ref_policy, reward model, value model.

A model is a Hub id, a local folder, an earlier stage's result or a loaded model. An adapter folder
is merged into its base, unless the stage trains adapters (`use_peft`) and continues from it.
"""

import copy
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, get_quantization_config

from trl_instruct import scalar_head
from trl_instruct.console import quiet_libraries, quiet_loading
from trl_instruct.errors import InputError
from trl_instruct.models import adapters, properties
from trl_instruct.models.properties import ModelSource, check_finished, is_nameless, unwrapped
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.types import Model

HEAD = "score.weight"

quiet_libraries()


def load_policy(
    source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False
) -> Model:
    """A causal language model; weights in float32 unless `model_config.dtype` says otherwise.

    An adapter trains further over its base if `model_config` asks for LoRA; else it is merged.
    """
    if isinstance(source, Model | PeftModel):
        if not source.can_generate():
            kind = type(source).__name__
            raise InputError(f"A {kind} was given; an AutoModelForCausalLM is needed.")
        scalar_head.disable_rescaling(unwrapped(source))
        return source
    if not adapters.is_adapter(source):
        return _load(source, AutoModelForCausalLM, model_config, trust_remote_code)
    adapter = adapters.Adapter.read(source)
    adapter.check_task(adapters.POLICY)
    if not keeps_adapter(model_config):
        return merged(adapter, model_config, trust_remote_code=trust_remote_code)
    return adapter.on(base_of(adapter, model_config, AutoModelForCausalLM, trust_remote_code))


def keeps_adapter(model_config: ModelConfig) -> bool:
    """Whether an adapter folder stays an adapter over its base, or is merged into it."""
    return model_config.use_peft or model_config.load_in_8bit or model_config.load_in_4bit


def base_of(
    adapter: adapters.Adapter, model_config: ModelConfig, kind: Any, trust_remote_code: bool
) -> Model:
    """The base that an adapter names, of that kind of AutoModel; InputError if it has changed."""
    adapter.check_base()
    if model_config.use_peft:
        adapter.check_options(model_config)
    return _load(adapter.base, kind, model_config, trust_remote_code, may_lack=HEAD)


def load_reward_model(
    source: ModelSource,
    model_config: ModelConfig,
    *,
    fresh_head: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """A scalar `AutoModelForSequenceClassification` (`num_labels=1`).

    If transformers has no such class for the architecture, `scalar_head.py` has one. With
    `fresh_head`, the source may be any language model, whose unembedding is replaced by a scalar
    head drawn from N(0, 1 / sqrt(hidden + 1)), as in Stiennon et al. 2020 (the class has no bias).
    """
    if isinstance(source, PeftModel):
        source = copy.deepcopy(source).merge_and_unload().requires_grad_(True)
    if isinstance(source, Model):
        bare = fresh_head and not hasattr(source, "score")
        model = _classifier_from_policy(source) if bare else source
        scalar_head.score_head(model)
    elif adapters.is_adapter(source):
        model = _adapter_classifier(source, model_config, fresh_head, trust_remote_code)
    else:
        kind, head = AutoModelForSequenceClassification, HEAD if fresh_head else None
        model = _load(source, kind, model_config, trust_remote_code, may_lack=head)
    if fresh_head:
        hidden = scalar_head.score_head(model).in_features
        nn.init.normal_(scalar_head.score_head(model).weight, std=1.0 / math.sqrt(hidden + 1))
        scalar_head.forget_shift(model)
    scalar_head.compute_in_float32(getattr(model, "score", None))  # an encoder has another
    return model


def _adapter_classifier(
    source: str | os.PathLike, model_config: ModelConfig, fresh_head: bool, trust_remote_code: bool
) -> Model:
    """A reward model from a reward model's adapter folder; with a fresh head, from any."""
    adapter = adapters.Adapter.read(source)
    if not fresh_head:
        adapter.check_task(adapters.CLASSIFIER)
    if not keeps_adapter(model_config):
        model = merged(adapter, model_config, trust_remote_code=trust_remote_code)
        return model if hasattr(model, "score") else _classifier_from_policy(model)
    kind = AutoModelForSequenceClassification
    base = base_of(adapter, model_config, kind, trust_remote_code)
    return adapter.on_classifier(base) if fresh_head else adapter.on(base)


def _classifier_from_policy(policy: Model) -> Model:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    scalar_head.register_scalar_head(type(config))
    scalar_head.disable_rescaling(policy)
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    classifier.base_model.load_state_dict(policy.base_model.state_dict())
    return classifier


def needs_base(source: ModelSource, model_config: ModelConfig) -> bool:
    """Whether a new adapter's base exists only in memory: it is saved, so that peft can load it."""
    return model_config.use_peft and isinstance(source, Model) and is_nameless(source)


def reference_of(policy: Model) -> Model | None:
    """A frozen copy of the policy; None for a LoRA policy, whose base is the reference."""
    if isinstance(policy, PeftModel):
        return None
    return copy.deepcopy(policy).eval().requires_grad_(False)


def _load(
    source: str | os.PathLike,
    kind: Any,
    model_config: ModelConfig,
    trust_remote_code: bool,
    may_lack: str | None = None,
) -> Model:
    path = os.fspath(source)
    check_finished(Path(path))
    arguments: dict[str, Any] = {"dtype": _dtype(model_config)}
    if (quantization := get_quantization_config(model_config)) is not None:
        # Set only if requested: None would mean "not quantised" and override the folder's own.
        arguments["quantization_config"] = quantization
    hub = {"revision": model_config.model_revision, "trust_remote_code": trust_remote_code}
    with quiet_loading():
        try:
            if kind is AutoModelForSequenceClassification:
                scalar_head.register_scalar_head(type(AutoConfig.from_pretrained(path, **hub)))
                arguments["num_labels"] = 1
            attention = model_config.attn_implementation
            model, info = kind.from_pretrained(
                path, attn_implementation=attention, output_loading_info=True, **hub, **arguments
            )
        except Exception as error:  # whatever a config.json or weights make the libraries raise
            fault = properties.load_fault(path, error)
            raise InputError(
                f"No model could be loaded from {path!r}: {fault} Give a Hub id, a folder saved "
                "with save_pretrained, or the result of an earlier stage."
            ) from error
    missing = sorted(set(info["missing_keys"]) - {may_lack})
    if missing:
        raise InputError(
            f"{path!r} lacks weights that a {type(model).__name__} needs: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}. Is it a model of another kind (a reward model "
            "where a policy is needed, or the reverse)?"
        )
    # With tied embeddings, a reward model's weights lack nothing that a language model needs.
    if kind is AutoModelForCausalLM and HEAD in info["unexpected_keys"]:
        raise InputError(f"{path!r} holds a reward model; give the policy's folder.")
    scalar_head.disable_rescaling(model)
    if adapters.is_quantized(model):
        _keep_layout(model)
        # Freezes all, casts unquantised weights to float32; trainers handle gradient checkpointing.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def _keep_layout(model: Model) -> None:
    """Keep the layout in which 4-bit weights were loaded.

    On CPUs with AVX512-BF16, bitsandbytes (0.49, 0.50) repacks them in place at the first
    evaluation pass. That fails if a layer's width is not a multiple of 32, or if the weights are
    shared by roles that train through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def merged(
    adapter: adapters.Adapter, model_config: ModelConfig, *, trust_remote_code: bool = False
) -> Model:
    """The model with an adapter merged into its weights, in full precision: less rounds both."""
    judges = adapter.config.task_type == adapters.CLASSIFIER
    kind = AutoModelForSequenceClassification if judges else AutoModelForCausalLM
    plain = {"load_in_8bit": False, "load_in_4bit": False, "use_peft": False}
    base = base_of(adapter, dataclasses.replace(model_config, **plain), kind, trust_remote_code)
    model = adapter.on(base, trainable=False).merge_and_unload()
    model.requires_grad_(True)  # peft froze the base
    return model


def _dtype(model_config: ModelConfig) -> Any:
    name = model_config.dtype or "float32"
    dtype = name if name == "auto" else getattr(torch, name, None)
    if not isinstance(dtype, str | torch.dtype):
        raise InputError(f"dtype is {name!r}; auto, float32, bfloat16 or float16 is needed.")
    return dtype


def empty_folder(output_dir: str | os.PathLike) -> Path:
    """The folder of a result; InputError if there is something in it."""
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {str(folder)!r} is not empty. Choose a new or empty folder.")
    return folder


def merge(
    adapter: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "float32"
) -> Path:
    """Merge an adapter into its base in full precision, into a new folder, with the tokenizer."""
    if not adapters.is_adapter(adapter):
        raise InputError(
            f"{os.fspath(adapter)!r} is not an adapter's folder: there is no {adapters.CONFIG}. "
            "Give a folder that a stage with use_peft wrote."
        )
    folder = empty_folder(output_dir)
    found = adapters.Adapter.read(adapter)
    tokenizer = load_tokenizer(adapter)
    merged(found, ModelConfig(dtype=dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def merge_in_place(folder: Path, model_config: ModelConfig) -> None:
    """Replace the adapter in a finishing stage's folder by the full model, never quantised."""
    merged(adapters.Adapter.read(folder), model_config).save_pretrained(folder)
    for name in (adapters.CONFIG, adapters.WEIGHTS, scalar_head.SHIFT_FILE):
        (folder / name).unlink(missing_ok=True)
