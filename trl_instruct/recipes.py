"""The three calls: load -> train -> save. recipes/*.py, make and Python users run this code."""

import copy
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl import ModelConfig, RewardTrainer, SFTTrainer

from trl_instruct.configs import Config, PPOConfig, RewardConfig, SFTConfig, resolve
from trl_instruct.data import load_demonstrations, load_prompts
from trl_instruct.errors import InputError
from trl_instruct.evaluation import pair_accuracy
from trl_instruct.models import (
    ModelSource,
    check_finished,
    check_tokenizer,
    context_length,
    load_policy,
    load_reward_model,
    load_tokenizer,
    merged_base,
    model_name,
    peft_config_of,
    score_head,
    with_lora,
)
from trl_instruct.pairs import load_pairs, rankings_to_pairs, split_by_prompt
from trl_instruct.ppo_trainer import PPOTrainer
from trl_instruct.pretraining import name_of, tiny_base
from trl_instruct.quiet import silence_harmless_warnings
from trl_instruct.rankings import load_rankings
from trl_instruct.rewards import RewardFunction, RewardModel
from trl_instruct.sources import load_records
from trl_instruct.stage import StageResult, stage
from trl_instruct.tiny import accuracy_ceiling, gold_score

TINY = "tiny"


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
        The folder, with metrics train_loss, eval_loss (where asked for), truncated, seconds.

    Raises:
        InputError: bad records, a prompt longer than the context, no model there, a tokenizer
            without EOS, an unknown option, an output_dir that is taken.
    """
    config, model_config = _options(SFTConfig, config, model_config, output_dir, dataset, options)
    demonstrations = load_demonstrations(dataset, config.dataset_train_split)
    held_out = eval_dataset if eval_dataset is not None else config.eval_dataset_name
    if held_out is not None:
        held_out = load_demonstrations(held_out)
    if isinstance(model, str) and model == TINY and config.output_dir:
        model = tiny_base(Path(config.output_dir).parent / "base", seed=config.seed)
    tokenizer = _tokenizer(model, processing_class, config, model_config)
    set_seed(config.seed)
    with stage("sft", config, _named(model_config, model)) as run:
        base = merged_base(model, run.folder / "base", model_config)
        policy = load_policy(base, model_config, trust_remote_code=config.trust_remote_code)
        config.max_length = _within_context(config.max_length, policy)
        truncated = _check_demonstrations(demonstrations, tokenizer, config)
        trainer = SFTTrainer(
            model=policy,
            args=config,
            train_dataset=demonstrations,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=peft_config_of(model_config),
            callbacks=callbacks,
        )
        run.show_progress(trainer, {"loss": "loss"})
        output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        metrics = {"train_loss": output.training_loss, "truncated": truncated}
        if held_out is not None:
            metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
        return run.finish(trainer, metrics)


def rm(
    model: ModelSource,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    eval_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    config: RewardConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StageResult:
    """Stage 2: train a reward model from rankings (InstructGPT 3.5, C.2).

    All C(K,2) pairs of each ranking, ties dropped, through TRL's `RewardTrainer`.

    Args:
        model: usually the SFT result; its unembedding is replaced by a scalar head.
        dataset: rankings (`prompt`, `responses` and `ranks` or `scores`, or best first), or pairs
            (`prompt`, `chosen`, `rejected`); named as in `sft`.
        output_dir: folder for the reward model.
        eval_dataset: rankings or pairs to measure the accuracy on; default: `eval_size` of the
            prompts, held out.
        processing_class, config, model_config, callbacks, options: as in `sft`.

    Returns:
        The folder, with metrics train_loss, pairs, accuracy with its 95 % interval (accuracy_low,
        accuracy_high), ceiling (where the held-out rankings hold gold_scores), overlong, seconds.

    Raises:
        InputError: as `sft`; also a ranking with fewer than two responses, no pair at all.
    """
    config, model_config = _options(
        RewardConfig, config, model_config, output_dir, dataset, options
    )
    train, held_out, ceiling = _preferences(dataset, eval_dataset, config)
    tokenizer = _tokenizer(model, processing_class, config, model_config)
    set_seed(config.seed)
    with stage("rm", config, _named(model_config, model)) as run:
        base = merged_base(model, run.folder / "base", model_config)
        classifier = load_reward_model(
            base, model_config, fresh_head=True, trust_remote_code=config.trust_remote_code
        )
        config.max_length = _within_context(config.max_length, classifier)
        trainer = RewardTrainer(
            model=classifier,
            args=config,
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=peft_config_of(model_config, "SEQ_CLS"),
            callbacks=callbacks,
        )
        overlong = len(train) - len(trainer.train_dataset)
        if overlong == len(train):
            raise InputError(
                f"All {len(train)} pairs are longer than max_length {config.max_length} tokens; "
                "raise it."
            )
        if overlong:
            run.say(f"{overlong} of {len(train)} pairs exceed max_length and are left out")
        run.show_progress(trainer, {"loss": "loss", "accuracy": "accuracy"})
        output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        metrics = {"train_loss": output.training_loss, "pairs": len(train), "overlong": overlong}
        if held_out is not None:
            accuracy = pair_accuracy(RewardModel(trainer.model, tokenizer), held_out)
            metrics |= {
                "accuracy": accuracy.mean,
                "accuracy_low": accuracy.low,
                "accuracy_high": accuracy.high,
                "eval_pairs": len(held_out),
                **({"ceiling": ceiling} if ceiling is not None else {}),
            }
        return run.finish(trainer, metrics)


def ppo(
    model: ModelSource,
    reward: ModelSource | RewardFunction,
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
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
        reward: a reward model (folder, Hub id, loaded model, result of `rm`), `"tiny"`, or a
            function `f(prompts, completions, **columns) -> list[float]`.
        dataset: prompts (`prompt`; further columns reach the reward); named as in `sft`.
        output_dir: folder for the policy.
        value_model: what the value function starts from; default: the reward model where it has
            the policy's tokenizer, else the policy with a head of zeros.
        processing_class, config, model_config, callbacks, options: as in `sft`, with `PPOConfig`.

    Returns:
        The folder, with the last iteration's metrics, cut_prompts and seconds.

    Raises:
        InputError: as `sft`; also a reward that returns anything but one finite number per
            completion.
    """
    config, model_config = _options(PPOConfig, config, model_config, output_dir, dataset, options)
    prompts = load_prompts(dataset, config.dataset_train_split)
    tokenizer = _tokenizer(model, processing_class, config, model_config)
    set_seed(config.seed)
    with stage("ppo", config, _named(model_config, model)) as run:
        base = merged_base(model, run.folder / "base", model_config)
        policy = load_policy(base, model_config, trust_remote_code=config.trust_remote_code)
        reward_function = load_reward(reward, batch_size=config.local_rollout_forward_batch_size)
        value = _value_model(value_model, reward_function, policy, tokenizer)
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=with_lora(policy, model_config),
            ref_model=None,
            reward_model=reward_function,
            train_dataset=prompts,
            value_model=value,
            callbacks=callbacks,
        )
        if trainer.cut_prompts:
            run.say(f"{trainer.cut_prompts} of {len(prompts)} prompts were cut from the left")
        labels = {"score": "objective/scores", "kl": "objective/kl", "length": "objective/length"}
        run.show_progress(trainer, labels)
        output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        return run.finish(trainer, {**output.metrics, "cut_prompts": trainer.cut_prompts})


def load_reward(reward: ModelSource | RewardFunction, *, batch_size: int = 64) -> RewardFunction:
    """A reward function from whatever `ppo` accepts as one."""
    if isinstance(reward, str) and reward == TINY:
        return gold_score
    if callable(reward) and not isinstance(reward, PreTrainedModel):
        return reward
    model = load_reward_model(reward, ModelConfig())
    score_head(model)
    return RewardModel(model, load_tokenizer(reward), batch_size=batch_size)


def _options(
    config_class: type[Config],
    config: Config | None,
    model_config: ModelConfig | None,
    output_dir: str | os.PathLike | None,
    dataset: Any,
    options: dict[str, Any],
) -> tuple[Config, ModelConfig]:
    silence_harmless_warnings()
    if output_dir is not None and config is None:
        options = {**options, "output_dir": os.fspath(output_dir)}
    config, model_config = resolve(config_class, config, model_config, options)
    if output_dir is not None:
        config.output_dir = os.fspath(output_dir)
    config.dataset_name = name_of(dataset) or config.dataset_name
    return config, model_config


def _named(model_config: ModelConfig, model: ModelSource) -> ModelConfig:
    """The model's name stands in config.yaml, however the model was given."""
    model_config.model_name_or_path = model_name(model)
    return model_config


def _tokenizer(
    model: ModelSource,
    processing_class: PreTrainedTokenizerBase | None,
    config: Any,
    model_config: ModelConfig,
) -> PreTrainedTokenizerBase:
    if processing_class is not None:
        return check_tokenizer(processing_class, model_name(model))
    if model is None:
        raise InputError("No model was given: set model_name_or_path to a Hub id or a folder.")
    if isinstance(model, str | os.PathLike):
        check_finished(Path(model))
    return load_tokenizer(
        model,
        revision=model_config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )


def _within_context(max_length: int | None, model: PreTrainedModel) -> int | None:
    context = context_length(model)
    if context is None or max_length is None:
        return max_length
    return min(max_length, context)


def _check_demonstrations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> int:
    """Demonstrations that max_length will cut; InputError where nothing but prompt is left."""
    if config.max_length is None:
        return 0
    cut = 0
    for row, record in enumerate(dataset):
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            whole, opening = tokenizer(prompt + completion), tokenizer(prompt)
        else:
            if tokenizer.chat_template is None and config.chat_template_path is None:
                raise InputError(
                    "The demonstrations are messages, but the tokenizer has no chat template. "
                    "Set chat_template_path to a Jinja file or to a model that has one."
                )
            if config.chat_template_path is not None:
                return 0  # TRL installs the template later, so lengths are not known yet
            whole = tokenizer.apply_chat_template(prompt + completion, return_dict=True)
            opening = tokenizer.apply_chat_template(prompt, return_dict=True)
        if len(opening["input_ids"]) >= config.max_length:
            raise InputError(
                f"Demonstration {row + 1}: the prompt alone is {len(opening['input_ids'])} tokens "
                f"and max_length is {config.max_length}, so no completion would be learnt from. "
                "Raise max_length (the model's context is its limit), or shorten the prompt."
            )
        cut += len(whole["input_ids"]) > config.max_length
    return cut


def _preferences(
    dataset: Any, eval_dataset: Any, config: RewardConfig
) -> tuple[Dataset, Dataset | None, float | None]:
    """Training pairs, held-out pairs, and the noise ceiling of the latter where it is known."""
    held_out = eval_dataset if eval_dataset is not None else config.eval_dataset_name
    records = load_records(dataset, config.dataset_train_split)
    if held_out is not None:
        train, test = records, load_records(held_out)
    elif config.eval_size:
        train, test = split_by_prompt(records, config.eval_size, seed=config.seed)
    else:
        return _pairs(records), None, None
    ceiling = None
    if "gold_scores" in test.column_names:
        ceiling = accuracy_ceiling(test["gold_scores"][:], test["scores"][:])
    return _pairs(train), _pairs(test), ceiling


def _pairs(records: Dataset) -> Dataset:
    if "responses" in records.column_names:
        return rankings_to_pairs(load_rankings(records))
    if "chosen" in records.column_names:
        return load_pairs(records)
    raise InputError(
        f"The reward model needs rankings (prompt, responses, and ranks or scores) or pairs "
        f"(prompt, chosen, rejected); the columns are {', '.join(records.column_names)}."
    )


def _value_model(
    source: ModelSource | None,
    reward: RewardFunction,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The value function's start: the given model, the reward model, or the policy."""
    if source is not None:
        return load_reward_model(source, ModelConfig())
    if isinstance(reward, RewardModel) and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        return copy.deepcopy(reward.model).requires_grad_(True)
    value = load_reward_model(policy, ModelConfig())
    score_head(value).weight.data.zero_()
    return value
