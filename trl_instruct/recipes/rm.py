"""Stage 2, the reward model: load -> train -> measure -> save."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from trl import ModelConfig

from trl_instruct.configs import RewardConfig
from trl_instruct.data import preferences
from trl_instruct.data.pairs import bootstrap
from trl_instruct.data.records import form_of
from trl_instruct.data.rendering import Rendered, render_all
from trl_instruct.data.sources import Record, iterate
from trl_instruct.errors import InputError
from trl_instruct.models.adapters import CLASSIFIER
from trl_instruct.models.load import load_reward_model
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.sharding import gathered_weights
from trl_instruct.recipes import stage
from trl_instruct.recipes.chain import remember_reading
from trl_instruct.recipes.dry_run import tell_lengths, tell_records
from trl_instruct.recipes.members import MEMBERS_APART, train_members
from trl_instruct.recipes.memory import Work, memory_table
from trl_instruct.recipes.options import data_of, held_out_of, named_source, stage_options
from trl_instruct.reward_trainer.evaluation import evaluate_reward, numbered
from trl_instruct.reward_trainer.labelers import reliability
from trl_instruct.reward_trainer.tables import FIGURE, plot, render
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import save_beside_adapter
from trl_instruct.types import Tokenizer


def rm(
    model: ModelSource,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    eval_dataset: Any = None,
    demonstrations: Any = None,
    processing_class: Tokenizer | None = None,
    config: RewardConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> stage.StageResult:
    """Stage 2: train a reward model from rankings (InstructGPT 3.5, C.2).

    All C(K,2) comparisons of a ranking, ties dropped, are one batch element. With `members` there
    are several models, in folders below output_dir (see `train_members`).

    Args:
        model: usually the SFT result; its unembedding is replaced by a scalar head.
        dataset: rankings (`prompt`, `responses` and `ranks` or `scores`, or best first), or pairs
            (`prompt`, `chosen`, `rejected`); named as in `sft`.
        eval_dataset: rankings or pairs for the accuracy; default: `eval_size` of the prompts.
        demonstrations: records (as in `sft`) that are to score 0 on average: the model's config
            keeps their mean score as its shift. None: no shift.
        processing_class, config, model_config, callbacks, options: as in `sft`.

    Returns:
        The folder, with metrics train_loss, pairs (trained on), overlong, truncated, data (counts
        of ties, repeated responses, ...), shift and std of the demonstrations' scores, those of
        `evaluate_reward` (accuracy, calibration, ...), labelers (their `reliability` on all
        rankings), train_accuracy (on as many of the training rankings) and seconds; and their
        figure, rm.png.

    Raises:
        InputError: as `sft`; also a ranking with fewer than two responses, or no pair at all.
    """
    config, model_config = stage_options(
        RewardConfig, config, model_config, output_dir, dataset, options
    )
    known, metric = ("accuracy", "loss", "margin"), config.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise InputError(
            f"metric_for_best_model is {metric!r}; rm measures {', '.join(known)} while it trains."
        )
    remember_reading(config, model)
    test = held_out_of(dataset, eval_dataset, config)

    def load(tokenizer: Tokenizer) -> preferences.Preferences:
        return preferences.load_preferences(
            data_of(dataset, config),
            test and test[0],
            named_source(demonstrations, config, "demonstrations_name"),
            config,
            fits=partial(_check_rendering, tokenizer=tokenizer),
        )

    if config.members > 1:
        given: Any = {"eval_dataset": eval_dataset, "demonstrations": demonstrations}
        given |= {"processing_class": processing_class, "callbacks": callbacks}
        train = partial(rm, model, dataset, model_config=model_config, **given)
        return train_members(train, load, model, config)
    with stage.run_stage("rm", config, model_config) as run:
        return _train(run, model, processing_class, load, callbacks)
    return run.earlier()


def _train(
    run: stage.StageRun,
    model: ModelSource,
    processing_class: Tokenizer | None,
    load: Callable[[Tokenizer], preferences.Preferences],
    callbacks: list[TrainerCallback] | None,
) -> stage.StageResult:
    """One reward model: started, trained, saved, measured. `load` reads the preferences."""
    config = run.config
    base, tokenizer = stage.starting_point(run, model, processing_class)
    data = load(tokenizer)
    run.say(str(data.counts))
    if config.eval_strategy != "no" and data.held_out is None:
        raise InputError(
            f"eval_strategy is {config.eval_strategy.value!r}, but nothing is held out. Set "
            "eval_size, or give an eval_dataset_name."
        )
    trust: Any = {"trust_remote_code": config.trust_remote_code}
    if config.member is not None:
        own_seed = config.seed + MEMBERS_APART * config.member
        data = data._replace(train=bootstrap(data.train, own_seed))
        set_seed(own_seed)  # of the head
    classifier = load_reward_model(base, run.model_config, fresh_head=True, **trust)
    stage.fit_together(config, classifier, tokenizer)
    if config.early_stopping_patience is not None:
        callbacks = [*(callbacks or ()), EarlyStoppingCallback(config.early_stopping_patience)]
    trainer = run.new_trainer(
        RankingRewardTrainer,
        classifier,
        task=CLASSIFIER,
        train_dataset=data.train,
        eval_dataset=data.held_out if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    _tell_before(run, trainer, data)
    if run.dry:
        _tell(run, data, tokenizer)
    output = run.train(trainer, {"loss": "loss", "accuracy": "accuracy"})
    run.save_model(trainer)
    if run.is_main:
        run.files.put_in_place()  # a failure to measure it does not lose it
    metrics = {
        "train_loss": output.training_loss,
        "pairs": preferences.count_pairs(data.train),
        "overlong": trainer.overlong,
        "truncated": trainer.truncated,
        "data": asdict(data.counts),
        "format": form_of(data.train[0]),
    }
    with gathered_weights(trainer.accelerator, trainer.model_wrapped):
        metrics |= _measure(run, RewardModel(trainer.model, tokenizer, shared=True), data)
    result = run.finish(trainer, metrics)
    if data.held_out is not None or data.demonstrations is not None:
        run.say(render(metrics, run.folder / FIGURE))
    return result


def _check_rendering(record: Record, *, tokenizer: Tokenizer) -> None:
    """InputError for a record, of any kind, that the chat template refuses, or that lacks one."""
    if isinstance(record["prompt"], str):
        return
    names = [name for name in ("completion", "chosen", "rejected") if name in record]
    replies = record["responses"] if "responses" in record else [record[name] for name in names]
    render_all(record["prompt"], replies, tokenizer, record)


def _tell(run: stage.StageRun, data: preferences.Preferences, tokenizer: Tokenizer) -> None:
    """Show the first response of the first rankings, and the lengths of all."""

    def rendered(record: Record) -> list[Rendered]:
        return render_all(record["prompt"], record["responses"], tokenizer, record)

    rankings = preferences.as_rankings(data.train)
    tell_records(run, (rendered(record)[0] for record in rankings), tokenizer)
    lengths = [len(row.ids) for record in iterate(rankings) for row in rendered(record)]
    tell_lengths(run, "prompts with responses", lengths, run.config.max_length)


def _tell_before(
    run: stage.StageRun, trainer: RankingRewardTrainer, data: preferences.Preferences
) -> None:
    """Tell how much was too long, and of memory; InputError if nothing else is left."""
    config, ranked = run.config, "ranks" in data.train.column_names  # else pairs
    if not len(trainer.train_dataset):
        raise InputError(
            f"All pairs of responses are longer than max_length, {config.max_length} tokens; "
            "raise it (up to the model's context), or set truncate_prompt."
        )
    if trainer.overlong:
        what = "responses" if ranked else "pairs"
        run.say(f"{trainer.overlong} {what} exceed max_length and are left out")
    if trainer.truncated:
        run.say(f"{trainer.truncated} prompts lose their beginning to fit into max_length")
    most = max(map(len, iterate(data.train, "ranks"))) if ranked else 2
    rows = config.per_device_train_batch_size * most
    batch = Work(rows, config.max_length or 0, predicted=0)
    run.say(memory_table({"reward model": trainer.model}, [batch], config))


def _measure(
    run: stage.StageRun, reward: RewardModel, data: preferences.Preferences
) -> dict[str, Any]:
    """Shift and held-out evaluation of the trained model; the figure goes into the folder."""
    metrics: dict[str, Any] = {}
    if data.demonstrations is not None:
        shown = data.demonstrations[:]
        shift, std = reward.measure_shift(shown.pop("prompt"), shown.pop("completion"), **shown)
        metrics |= {"shift": shift, "std": std, "demonstrations": len(data.demonstrations)}
        if isinstance(reward.model, PeftModel) and run.is_main:
            save_beside_adapter(reward.model, run.new)
    if data.held_out is not None:
        evaluation = evaluate_reward(reward, data.held_out, reward.tokenizer)
        both = preferences.as_rankings(data.train), data.held_out
        named = any("labeler" in rankings.column_names for rankings in both)
        labelers = reliability(numbered(*both).rankings) if named else {}
        metrics |= {**evaluation.metrics, "labelers": labelers}
        metrics["train_accuracy"] = _train_accuracy(run, reward, data)
        if run.is_main:
            plot(evaluation, run.new / FIGURE)
    if reward.truncated:
        run.say(f"{reward.truncated} measured texts exceed the context; their beginning is cut")
    return metrics


def _train_accuracy(
    run: stage.StageRun, reward: RewardModel, data: preferences.Preferences
) -> float:
    """Accuracy on as many training rankings as are held out; it exceeds theirs by what the model
    has memorised. NaN if none of the rankings has a winner."""
    assert data.held_out is not None
    shown = data.train.shuffle(seed=run.config.seed)
    shown = preferences.as_rankings(shown.select(range(min(len(shown), len(data.held_out)))))
    if not preferences.count_pairs(shown):
        return math.nan
    return evaluate_reward(reward, shown, reward.tokenizer).metrics["accuracy"]
