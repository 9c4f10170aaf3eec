"""What every stage does around its training: claim a folder, show progress, save a result."""

import contextlib
import copy
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import ModelCard, ModelCardData
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from trl import ModelConfig

from trl_instruct.configs import RewardConfig, SFTConfig, StageConfig
from trl_instruct.console import in_markdown, say
from trl_instruct.data.sources import AnyDataset, Source, first_record
from trl_instruct.errors import InputError, redact
from trl_instruct.files import CONFIG_FILE, METRICS_FILE, write_json
from trl_instruct.models.adapters import (
    FINGERPRINT,
    Adapter,
    check_trains_in_float32,
    is_adapter,
)
from trl_instruct.models.checkpoints import (
    all_checkpoints,
    check_resumable,
    find_checkpoint,
    is_whole,
)
from trl_instruct.models.load import base_for_adapter, check_finished
from trl_instruct.models.merging import merge_in_place
from trl_instruct.models.properties import ModelSource, context_length, model_name
from trl_instruct.models.sharding import check_saving
from trl_instruct.models.tokenizers import check_tokenizer, install_chat_template, load_tokenizer
from trl_instruct.recipes.dry_run import DryRunEnd, plan_of
from trl_instruct.recipes.options import save_config
from trl_instruct.recipes.progress import Interruption, ProgressBar
from trl_instruct.recipes.publishing import create_repository, publish
from trl_instruct.scalar_head import SHIFT_FILE

# What a stage writes and --overwrite_output_dir removes.
WRITTEN = (
    "checkpoint-*",
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    FINGERPRINT,
    SHIFT_FILE,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
    "README.md",
    "trainer_state.json",
    "summary.json",
    "report.html",
    "rm.png",
    "ppo.png",
    "evaluation.json",
    "evaluation.png",
    CONFIG_FILE,
    METRICS_FILE,
)


# Subfolder of a LoRA stage, for a base model that has no other folder.
BASE = "base"


@dataclass(frozen=True)
class StageResult(os.PathLike):
    """A stage's result: its folder, usable as a path, and its metrics."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@contextlib.contextmanager
def run_stage(name: str, config: StageConfig, model_config: ModelConfig) -> Iterator["StageRun"]:
    """The run of a stage in its folder, seeded.

    The folder does not change before `begin`: a mistake found while data and models load costs no
    earlier run. Metrics are written last: a folder with the resolved config but no metrics is a
    stage that was cut short. A stage that fails with nothing to resume from leaves no files.

    Raises:
        InputError: no output_dir, one with another run or other files, or no checkpoint to resume.
    """
    run = StageRun(name, config, model_config)
    run.check_folder()
    clear_device_cache(garbage_collection=True)  # cycles in accelerate keep old models alive
    PartialState().wait_for_everyone()
    set_seed(config.seed)
    try:
        yield run
    except DryRunEnd:
        if run.is_main and not run.existed and run.folder.is_dir():
            run.folder.rmdir()  # transformers makes it
    except BaseException:
        if run.is_main:
            run.release()
        raise


class StageRun:
    """One run of a stage in its folder."""

    def __init__(self, name: str, config: StageConfig, model_config: ModelConfig):
        if config.output_dir in (None, "", "trainer_output"):  # TrainingArguments' default
            raise InputError(f"{name} needs output_dir, the folder to save its result in.")
        self.name = name
        self.config = config
        self.model_config = model_config
        self.folder = Path(config.output_dir)
        self.existed = self.folder.exists()
        self.checkpoint: Path | None = None
        self.repository: str | None = None
        self.is_main = PartialState().is_main_process
        self.started = time.perf_counter()

    @property
    def base_folder(self) -> Path:
        """Folder for the base model of an adapter, if it has no other."""
        return self.folder / BASE

    @property
    def dry(self) -> bool:
        """Whether the run ends before its first step and leaves the folder alone."""
        return self.config.faults is not None

    def check_folder(self) -> None:
        """InputError unless the folder is new, empty, or may be replaced or resumed."""
        try:
            self._check_folder()
        except InputError as fault:
            if self.config.faults is None:
                raise
            if str(fault) not in self.config.faults:
                self.config.faults.append(str(fault))

    def _check_folder(self) -> None:
        config, folder = self.config, self.folder
        if self.existed and not folder.is_dir():
            raise InputError(f"output_dir {str(folder)!r} is a file; choose a folder.")
        self._check_writable()
        if config.resume_from_checkpoint:
            self.checkpoint = find_checkpoint(folder, config.resume_from_checkpoint)
            check_resumable(self.checkpoint, self.name, adapter=self.model_config.use_peft)
            return
        content = sorted(p.name for p in folder.iterdir()) if self.existed else []
        if content and CONFIG_FILE not in content:
            raise InputError(
                f"output_dir {str(folder)!r} holds {content[0]!r} and no run. Choose a new or "
                "empty folder."
            )
        if content and not config.overwrite_output_dir:
            held = "another run" if METRICS_FILE in content else "a run that was cut short"
            raise InputError(
                f"output_dir {str(folder)!r} holds {held}. Choose a new folder, or set "
                "--overwrite_output_dir to replace it."
            )
        source = self.model_config.model_name_or_path
        if content and source and Path(source).resolve() == folder.resolve():
            raise InputError(
                f"output_dir {str(folder)!r} is the folder of the model to start from, which "
                "would be lost. Choose another output_dir."
            )

    def _check_writable(self) -> None:
        """InputError if the folder cannot be made or written to."""
        ancestors = [self.folder, *self.folder.absolute().parents]
        nearest = next(path for path in ancestors if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            fault = "is not a folder" if not nearest.is_dir() else "is not writable"
            raise InputError(
                f"output_dir {str(self.folder)!r}: {str(nearest)!r} {fault}. Choose another."
            )

    def begin(self) -> None:
        """Remove an earlier run's files and write the config: from here on the stage runs."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            patterns = (METRICS_FILE,) if self.checkpoint else WRITTEN
            cut_short = [path for path in all_checkpoints(self.folder) if not is_whole(path)]
            for path in {*cut_short, *(p for g in patterns for p in self.folder.glob(g))}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not self.model_config.use_peft:
                shutil.rmtree(self.base_folder, ignore_errors=True)
            save_config(self.folder / CONFIG_FILE, self.config, self.model_config)
        PartialState().wait_for_everyone()

    def _check_batches(self, trainer: Trainer) -> None:
        """InputError if dataloader_drop_last drops all that there is."""
        rows, config = trainer.train_dataset, self.config
        batch = config.train_batch_size * config.world_size
        if config.dataloader_drop_last and isinstance(rows, Sized) and len(rows) < batch:
            raise InputError(
                f"dataloader_drop_last drops all of the {len(rows)} training rows: a batch has "
                f"{batch}. Give more rows, a smaller per_device_train_batch_size, or leave it out."
            )

    def release(self) -> None:
        """Remove what a failed stage left, unless there is something to resume from."""
        content = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else None
        if content is None or not content <= {CONFIG_FILE, BASE}:
            return
        shutil.rmtree(self.folder)
        if self.existed:
            self.folder.mkdir()

    def say(self, message: str) -> None:
        """Print a line for the user, from the main process."""
        if self.is_main:
            say(f"{self.name}: {message}")

    def train(self, trainer: Trainer, labels: dict[str, str]) -> TrainOutput:
        """Train from the start, or from the checkpoint; on SIGTERM, save one and exit with 143.

        Args:
            trainer: anything with the interface of `transformers.Trainer`.
            labels: for the progress bar: label -> key in the trainer's logs.
        """
        check_saving(trainer.accelerator)
        if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
            check_trains_in_float32(trainer.model)  # DeepSpeed keeps float32 weights itself
        self._check_batches(trainer)
        if plan := plan_of(trainer):
            self.say(plan)
        if self.dry:
            raise DryRunEnd
        self.repository = create_repository(self.config) if self.is_main else None
        self.begin()
        if not self.config.disable_tqdm:
            # One bar with the named metrics instead of a printed dict per log.
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(ProgressBar(self.name, labels))
        interruption = Interruption()
        trainer.add_callback(interruption)
        with interruption.listening(), self._loading(interruption):
            output = trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
        if interruption.requested:
            self.say(
                f"stopped by SIGTERM after step {output.global_step} of {trainer.state.max_steps}; "
                "resume_from_checkpoint=True continues from there"
            )
            raise SystemExit(128 + signal.SIGTERM)
        return output

    @contextlib.contextmanager
    def _loading(self, progress: Interruption) -> Iterator[None]:
        """Turn an error before the first step of a resumed run into an `InputError`."""
        try:
            yield
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            if self.checkpoint is None or progress.begun or isinstance(error, InputError):
                raise
            raise InputError(
                f"The checkpoint {str(self.checkpoint)!r} does not fit this run, which needs the "
                f"model and options of the run that wrote it: {str(error).strip().splitlines()[0]}"
            ) from error

    def finish(self, trainer: Trainer, metrics: dict[str, Any]) -> StageResult:
        """Save model, tokenizer, log history, model card and, last, the metrics."""
        trainer.save_model(str(self.folder))
        if self.is_main:
            if self.config.merge_adapter and is_adapter(self.folder):
                merge_in_place(self.folder, self.model_config)
                shutil.rmtree(self.base_folder, ignore_errors=True)
            if is_adapter(self.folder):
                Adapter.read(self.folder).keep_fingerprint()
            # config.yaml holds the arguments as text; the pickled ones are of no use.
            (self.folder / "training_args.bin").unlink(missing_ok=True)
            trainer.save_state()
            self.write_model_card(metrics)
            metrics = self.write_metrics(metrics)
            if self.repository is not None:
                publish(self.folder, self._written(), self.config, self.repository)
        PartialState().wait_for_everyone()
        return StageResult(self.folder, metrics)

    def _written(self) -> list[Path]:
        """The files and folders of the result."""
        patterns = [pattern for pattern in WRITTEN if pattern != "checkpoint-*"]
        return [path for pattern in (*patterns, BASE) for path in self.folder.glob(pattern)]

    def write_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write the stage's last file: its name, metrics and seconds."""
        seconds = round(time.perf_counter() - self.started, 1)
        metrics = {"stage": self.name, **metrics, "seconds": seconds}
        write_json(self.folder / METRICS_FILE, metrics)
        return metrics

    def write_model_card(self, metrics: dict[str, Any]) -> None:
        """Write the folder's README.md: what was trained, on which data, with which metrics."""
        source = in_markdown(str(redact(self.config.dataset_name)))
        tags = ["trl-instruct", "trl", self.name]
        data = ModelCardData(library_name="transformers", tags=tags)
        rows = [
            f"| {in_markdown(k)} | {v:.6g} |"
            for k, v in metrics.items()
            if isinstance(v, (int, float))
        ]
        text = [
            f"---\n{data.to_yaml()}\n---",
            f"# {in_markdown(self.folder.name)}",
            f"Made by the `{self.name}` stage of trl-instruct, from the data {source}. All options "
            f"are in `{CONFIG_FILE}`.",
            "| metric | value |\n|---|---|\n" + "\n".join(rows),
            "Method: Ouyang et al. 2022, [Training language models to follow instructions with "
            "human feedback](https://arxiv.org/abs/2203.02155).",
        ]
        card = redact("\n\n".join(text))
        ModelCard(card, ignore_metadata_errors=True).save(self.folder / "README.md")


def starting_point(
    run: StageRun, model: ModelSource | None, processing_class: PreTrainedTokenizerBase | None
) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """The source of the model to train, and its tokenizer; the run's config names the model."""
    if model is None:
        raise InputError("No model was given: set model_name_or_path to a Hub id or a folder.")
    model_config = run.model_config
    model_config.model_name_or_path = model_name(model)
    run.check_folder()
    if isinstance(model, str | os.PathLike):
        check_finished(Path(model))
    given = {role: getattr(run.config, role, None) for role in ("eos_token", "pad_token")}
    special_tokens = {role: token for role, token in given.items() if token is not None}
    if processing_class is not None:
        own = copy.deepcopy(processing_class)
        tokenizer = check_tokenizer(own, model_name(model), special_tokens)
    else:
        tokenizer = load_tokenizer(
            model,
            revision=model_config.model_revision,
            trust_remote_code=run.config.trust_remote_code,
            special_tokens=special_tokens,
        )
    template = getattr(run.config, "chat_template_path", None)
    if template is not None:
        install_chat_template(tokenizer, template)
    return base_for_adapter(model, run.base_folder, tokenizer, model_config), tokenizer


def within_context(max_length: int | None, model: PreTrainedModel) -> int | None:
    """`max_length`, or the model's context if that is shorter."""
    context = context_length(model)
    if context is None or max_length is None:
        return max_length
    return min(max_length, context)


def check_chat_template(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig | RewardConfig
) -> None:
    """InputError for messages without a chat template."""
    known = tokenizer.chat_template or config.chat_template_path
    first = first_record(dataset, Source.of(dataset))
    if not known and not isinstance(first["prompt"], str):
        raise InputError(
            "The records are messages, but the tokenizer has no chat template. Set "
            "chat_template_path to a Jinja file or to a model that has one."
        )
