"""Stage 1, supervised fine-tuning: load -> train -> measure -> save."""

import os
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl import ModelConfig

from trl_instruct.configs import SFTConfig
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.records import form_of, load_demonstrations
from trl_instruct.data.rendering import Rendered, render
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate, map_records
from trl_instruct.errors import InputError, located
from trl_instruct.files import METRICS_FILE
from trl_instruct.generation.sampler import eos_token_ids
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource, context_length
from trl_instruct.models.resuming import ResumableTrainer
from trl_instruct.recipes import stage
from trl_instruct.recipes.chain import remember_reading
from trl_instruct.recipes.dry_run import SHOWN, tell_lengths, tell_records
from trl_instruct.recipes.memory import Work, memory_table
from trl_instruct.recipes.options import data_of, held_out_of, stage_options
from trl_instruct.recipes.pretrain import tiny_base
from trl_instruct.rewards.load import TINY
from trl_instruct.types import Model, Tokenizer


class SFTTrainer(ResumableTrainer, trl.SFTTrainer):
    """TRL's, whose runs can be resumed."""


def sft(
    model: ModelSource,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    eval_dataset: Any = None,
    processing_class: Tokenizer | None = None,
    config: SFTConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> stage.StageResult:
    """Stage 1: fine-tune a language model on demonstrations (InstructGPT 3.5, C.1).

    The loss counts the completion's tokens only.

    Args:
        model: a Hub id, a folder, a loaded model, or `"tiny"`, the embedded base model (trained
            into a folder beside output_dir if it is missing).
        dataset: demonstrations (`prompt`, `completion`; text or messages): a Hub id, a local
            json / jsonl(.gz) / csv / parquet, `"tiny:demonstrations"`, or a `datasets.Dataset`.
        eval_dataset: demonstrations to measure the loss on.
        processing_class: the tokenizer, if it is not in the model's folder.
        config, model_config: `SFTConfig` and TRL's `ModelConfig`; or their fields as `options`.
        callbacks: as in `transformers.Trainer`.

    Returns:
        The folder, with metrics train_loss, truncated and seconds; with held-out demonstrations
        also eval_loss and base_loss, the same before training.

    Raises:
        InputError: bad records, a prompt longer than the context, a missing model, a tokenizer
            without EOS, a chat template that ends replies with another token, an unknown option, an
            output_dir that is taken.
    """
    config, model_config = stage_options(
        SFTConfig, config, model_config, output_dir, dataset, options
    )
    if config.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise InputError(
            f"metric_for_best_model is {config.metric_for_best_model!r}; sft measures the loss "
            "while it trains. Give 'loss', or leave it out."
        )
    remember_reading(config, model)
    reading = Reading.of(config)
    others, test = reading.of_another(), held_out_of(dataset, eval_dataset, config)
    source = data_of(dataset, config), config.dataset_train_split, config.dataset_streaming
    demonstrations = load_demonstrations(*source, reading=reading)
    held_out = None if test is None else load_demonstrations(*test, reading=others)
    config.eval_on_start = config.eval_on_start or held_out is not None
    if isinstance(model, str) and model == TINY:
        model = _tiny_base(stage.StageRun("sft", config, model_config))
    with stage.run_stage("sft", config, model_config) as run:
        base, tokenizer = stage.starting_point(run, model, processing_class)
        policy = load_policy(base, model_config, trust_remote_code=config.trust_remote_code)
        stage.fit_together(config, policy, tokenizer)
        form = form_of(first_record(demonstrations, Source.of(demonstrations)))
        given = tokenizer, config
        demonstrations, truncated = render_demonstrations(demonstrations, *given, reading)
        _check_ending(run, demonstrations, policy, tokenizer)
        if held_out is not None:
            held_out, _ = render_demonstrations(held_out, *given, others)
        if run.dry:
            _tell(run, demonstrations, tokenizer)
        if truncated:
            run.say(f"{truncated} of {len(demonstrations)} demonstrations are cut at max_length")
        trainer = run.new_trainer(
            SFTTrainer,
            policy,
            train_dataset=demonstrations,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        length = config.max_length or context_length(policy) or 0
        batch = Work(config.per_device_train_batch_size, length, predicted=length)
        run.say(memory_table({"policy": trainer.model}, [batch], config))
        output = run.train(trainer, {"loss": "loss"})
        metrics = {"train_loss": output.training_loss, "truncated": truncated, "format": form}
        if held_out is not None:
            logs = trainer.state.log_history  # from the start, even of a resumed run
            before = next(log["eval_loss"] for log in logs if "eval_loss" in log)
            metrics |= {"base_loss": before, "eval_loss": trainer.evaluate()["eval_loss"]}
        return run.finish(trainer, metrics)
    return run.earlier()


def _tiny_base(run: stage.StageRun) -> stage.StageResult:
    """The embedded base model, beside the stage's folder; trained if it is missing."""
    run.check_folder()
    run.files.unlock()
    folder = run.folder.parent / "base"
    if run.dry and not (folder / METRICS_FILE).is_file():
        raise InputError(f"The tiny base model is not in {folder} yet; sft trains it.")
    return tiny_base(folder, seed=run.config.seed)


def _tell(run: stage.StageRun, rendered: AnyDataset, tokenizer: Tokenizer) -> None:
    """Show the first demonstrations with their loss mask, and the lengths of all."""
    if isinstance(rendered, IterableDataset) or "input_ids" not in rendered.column_names:
        run.say("the trainer itself renders the demonstrations: they are not shown")
        return
    shown = []
    for record in rendered.select(range(min(SHOWN, len(rendered)))):
        ids, start = record["input_ids"], record["completion_mask"].index(1)
        shown.append(Rendered(ids[:start], ids[start:], None))
    tell_records(run, shown, tokenizer)
    tell_lengths(run, "demonstrations", [*map(len, rendered["input_ids"])], run.config.max_length)


def _check_ending(
    run: stage.StageRun, rendered: Dataset, policy: Model, tokenizer: Tokenizer
) -> None:
    """Refuse, or tell of, a chat template whose replies end with no EOS, as base models have."""
    first = first_record(rendered, Source.of(rendered))
    if "completion_mask" not in first:
        return  # TRL renders
    learnt = [i for i, own in zip(first["input_ids"], first["completion_mask"], strict=True) if own]
    if set(learnt) & set(eos_token_ids(policy, tokenizer)):
        return
    last = next((i for i in reversed(learnt) if tokenizer.decode([i]).strip()), None)
    if last not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        run.say(
            "the chat template ends a reply with no special token: the policy will not stop by "
            "itself, so give stop_strings wherever it generates"
        )
        return
    token = tokenizer.convert_ids_to_tokens(last)
    raise InputError(
        f"The chat template ends a reply with {token!r}, but the model's EOS token is "
        f"{tokenizer.eos_token!r}: the policy would never stop. Set eos_token to {token!r}."
    )


def render_demonstrations(
    dataset: Dataset, tokenizer: Tokenizer, config: SFTConfig, reading: Reading = AS_PUBLISHED
) -> tuple[Dataset, int]:
    """Demonstrations with the ids that SFTTrainer takes, and how many of them max_length cuts.

    TRL renders them itself for assistant_only_loss.
    """
    if config.assistant_only_loss and config.completion_only_loss is not False:
        raise InputError(
            "assistant_only_loss learns every reply of a dialogue, completion_only_loss the last "
            "one only. Set completion_only_loss=False as well, or leave assistant_only_loss out."
        )
    if config.assistant_only_loss:
        return dataset, 0

    def render_one(record: Record) -> dict[str, list[int]]:
        prompt, completion, _ = render(record["prompt"], record["completion"], tokenizer, record)
        if config.max_length is not None and len(prompt) >= config.max_length:
            raise InputError(
                f"the prompt alone is {len(prompt)} tokens and max_length is {config.max_length}, "
                "which leaves no completion to learn. Raise max_length (up to the model's "
                "context), or shorten the prompt."
            )
        mask = [0] * len(prompt) + [1] * len(completion)
        return {"input_ids": prompt + completion, "completion_mask": mask}

    def located_one(record: Record, row: int) -> dict[str, list[int]]:
        with reading.source.located(row) if reading.found else located(f"Demonstration {row + 1}"):
            return render_one(record)

    if reading.skips:
        dataset = reading.checked(dataset, render_one)
    ready = map_records(dataset, located_one, with_indices=True)
    if config.max_length is None or isinstance(ready, IterableDataset):
        return ready, 0
    return ready, sum(len(ids) > config.max_length for ids in iterate(ready, "input_ids"))
