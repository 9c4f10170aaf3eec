"""Loading of rewards: a reward model, a function, a server, ... as a reward function."""

import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from transformers import AutoConfig
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.load import load_reward_model
from trl_instruct.models.properties import ModelSource, is_nameless
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.rewards.classifier import ClassifierReward
from trl_instruct.rewards.combined import Ensemble, WeightedSum
from trl_instruct.rewards.function import RewardFunction
from trl_instruct.rewards.http import HTTPReward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.tiny import gold_score
from trl_instruct.types import Tokenizer

TINY = "tiny"

Reward: TypeAlias = ModelSource | RewardFunction | Sequence[ModelSource | RewardFunction]


def load_reward(
    reward: Any,
    tokenizer: Tokenizer | None = None,
    *,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    combine_beta: float | None = None,
    batch_size: int = 64,
    model_config: ModelConfig | None = None,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """A reward function from anything that `ppo` accepts as a reward.

    Args:
        reward: a function or reward object, a scalar reward model (folder, Hub id, loaded),
            `"tiny"` (the gold scorer), the address of a reward server (`http://...`), a function or
            reward object in a Python file (`rewards.py:brevity`; the file is run), or a list of
            these for their weighted sum, or an `Ensemble` of them. A scalar encoder classifier
            (BERT) becomes a `ClassifierReward` with its logit.
        tokenizer: for a loaded model that did not come from a folder with a tokenizer.
        weights: of a list; default 1 each.
        combine, combine_beta: of a list, `Ensemble`'s combine and beta; default: their sum.
        batch_size: completions per forward pass of a model.
        model_config: how to load a model: dtype, `load_in_8bit`, `load_in_4bit`.
        trust_remote_code: whether a model from the Hub may run its own code.

    Raises:
        InputError: the reward is not found, has several labels, or does not fit the weights.
    """
    if combine is not None and weights is not None:
        raise InputError("reward_weights are of a sum; leave them or combine out.")
    if combine_beta is not None and combine != "pessimistic":
        raise InputError("combine_beta is of combine: pessimistic; set that, or leave it out.")
    reward = sole_reward(reward, weights)
    trust: Any = {"trust_remote_code": trust_remote_code}
    if isinstance(reward, list | tuple):
        options: Any = {"batch_size": batch_size, "model_config": model_config, **trust}
        parts = [load_reward(part, tokenizer, **options) for part in reward]
        if combine is None:
            return WeightedSum(parts, weights)
        return Ensemble(parts, combine, beta=1.0 if combine_beta is None else combine_beta)
    for option, given in {"reward_weights": weights, "combine": combine}.items():
        if given is not None:
            raise InputError(f"{option} is for a list of rewards; one reward was given.")
    if isinstance(reward, str) and reward == TINY:
        return gold_score
    if reward is None:
        raise InputError(
            "No reward was given: set reward_model_path to a reward model's folder or Hub id, or "
            "pass a function f(prompts, completions, **columns) -> list[float]."
        )
    if callable(reward) and not isinstance(reward, nn.Module):
        return reward
    if is_address(reward):
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
    name = None if isinstance(reward, nn.Module) else str(reward)
    return RewardModel(model, tokenizer, batch_size=batch_size, name=name)


def sole_reward(reward: Any, weights: Sequence[float] | None) -> Any:
    """The reward of a list of one without weights; anything else unchanged."""
    alone = isinstance(reward, list | tuple) and len(reward) == 1 and weights is None
    return reward[0] if alone else reward


def _is_encoder(model: Any) -> bool:
    """Whether it is a classifier without a head `score` on every token (BERT, DeBERTa, ...)."""
    kind = type(model).__name__
    return kind.endswith("ForSequenceClassification") and not hasattr(model, "score")


def _check_labels(source: ModelSource, *, trust_remote_code: bool) -> None:
    """InputError for a classifier with several labels: any of them could be the reward."""
    if isinstance(source, nn.Module):
        config: Any = source.config
    else:
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception:
            return  # a LoRA adapter's folder, or a missing one: loading it will tell
    kind, labels = (config.architectures or [type(source).__name__])[0], config.id2label
    if kind.endswith("ForSequenceClassification") and len(labels) > 1:
        raise InputError(
            f"A classifier with the labels {', '.join(labels.values())} was given as the reward. "
            "Say which labels count: ClassifierReward(model, {label: weight})."
        )


def is_python(reward: Any) -> bool:
    """Whether a reward's name refers to code in a Python file."""
    return isinstance(reward, str) and (".py:" in reward or reward.endswith(".py"))


def is_address(reward: Any) -> bool:
    """Whether a reward's name is the address of a server."""
    return isinstance(reward, str) and reward.startswith(("http://", "https://"))


def _from_file(reward: str) -> RewardFunction:
    """What a name like `rewards.py:brevity` refers to; the file is run."""
    file, _, name = reward.rpartition(":")
    if name.endswith(".py"):
        raise InputError(f"Reward {reward!r} is a file; name what is in it: {reward}:FUNCTION.")
    if not Path(file).is_file():
        raise InputError(f"Reward {reward!r}: there is no file {file} (looked in {Path.cwd()}).")
    spec = importlib.util.spec_from_file_location(f"trl_instruct_reward_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, among others, look it up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f"line {lines[-1]}, " if lines else ""
        told = f"{file} cannot be run: {where}{type(error).__name__}: {error}"
        raise InputError(f"Reward {reward!r}: {told}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"Reward {reward!r}: {file} defines no function or reward {name!r}.")
    return found
