"""What PPO adds to a checkpoint: the value model, the policy's moving average, and its progress."""

from pathlib import Path
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from trl_instruct.files import read_json, write_json
from trl_instruct.models.resuming import PPO_STATE
from trl_instruct.rewards.function import load_states, states_of
from trl_instruct.types import Model

VALUE, EMA = "value_model", "ema.safetensors"


def save_rest(trainer: Any, folder: Path, value_state: dict[str, Tensor] | None) -> None:
    """Save a PPOTrainer's value model (its gathered state, or its own), average and progress."""
    trainer.value_model.save_pretrained(folder / VALUE, state_dict=value_state)
    if trainer.average is not None:
        trainer.average.save(folder / EMA)
    progress = {
        "kl_coef": trainer.kl_coef,
        "kl_coef_given": trainer.args.kl_coef,
        "ptx": trainer.pretraining and trainer.pretraining.state(),
        "reward": states_of(trainer.reward),
        "metrics": trainer.metrics,
        # An iteration that is saved as it began will be judged again.
        "judged": [one for one in trainer.judged if one[0] < trainer.state.global_step],
    }
    write_json(folder / PPO_STATE, progress)


def load_weights(model: Model | PeftModel, folder: Path) -> None:
    """Load into a model, or its adapter, the weights that its `save_pretrained` wrote."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    else:
        saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


def restore(trainer: Any, checkpoint: Path) -> None:
    """Load a PPOTrainer's policy and what `save_rest` wrote, except a changed kl_coef."""
    load_weights(trainer.policy, checkpoint)
    load_weights(trainer.value_model, checkpoint / VALUE)
    progress = read_json(checkpoint / PPO_STATE)
    trainer.metrics, trainer.judged = progress["metrics"], progress.get("judged", [])
    if trainer.args.kl_coef == progress["kl_coef_given"]:
        trainer.kl_coef = progress["kl_coef"]  # where it has adapted to
    load_states(trainer.reward, progress["reward"])
    if trainer.pretraining is not None:
        trainer.pretraining.load_state(progress["ptx"])
    if trainer.average is not None:
        trainer.average.load(checkpoint / EMA)
