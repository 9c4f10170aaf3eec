"""A transformers Trainer with its own loop: everything around an iteration.

One `global_step` is one iteration. Callbacks, trackers, logs, checkpoints and their limits behave
as in any Trainer. PPO uses private methods of the Trainer in this file only.
"""

import math
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from trl_instruct.errors import InputError
from trl_instruct.models.sharding import load_shards, mark_fsdp_root


class IterationTrainer(Trainer):
    """Does what `Trainer.train` does before, between and after the iterations of a subclass.

    The subclass sets `num_iterations` and `iterations_per_epoch`, and calls `begin_training`,
    `begin_iteration`, `end_iteration` and `end_training` in that order.
    """

    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    control: TrainerControl
    num_iterations: int
    iterations_per_epoch: float
    metrics: dict[str, Any]
    random_state: tuple[Any, ...]
    saved_step: int

    def begin_training(self, checkpoint: Path | None = None) -> None:
        """Set up optimizer, scheduler, processes and callbacks.

        A checkpoint's progress and random states are restored; the caller loads its weights.
        """
        args = self.args
        set_seed(args.seed + 100_003 * self.accelerator.process_index)  # ranks must differ
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        mark_fsdp_root(self.model_wrapped)
        self.create_scheduler(num_training_steps=self.num_iterations)
        callbacks = [*self.callback_handler.callbacks, self.control]
        exported = [c for c in callbacks if isinstance(c, ExportableState)]
        self.state = TrainerState(stateful_callbacks=exported)
        if checkpoint is not None:
            self._load_progress(checkpoint)
        resumed = checkpoint is not None and checkpoint.parent == Path(str(args.output_dir))
        self.saved_step = self.state.global_step if resumed else -1
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.max_steps = self.num_iterations
        self.state.num_train_epochs = math.ceil(self.num_iterations / self.iterations_per_epoch)
        self.state.compute_steps(args, self.num_iterations)
        handler = self.callback_handler
        handler.model, handler.optimizer = self.model, self.optimizer
        handler.lr_scheduler = self.lr_scheduler
        self.control = handler.on_train_begin(args, self.state, self.control)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's schedule, one step ahead: a warm-up over 10 iterations starts at a tenth.

        A start at 0 would waste an iteration: sampled and scored, but without effect.
        """
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()
        return scheduler

    def _load_progress(self, checkpoint: Path) -> None:
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_callback_state()
        self._load_optimizer_and_scheduler(str(checkpoint))
        load_shards(self.accelerator, self.model_wrapped, checkpoint)
        self._load_scaler(str(checkpoint))
        self._load_rng_state(str(checkpoint))

    def begin_iteration(self) -> None:
        """Remember the random state and call the callbacks."""
        self.random_state = random_state()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    def end_iteration(self, metrics: dict[str, Any]) -> None:
        """Count the iteration, log its metrics by name, and save a checkpoint if one is due."""
        handler, state, passes = self.callback_handler, self.state, self.state.epoch or 0.0
        self.metrics = metrics
        state.global_step += 1
        state.epoch = state.global_step / self.iterations_per_epoch
        self.lr_scheduler.step()
        self.control = handler.on_step_end(self.args, state, self.control)
        if int(state.epoch) > int(passes):
            self.control = handler.on_epoch_end(self.args, state, self.control)
        if self.control.should_log:
            self.log(dict(metrics))
        if self._is_best() and self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = True
        if self.control.should_save:
            self._save_whole_checkpoint()
            self.control = handler.on_save(self.args, state, self.control)

    def _is_best(self) -> bool:
        """Whether `metric_for_best_model` is the best so far; that checkpoint is then kept."""
        name = self.args.metric_for_best_model
        if name is not None and name not in self.metrics:
            raise InputError(
                f"metric_for_best_model is {name!r}, which is not logged: set it to one of "
                f"{', '.join(sorted(self.metrics))}."
            )
        logged = {f"eval_{name}": value for name, value in self.metrics.items()}
        return self._determine_best_metric(logged, trial=None)

    def save_last_state(self, fault: str) -> str:
        """Save the run as it was when this iteration began, before any weight changed.

        Returns `fault` (why the run ends) and where the run was saved; the first iteration has
        nothing to save.
        """
        if not self.state.global_step:
            return fault
        if self.state.global_step != self.saved_step:
            set_random_state(self.random_state)
            self._save_whole_checkpoint()
        saved = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.saved_step}"
        told = "holds the run as it was before that: resume it with resume_from_checkpoint."
        return f"{fault.rstrip('.')}. {saved} {told}"

    def _save_whole_checkpoint(self) -> None:
        """Save all that a resumed run needs in `checkpoint-<step>` of output_dir."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            # An earlier run may have left a checkpoint of this step: a kill while it is
            # overwritten file by file would leave a mixture of the two.
            shutil.rmtree(Path(str(self.args.output_dir)) / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._save_checkpoint(self.model_wrapped, trial=None)
        self.saved_step = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        """Save every process's random state before the main one marks the checkpoint complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def end_training(self) -> TrainOutput:
        """Call the callbacks and return the last iteration's metrics."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        metrics = {**self.metrics, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, metrics["loss/policy"], metrics)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float
) -> None:
    """Give some of an optimizer's parameters their own peak learning rate.

    It must be unused and without a scheduler; parameters that it does not train are ignored.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})


def random_state() -> tuple[Any, ...]:
    """State of all random number generators of this process."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def set_random_state(state: tuple[Any, ...]) -> None:
    """Restore a `random_state`."""
    python, numpy, cpu, devices = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if devices:
        torch.cuda.set_rng_state_all(devices)
