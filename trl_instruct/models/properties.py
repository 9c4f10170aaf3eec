"""Properties of a model: its name, context length, accepted arguments, mode; why none is loaded."""

import contextlib
import copy
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from trl_instruct.errors import InputError, summary
from trl_instruct.files import CONFIG_FILE, METRICS_FILE, listed_files
from trl_instruct.types import Model

ModelSource: TypeAlias = str | os.PathLike | Model


def accepted(module: nn.Module, **arguments: Any) -> dict[str, Any]:
    """The arguments that the module's forward accepts (some architectures take no positions)."""
    known = inspect.signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}


def call(module: nn.Module, **arguments: Any) -> Any:
    """What the module returns for those of the arguments that it accepts."""
    return module(**accepted(module, **arguments))


def disable_dropout(model: nn.Module) -> None:
    """Make a model in training mode the function that it is in eval mode: no dropout of values or
    layers, no jitter. In RL these would make the policy differ from the one that sampled.
    """
    still: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _set_rates_to_zero(module)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, Model):
            # Some layers read a rate there (Falcon, GPT-J). The model saves its own, unchanged.
            if id(config) not in still:
                still[id(config)] = copy.copy(config)
                _set_rates_to_zero(still[id(config)])
            module.config = still[id(config)]


def _set_rates_to_zero(owner: Any) -> None:
    """Set the probabilities that an object keeps as attributes (`attention_dropout`, ...) to 0."""
    for name, value in vars(owner).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(owner, name, 0.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, then back into its previous mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def unwrapped(model: Model) -> Model:
    """The model inside a PEFT wrapper, with its adapter; any other model unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_length(model: Model) -> int | None:
    """Most tokens the model can attend to; None if its architecture has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def model_name(source: ModelSource | None) -> str:
    """A model's name in messages, and where to look for its tokenizer; InputError without one."""
    if source is None:
        raise InputError("No model was given: set model_name_or_path to a Hub id or a folder.")
    if isinstance(source, Model | PeftModel):
        return source.config._name_or_path or type(source).__name__
    return os.fspath(source)


def is_nameless(source: ModelSource) -> bool:
    """Whether the source is a model in memory that was not loaded from anywhere."""
    return isinstance(source, Model | PeftModel) and not source.config._name_or_path


def check_finished(folder: Path) -> None:
    """InputError if the folder's stage has not finished."""
    if CONFIG_FILE in listed_files(folder) and not (folder / METRICS_FILE).is_file():
        raise InputError(
            f"The stage in {str(folder)!r} has not finished: there is no {METRICS_FILE}. Finish it."
        )


def load_fault(path: str, error: Exception) -> str:
    """The libraries' error in one line; if the path is not a folder, it begins with that."""
    told = summary(error).rstrip(". ") + "."
    if "above report" in told:  # which is a log that names each weight
        told = "its weights have other shapes than its config.json says."
    if "trust_remote_code" in str(error):
        told += " Set trust_remote_code if you trust that code."
    if os.path.isfile(path):
        return "it is a file, not a folder."
    if os.path.isdir(path):
        return told
    return f"there is no such folder (looked in {Path.cwd()}), and as a Hub id: {told}"
