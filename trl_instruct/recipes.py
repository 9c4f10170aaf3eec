"""The three calls: load -> train -> save. recipes/*.py, make and Python users run this code."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig, SFTTrainer

from trl_instruct import ppo_report
from trl_instruct.adapters import (
    CLASSIFIER,
    keep_float32,
    new_adapter_config,
    trained_weights,
)
from trl_instruct.configs import PPOConfig, RewardConfig, SFTConfig
from trl_instruct.data import load_demonstrations, load_prompts, load_texts, openings
from trl_instruct.errors import InputError
from trl_instruct.memory import Work, memory_table
from trl_instruct.models import ModelSource, context_length, load_policy, load_reward_model
from trl_instruct.ppo_trainer import PPOTrainer
from trl_instruct.preferences import (
    Preferences,
    as_rankings,
    count_pairs,
    load_preferences,
    most_responses,
)
from trl_instruct.preparation import (
    check_chat_template,
    check_demonstrations,
    named_source,
    stage_options,
    starting_point,
    within_context,
)
from trl_instruct.pretraining import tiny_base
from trl_instruct.reward_evaluation import evaluate_reward, pair_accuracy
from trl_instruct.reward_function import RewardFunction, parts_of
from trl_instruct.reward_report import FIGURE, draw, render
from trl_instruct.reward_trainer import RankingRewardTrainer
from trl_instruct.rewards import TINY, Reward, RewardModel, load_reward
from trl_instruct.roles import Roles, load_roles
from trl_instruct.rollout_scores import reward_counts
from trl_instruct.sampling import unused_sampling
from trl_instruct.shift import save_beside_adapter
from trl_instruct.sources import name_of
from trl_instruct.stage import Stage, StageResult, stage
from trl_instruct.tokenizers import check_vocabulary
from trl_instruct.upstream_ppo import upstream_trainer


def sft(
    model: ModelSource,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    config: SFTConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StageResult:
    """Stage 1: fine-tune a language model on demonstrations (InstructGPT 3.5, C.1).

    The loss counts the completion's tokens only.

    Args:
        model: a Hub id, a folder, a loaded model, or `"tiny"`, the embedded base model, which is
            made beside output_dir where it is missing.
        dataset: demonstrations (`prompt`, `completion`; text or messages): a Hub id, a local
            json / jsonl(.gz) / csv / parquet, `"tiny:demonstrations"`, or a `datasets.Dataset`.
        output_dir: folder for the policy.
        eval_dataset: demonstrations to measure the loss on.
        processing_class: the tokenizer, where it does not lie beside the model.
        config, model_config: `SFTConfig` and TRL's `ModelConfig`; or their fields as `options`.
        callbacks: as in `transformers.Trainer`.

    Returns:
        The folder, with metrics train_loss, truncated, seconds; and where there are held-out
        demonstrations eval_loss and, the same before training, base_loss.

    Raises:
        InputError: bad records, a prompt longer than the context, no model there, a tokenizer
            without EOS, an unknown option, an output_dir that is taken.
    """
    config, model_config = stage_options(
        SFTConfig, config, model_config, output_dir, dataset, options
    )
    demonstrations = load_demonstrations(dataset, config.dataset_train_split)
    held_out = named_source(eval_dataset, config)
    if held_out is not None:
        held_out = load_demonstrations(held_out, config.eval_dataset_split)
    if isinstance(model, str) and model == TINY:
        Stage("sft", config, model_config).check_folder()
        model = tiny_base(Path(config.output_dir).parent / "base", seed=config.seed)
    with stage("sft", config, model_config) as run:
        base, tokenizer = starting_point(run, model, processing_class)
        policy = load_policy(base, model_config, trust_remote_code=config.trust_remote_code)
        config.max_length = within_context(config.max_length, policy)
        config.eval_on_start = config.eval_on_start or held_out is not None
        truncated = check_demonstrations(demonstrations, tokenizer, config)
        if truncated:
            run.say(f"{truncated} of {len(demonstrations)} demonstrations are cut at max_length")
        check_vocabulary(tokenizer, policy)
        trained = trained_weights(policy)
        trainer = SFTTrainer(
            model=policy,
            args=config,
            train_dataset=demonstrations,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=new_adapter_config(policy, model_config),
            callbacks=callbacks,
        )
        keep_float32(trainer.model, trained)
        length = config.max_length or context_length(policy) or 0
        batch = Work(config.per_device_train_batch_size, length, predicted=length)
        run.say(memory_table({"policy": trainer.model}, [batch], config))
        output = run.train(trainer, {"loss": "loss"})
        metrics = {"train_loss": output.training_loss, "truncated": truncated}
        if held_out is not None:
            logs = trainer.state.log_history  # of a resumed run, too, from its start
            metrics["base_loss"] = next(log["eval_loss"] for log in logs if "eval_loss" in log)
            metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
        return run.finish(trainer, metrics)


def rm(
    model: ModelSource,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    eval_dataset: Any = None,
    demonstrations: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    config: RewardConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StageResult:
    """Stage 2: train a reward model from rankings (InstructGPT 3.5, C.2).

    All C(K,2) comparisons of a ranking, ties dropped, are one batch element.

    Args:
        model: usually the SFT result; its unembedding is replaced by a scalar head.
        dataset: rankings (`prompt`, `responses` and `ranks` or `scores`, or best first), or pairs
            (`prompt`, `chosen`, `rejected`); named as in `sft`.
        output_dir: folder for the reward model.
        eval_dataset: rankings or pairs to measure the accuracy on; default: `eval_size` of the
            prompts, held out.
        demonstrations: what scores 0 on average (`prompt`, `completion`, as in `sft`): their mean
            score is kept in the model's config as its shift. None: no shift.
        processing_class, config, model_config, callbacks, options: as in `sft`.

    Returns:
        The folder, with metrics train_loss, pairs (trained on), overlong, truncated, data (what the
        rankings hold: ties, repeated responses, ...), shift and std of the demonstrations' scores,
        those of `evaluate_reward` (accuracy, calibration, ...), train_accuracy (the same on as many
        rankings it was trained on), seconds; and their figure, rm.png.

    Raises:
        InputError: as `sft`; also a ranking with fewer than two responses, no pair at all.
    """
    config, model_config = stage_options(
        RewardConfig, config, model_config, output_dir, dataset, options
    )
    data = load_preferences(
        dataset,
        named_source(eval_dataset, config),
        named_source(demonstrations, config, "demonstrations_name"),
        config,
    )
    with stage("rm", config, model_config) as run:
        run.say(str(data.report))
        base, tokenizer = starting_point(run, model, processing_class)
        check_chat_template(data.train, tokenizer, config)
        classifier = load_reward_model(
            base, model_config, fresh_head=True, trust_remote_code=config.trust_remote_code
        )
        config.max_length = within_context(config.max_length, classifier)
        check_vocabulary(tokenizer, classifier)
        trained = trained_weights(classifier)
        trainer = RankingRewardTrainer(
            model=classifier,
            args=config,
            train_dataset=data.train,
            processing_class=tokenizer,
            peft_config=new_adapter_config(classifier, model_config, CLASSIFIER),
            callbacks=callbacks,
        )
        keep_float32(trainer.model, trained)
        _check_overlong(trainer, run)
        rows = config.per_device_train_batch_size * most_responses(data.train)
        batch = Work(rows, config.max_length or 0, predicted=0)
        run.say(memory_table({"reward model": trainer.model}, [batch], config))
        output = run.train(trainer, {"loss": "loss", "accuracy": "accuracy"})
        metrics = {
            "train_loss": output.training_loss,
            "pairs": count_pairs(data.train),
            "overlong": trainer.overlong,
            "truncated": trainer.truncated,
            "data": asdict(data.report),
            **_measure(run, RewardModel(trainer.model, tokenizer), data),
        }
        result = run.finish(trainer, metrics)
        if data.held_out is not None or data.demonstrations is not None:
            run.say(render(metrics, run.folder / FIGURE))
        return result


def ppo(
    model: ModelSource,
    reward: Reward,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    ptx_dataset: Any = None,
    value_model: ModelSource | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    config: PPOConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StageResult:
    """Stage 3: optimise the policy against the reward (InstructGPT 3.5, C.4).

    Args:
        model: the SFT result; also the frozen reference of the KL penalty.
        reward: a reward model (folder, Hub id, loaded model, result of `rm`), a function
            `f(prompts, completions, **columns) -> list[float]`, an adapter, `"tiny"`, the rest of
            what `load_reward` takes, or a list of these, summed with `reward_weights`.
        dataset: prompts (`prompt`; further columns reach the reward), or with `opening_length`
            texts (`text`) whose openings they are; named as in `sft`.
        output_dir: folder for the policy.
        ptx_dataset: pretraining text (`text`) for PPO-ptx, named as in `sft`; with `ptx_coef`.
        value_model: what the value function starts from: a reward model, or `"policy"` (with a
            head of zeros); `"value_head"`: a head on the policy itself; default: the reward model
            where it has the policy's tokenizer, else the policy.
        processing_class, config, model_config, callbacks, options: as in `sft`, with `PPOConfig`.

    Returns:
        The folder, with the last iteration's metrics, cut_prompts, reward_truncated (texts that a
        reward model's context has cut) and reward_unparsable (a judge's answers without a score)
        where there are any, and seconds.

    Raises:
        InputError: as `sft`; also a reward that returns anything but one finite number per
            completion.
    """
    config, model_config = stage_options(
        PPOConfig, config, model_config, output_dir, dataset, options
    )
    trainer_class = upstream_trainer(config) if config.engine == "trl" else PPOTrainer
    config.reward_model_path = _reward_names(reward) or config.reward_model_path
    records = load_texts if config.opening_length else load_prompts
    prompts = records(dataset, config.dataset_train_split)
    texts = _pretraining_texts(ptx_dataset, config)
    with stage("ppo", config, model_config) as run:
        base, tokenizer = starting_point(run, model, processing_class)
        if config.opening_length:
            prompts = openings(prompts, tokenizer, config.opening_length)
        value = value_model or config.value_model_path
        roles = load_roles(base, reward, value, tokenizer, config, model_config)
        check_vocabulary(tokenizer, roles.policy)
        if unused := unused_sampling(roles.policy):
            told = ", ".join(f"{name} {value}" for name, value in unused.items())
            run.say(f"the model's own sampling settings are not used: {told}")
        trainer = trainer_class(
            args=config,
            processing_class=tokenizer,
            model=roles.policy,
            ref_model=roles.ref_policy,
            reward_model=roles.reward,
            train_dataset=prompts,
            value_model=roles.value,
            ptx_dataset=texts,
            gold=_gold(config, tokenizer),
            callbacks=callbacks,
        )
        if trainer.cut_prompts:
            run.say(f"{trainer.cut_prompts} of {len(prompts)} prompts were cut from the left")
        run.say(memory_table(*_roles_and_passes(roles, trainer), config))
        labels = {"score": "objective/scores", "kl": "objective/kl", "length": "objective/length"}
        output = run.train(trainer, labels)
        if run.is_main:
            ppo_report.draw(trainer.state.log_history, run.folder / ppo_report.FIGURE)
        metrics = {**output.metrics, "cut_prompts": trainer.cut_prompts}
        for name, count in reward_counts(roles.reward).items():
            if count:
                run.say(f"{count} of the texts that the reward was given were {name}")
                metrics[f"reward_{name}"] = count
        return run.finish(trainer, metrics)


def _gold(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> RewardFunction | None:
    """The judge that nothing is trained on, if there is one."""
    if config.gold is None:
        return None
    return load_reward(config.gold, tokenizer, trust_remote_code=config.trust_remote_code)


def _roles_and_passes(roles: Roles, trainer: Any) -> tuple[dict[str, nn.Module | None], list[Work]]:
    """What PPO holds, and the passes that take turns: updates and rollouts."""
    args, held = trainer.args, {"policy": roles.policy, "ref_policy": trainer.ref_model}
    held["value"] = roles.value
    judges = [getattr(part, "model", None) for part in parts_of(roles.reward)]
    for number, judge in enumerate((j for j in judges if isinstance(j, nn.Module)), start=1):
        held["reward" if number == 1 else f"reward {number}"] = judge
    length = max(map(len, trainer.prompts)) + args.response_length
    shape = {"length": length, "predicted": args.response_length}
    update = Work(args.per_device_train_batch_size, **shape, models=2)
    return held, [update, Work(args.local_rollout_forward_batch_size, **shape, backward=False)]


def _reward_names(reward: Any) -> Any:
    """How the config names the reward; None where one of them lives in memory only."""
    if not isinstance(reward, list | tuple):
        return name_of(reward)
    names = [name for part in reward if (name := name_of(part))]
    return names if len(names) == len(reward) else None


def _pretraining_texts(dataset: Any, config: PPOConfig) -> Dataset | IterableDataset | None:
    """What PPO-ptx mixes in. InputError where text was given and no weight for it."""
    config.ptx_dataset_name = name_of(dataset) or config.ptx_dataset_name
    source = config.ptx_dataset_name if dataset is None else dataset
    if source is None:
        return None
    if not config.ptx_coef:
        raise InputError(
            f"Pretraining text was given ({config.ptx_dataset_name or 'ptx_dataset'}), but "
            "ptx_coef is 0, so that it would not be used; the paper's is 27.8."
        )
    return load_texts(source, config.ptx_dataset_split, streaming=config.ptx_streaming)


def _check_overlong(trainer: RankingRewardTrainer, run: Stage) -> None:
    """Tell what the trainer left out for its length; InputError where nothing else is there."""
    if not len(trainer.train_dataset):
        raise InputError(
            "All pairs of responses are longer than max_length "
            f"{run.config.max_length} tokens; raise it (the model's context is its limit), or set "
            "truncate_prompt."
        )
    if trainer.overlong:
        what = "responses" if "ranks" in trainer.train_dataset.column_names else "pairs"
        run.say(f"{trainer.overlong} {what} exceed max_length and are left out")
    if trainer.truncated:
        run.say(f"{trainer.truncated} prompts lose their beginning to fit into max_length")


def _measure(run: Stage, reward: RewardModel, data: Preferences) -> dict[str, Any]:
    """Shift and held-out evaluation of the trained model; the figure goes into the folder."""
    metrics: dict[str, Any] = {}
    if data.demonstrations is not None:
        shown = data.demonstrations[:]
        shift, std = reward.measure_shift(shown["prompt"], shown["completion"])
        metrics |= {"shift": shift, "std": std, "demonstrations": len(data.demonstrations)}
        if isinstance(reward.model, PeftModel) and run.is_main:
            save_beside_adapter(reward.model, run.folder)
    if data.held_out is not None:
        evaluation = evaluate_reward(reward, data.held_out, reward.tokenizer)
        metrics |= {**evaluation.metrics, "train_accuracy": _train_accuracy(run, reward, data)}
        if run.is_main:
            draw(evaluation, run.folder / FIGURE)
    if reward.truncated:
        run.say(
            f"{reward.truncated} texts to measure on exceed the context; their beginning is cut"
        )
    return metrics


def _train_accuracy(run: Stage, reward: RewardModel, data: Preferences) -> float:
    """Accuracy on as many of the rankings trained on as are held out: above that by what the model
    has learnt by heart. NaN where there is no winner among them."""
    assert data.held_out is not None
    shown = data.train.shuffle(seed=run.config.seed)
    shown = as_rankings(shown.select(range(min(len(shown), len(data.held_out)))))
    return pair_accuracy(reward, shown).mean if count_pairs(shown) else math.nan
