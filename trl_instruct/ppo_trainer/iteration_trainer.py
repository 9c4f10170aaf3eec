"""A transformers Trainer with its own loop: everything around an iteration.

One `global_step` is one iteration. Callbacks, trackers, logs, checkpoints and their limits behave
as in any Trainer. PPO uses private methods of the Trainer in this file only.
"""

import math
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput

from trl_instruct.console import get_logger
from trl_instruct.errors import InputError
from trl_instruct.models.processes import seed_process
from trl_instruct.models.resuming import ResumableTrainer
from trl_instruct.models.sharding import load_shards, mark_fsdp_root
from trl_instruct.ppo_trainer.exploitation import GOLD, Judged, recent, turned_from
from trl_instruct.ppo_trainer.run_state import restore
from trl_instruct.rewards.function import RewardFunction, load_states, states_of

logger = get_logger(__name__)


class IterationTrainer(ResumableTrainer):
    """Does what `Trainer.train` does before, between and after the iterations of a subclass.

    The subclass sets `num_iterations`, `iterations_per_epoch` and `judged` (of each iteration its
    number and what `stop_when_exploited` watches), and calls `begin_training`,
    `begin_iteration`, `judge_weights`, `end_iteration` and `end_training` in that order.
    """

    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    control: TrainerControl
    num_iterations: int
    iterations_per_epoch: float
    metrics: dict[str, Any]
    reward: RewardFunction
    beginning: tuple[Any, ...]
    judged: list[tuple[int, float, float, float]]

    def begin_training(self, checkpoint: Path | None = None) -> None:
        """Set up optimizer, scheduler, processes, callbacks; restore all but the weights."""
        args = self.args
        seed_process(args.seed)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.turned = False
        self.told_by_rewards: dict[str, list[float]] = defaultdict(list)
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        mark_fsdp_root(self.model_wrapped)
        self.create_scheduler(num_training_steps=self.num_iterations)
        callbacks = [*self.callback_handler.callbacks, self.control]
        exported = [c for c in callbacks if isinstance(c, ExportableState)]
        self.state = TrainerState(stateful_callbacks=exported)
        if checkpoint is not None:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._load_callback_state()
            self._load_optimizer_and_scheduler(str(checkpoint))
            load_shards(self.accelerator, self.model_wrapped, checkpoint)
            self._load_scaler(str(checkpoint))
            self._load_rng_state(str(checkpoint))
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
        """The Trainer's, one step ahead: a first iteration at a rate of 0 would have no effect."""
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()
        return scheduler

    def begin_iteration(self) -> None:
        """Remember what sampling and scoring change, and call the callbacks."""
        self.beginning = self._moment()
        self.told_by_rewards.clear()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number that a reward tells, as objective/<name>."""
        self.told_by_rewards[f"objective/{name}"].append(value)

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
        if self.control.should_save:
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = handler.on_save(self.args, state, self.control)

    def judge_weights(self, measured: dict[str, Any], *, may_fail: str | None = None) -> None:
        """Credit what an iteration measures before its update to the weights that it sampled with.

        If `metric_for_best_model`, which may be missing if `may_fail` names it, is the best so far,
        their checkpoint is kept; with `save_strategy` best it is saved now, else there may be none.
        """
        name, state = self.args.metric_for_best_model, self.state
        if name not in (*measured, may_fail, None):
            raise InputError(
                f"metric_for_best_model is {name!r}, which a rollout does not measure: set it to "
                f"one of {', '.join(sorted(measured))}."
            )
        saves = self.args.save_strategy == SaveStrategy.BEST or state.global_step == self.saved_step
        if self.args.stop_when_exploited:
            measured, saves = self._watch(measured), True
        if name not in measured or not state.global_step or not saves:
            return
        if self._determine_best_metric({f"eval_{name}": measured[name]}, trial=None):
            state.best_model_checkpoint = str(self.checkpoint_of(state.global_step))
            self._save_beginning()

    def _watch(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Note what the judge says; if it has turned, this iteration is the last.

        Returns, as the metric whose best is the peak, its mean over the last iterations.
        """
        names = (GOLD, f"{GOLD}_se", "objective/scores")
        if not measured.keys() >= set(names):
            return {}
        self.judged.append((self.state.global_step, *(measured[name] for name in names)))
        if turned_from([Judged(*rest) for _, *rest in self.judged]) is not None:
            self.turned = self.control.should_training_stop = True
        mean = recent([mean for _, mean, *_ in self.judged])[-1]
        return {GOLD: mean} if math.isfinite(mean) else {}

    def _save_beginning(self) -> None:
        """Save the run as it was when this iteration began, unless that has been done."""
        now = self._moment()
        self._return_to(self.beginning)
        self._save_checkpoint(self.model_wrapped, trial=None)
        self._return_to(now)

    @contextmanager
    def saved_on(self, kind: type[InputError]) -> Iterator[None]:
        """If this error is raised inside, save the run as it was when this iteration began.

        No weight has changed since. The error then also says where the run was saved; the first
        iteration has nothing to save.
        """
        try:
            yield
        except kind as error:
            step, told = self.state.global_step, f"Iteration {self.state.global_step + 1}: {error}"
            if step:
                self._save_beginning()
                told = f"{told.rstrip('.')}. {self.checkpoint_of(step)} holds the run as it was "
                told += "before that: resume it with resume_from_checkpoint."
            raise kind(told) from error

    def _moment(self) -> tuple[Any, ...]:
        """State of the reward, and of all random number generators of this process."""
        numbers = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        return states_of(self.reward), *numbers, torch.cuda.get_rng_state_all()

    def _return_to(self, moment: tuple[Any, ...]) -> None:
        rewards, python, numpy, cpu, devices = moment
        load_states(self.reward, rewards)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(devices)

    def end_training(self) -> TrainOutput:
        """Call the callbacks and return the last iteration's metrics."""
        peak = self.state.best_model_checkpoint
        if self.turned and peak is not None:
            logger.warning(
                "%s has turned: %.3f at its peak, now %.3f. The run ends; its result is the policy "
                "at the peak, %s.",
                *(GOLD, self.state.best_metric, self.judged[-1][1], peak),
            )
            restore(self, Path(peak))
            self.metrics["peak_iteration"] = int(peak.rpartition("-")[2])
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        metrics = {**self.metrics, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, metrics["loss/policy"], metrics)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float
) -> None:
    """Give some parameters of an unused optimizer a peak learning rate of their own."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
