"""Checkpoints of a run: which are complete, which to resume from, how to load their weights."""

import json
from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_instruct.errors import InputError
from trl_instruct.files import METRICS_FILE

PPO_STATE = "ppo_state.json"


def is_whole(folder: Path) -> bool:
    """Whether a `checkpoint-<step>` folder is complete: Trainers write their state as JSON last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, complete or not, sorted by step."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [(path.name.rpartition("-")[2], path) for path in found]
    return [path for step, path in sorted((int(s), p) for s, p in numbered if s.isdigit())]


def find_checkpoint(folder: Path, checkpoint: str | bool) -> Path:
    """The checkpoint that `resume_from_checkpoint` names.

    Args:
        folder: the stage's.
        checkpoint: a checkpoint's folder, or True for the last complete one.

    Raises:
        InputError: it is missing or incomplete.
    """
    if isinstance(checkpoint, bool):
        whole = [path for path in all_checkpoints(folder) if is_whole(path)]
        if whole:
            return whole[-1]
    elif Path(checkpoint).is_dir():
        if is_whole(Path(checkpoint)):
            return Path(checkpoint)
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} is incomplete: the run ended while writing it. "
            "Resume from an earlier one, or set resume_from_checkpoint to true (last complete one)."
        )
    raise InputError(
        f"resume_from_checkpoint is {checkpoint!r}, but there is no checkpoint at "
        f"{str(folder if isinstance(checkpoint, bool) else checkpoint)!r}. Give the folder of one "
        "(.../checkpoint-<step>), or leave the option out to start afresh."
    )


def check_resumable(checkpoint: Path, stage: str, *, adapter: bool) -> None:
    """Check that a checkpoint is one of this stage, and an adapter's if the run trains one.

    Raises:
        InputError: it is another stage's, or the folder of a stage's result.
    """
    config, lora = (
        json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if (checkpoint / name).is_file()
        else {}
        for name in ("config.json", "adapter_config.json")
    )
    if (checkpoint / METRICS_FILE).is_file():
        raise InputError(
            f"resume_from_checkpoint {str(checkpoint)!r} is the result of a stage, not a "
            "checkpoint. Give one of its folders checkpoint-<step>."
        )
    if not config and not lora:
        return  # sharded weights, which stand without a config
    classes = str(config.get("architectures", ""))
    scores = "SequenceClassification" in classes or lora.get("task_type") == "SEQ_CLS"
    found = "ppo" if (checkpoint / PPO_STATE).is_file() else "rm" if scores else "sft"
    if found != {"pretrain": "sft"}.get(stage, stage):
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} was written by {found}, not by {stage}. Resume "
            f"from one of {stage}'s, or choose another output_dir."
        )
    if bool(lora) != adapter:
        held, needed = ("an adapter", "is not") if lora else ("a full model", "is")
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} holds {held}, but use_peft {needed} set. Resume "
            "with the options of the run that wrote it."
        )


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Load into a model, or its adapter, the weights that its `save_pretrained` wrote."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    else:
        saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
