"""One base model in several roles: each an ordinary model of its own, over the same weights.

A role is a copy of the modules that hold no weights, around the very modules that do. So each has
its own adapter and its own head, is wrapped, trained, checkpointed and saved by peft like any other
model, and none has to be switched on or off: with adapters in one model, peft's `set_adapter` takes
the gradient from the others, and gradient checkpointing recomputes a layer with whichever adapter
is active when the backward pass comes by.
"""

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import CLASSIFIER, Adapter, is_adapter, with_lora
from trl_instruct.models.load import base_of, check_finished, load_policy
from trl_instruct.models.properties import ModelSource, model_name
from trl_instruct.scalar_head import read_beside_adapter, register_scalar_head

# How transformers marks a model with quantised weights.
MARKS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method")


class SharedBase:
    """A frozen base model, loaded once, and the roles that are adapters over it.

    Args:
        source: what the policy starts from: an adapter (its base is the base), or the base itself.
        model_config: how the base is loaded (full precision, 8 or 4 bit), and what a fresh adapter
            is like.

    Raises:
        InputError: as `load_policy`.
    """

    def __init__(
        self, source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False
    ):
        trust = {"trust_remote_code": trust_remote_code}
        self.model_config = model_config
        self.adapter = Adapter.read(source) if is_adapter(source) else None  # type: ignore[arg-type]
        if self.adapter is None:
            self.name = model_name(source)
            self.model = load_policy(source, model_config, **trust)
        else:
            check_finished(Path(self.adapter.folder))
            self.name = self.adapter.base
            self.model = base_of(self.adapter, model_config, **trust)
        self.model.requires_grad_(False)

    def policy(self) -> PeftModel:
        """The policy: the adapter that it starts from, or a fresh one. Trains."""
        if self.adapter is None:
            return with_lora(view_of(self.model), self.model_config)
        return self.adapter.on(view_of(self.model))

    def adapter_in(self, source: object) -> Adapter | None:
        """The adapter over this base in a folder; None where the source is none."""
        if not isinstance(source, str | os.PathLike) or not is_adapter(source):
            return None
        adapter = Adapter.read(source)
        return adapter if _same_place(adapter.base, self.name) else None

    def classifier(self, adapter: Adapter) -> PeftModel:
        """The reward model that an adapter over this base is, with its head and shift. Trains."""
        check_finished(Path(adapter.folder))
        adapter.check_base()
        adapter.check_task(CLASSIFIER)
        model = adapter.on(classifier_over(self.model))
        read_beside_adapter(model, Path(adapter.folder))
        return model

    def fresh_classifier(self) -> PeftModel:
        """A classifier that starts from the policy, with a head of zeros. Trains."""
        model = classifier_over(self.model)
        if self.adapter is None:
            return with_lora(model, self.model_config, CLASSIFIER)
        return self.adapter.on_classifier(model)


def _same_place(one: str, other: str) -> bool:
    """Whether two names are those of one model: the same folder, or the same Hub id."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """Another model over the same frozen weights; what trains is copied.

    Args:
        model: a language model or classifier, with or without adapters.
    """
    shared: dict[int, nn.Module | Tensor] = {}
    for part in model.modules():
        frozen = [p for p in part.parameters(recurse=False) if not p.requires_grad]
        shared |= {id(parameter): parameter for parameter in frozen}
        # The module itself: quantised ones keep more about their weights than the parameter.
        if frozen and not list(part.children()) and not _trains(part):
            shared[id(part)] = part
    return copy.deepcopy(model, shared)


def classifier_over(model: PreTrainedModel) -> PreTrainedModel:
    """A scalar sequence classifier over a frozen language model's own weights, its head zeros.

    Args:
        model: without adapters.

    Raises:
        InputError: as `classifier_around`.
    """
    return classifier_around(view_of(model))


def classifier_around(model: PreTrainedModel) -> PreTrainedModel:
    """A scalar sequence classifier around a language model's own backbone, its head zeros.

    The two are one trunk: what is done to it in one is done to the other.

    Args:
        model: without adapters.

    Raises:
        InputError: an architecture whose classifier has another backbone than its language model.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    register_scalar_head(type(config))
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    backbone = classifier.base_model_prefix
    parts = {name for name, _ in classifier.named_children()}
    same = type(classifier.base_model) is type(model.base_model)
    if parts != {backbone, "score"} or not same:
        raise InputError(
            f"A {type(classifier).__name__} is not made around the backbone of a "
            f"{type(model).__name__}, so the two cannot be one model. Load them separately: leave "
            "value_model_path out, and set share_base to false."
        )
    setattr(classifier, backbone, model.base_model)
    place = {"device": model.get_input_embeddings().weight.device, "dtype": model.dtype}
    classifier.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, **place)
    nn.init.zeros_(classifier.score.weight)
    for name in MARKS:
        if hasattr(model, name):
            setattr(classifier, name, getattr(model, name))
    return classifier.train(model.training)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
