"""Checkpoints of a run: which are complete, which to resume from, how to load their weights."""

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_instruct.console import get_logger
from trl_instruct.errors import InputError
from trl_instruct.files import MANIFEST_FILE, METRICS_FILE, damage, read_json, read_manifest

logger = get_logger(__name__)

PPO_STATE = "ppo_state.json"
RUN_FILE = "run.json"  # of any checkpoint: what `models/resuming.py` remembers
AUTO = "auto"  # resume_from_checkpoint: go on if there is a whole checkpoint, else begin


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: its manifest comes last."""
    return (folder / MANIFEST_FILE).is_file()


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, complete or not, sorted by step."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [(path.name.rpartition("-")[2], path) for path in found]
    return [path for step, path in sorted((int(s), p) for s, p in numbered if s.isdigit())]


def find_checkpoint(folder: Path, checkpoint: str | bool) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; all processes call it.

    Args:
        folder: the stage's.
        checkpoint: a checkpoint's folder; True for the last whole one; AUTO for that, or None if
            there is none.

    Raises:
        InputError: it is missing or damaged.
    """
    found = [_find(folder, checkpoint) if PartialState().is_main_process else None]
    path, fault = broadcast_object_list(found)[0]
    if fault is not None:
        raise InputError(fault)
    return path


def _find(folder: Path, checkpoint: str | bool) -> tuple[Path | None, str | None]:
    """The checkpoint, or None and why there is none."""
    named = None if checkpoint in (True, AUTO) else Path(str(checkpoint))
    if named is not None and named.is_dir():
        fault = fault_of(named)
        advice = "Resume from an earlier one, or set resume_from_checkpoint to true: the last whole"
        told = f"The checkpoint {str(named)!r} cannot be resumed from: {fault}. {advice} one."
        return (named, None) if fault is None else (None, told)
    for path in reversed(all_checkpoints(folder) if named is None else []):
        if (fault := fault_of(path)) is None:
            return path, None
        logger.warning("%s is passed over: %s.", path, fault)
    if checkpoint == AUTO:
        return None, None
    return None, (
        f"resume_from_checkpoint is {checkpoint!r}, but there is no whole checkpoint at "
        f"{str(named or folder)!r}. Give the folder of one (.../checkpoint-<step>), or leave the "
        "option out to start afresh."
    )


def fault_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if all its files are as they were written."""
    if (folder / METRICS_FILE).is_file():
        return "it is the result of a stage, not a checkpoint; those are its folders checkpoint-*"
    if not is_finished(folder):
        return (
            "it is incomplete: the run ended while writing it (or an older version of "
            f"trl-instruct wrote it, without {MANIFEST_FILE})"
        )
    try:
        fault, names = damage(folder), read_manifest(folder)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        return f"its {MANIFEST_FILE} is damaged ({type(error).__name__})"
    needed = RUN_FILE in names and any(name.startswith("rng_state") for name in names)
    if fault is None and not needed:
        return "save_only_model left out what a resumed run needs"
    return fault


def check_resumable(checkpoint: Path, stage: str, *, adapter: bool) -> None:
    """InputError if a checkpoint is not of this stage, or not an adapter's as the run is."""
    run = read_json(checkpoint / RUN_FILE)["run"]
    if run.get("stage", stage) != stage:
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} was written by {run['stage']}, not by {stage}. "
            f"Resume from one of {stage}'s, or choose another output_dir."
        )
    if run.get("use_peft", adapter) != adapter:
        held, needed = ("a full model", "is") if adapter else ("an adapter", "is not")
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} holds {held}, but use_peft {needed} set. Resume "
            "with the options of the run that wrote it."
        )


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Load into a model, or its adapter, the weights that its `save_pretrained` wrote."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    else:
        saved = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
