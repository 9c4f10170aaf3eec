"""What PPO adds to a checkpoint: the value model, the policy's moving average, and its progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from trl_instruct.configs import PPOConfig
from trl_instruct.files import write_json
from trl_instruct.models.checkpoints import PPO_STATE, load_weights
from trl_instruct.ppo_trainer.ema import MovingAverage
from trl_instruct.ppo_trainer.ptx import PretrainingRows
from trl_instruct.rewards.function import RewardFunction, load_states, states_of

VALUE, EMA, PROGRESS = "value_model", "ema.safetensors", PPO_STATE


class Resumable(Protocol):
    """What a checkpoint holds of a PPOTrainer, in addition to the Trainer's own state."""

    @property
    def policy(self) -> PreTrainedModel: ...
    @property
    def value_model(self) -> PreTrainedModel: ...

    args: PPOConfig
    average: MovingAverage | None
    pretraining: PretrainingRows | None
    reward: RewardFunction
    kl_coef: float
    metrics: dict[str, Any]


def save_rest(trainer: Resumable, folder: Path, value_state: dict[str, Tensor] | None) -> None:
    """Save the value model, the moving average and the run's progress.

    `folder` already holds the policy. `value_state` is the value model's gathered weights, or None
    if the model holds them itself.
    """
    trainer.value_model.save_pretrained(folder / VALUE, state_dict=value_state)
    if trainer.average is not None:
        trainer.average.save(folder / EMA)
    progress = {
        "kl_coef": trainer.kl_coef,
        "kl_coef_given": trainer.args.kl_coef,
        "ptx": trainer.pretraining and trainer.pretraining.state(),
        "reward": states_of(trainer.reward),
        "metrics": trainer.metrics,
    }
    write_json(folder / PROGRESS, progress)


def load_models(trainer: Resumable, checkpoint: Path) -> None:
    """Load the weights of policy and value model from a checkpoint."""
    load_weights(trainer.policy, checkpoint)
    load_weights(trainer.value_model, checkpoint / VALUE)


def load_rest(trainer: Resumable, checkpoint: Path) -> None:
    """Restore what `save_rest` wrote, except the value model's weights and a changed kl_coef."""
    progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    trainer.metrics = progress["metrics"]
    if trainer.args.kl_coef == progress["kl_coef_given"]:
        trainer.kl_coef = progress["kl_coef"]  # where it has adapted to
    load_states(trainer.reward, progress["reward"])
    if trainer.pretraining is not None:
        trainer.pretraining.load_state(progress["ptx"])
    if trainer.average is not None:
        trainer.average.load(checkpoint / EMA)
