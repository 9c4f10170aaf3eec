"""One base model in several roles: each is an ordinary model over the same weights.

A role copies the modules without weights and reuses those with weights. So it has its own adapter
and head, and peft wraps, trains, checkpoints and saves it like any other model. No adapter needs
switching: with several in one model, peft's `set_adapter` would stop the gradients of the others,
and gradient checkpointing would recompute a layer with the adapter active in the backward pass.
"""

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import CLASSIFIER, Adapter, is_adapter, with_lora
from trl_instruct.models.load import base_of, load_policy
from trl_instruct.models.properties import ModelSource, model_name
from trl_instruct.scalar_head import compute_in_float32, register_scalar_head
from trl_instruct.types import Model

# How transformers marks a model with quantised weights.
MARKS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method")


class SharedBase:
    """A frozen base, loaded once, and the roles over it; the policy starts from `source`."""

    def __init__(
        self, source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False
    ):
        self.model_config = model_config
        self.adapter = Adapter.read(source) if is_adapter(source) else None  # type: ignore[arg-type]
        if self.adapter is None:
            self.name = model_name(source)
            self.model = load_policy(source, model_config, trust_remote_code=trust_remote_code)
        else:
            self.name = self.adapter.base
            kind = AutoModelForCausalLM
            self.model = base_of(self.adapter, model_config, kind, trust_remote_code)
        self.model.requires_grad_(False)

    def policy(self) -> PeftModel:
        """The policy, to train: the base with the adapter that it starts from or a new one."""
        if self.adapter is None:
            return with_lora(view_of(self.model), self.model_config)
        return self.adapter.on(view_of(self.model))

    def adapter_in(self, source: object) -> Adapter | None:
        """The adapter in a folder, or None if the source is not an adapter over this base."""
        if not isinstance(source, str | os.PathLike) or not is_adapter(source):
            return None
        adapter = Adapter.read(source)
        base = Path(adapter.base)
        same_folder = base.exists() and base.resolve() == Path(self.name).resolve()
        return adapter if adapter.base == self.name or same_folder else None

    def classifier(self, adapter: Adapter) -> PeftModel:
        """The reward model of an adapter over this base, with its head and shift, to train."""
        adapter.check_base()
        adapter.check_task(CLASSIFIER)
        return adapter.on(classifier_around(view_of(self.model)))

    def fresh_classifier(self) -> PeftModel:
        """A classifier to train that starts from the policy, with a head of zeros."""
        model = classifier_around(view_of(self.model))
        if self.adapter is None:
            return with_lora(model, self.model_config, CLASSIFIER)
        return self.adapter.on_classifier(model)


def view_of(model: Model) -> Model:
    """A copy of a model, with or without adapters, that shares its frozen weights only."""
    shared: dict[int, nn.Module | Tensor] = {}
    for part in model.modules():
        own = list(part.parameters(recurse=False))
        frozen = [parameter for parameter in own if not parameter.requires_grad]
        shared |= {id(parameter): parameter for parameter in frozen}
        # Share the whole module: quantised ones keep more about their weights than the parameter.
        if own and len(frozen) == len(own) and not list(part.children()):
            shared[id(part)] = part
    return copy.deepcopy(model, shared)


def classifier_around(model: Model) -> Model:
    """A scalar sequence classifier, its head zero, around the backbone of a model without adapters.

    The two share one trunk: a change to it in one is a change in the other.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    register_scalar_head(type(config))
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    backbone = classifier.base_model_prefix
    same = type(classifier.base_model) is type(model.base_model)
    if {name for name, _ in classifier.named_children()} != {backbone, "score"} or not same:
        raise InputError(
            f"A {type(classifier).__name__} does not have the backbone of a "
            f"{type(model).__name__}, so the two cannot share one. Load them separately: leave "
            "value_model_path out, and set share_base to false."
        )
    setattr(classifier, backbone, model.base_model)
    place = {"device": model.get_input_embeddings().weight.device, "dtype": model.dtype}
    classifier.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, **place)
    nn.init.zeros_(classifier.score.weight)
    compute_in_float32(classifier.score)
    for name in MARKS:
        if hasattr(model, name):
            setattr(classifier, name, getattr(model, name))
    return classifier.train(model.training)
