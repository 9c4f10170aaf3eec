"""Runs that are resumed: from which checkpoint, the same options, the figures of the whole run."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from trl_instruct import files
from trl_instruct.console import get_logger
from trl_instruct.errors import NOT_AS_EXPECTED, InputError, redact, summary
from trl_instruct.files import read_json, write_json
from trl_instruct.option_checks import TABLES

logger = get_logger(__name__)

PPO_STATE = "ppo_state.json"
RUN_FILE = "run.json"  # of any checkpoint: what a `ResumableTrainer` remembers
AUTO = "auto"  # resume_from_checkpoint: go on if there is a whole checkpoint, else begin
MAY_CHANGE: str = TABLES["may_change"]  # options of a resumed run, as patterns
# What a Trainer, or TRL's, has counted since the run began.
COUNTS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: its manifest comes last."""
    return (folder / files.MANIFEST_FILE).is_file()


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, complete or not, sorted by step."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    numbered = [(path.name.rpartition("-")[2], path) for path in found]
    return [path for step, path in sorted((int(s), p) for s, p in numbered if s.isdigit())]


def find_checkpoint(folder: Path, checkpoint: str | bool) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, if it is whole; all processes call it.

    A folder; True: the last whole one in the stage's folder; AUTO: that, or None if there is none.
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
    if (folder / files.METRICS_FILE).is_file():
        return "it is the result of a stage, not a checkpoint; those are its folders checkpoint-*"
    if not is_finished(folder):
        return (
            "it is incomplete: the run ended while writing it (or an older version of "
            f"trl-instruct wrote it, without {files.MANIFEST_FILE})"
        )
    try:
        fault, names = files.damage(folder), read_json(folder / files.MANIFEST_FILE)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        return f"its {files.MANIFEST_FILE} is damaged ({type(error).__name__})"
    needed = RUN_FILE in names and any(name.startswith("rng_state") for name in names)
    if fault is None and not needed:
        return "save_only_model left out what a resumed run needs"
    return fault


def check_resumable(checkpoint: Path, stage: str, *, adapter: bool) -> None:
    """InputError if a checkpoint is not of this stage, or not an adapter's as the run is."""
    before = read_json(checkpoint / RUN_FILE)["run"]
    check_same_run(before, {"stage": stage, "use_peft": adapter}, checkpoint)


class ResumableTrainer(Trainer):
    """What any Trainer needs for runs that can be resumed; comes before it among the bases.

    - A checkpoint has a manifest, written last; an older one is removed only after that.
    - Weights that are not finite are never saved.
    - A resumed run has the data and options of the first, apart from `MAY_CHANGE`, which take
      effect. Its losses, tokens and seconds are those of the whole run.
    """

    stage_options: dict[str, Any] | None = None  # that are not in args: the stage, the model
    seconds_before = 0.0  # that the run had trained when its checkpoint was written
    saved_step = -1

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counts_before: dict[str, Any] = {}
        continuation = TrainerCallback()
        continuation.on_train_begin = lambda *_, **__: self.restore()  # the checkpoint is loaded
        self.add_callback(continuation)

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any) -> Any:
        """`Trainer.train`; `resume_from_checkpoint` is as in `find_checkpoint`."""
        checkpoint = self.remember(resume_from_checkpoint)
        return super().train(checkpoint and str(checkpoint), *rest)

    def check_optimizer(self) -> None:
        """InputError for options that the optimizer or the scheduler refuses; neither is kept."""
        try:
            self.create_optimizer_and_scheduler(num_training_steps=1)
        except (ImportError, *NOT_AS_EXPECTED) as error:
            raise InputError(f"These options cannot be used: {summary(error)}") from error
        for made in ("optimizer", "lr_scheduler"):
            setattr(self, made, None)

    def remember(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The checkpoint to resume from, if any; InputError for one of other data or options."""
        self.began = time.perf_counter()
        names = [getattr(self.args, name, None) for name in ("dataset_name", "datasets")]
        self.data = _fingerprint(self.train_dataset) or f"the stream {names}"
        if not resume_from_checkpoint:
            return None
        folder = Path(str(self.args.output_dir))
        checkpoint = find_checkpoint(folder, resume_from_checkpoint)
        if checkpoint is not None:
            remembered = read_json(checkpoint / RUN_FILE)
            check_same_run(remembered["run"], self.run(), checkpoint)
            self.counts_before = counts = remembered["counts"]
            self.seconds_before, self.resumed_from = counts["seconds"], checkpoint
            if checkpoint.resolve() == self.checkpoint_of(counts["step"]).resolve():
                self.saved_step = counts["step"]
        return checkpoint

    def run(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first, as JSON."""
        fields = {f.name for f in dataclasses.fields(self.args) if f.init}
        options = {name: value for name, value in self.args.to_dict().items() if name in fields}
        options = {k: v for k, v in (options | (self.stage_options or {})).items() if _shapes(k)}
        for name, value in options.items():
            if name.endswith("_path") and os.path.exists(str(value)):
                options[name] = os.path.realpath(value)
        run = {**redact(options), "processes": self.args.world_size, "training data": self.data}
        return json.loads(json.dumps(run, default=str))

    def restore(self) -> None:
        """Restore the counts of a resumed run; set what its options changed."""
        state, before = self.state, self.counts_before
        if not before:
            return
        if state.global_step > state.max_steps:
            raise InputError(
                f"The checkpoint is of step {state.global_step}, but this run has "
                f"{state.max_steps} in all. Train longer, or resume from an earlier checkpoint."
            )
        if best := state.best_model_checkpoint:  # beside the other, if the run was moved
            state.best_model_checkpoint = str(self.resumed_from.with_name(Path(best).name))
        state.compute_steps(self.args, state.max_steps)
        scheduler = self.lr_scheduler
        if hasattr(scheduler, "lr_lambdas"):
            # New peaks, at the place that the schedule has reached.
            scheduler.base_lrs = self.peak_rates
            groups = scheduler.optimizer.param_groups
            for group, peak, at in zip(groups, self.peak_rates, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = peak, peak * at(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]  # for the log
        for name in before.keys() & set(COUNTS):
            setattr(self, name, before[name])
        self._initial_global_step = 0  # the mean loss is over all steps
        if "loss" in before:  # since the last log
            self._tr_loss: Any = self._tr_loss + before["loss"]
        for name, values in files.nulls_as_nan(before.get("metrics", {})).items():
            self._metrics["train"][name] = values

    def _counts(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in COUNTS if hasattr(self, name)}
        seconds = self.seconds_before + time.perf_counter() - self.began
        counts |= {"step": self.state.global_step, "seconds": seconds}
        if hasattr(self, "_tr_loss"):
            counts["loss"] = self.accelerator.gather(self._tr_loss).mean().item()
        if hasattr(self, "_metrics"):
            counts["metrics"] = dict(self._metrics["train"])
        return counts

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; remembers the peak rates, which a checkpoint's state would replace."""
        scheduler = super().create_scheduler(*args, **kwargs)
        self.peak_rates = list(getattr(scheduler, "base_lrs", []))
        return scheduler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's batches of a step; none if `max_steps` have been taken."""
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(*args, **kwargs)
        self.control.should_training_stop = True
        return [], None

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log; the last one times the whole run."""
        if self.seconds_before and "train_runtime" in logs:
            own, whole = logs["train_runtime"], logs["train_runtime"] + self.seconds_before
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] *= own / whole
            logs["train_runtime"] = whole
        super().log(logs, *args, **kwargs)

    def checkpoint_of(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, and its manifest last, unless that of this step is there already."""
        args, step = self.args, self.state.global_step
        if step == self.saved_step:
            return
        check_weights(self)
        folder, counts = self.checkpoint_of(step), self._counts()
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that went another way
        self.accelerator.wait_for_everyone()
        limit, args.save_total_limit = args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # pickled; resuming reads none
            write_json(folder / RUN_FILE, {"run": self.run(), "counts": counts})
            files.write_manifest(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)
        self.saved_step = step


def check_same_run(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """InputError if a run differs from the checkpoint's, in options that both versions know."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and _shapes(name):
            raise InputError(
                f"The checkpoint {str(checkpoint)!r} was made with {name} {before[name]}, this run "
                f"has {now[name]}. Resume with what it was made with, or start a new run: a "
                "resumed run may change rates, lengths, logging and saving only (docs/resume.md)."
            )


def _shapes(option: str) -> bool:
    """Whether a resumed run must have the same value of an option."""
    return not any(fnmatchcase(option, pattern) for pattern in MAY_CHANGE.split())


def check_weights(trainer: Trainer) -> None:
    """FloatingPointError if a weight that a trainer would save is not a finite number."""
    weights = (getattr(w, "ds_tensor", w).detach() for w in trainer.model.parameters())
    held = (w.to_local() if hasattr(w, "to_local") else w for w in weights)  # by this process
    if all(gather_object([all(bool(w.isfinite().all()) for w in held)])):
        return
    folder = Path(str(trainer.args.output_dir))
    kept = [str(path) for path in all_checkpoints(folder) if is_finished(path)]
    told = f"{kept[-1]} has the run as it was before" if kept else "there is no checkpoint"
    raise FloatingPointError(
        f"Weights are not finite after step {trainer.state.global_step}, and are not saved; "
        f"{told}. Lower learning_rate, set max_grad_norm, or use bf16 instead of fp16."
    )


def _fingerprint(dataset: Any) -> str | None:
    """SHA-256 of all rows, in their order; None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]
