"""The shift of a reward model: what is taken off its scores so that demonstrations score 0.

The ranking loss knows differences of scores only and leaves their zero to chance; before RL it is
put at the labelers' demonstrations (InstructGPT 3.5). The shift is the mean score of the
demonstrations, kept in the model's config as `reward_shift` (their standard deviation as
`reward_std`), and subtracted where the model is read as a reward or as a value model. The weights
stay as trained: plain transformers gives the score without the shift.
"""

import json
from pathlib import Path

from transformers import PreTrainedModel

SHIFT, STD = "reward_shift", "reward_std"
# In an adapter's folder, where a config.json would make transformers look for full weights.
SHIFT_FILE = "reward_config.json"


def shift_of(model: PreTrainedModel) -> float:
    """The shift in the model's config; 0 where there is none."""
    return float(getattr(model.config, SHIFT, None) or 0.0)


def keep_shift(model: PreTrainedModel, shift: float, std: float) -> None:
    """Put the demonstrations' mean score and its standard deviation in the model's config."""
    setattr(model.config, SHIFT, shift)
    setattr(model.config, STD, std)


def forget_shift(model: PreTrainedModel) -> None:
    """Remove the shift of a head that is gone."""
    for name in (SHIFT, STD):
        if hasattr(model.config, name):
            delattr(model.config, name)


def save_beside_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the shift into an adapter's folder; nothing where the model has none."""
    values = {name: getattr(model.config, name, None) for name in (SHIFT, STD)}
    if values[SHIFT] is not None:
        (folder / SHIFT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_beside_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model with a merged adapter the shift in the adapter's folder, not its base's."""
    forget_shift(model)
    if (folder / SHIFT_FILE).is_file():
        values = json.loads((folder / SHIFT_FILE).read_text(encoding="utf-8"))
        keep_shift(model, values[SHIFT], values[STD])
