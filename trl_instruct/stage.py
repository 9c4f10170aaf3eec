"""What every stage does around its training: claim a folder, show progress, leave a result."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import ModelConfig

from trl_instruct.configs import StageConfig, save_config
from trl_instruct.errors import InputError
from trl_instruct.models import CONFIG_FILE, METRICS_FILE

# What a stage writes, and so what --overwrite_output_dir may remove.
WRITTEN = (
    "checkpoint-*",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "trainer_state.json",
    METRICS_FILE,
)


@dataclass(frozen=True)
class StageResult(os.PathLike):
    """What a stage leaves: the folder, usable wherever a path is, and its metrics."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@contextlib.contextmanager
def stage(name: str, config: StageConfig, model_config: ModelConfig) -> Iterator["Stage"]:
    """The folder of a stage, from its claim to its end.

    A folder that holds the resolved config but no metrics is a stage that was cut short; the
    metrics are written last. Where the stage fails before it has written anything else, the folder
    goes as it came.

    Raises:
        InputError: no output_dir, one that holds another run, or one that holds something else.
    """
    run = Stage(name, config)
    if run.is_main:
        run.claim(model_config)
    PartialState().wait_for_everyone()
    try:
        yield run
    except BaseException:
        if run.is_main:
            run.release()
        raise


class Stage:
    """One run of a stage in its folder."""

    def __init__(self, name: str, config: StageConfig):
        if not config.output_dir:
            raise InputError(f"{name} needs output_dir, the folder to save its result in.")
        self.name = name
        self.config = config
        self.folder = Path(config.output_dir)
        self.is_main = PartialState().is_main_process
        self.started = time.perf_counter()

    def claim(self, model_config: ModelConfig) -> None:
        """Take an empty or new folder, or, when asked to, one with an earlier run."""
        config, folder = self.config, self.folder
        content = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        if content and not config.resume_from_checkpoint:
            if CONFIG_FILE not in content:
                raise InputError(
                    f"output_dir {str(folder)!r} holds {sorted(content)[0]!r} and no run of a "
                    "stage. Choose a new or empty folder."
                )
            if not config.overwrite_output_dir:
                raise InputError(
                    f"output_dir {str(folder)!r} holds another run. Choose a new folder, or set "
                    "--overwrite_output_dir to replace it."
                )
            for pattern in WRITTEN:
                for path in folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        save_config(folder / CONFIG_FILE, config, model_config)

    def release(self) -> None:
        """Remove the folder again if it holds nothing but the config."""
        if [p.name for p in self.folder.iterdir()] == [CONFIG_FILE]:
            shutil.rmtree(self.folder)

    def say(self, message: str) -> None:
        """A line for the user, once for all processes."""
        if self.is_main:
            print(f"{self.name}: {message}")

    def show_progress(self, trainer: Trainer, labels: dict[str, str]) -> None:
        """One bar with the named metrics, in place of a printed dict per log."""
        if self.config.disable_tqdm:
            return
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressBar(self.name, labels))

    def finish(self, trainer: Trainer, metrics: dict[str, Any]) -> StageResult:
        """Save model, tokenizer, log history, model card and, last, the metrics."""
        trainer.save_model(str(self.folder))
        if self.is_main:
            # Pickled arguments serve nobody here: config.yaml holds them as text.
            (self.folder / "training_args.bin").unlink(missing_ok=True)
            trainer.save_state()
            self.write_model_card(metrics)
            metrics = self.write_metrics(metrics)
        if self.config.push_to_hub:
            trainer.push_to_hub()
        PartialState().wait_for_everyone()
        return StageResult(self.folder, metrics)

    def write_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The last file of a stage: its metrics and its seconds."""
        metrics = {**metrics, "seconds": round(time.perf_counter() - self.started, 1)}
        write_json(self.folder / METRICS_FILE, metrics)
        return metrics

    def write_model_card(self, metrics: dict[str, Any]) -> None:
        """README.md of the folder: what was trained, from what, and how it measured."""
        tags = ["trl-instruct", "trl", self.name]
        data = ModelCardData(library_name="transformers", tags=tags)
        rows = [f"| {k} | {v:.6g} |" for k, v in metrics.items() if isinstance(v, (int, float))]
        text = [
            f"---\n{data.to_yaml()}\n---",
            f"# {self.folder.name}",
            f"Made by the `{self.name}` stage of trl-instruct, from the data "
            f"`{self.config.dataset_name}`. All options stand in `{CONFIG_FILE}`.",
            "| metric | value |\n|---|---|\n" + "\n".join(rows),
            "Method: Ouyang et al. 2022, [Training language models to follow instructions with "
            "human feedback](https://arxiv.org/abs/2203.02155).",
        ]
        ModelCard("\n\n".join(text), ignore_metadata_errors=True).save(self.folder / "README.md")


class ProgressBar(TrainerCallback):
    """A bar over optimizer steps (PPO: iterations) that shows the named metrics."""

    def __init__(self, name: str, labels: dict[str, str]):
        self.name, self.labels = name, labels
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
            self.bar = tqdm(
                desc=self.name,
                total=state.max_steps,
                initial=state.global_step,
                mininterval=interval,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        shown = {label: logs[key] for label, key in self.labels.items() if logs and key in logs}
        if self.bar is not None and shown:
            self.bar.set_postfix({k: f"{float(v):.3g}" for k, v in shown.items()}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def write_json(path: Path, content: Any) -> None:
    """Write at once or not at all: a reader never sees half a file. NaN becomes null."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
