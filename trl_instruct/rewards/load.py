"""Reward adapters: whatever judges a completion, as a reward function; a reward model first."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.load import load_reward_model
from trl_instruct.models.properties import ModelSource, is_nameless
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.rewards.classifier import ClassifierReward
from trl_instruct.rewards.combined import WeightedSum
from trl_instruct.rewards.function import RewardFunction
from trl_instruct.rewards.http import HTTPReward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.tiny import gold_score

TINY = "tiny"


Reward: TypeAlias = ModelSource | RewardFunction | Sequence[ModelSource | RewardFunction]


def load_reward(
    reward: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 64,
    model_config: ModelConfig | None = None,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """A reward function from whatever `ppo` accepts as one.

    Args:
        reward: a function, an adapter, a scalar reward model (folder, Hub id, loaded), `"tiny"`
            (the gold scorer), the address of a reward server (`http://...`), a function or adapter
            in a Python file of your own (`rewards.py:brevity`; the file is run), or a list of
            these: their weighted sum. A scalar classifier of an encoder (BERT) is read as
            `ClassifierReward` reads it, by its logit.
        tokenizer: for a model in memory that was not loaded from a folder with its own.
        weights: of a list; default: 1 each.
        batch_size: completions per forward pass of a model.
        model_config: how to load a model: dtype, `load_in_8bit`, `load_in_4bit`.
        trust_remote_code: whether a model from the Hub may bring code of its own.

    Raises:
        InputError: nothing there, a classifier of several labels, weights that do not fit.
    """
    reward = sole_reward(reward, weights)
    trust: Any = {"trust_remote_code": trust_remote_code}
    if isinstance(reward, list | tuple):
        options: Any = {"batch_size": batch_size, "model_config": model_config, **trust}
        return WeightedSum([load_reward(part, tokenizer, **options) for part in reward], weights)
    if weights is not None:
        raise InputError("reward_weights belong to a list of rewards; one reward was given.")
    if isinstance(reward, str) and reward == TINY:
        return gold_score
    if reward is None:
        raise InputError(
            "No reward was given: set reward_model_path to a reward model's folder or Hub id, or "
            "pass a function f(prompts, completions, **columns) -> list[float]."
        )
    if callable(reward) and not isinstance(reward, nn.Module):
        return reward
    if isinstance(reward, str) and reward.startswith(("http://", "https://")):
        return HTTPReward(reward)
    if is_python(reward):
        return _from_file(reward)
    _check_labels(reward, **trust)
    model = reward
    if not _is_encoder(reward):
        model = load_reward_model(reward, model_config or ModelConfig(), **trust)
    own = tokenizer is None or not is_nameless(reward)
    if _is_encoder(model):
        label, given = model.config.id2label[0], None if own else tokenizer
        return ClassifierReward(model, label, tokenizer=given, batch_size=batch_size)
    if own:
        tokenizer = load_tokenizer(reward, **trust)
    return RewardModel(model, tokenizer, batch_size=batch_size)


def sole_reward(reward: Any, weights: Sequence[float] | None) -> Any:
    """The one reward of a list without weights; else what was given."""
    alone = isinstance(reward, list | tuple) and len(reward) == 1 and weights is None
    return reward[0] if alone else reward


def _is_encoder(model: Any) -> bool:
    """Whether it is a classifier that has no head `score` on every token (BERT, DeBERTa, ...)."""
    kind = type(model).__name__
    return kind.endswith("ForSequenceClassification") and not hasattr(model, "score")


def _check_labels(source: ModelSource, *, trust_remote_code: bool) -> None:
    """InputError for a classifier of several labels: which of them is the reward?"""
    config: Any = None
    if isinstance(source, nn.Module):
        config = source.config
    else:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError):
            return  # an adapter's folder, or nothing there: loading it will tell
    kind, labels = (config.architectures or [type(source).__name__])[0], config.id2label
    if kind.endswith("ForSequenceClassification") and len(labels) > 1:
        raise InputError(
            f"A classifier with the labels {', '.join(labels.values())} was given as the reward. "
            "Say what counts: ClassifierReward(model, {label: weight})."
        )


def is_python(reward: Any) -> bool:
    """Whether a reward's name stands for code in a Python file."""
    return isinstance(reward, str) and ".py:" in reward


def _from_file(reward: str) -> RewardFunction:
    """What a name like `rewards.py:brevity` stands for; the file is run."""
    file, _, name = reward.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"Reward {reward!r}: there is no file {file} (looked in {Path.cwd()}).")
    spec = importlib.util.spec_from_file_location(f"trl_instruct_reward_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses, among others, look for it
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"Reward {reward!r}: {file} defines no function or adapter {name!r}.")
    return found
