"""What every stage does around its training: claim a folder, show progress, save a result."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from trl import ModelConfig

from trl_instruct.configs import RewardConfig, SFTConfig, StageConfig
from trl_instruct.console import say
from trl_instruct.errors import NOT_AS_EXPECTED, InputError, explained, summary
from trl_instruct.files import CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, read_metrics, write_json
from trl_instruct.models import adapters, resuming, tokenizers
from trl_instruct.models.load import merge_in_place, needs_base
from trl_instruct.models.properties import ModelSource, check_finished, context_length, model_name
from trl_instruct.models.resuming import AUTO, check_resumable, check_weights, find_checkpoint
from trl_instruct.models.sharding import check_saving
from trl_instruct.recipes.dry_run import StageEnd, plan_of
from trl_instruct.recipes.options import config_text, option_errors
from trl_instruct.recipes.progress import Interruption, ProgressBar, hold_trackers, way_on
from trl_instruct.recipes.publishing import create_repository, model_card, publish, without_secrets
from trl_instruct.recipes.run_files import BASE, RunFiles
from trl_instruct.types import Model, Tokenizer


@dataclass(frozen=True)
class StageResult(os.PathLike):
    """A stage's result: its folder, usable as a path, and its metrics."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__


@contextlib.contextmanager
def run_stage(name: str, config: StageConfig, model_config: ModelConfig) -> Iterator["StageRun"]:
    """The run of a stage in its folder, seeded.

    The folder does not change before `begin`: a mistake found while data and models load costs no
    earlier run. Metrics are written last: a folder with a config but no metrics is a stage that was
    cut short. One that fails in a new folder, with nothing to resume from, leaves no files.
    """
    run = StageRun(name, config, model_config)
    try:
        run.check_folder()
        clear_device_cache(garbage_collection=True)  # cycles in accelerate keep old models alive
        PartialState().wait_for_everyone()
        with explained(f"seed is {config.seed}"):
            set_seed(config.seed)
        yield run
    except StageEnd:
        pass
    except BaseException as error:
        if run.is_main:
            run.release()
        if isinstance(error, KeyboardInterrupt):
            error.args = (way_on(run.folder, begun=run.begun),)
        raise
    finally:
        if run.is_main:
            run.files.unlock()


def output_folder(name: str, config: StageConfig) -> Path:
    """The folder of a stage's result; InputError without one."""
    if config.output_dir in (None, "", "trainer_output"):  # TrainingArguments' default
        raise InputError(f"{name} needs output_dir, the folder to save its result in.")
    return Path(config.output_dir)


class StageRun:
    """One run of a stage in its folder."""

    def __init__(self, name: str, config: StageConfig, model_config: ModelConfig):
        self.name = name
        self.config, self.model_config = config, model_config
        self.dry = config.faults is not None  # ends before its first step, leaves the folder alone
        self.folder = output_folder(name, config)
        self.files = RunFiles(self.folder)
        self.new = self.files.new  # where to write what `write_metrics` puts in place
        self.saved_base = self.begun = False
        self.asks_for_last = config.resume_from_checkpoint in (True, AUTO)
        self.checkpoint: Path | None = None
        self.repository: str | None = None
        self.kind = "dataset" if name == "candidates" else "model"  # of repository
        self.is_main = PartialState().is_main_process
        self.started = time.perf_counter()

    def check_folder(self) -> None:
        """InputError unless the folder is new, empty, or may be replaced or resumed."""
        with self._listed_if_dry():
            self.files.check_writable()
            if self.config.resume_from_checkpoint and self.checkpoint is None:
                self.checkpoint = find_checkpoint(self.folder, self.config.resume_from_checkpoint)
            if self.checkpoint is not None:
                check_resumable(self.checkpoint, self.name, adapter=self.model_config.use_peft)
            if self.is_main and not self.dry and self.files.holds_run():
                self.files.lock()
            if not self.asks_for_last or METRICS_FILE not in self.files.content():
                self._check_content()  # else `train` sees whether it is this run's result
            self.check_source()

    @contextlib.contextmanager
    def _listed_if_dry(self) -> Iterator[None]:
        """A dry run lists its faults and goes on."""
        try:
            yield
        except InputError as fault:
            if self.config.faults is None:
                raise
            if str(fault) not in self.config.faults:
                self.config.faults.append(str(fault))

    @property
    def _resumes_here(self) -> bool:
        """Whether the checkpoint to resume from is this folder's."""
        here = self.folder.resolve()
        return self.checkpoint is not None and self.checkpoint.absolute().parent.resolve() == here

    def _had_ended(self, trainer: Any) -> bool:
        """Whether the run to resume has its result, made with the same options; then tells so."""
        same, named = False, self.checkpoint or self.config.dataset_name or self.config.datasets
        if self.is_main and named and self.asks_for_last and (self.folder / METRICS_FILE).is_file():
            held = (self.folder / CONFIG_FILE).read_text(encoding="utf-8")
            same = held == config_text(self.config, self.model_config)
        [same] = broadcast_object_list([same])
        if same:
            trainer.remember(self.checkpoint and str(self.checkpoint))  # InputError: other data
            told = "--overwrite_output_dir, without --resume_from_checkpoint, trains anew"
            self.say(f"this run is finished: nothing is left to train ({told})")
        return same

    def earlier(self) -> StageResult:
        """The result of a run that had ended before; of a dry run, without metrics."""
        return StageResult(self.folder, {} if self.dry else read_metrics(self.folder))

    def _check_content(self) -> None:
        again = self.config.resume_from_checkpoint == AUTO
        again = again and METRICS_FILE not in self.files.content()
        replace = bool(self.config.overwrite_output_dir) or again
        self.files.check_content(replace=replace, resume=self._resumes_here)

    def check_source(self) -> None:
        """InputError for a model to start from that this run would remove when it begins."""
        source, here = self.model_config.model_name_or_path, self.folder.resolve()
        removes = self.files.held and not self._resumes_here
        with self._listed_if_dry():
            if source and removes and Path(source).resolve().is_relative_to(here):
                raise InputError(
                    f"output_dir {str(self.folder)!r} is the folder of the model to start from, "
                    f"{source!r}, which would be lost. Choose another output_dir."
                )

    def begin(self) -> None:
        """Remove an earlier run's files and write the config: from here on the stage runs."""
        fault = None
        if self.is_main:
            try:
                self.repository = create_repository(self.config, self.kind)
                self.files.lock()
                self._check_content()  # again: models took minutes to load
                self.files.clear(resume=self._resumes_here, keep_base=self.saved_base)
                text = config_text(self.config, self.model_config)
                (self.new / CONFIG_FILE).write_text(text, encoding="utf-8")
                self.files.put_in_place()
            except (InputError, OSError) as error:
                told = f"output_dir {str(self.folder)!r}: {error}. Choose another."
                fault = str(error) if isinstance(error, InputError) else told
        [fault] = broadcast_object_list([fault])  # all processes end, or none
        if fault:
            raise InputError(fault)
        self.begun = True

    def save_base(self, model: Model, tokenizer: Tokenizer) -> Path:
        """Save a base model that exists only in memory; its folder, which a new adapter names."""
        if self.is_main:
            self.files.lock()
            for part in (model, tokenizer):
                part.save_pretrained(self.new / BASE)
            known = adapters.fingerprint(self.folder / BASE)
            if self._resumes_here and known not in (None, adapters.fingerprint(self.new / BASE)):
                raise InputError(
                    f"The model is not the one in {str(self.folder / BASE)!r}, over which the run "
                    "to resume trains its adapter. Give the same."
                )
            self.files.put_in_place()
        self.saved_base = True
        PartialState().wait_for_everyone()
        return self.folder / BASE

    def new_trainer(
        self, kind: Any, model: Model, *, task: Any = adapters.POLICY, **given: Any
    ) -> Any:
        """A trainer, over a new adapter if options ask for one; what trains stays float32."""
        adapter = adapters.new_adapter_config(model, self.model_config, task)
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        args = without_secrets(self.config)
        with option_errors():
            trainer = kind(model=model, args=args, peft_config=adapter, **given)
        adapters.keep_float32(trainer.model, trained)
        return trainer

    def release(self) -> None:
        """Remove what a failed stage left in a new folder, unless there is something to keep."""
        if not self.files.lock_file.is_locked:
            return
        if not self.begun:
            shutil.rmtree(self.new, ignore_errors=True)
        kept = {*self.files.content()} - {CONFIG_FILE, BASE, MANIFEST_FILE}
        if not (self.files.held or kept or self.files.incoming()):
            self.files.remove()
            (self.folder / MANIFEST_FILE).unlink(missing_ok=True)

    def say(self, message: str) -> None:
        """Print a line for the user, from the main process."""
        if self.is_main:
            say(f"{self.name}: {message}")

    def train(self, trainer: Trainer, labels: dict[str, str]) -> TrainOutput:
        """Train or resume; on SIGTERM save, exit with 143. `labels`: the bar's -> key in logs."""
        check_saving(trainer.accelerator)
        if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:  # it keeps float32
            adapters.check_trains_in_float32(trainer.model)
        rows, batch = trainer.train_dataset, self.config.train_batch_size * self.config.world_size
        if self.config.dataloader_drop_last and isinstance(rows, Sized) and len(rows) < batch:
            raise InputError(
                f"dataloader_drop_last drops all of the {len(rows)} training rows: a batch has "
                f"{batch}. Give more rows, a smaller per_device_train_batch_size, or leave it out."
            )
        if plan := plan_of(trainer):
            self.say(plan)
        if isinstance(trainer, resuming.ResumableTrainer):  # TRL's PPOTrainer has one by now
            trainer.check_optimizer()
        if self.dry or self._had_ended(trainer):
            raise StageEnd
        self.begin()
        if not self.config.disable_tqdm:
            # One bar with the named metrics instead of a printed dict per log.
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(ProgressBar(self.name, labels))
        # TRL's would write a draft of one over the folder's README.md at each checkpoint.
        vars(trainer)["create_model_card"] = lambda *_, **__: None
        trainer.stage_options = {"stage": self.name, **asdict(self.model_config)}
        interruption = Interruption()
        trainer.add_callback(interruption)
        self.ends = hold_trackers(trainer)
        with interruption.listening(), self._loading(interruption):
            output = trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
        self.started -= getattr(trainer, "seconds_before", 0.0)
        if interruption.requested:
            self.say(
                f"stopped by SIGTERM after step {output.global_step} of {trainer.state.max_steps}; "
                "resume_from_checkpoint=True continues from there"
            )
            raise SystemExit(128 + signal.SIGTERM)
        check_weights(trainer)
        return output

    @contextlib.contextmanager
    def _loading(self, progress: Interruption) -> Iterator[None]:
        """Turn an error before the first step into an `InputError`: of options, or a checkpoint."""
        try:
            yield
        except (RuntimeError, OSError, *NOT_AS_EXPECTED) as error:
            begun = progress.begun or isinstance(error, InputError)
            if begun or not (self.checkpoint or isinstance(error, ValueError | ArithmeticError)):
                raise
            told = "These options cannot be used"
            if self.checkpoint:
                told = (
                    f"The checkpoint {str(self.checkpoint)!r} does not fit this run, which needs "
                    "the model and options of the run that wrote it"
                )
            raise InputError(f"{told}: {summary(error)}") from error

    def save_model(self, trainer: Trainer) -> None:
        """Save model and tokenizer among the new files; all processes call it."""
        trainer.save_model(str(self.new))
        # config.yaml holds the arguments as text; the pickled ones are of no use.
        if self.is_main:
            (self.new / "training_args.bin").unlink(missing_ok=True)

    def finish(self, trainer: Trainer, metrics: dict[str, Any]) -> StageResult:
        """Save model, tokenizer, log history, model card and, last, the metrics."""
        parts = {"model": trainer.model, "processing_class": trainer.processing_class}
        for end in self.ends:
            end(trainer.args, trainer.state, trainer.control, **parts)
        self.save_model(trainer)
        if self.is_main:
            if self.config.merge_adapter and adapters.is_adapter(self.new):
                merge_in_place(self.new, self.model_config)
            if adapters.is_adapter(self.new):
                adapters.Adapter.read(self.new).keep_fingerprint()
            trainer.state.save_to_json(str(self.new / TRAINER_STATE_NAME))
            name, base = self.repository or self.folder.name, self.model_config.model_name_or_path
            card = model_card(self.new, name, self.name, self.config, base, metrics)
            card.save(self.new / "README.md")
            kept = {CONFIG_FILE, *self.files.incoming()}
            self.files.remove(unless=kept | ({BASE} if adapters.is_adapter(self.new) else set()))
        return self.write_metrics(metrics)

    def write_metrics(self, metrics: dict[str, Any]) -> StageResult:
        """Write the stage's last file: its name, metrics and seconds. Then publish the folder."""
        seconds = round(time.perf_counter() - self.started, 1)
        metrics = {"stage": self.name, **metrics, "seconds": seconds}
        if self.is_main:
            write_json(self.new / METRICS_FILE, metrics)
            self.files.put_in_place()
            if self.repository is not None:
                publish(self.folder, self.config, self.repository, self.kind)
        PartialState().wait_for_everyone()
        return StageResult(self.folder, metrics)


def starting_point(
    run: StageRun, model: ModelSource, processing_class: Tokenizer | None
) -> tuple[ModelSource, Tokenizer]:
    """The source of the model to train, and its tokenizer; the run's config names the model."""
    model_config = run.model_config
    model_config.model_name_or_path = model_name(model)
    run.check_source()
    if isinstance(model, str | os.PathLike):
        check_finished(Path(model))
    given = {role: getattr(run.config, role, None) for role in ("eos_token", "pad_token")}
    special_tokens = {role: token for role, token in given.items() if token is not None}
    tokenizer = tokenizers.load_tokenizer(
        model,
        processing_class,
        revision=model_config.model_revision,
        trust_remote_code=run.config.trust_remote_code,
        special_tokens=special_tokens,
    )
    template = getattr(run.config, "chat_template_path", None)
    if template is not None:
        tokenizers.install_chat_template(tokenizer, template)
    if needs_base(model, model_config):
        return run.save_base(model, tokenizer), tokenizer
    return model, tokenizer


def fit_together(config: SFTConfig | RewardConfig, model: Model, tokenizer: Tokenizer) -> None:
    """Limit max_length to the model's context; InputError if the tokenizer is another model's."""
    context = context_length(model)
    if context is not None and config.max_length is not None:
        config.max_length = min(config.max_length, context)
    tokenizers.check_vocabulary(tokenizer, model)
