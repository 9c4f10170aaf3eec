"""Every option of SFTConfig, RewardConfig, PPOConfig and TRL's ModelConfig: who honours it.

An option of transformers or TRL is handed to a library that honours it in that stage, or refused;
one of ours has its effect in a test. A field that a new version adds is in no table: this fails.
"""

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import LLAMA
from datasets import Dataset
from transformers import TrainingArguments
from trl import ModelConfig
from trl import RewardConfig as TRLRewardConfig
from trl import SFTConfig as TRLSFTConfig

from trl_instruct.configs import PPOConfig, PretrainConfig, RewardConfig, SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.recipes.options import data_of, stage_options
from trl_instruct.recipes.pretrain import pretrain

STAGES = {"sft": SFTConfig, "rm": RewardConfig, "ppo": PPOConfig}
REFUSED = "refused"


def table(*groups):
    """{option: who honours it} from (who, names) pairs."""
    return {name: who for who, names in groups for name in names.split()}


# Options of TrainingArguments that all three stages honour, and by what.
ALIKE = table(
    (
        "TrainingArguments",  # when it is made
        "output_dir use_cpu tf32 ddp_backend ddp_timeout local_rank log_on_each_node "
        "save_on_each_node activation_checkpointing activation_checkpointing_kwargs",
    ),
    (
        "Trainer",  # create_optimizer, create_scheduler, callbacks, _save_checkpoint, log
        "adam_beta1 adam_beta2 adam_epsilon full_determinism gradient_checkpointing "
        "gradient_checkpointing_kwargs greater_is_better learning_rate log_level "
        "log_level_replica logging_first_step logging_steps logging_strategy "
        "lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model "
        "num_train_epochs optim optim_args optim_target_modules per_device_train_batch_size "
        "gradient_accumulation_steps restore_callback_states_from_checkpoint save_only_model "
        "save_steps save_strategy save_total_limit seed data_seed use_cache warmup_steps "
        "weight_decay disable_tqdm",
    ),
    ("trackers", "project report_to run_name trackio_space_id trackio_static_space_id"),
    ("trackers", "trackio_bucket_id"),
    (
        "accelerate",
        "accelerator_config bf16 fp16 ddp_broadcast_buffers ddp_bucket_cap_mb "
        "ddp_find_unused_parameters ddp_static_graph deepspeed fsdp fsdp_config",
    ),
    (
        "recipes/test_publishing.py::test_an_adapter_with_its_checkpoints",
        "push_to_hub hub_model_id hub_private_repo hub_revision hub_token hub_strategy",
    ),
    ("recipes/test_checkpoints.py::test_resuming_is_bit_identical", "resume_from_checkpoint"),
    ("what a stage does anyway", "do_train do_eval dataloader_pin_memory"),
    (
        REFUSED,
        "batch_eval_metrics bf16_full_eval fp16_full_eval do_predict enable_jit_checkpoint "
        "eval_accumulation_steps eval_do_concat_batches hub_always_push include_for_metrics "
        "label_names length_column_name prediction_loss_only",
    ),
)
# Those that only a Trainer's own loop, evaluation or data loader honours: sft and rm.
NOT_PPO = table(
    (
        "Trainer",
        "auto_find_batch_size debug eval_delay eval_on_start eval_steps eval_strategy "
        "eval_use_gather_object ignore_data_skip include_num_input_tokens_seen "
        "load_best_model_at_end logging_nan_inf_filter neftune_noise_alpha "
        "per_device_eval_batch_size remove_unused_columns skip_memory_metrics "
        "torch_empty_cache_steps train_sampling_strategy use_liger_kernel liger_kernel_config",
    ),
    (
        "accelerate",
        "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context "
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor "
        "parallelism_config torch_compile torch_compile_backend torch_compile_mode",
    ),
)
LOSS = "label_smoothing_factor average_tokens_across_devices"
TRAINING_ARGUMENTS = {
    "sft": ALIKE | NOT_PPO | table(("TRL", LOSS)),
    "rm": ALIKE | NOT_PPO | table((REFUSED, LOSS)),
    "ppo": ALIKE | dict.fromkeys(NOT_PPO, REFUSED) | table((REFUSED, LOSS)),
}
# Fields of TrainingArguments that transformers 5.4, the oldest, lacks; and those it alone has.
NEWER = {
    *("activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order"),
    *("dataloader_multiprocessing_context", "ddp_static_graph", "trackio_bucket_id"),
    "trackio_static_space_id",
}
OLDER = {"logging_dir": "trackers", "warmup_ratio": "Trainer"}

TRLS = {
    "sft": table(
        (
            "TRL",
            "activation_offloading assistant_only_loss completion_only_loss dataset_num_proc "
            "eval_packing loss_type packing packing_strategy pad_to_multiple_of padding_free "
            "router_aux_loss_coef shuffle_dataset truncation_mode",
        ),
        ("models/test_load_models.py::test_special_tokens_that_are_named_", "eos_token pad_token"),
        ("recipes/test_recipes.py::test_conversational_data", "chat_template_path"),
        ("recipes/test_recipes.py::test_cut_demonstrations_are_counted", "max_length"),
        ("rewards/test_load_rewards.py::test_code_of_a_models_own_runs", "trust_remote_code"),
        (REFUSED, "dataset_kwargs dataset_text_field model_init_kwargs"),
    ),
    "rm": table(
        ("TRL", "activation_offloading"),
        ("reward_trainer/test_reward_trainer.py::test_trls_own", "center_rewards_coefficient"),
        ("models/test_load_models.py::test_special_tokens_that_are_named_", "eos_token pad_token"),
        ("recipes/test_recipes.py::test_conversational_data", "chat_template_path"),
        ("datasets", "dataset_num_proc"),
        ("models/test_load_models.py::test_dropout_is_off", "disable_dropout"),
        ("recipes/test_recipes.py::test_overlong_pairs_are_counted", "max_length"),
        ("reward_trainer/test_reward_trainer.py::test_collator_pads", "pad_to_multiple_of"),
        ("rewards/test_load_rewards.py::test_code_of_a_models_own_runs", "trust_remote_code"),
        (REFUSED, "model_init_kwargs"),
    ),
}
OURS = table(
    ("data/test_reading.py::test_options_of_a_config", "columns prompt_suffix on_bad_record"),
    ("data/test_reading.py::test_a_template_writes_prompts_of_every_shape", "prompt_template"),
    ("test_options.py::test_a_subset_of_a_dataset", "dataset_config"),
    ("test_cli.py::test_the_stages_from_the_command_line", "dataset_name eval_dataset_name"),
    ("test_cli.py::test_candidates_of_the_splits_that_are_named", "dataset_train_split"),
    ("recipes/test_recipes.py::test_sft_measures_on_the_split", "dataset_test_split"),
    ("test_configs.py::test_stages_that_do_not_stream_say_so", "dataset_streaming"),
    ("data/test_reading.py::test_mixtures_of_shapes", "datasets"),
    ("models/test_merging.py::test_a_stage_leaves_the_merged_model", "merge_adapter"),
    ("recipes/test_stage.py::test_another_run_is_replaced_only_on_demand", "overwrite_output_dir"),
    ("rewards/test_load_rewards.py::test_code_of_a_models_own_runs", "trust_remote_code"),
)
OWN = {
    "sft": OURS,
    "rm": OURS
    | table(
        ("reward_trainer/test_reward_trainer.py::test_average_over_pairs_and_", "average_over"),
        ("reward_trainer/test_reward_trainer.py::test_batches_hold_rank", "batch_by_length"),
        ("reward_trainer/test_reward_trainer.py::test_the_three_forwards_give", "forward"),
        ("reward_trainer/test_reward_losses.py::test_half_a_tie_goes_to_each", "ties"),
        ("reward_trainer/test_reward_trainer.py::test_a_prompt_that_is_too", "truncate_prompt"),
        ("test_cli.py::test_a_reward_model_from_yaml", "demonstrations_name"),
        ("recipes/test_recipes.py::test_rm_keeps_the_best_checkpo", "early_stopping_patience"),
        ("data/test_preferences.py::test_held_out_rankings_stay_whole", "eval_size"),
        ("data/test_rankings.py::test_the_order_of_numbers_can_be_given_too", "rating_order"),
        ("data/test_preferences.py::test_labelers_are_left_out", "leave_out_labelers"),
        ("recipes/test_members.py::test_members_differ", "members member"),
    ),
    "ppo": OURS
    | table(
        (
            "ppo_trainer/test_ppo_trainer.py::test_beta_follows_the_kl_to_its_target",
            "kl_coef adaptive_kl_target adaptive_kl_horizon",
        ),
        (
            "ppo_trainer/test_ppo_trainer.py::test_both_clips_are_around",
            "cliprange cliprange_value cliprange_high dual_clip",
        ),
        ("ppo_trainer/test_ppo_trainer.py::test_a_step_descends_the_policy_loss_plus", "vf_coef"),
        ("ppo_trainer/test_ppo_trainer.py::test_rewards_hold_the_kl_penalty", "whiten_rewards"),
        ("ppo_trainer/test_ppo_trainer.py::test_an_iteration_ends_early_where", "target_kl"),
        ("ppo_trainer/test_ppo_trainer.py::test_the_value_function_has", "value_learning_rate"),
        ("ppo_trainer/test_ppo_trainer.py::test_a_completion_without", "missing_eos_penalty"),
        ("ppo_trainer/test_ppo_trainer.py::test_a_minibatch_is_an_optim", "num_mini_batches"),
        ("ppo_trainer/test_ppo_trainer.py::test_every_ppo_epoch_takes", "num_ppo_epochs"),
        ("ppo_trainer/test_ppo_trainer.py::test_the_reward_does_not_see_the_", "stop_strings"),
        (
            "ppo_trainer/test_ppo_trainer.py::test_the_scores_belong_to_their_ep",
            "local_rollout_forward_batch_size response_length",
        ),
        (
            "generation/test_vllm.py::test_what_the_engine_is_told",
            "use_vllm vllm_mode vllm_model_impl vllm_server_base_url vllm_server_timeout "
            "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
            "vllm_tensor_parallel_size vllm_enable_sleep_mode",
        ),
        (
            "generation/test_vllm.py::test_the_policy_loss_is_weighted_by_token",
            "vllm_importance_sampling_correction vllm_importance_sampling_clip_max",
        ),
        (
            "generation/test_paged.py::test_a_run_repeats_with_its_seed",
            "use_transformers_continuous_batching",
        ),
        ("generation/test_sampler.py::test_sampling_has_a_batch_size_of_", "rollout_batch_size"),
        ("ppo_trainer/test_advantages.py::test_every_estimator_that_is", "kl_estimator"),
        ("ppo_trainer/test_advantages.py::test_gae_equals_the_naive_sum", "gamma lam"),
        ("ppo_trainer/test_advantages.py::test_advantages_and_returns_may", "lam_alpha value_lam"),
        ("ppo_trainer/test_ppo_trainer.py::test_at_first_the_value", "value_warmup_iterations"),
        (
            "models/test_precision.py::test_a_run_with_frozen_models_in_bfloat16",
            "frozen_dtype cast_lm_head_to_fp32",
        ),
        ("models/test_precision.py::test_frozen_models_wait_on_the_cpu", "offload_frozen"),
        ("ppo_trainer/test_ema.py::test_the_average_is_what_is_saved", "ema_decay"),
        ("ppo_trainer/test_ppo_curves.py::test_samples_are_shown", "num_sample_generations"),
        ("ppo_trainer/test_ppo_run.py::test_how_long_a_run_is", "total_episodes"),
        (
            "ppo_trainer/test_ptx.py::test_ptx_from_a_file",
            "ptx_coef ptx_dataset_name ptx_dataset_split ptx_streaming ptx_max_length "
            "ptx_rows_per_episode",
        ),
        ("ppo_trainer/test_roles.py::test_models_can_stay_apart", "share_base"),
        ("ppo_trainer/test_upstream.py::test_a_run_leaves_what_ours_leaves", "engine"),
        ("recipes/test_recipes.py::test_a_value_model_of_its_own", "value_model_path"),
        (
            "recipes/test_recipes.py::test_several_rewards_from_python_and_yaml",
            "reward_model_path reward_weights",
        ),
        ("rewards/test_reward_faults.py::test_a_fixed_score_without_eos", "missing_eos_score"),
        ("rewards/test_reward_faults.py::test_a_skipped_episode_counts_nowhere", "on_error"),
        ("rewards/test_reward_faults.py::test_a_judge_that_is_not_trained_on", "gold"),
        ("rewards/test_ensemble.py::test_a_list_is_combined", "combine combine_beta"),
        ("ppo_trainer/test_exploitation.py::test_a_run_ends_at_its_peak", "stop_when_exploited"),
        ("rewards/test_reward_tokens.py::test_a_cut_prompt_is_read_whole", "max_prompt_length"),
        ("generation/test_sampling.py::test_sampling_is_from_the_full", "temperature"),
        ("evaluation/test_prompt_forms.py::test_prompts_of_a_file", "opening_length"),
        ("evaluation/test_compare.py::test_what_is_compared", "summary_file"),
    ),
}
MODEL = table(
    ("transformers", "model_name_or_path model_revision attn_implementation dtype"),
    ("peft", "use_peft lora_r lora_alpha lora_dropout lora_target_modules"),
    ("peft", "lora_target_parameters lora_modules_to_save use_rslora use_dora"),
    ("bitsandbytes", "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant"),
    ("bitsandbytes", "bnb_4bit_quant_storage"),
    ("the stage, which sets it", "lora_task_type"),  # another is refused
)


def names_of(config_class):
    return {field.name for field in dataclasses.fields(config_class)}


def verdicts(stage):
    return {**TRAINING_ARGUMENTS[stage], **TRLS.get(stage, {}), **OWN[stage]}


def test_every_field_of_the_libraries_is_in_the_table():
    for stage in STAGES:
        known = TRAINING_ARGUMENTS[stage]
        assert names_of(TrainingArguments) - OLDER.keys() <= known.keys()
        assert known.keys() - names_of(TrainingArguments) <= NEWER
    for stage, theirs in (("sft", TRLSFTConfig), ("rm", TRLRewardConfig)):
        assert names_of(theirs) - names_of(TrainingArguments) == TRLS[stage].keys()
    assert names_of(ModelConfig) == MODEL.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_has_a_verdict(stage):
    fields = names_of(STAGES[stage])
    assert fields - OLDER.keys() == verdicts(stage).keys() & (
        fields | (verdicts(stage).keys() - NEWER)
    )
    refused = {name for name, who in verdicts(stage).items() if who == REFUSED}
    assert refused & fields == STAGES[stage].REFUSED.keys() & fields


def test_the_tests_that_are_named_exist():
    for who in {who for stage in STAGES for who in verdicts(stage).values() if "::" in who}:
        path, name = who.split("::")
        text = (Path(__file__).parent / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}", text, re.MULTILINE), who


def other_value(field):
    """A value of a field's kind that is not its default."""
    values = {"eval_strategy": "steps", "train_sampling_strategy": "sequential", "debug": "x"}
    if field.name in values or "strategy" in field.name:
        return values.get(field.name, "x")
    kind, default = str(field.type), field.default
    if isinstance(default, bool) or kind.startswith("bool"):
        return not default
    return 3 if re.match(r"int|float|<class '(int|float)'>", kind) else {"x": 1}


@pytest.mark.parametrize("config_class", [*STAGES.values(), PretrainConfig])
def test_what_would_be_ignored_is_refused(config_class):
    fields = [f for f in dataclasses.fields(config_class) if f.name in config_class.REFUSED]
    assert len(fields) > 10
    for field in fields:
        told = re.escape(f"{field.name} is not an option here: {config_class.REFUSED[field.name]}")
        with pytest.raises(InputError, match=told) as caught:
            config_class(output_dir="x", use_cpu=True, **{field.name: other_value(field)})
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    config_class(output_dir="x", use_cpu=True, **defaults)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 8}, "lora_r is not an option here: use_peft is not set"),
        ({"use_dora": True}, "use_dora is not an option here: use_peft is not set"),
        ({"use_peft": True, "use_bnb_nested_quant": True}, "load_in_4bit is not set"),
        ({"use_peft": True, "lora_task_type": "TOKEN_CLS"}, "lora_task_type is not an option"),
    ],
)
def test_options_of_the_model_that_would_be_ignored(options, message):
    with pytest.raises(InputError, match=message):
        stage_options(SFTConfig, None, None, "x", "d.jsonl", {"use_cpu": True, **options})


def test_a_subset_of_a_dataset():
    config = SFTConfig(output_dir="x", use_cpu=True, dataset_config="main")
    named = data_of("openai/gsm8k", config)
    assert (named.path, named.name) == ("openai/gsm8k", "main")
    with pytest.raises(InputError, match="dataset_config names a subset of a dataset on the Hub"):
        data_of(Dataset.from_dict({"text": ["a"]}), config)


def test_stage_0_takes_no_options_of_a_model(tmp_path):
    text = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(InputError, match="dtype is not an option here: architecture and archi"):
        pretrain(text, tmp_path / "x", architecture_kwargs=LLAMA, dtype="bfloat16")


def test_the_best_by_a_metric_that_can_be_compared():
    def metric(**options):
        return PPOConfig(output_dir="x", use_cpu=True, **options).metric_for_best_model

    assert metric() == "objective/rlhf_reward"
    assert metric(adaptive_kl_target=6.0) == "objective/scores"  # beta moves, and with it the other
    assert metric(adaptive_kl_target=6.0, metric_for_best_model="objective/kl") == "objective/kl"


def test_a_horizon_that_could_turn_beta_round():
    batch = {"num_mini_batches": 8, "per_device_train_batch_size": 8, "use_cpu": True}
    options = {"output_dir": "x", "adaptive_kl_target": 6.0, **batch}
    with pytest.raises(InputError, match=r"adaptive_kl_horizon is 102; it must be above 102\.4"):
        PPOConfig(adaptive_kl_horizon=102, **options)
    PPOConfig(adaptive_kl_horizon=103, **options)
    PPOConfig(adaptive_kl_horizon=1, **{**options, "adaptive_kl_target": None})
