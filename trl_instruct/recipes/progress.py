"""What a stage shows while it trains, and how a signal ends it."""

import contextlib
import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from trl_instruct.console import progress_bar
from trl_instruct.models.resuming import all_checkpoints, is_finished


class Interruption(TrainerCallback):
    """On SIGTERM to any of its processes, a run finishes its step, saves a checkpoint and stops."""

    def __init__(self) -> None:
        self.requested = self.begun = False

    def request(self, *_: Any) -> None:
        """Handle the signal."""
        self.requested = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signal in this context; restore the old handler even if training fails."""
        if threading.current_thread() is not threading.main_thread():  # only it gets signals
            yield
            return
        previous = signal.signal(signal.SIGTERM, self.request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.requested = any(gather_object([self.requested]))
        if self.requested:
            control.should_save = control.should_training_stop = True


def hold_trackers(trainer: Trainer) -> list[Callable[..., Any]]:
    """Keep trackers' runs open for a last evaluation; returns what ends them, as on_train_end."""
    names, ends = trainer.args.report_to, []
    kinds: Any = tuple(get_reporting_integration_callbacks(names))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, kinds):
            ends.append(callback.on_train_end)
            callback.on_train_end = lambda *_, **__: None
    if "wandb" in names and (wandb := importlib.import_module("wandb")).run is None:
        ends.append(lambda *_, **__: wandb.finish())  # or the next stage would go on with this run
    return ends


class ProgressBar(ProgressCallback):
    """transformers' bar over optimizer steps (PPO: iterations), which shows the named metrics."""

    def __init__(self, name: str, labels: dict[str, str]):
        super().__init__()
        self.name, self.labels = name, labels

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = progress_bar(self.name, state.max_steps, initial=state.global_step)

    def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
        """No bar over held-out data."""

    def on_log(self, *_: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        shown = {k: f"{float(logs[v]):.3g}" for k, v in self.labels.items() if v in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown, refresh=False)


def way_on(folder: Path, *, begun: bool) -> str:
    """How to go on with a run that Ctrl-C ended."""
    if not begun:
        return "nothing was trained yet: the same command begins again"
    whole = [path for path in all_checkpoints(folder) if is_finished(path)]
    told = f"goes on from {whole[-1]}" if whole else "begins again: there is no checkpoint yet"
    return f"the same command with --resume_from_checkpoint auto {told}"
