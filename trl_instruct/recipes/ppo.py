"""Stage 3, PPO: load -> train -> save."""

import os
from collections import Counter
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from trl import ModelConfig

from trl_instruct.configs import PPOConfig
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import load_prompts, load_texts, openings, prompts_of
from trl_instruct.data.rendering import Rendered
from trl_instruct.data.sources import name_of
from trl_instruct.errors import InputError
from trl_instruct.generation.sampling import prompt_tokens, unused_sampling
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import check_vocabulary
from trl_instruct.ppo_trainer import curves
from trl_instruct.ppo_trainer.roles import Roles, load_roles
from trl_instruct.ppo_trainer.token_statistics import KERNEL_ON, TILE, TOKENS_AT_ONCE
from trl_instruct.ppo_trainer.trainer import PPOTrainer
from trl_instruct.ppo_trainer.upstream import upstream_trainer
from trl_instruct.recipes.chain import check_format, known_form, remember_reading
from trl_instruct.recipes.dry_run import fitting, tell_lengths, tell_records, tell_rewards
from trl_instruct.recipes.memory import Work, memory_table
from trl_instruct.recipes.options import data_of, named_source, option_errors, stage_options
from trl_instruct.recipes.publishing import without_secrets
from trl_instruct.recipes.stage import StageResult, StageRun, run_stage, starting_point
from trl_instruct.rewards.function import counts_of, models_of
from trl_instruct.rewards.load import Reward, load_reward
from trl_instruct.types import Tokenizer


def ppo(
    model: ModelSource,
    reward: Reward = None,
    dataset: Any = None,
    output_dir: str | os.PathLike | None = None,
    *,
    ptx_dataset: Any = None,
    value_model: ModelSource | None = None,
    processing_class: Tokenizer | None = None,
    config: PPOConfig | None = None,
    model_config: ModelConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> StageResult:
    """Stage 3: optimise the policy against the reward (InstructGPT 3.5, C.4).

    Args:
        model: the SFT result; also the frozen reference of the KL penalty.
        reward: a reward model (folder, Hub id, loaded model, result of `rm`), a function
            `f(prompts, completions, **columns) -> list[float]`, a reward object, `"tiny"`, whatever
            else `load_reward` takes, or a list of these, summed with `reward_weights`.
        dataset: prompts (`prompt`; other columns go to the reward) or, with `opening_length`, texts
            (`text`) whose openings are the prompts; named as in `sft`.
        ptx_dataset: pretraining text (`text`) for PPO-ptx, named as in `sft`; needs `ptx_coef`.
        value_model: the initial value function: a reward model, `"policy"` (with a zero head), or
            `"value_head"` (a head on the policy itself); default: the reward model if it has the
            policy's tokenizer, else the policy.
        processing_class, config, model_config, callbacks, options: as in `sft`, with `PPOConfig`.

    Returns:
        The folder, with the last iteration's metrics, cut_prompts, seconds, format and, if above 0,
        reward_truncated (texts cut to a reward model's context) and reward_unparsable (a judge's
        answers without a score).

    Raises:
        InputError: as `sft`; also a reward other than one finite number per completion.
    """
    config, model_config = stage_options(
        PPOConfig, config, model_config, output_dir, dataset, options
    )
    trainer_class = upstream_trainer(config) if config.engine == "trl" else PPOTrainer
    config.reward_model_path = _reward_names(reward) or config.reward_model_path
    remember_reading(config, model)
    reading = Reading.of(config)
    prompts = (load_texts if config.opening_length else load_prompts)(
        data_of(dataset, config), config.dataset_train_split, reading=reading
    )
    pretraining = _pretraining_texts(ptx_dataset, config)
    with run_stage("ppo", config, model_config) as run:
        base, tokenizer = starting_point(run, model, processing_class)
        if config.opening_length:
            prompts = openings(prompts, tokenizer, config.opening_length)
        check_format(prompts, tokenizer, policy=model, reward_model=reward)
        value = value_model or config.value_model_path
        roles = load_roles(base, reward, value, tokenizer, config, model_config)
        check_vocabulary(tokenizer, roles.policy)
        prompts = fitting(prompts, tokenizer, roles.policy, reading, config)
        _check_held_out(config, model, tokenizer, roles.policy, reading)
        trust: Any = {"trust_remote_code": config.trust_remote_code}
        gold = load_reward(config.gold, tokenizer, **trust) if config.gold is not None else None
        with option_errors():
            trainer = trainer_class(
                args=without_secrets(config),
                processing_class=tokenizer,
                model=roles.policy,
                ref_model=roles.ref_policy,
                reward_model=roles.reward,
                train_dataset=prompts,
                value_model=roles.value,
                ptx_dataset=pretraining,
                gold=gold,
                callbacks=callbacks,
            )
        _tell_before(run, roles, trainer)
        if run.dry:
            tell_records(run, (Rendered(ids, [], None) for ids in trainer.prompts), tokenizer)
            tell_lengths(run, "prompts", [*map(len, trainer.prompts)], config.max_prompt_length)
            tell_rewards(run, roles.policy, roles.reward, trainer, prompts)
        labels = {"score": "objective/scores", "kl": "objective/kl", "length": "objective/length"}
        output = run.train(trainer, labels)
        metrics = {**output.metrics, "cut_prompts": trainer.cut_prompts, **_counted(run, roles)}
        if form := known_form(model):  # its prompts here may be messages that are rendered
            metrics["format"] = form
        if run.is_main:
            curves.plot(trainer.state.log_history, run.new / curves.FIGURE)
        return run.finish(trainer, metrics)
    return run.earlier()


def _check_held_out(
    config: PPOConfig, source: ModelSource, tokenizer: Any, policy: Any, reading: Reading
) -> None:
    """InputError for a held-out prompt that `compare` could not read after the training."""
    if config.dataset_test_split and config.eval_dataset_name is None:
        if config.dataset_name is None or config.dataset_config is not None:
            raise InputError("dataset_test_split: a split of what? Name an eval_dataset_name.")
        config.eval_dataset_name = config.dataset_name
    if config.eval_dataset_name is None:
        if config.summary_file:
            raise InputError("summary_file needs held-out prompts: name an eval_dataset_name.")
        return
    split = config.dataset_test_split or "train"
    given = tokenizer, config.opening_length, reading.of_another()
    prompts = prompts_of(config.eval_dataset_name, split, *given)
    check_format(prompts, tokenizer, policy=source)
    prompt_tokens(prompts[:], tokenizer, policy, config)


def _tell_before(run: StageRun, roles: Roles, trainer: Any) -> None:
    """Tell of unused sampling settings, cut prompts and memory."""
    if unused := unused_sampling(roles.policy):
        told = ", ".join(f"{name} {value}" for name, value in unused.items())
        run.say(f"the model's own sampling settings are not used: {told}")
    if trainer.cut_prompts:
        run.say(f"{trainer.cut_prompts} of {len(trainer.prompts)} prompts were cut from the left")
    args, held = trainer.args, {"policy": roles.policy, "ref_policy": trainer.ref_model}
    held["value"] = roles.value
    for number, judge in enumerate(models_of(roles.reward), start=1):
        held["reward" if number == 1 else f"reward {number}"] = judge
    length = max(map(len, trainer.prompts)) + args.response_length
    tile = TILE * TOKENS_AT_ONCE if args.device.type in KERNEL_ON else 0
    shape = {"length": length, "predicted": args.response_length, "tile": tile}
    update = Work(args.per_device_train_batch_size, **shape, models=2)
    # TRL's own config has no rollout_batch_size.
    at_once = max(run.config.rollout_batch_size or 0, args.local_rollout_forward_batch_size)
    rollout = Work(at_once, **shape, backward=False)
    run.say(memory_table(held, [update, rollout], run.config))


def _counted(run: StageRun, roles: Roles) -> dict[str, int]:
    """Counts of texts that the reward, in any process, had to cut or could not parse."""
    counts: Counter[str] = Counter()
    for part in gather_object(counts_of(roles.reward)):
        counts += Counter(part)
    for name, count in counts.items():
        run.say(f"{count} of the texts for the reward were {name}")
    return {f"reward_{name}": count for name, count in counts.items()}


def _reward_names(reward: Any) -> Any:
    """The reward's name(s) for the config; None if one of them is only in memory."""
    if not isinstance(reward, list | tuple):
        return name_of(reward)
    names = [name for part in reward if (name := name_of(part))]
    return names if len(names) == len(reward) else None


def _pretraining_texts(dataset: Any, config: PPOConfig) -> Dataset | IterableDataset | None:
    """Text for PPO-ptx; InputError if text was given, but no weight for it."""
    source = named_source(dataset, config, "ptx_dataset_name")
    if source is None:
        return None
    if not config.ptx_coef:
        raise InputError(
            f"Pretraining text was given ({config.ptx_dataset_name or 'ptx_dataset'}), but "
            "ptx_coef is 0: set ptx_coef to use the text; the paper's is 27.8."
        )
    reading = Reading.of(config, strict=False)
    split, streams = config.ptx_dataset_split, config.ptx_streaming
    return load_texts(source, split, streaming=streams, reading=reading)
