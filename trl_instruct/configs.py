"""One dataclass per stage, extending TRL's. Defaults are InstructGPT's published values where they
make sense at any scale; the help in configs.yaml cites the place in the paper (Ouyang et al. 2022).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import trl
import yaml
from transformers import SchedulerType, TrainingArguments

from trl_instruct import option_checks
from trl_instruct.errors import InputError

HELP = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
Config = TypeVar("Config")


def _with_help(config: type[Config]) -> type[Config]:
    """The dataclass, whose own fields get their help from configs.yaml."""
    for name, text in HELP[config.__name__].items():
        own: Any = vars(config)["__dataclass_fields__"][name]
        own.metadata = MappingProxyType({"help": text.replace("%", "%%")})  # argparse formats it
    return config


# A mixin: if StageConfig were a TrainingArguments itself, its defaults would hide TRL's.
_Mixin: Any = TrainingArguments if TYPE_CHECKING else object


@_with_help
@dataclass
class StageConfig(_Mixin):
    """Options of every stage: its data and its folder."""

    # Options that would be ignored, and names that a user may take for options: why not.
    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("all")
    # With a list, a dry run: faulty records are told there, and nothing is trained.
    faults: ClassVar[list[str] | None] = None
    # Whether the columns are those of an earlier stage; some files may not have them.
    remembered: ClassVar[bool] = False

    output_dir: str | None = None
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    dataset_streaming: bool = False
    datasets: list[dict] | None = None
    eval_dataset_name: str | None = None
    columns: list[str] | None = None
    prompt_template: str | None = None
    prompt_suffix: str | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    trust_remote_code: bool = False
    merge_adapter: bool = False
    bf16: bool | None = None

    def __post_init__(self) -> None:
        for name in (own.name for own in fields(self) if str(own.type).startswith("list[str]")):
            if isinstance(text := getattr(self, name), str):
                setattr(self, name, [text])
        option_checks.check_finite(self)
        option_checks.check_refused(self.REFUSED, self)
        option_checks.check_numbers(self)
        switches: dict[str, Any] = {"true": True, "false": False}  # flags are text
        resume = self.resume_from_checkpoint
        self.resume_from_checkpoint = switches.get(str(resume).lower(), resume)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and option_checks.has_bf16()
        try:
            floored = SchedulerType(self.lr_scheduler_type) is SchedulerType.COSINE_WITH_MIN_LR
        except ValueError as error:
            raise InputError(f"lr_scheduler_type: {error}.") from error
        for name in ("adam_beta1", "adam_beta2"):  # torch refuses an int beside a float
            setattr(self, name, float(getattr(self, name)))
        self.lr_scheduler_kwargs: dict[str, Any] | str | None = self.lr_scheduler_kwargs or (
            {"min_lr_rate": 0.1} if floored else None
        )
        super().__post_init__()
        for name in ("prompt_template", "prompt_suffix"):
            if (text := getattr(self, name)) is not None:
                setattr(self, name, text.replace("\\n", "\n"))  # a shell types no line break
        if self.datasets and (self.dataset_name or self.dataset_config):
            raise InputError("datasets and dataset_name were both given; use one of them.")
        if self.datasets and self.dataset_train_split != "train":
            raise InputError("dataset_train_split is not read beside datasets; give each a split.")
        option_checks.check_training(self)


@_with_help
@dataclass
class PretrainConfig(StageConfig, TrainingArguments):
    """Stage 0: a small base model from scratch, on any text, with any architecture."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("pretrain") | dict.fromkeys(
        vars(trl.ModelConfig()), "architecture and architecture_kwargs make the model."
    )

    architecture: str = "llama"
    architecture_kwargs: dict[str, Any] | str | None = None
    vocab_size: int = 8192
    max_length: int = 512
    packing: bool = True
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    num_train_epochs: float = 1.0

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "architecture_kwargs"]


@_with_help
@dataclass
class SFTConfig(StageConfig, trl.SFTConfig):
    """Stage 1, supervised fine-tuning (InstructGPT C.1)."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("sft")

    learning_rate: float = 9.65e-6
    num_train_epochs: float = 16.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4


@_with_help
@dataclass
class RewardConfig(StageConfig, trl.RewardConfig):
    """Stage 2, the reward model (InstructGPT 3.5, C.2)."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("rm")

    learning_rate: float = 9e-6
    num_train_epochs: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 8
    forward: Literal["shared_prefix", "grouped", "pairs"] = "shared_prefix"
    average_over: Literal["prompts", "pairs"] = "prompts"
    ties: Literal["drop", "half"] = "drop"
    batch_by_length: bool = True
    eval_size: float = 0.1
    demonstrations_name: str | None = None
    early_stopping_patience: int | None = None
    members: int = 1
    member: int | None = None
    rating_order: list[str] | None = None
    leave_out_labelers: list[str] | None = None
    truncate_prompt: bool = False

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.members > 1 and (self.member is not None or self.push_to_hub):
            raise InputError("members excludes member and push_to_hub: push each of the folders.")
        metric: str | None = getattr(self, "metric_for_best_model", None)
        self.metric_for_best_model = metric or ("accuracy" if self.load_best_model_at_end else None)
        super().__post_init__()


@_with_help
@dataclass
class SamplingConfig(StageConfig):
    """Options of the stages that sample."""

    response_length: int = 53
    opening_length: int | None = None
    max_prompt_length: int | None = None
    temperature: float = 1.0
    stop_strings: list[str] | None = None
    frozen_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    use_transformers_continuous_batching: bool = False
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_model_impl: Literal["vllm", "transformers"] = "vllm"
    vllm_server_base_url: str | None = None
    vllm_server_timeout: float = 240.0
    vllm_group_port: int = 51216
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False


@_with_help
@dataclass
class PPOConfig(SamplingConfig, TrainingArguments):
    """Stage 3, PPO (InstructGPT 3.5, C.4). Fields of TRL's PPOConfig keep their names.

    minibatch = one optimizer step = per_device_train_batch_size x gradient_accumulation_steps x
    processes; a rollout batch = num_mini_batches minibatches; num_ppo_epochs passes over it.
    The defaults are the paper's 512 = 8 x 64, one epoch.
    """

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("ppo")

    engine: Literal["trl_instruct", "trl"] = "trl_instruct"
    reward_model_path: list[str] | None = None
    reward_weights: list[float] | None = None
    combine: Literal["mean", "min", "pessimistic"] | None = None
    combine_beta: float | None = None
    gold: str | None = None
    stop_when_exploited: bool = False
    summary_file: str | None = None
    learning_rate: float = 3e-6
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 10
    num_train_epochs: float = 8.0
    total_episodes: int | None = None
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 8
    num_mini_batches: int = 8
    num_ppo_epochs: int = 1
    local_rollout_forward_batch_size: int = 64
    rollout_batch_size: int | None = None
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_clip_max: float = 3.0
    offload_frozen: bool = False
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    on_error: Literal["stop", "skip"] = "stop"
    kl_coef: float = 0.02
    adaptive_kl_target: float | None = None
    adaptive_kl_horizon: int = 10_000
    target_kl: float | None = None
    kl_estimator: Literal["k1", "k3"] = "k1"
    whiten_rewards: bool = False
    ptx_coef: float = 0.0
    ptx_dataset_name: str | None = None
    ptx_dataset_split: str = "train"
    ptx_streaming: bool = False
    ptx_max_length: int = 512
    ptx_rows_per_episode: int = 8
    cast_lm_head_to_fp32: bool = False
    ema_decay: float | None = None
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    value_model_path: str | None = None
    share_base: bool | None = None
    value_learning_rate: float | None = None
    value_warmup_iterations: int = 0
    gamma: float = 1.0
    lam: float = 0.95
    lam_alpha: float | None = None
    value_lam: float | None = None
    gradient_checkpointing: bool = True
    logging_steps: float = 1
    num_sample_generations: int = 5
    metric_for_best_model: str | None = None

    def __post_init__(self) -> None:
        if self.stop_when_exploited:
            self.save_total_limit: int | None = self.save_total_limit or 1
            if self.metric_for_best_model not in (None, "objective/gold"):
                raise InputError(
                    f"metric_for_best_model is {self.metric_for_best_model!r}, but "
                    "stop_when_exploited keeps the best by objective/gold. Leave it out."
                )
            self.metric_for_best_model = "objective/gold"
        if self.metric_for_best_model is None and self.engine == "trl_instruct":
            fixed = self.adaptive_kl_target is None
            self.metric_for_best_model = f"objective/{'rlhf_reward' if fixed else 'scores'}"
        super().__post_init__()
        named: Any = self.reward_model_path
        self.reward_model_path = named[0] if isinstance(named, list) and len(named) == 1 else named
        episodes = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        fifth = episodes * self.num_mini_batches / 5
        if self.adaptive_kl_target is not None and self.adaptive_kl_horizon <= fifth:
            raise InputError(
                f"adaptive_kl_horizon is {self.adaptive_kl_horizon}; it must be above {fifth:g}, a "
                "fifth of the rollout batch, or one iteration could make kl_coef 0 or negative."
            )
        if (self.rollout_batch_size or 0) * self.world_size > 5 * fifth:
            raise InputError(
                f"rollout_batch_size is {self.rollout_batch_size}, but an iteration has "
                f"{5 * fifth / self.world_size:g} episodes a device, and it says how many are "
                "sampled at once; gradient_accumulation_steps and num_mini_batches set the number."
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise InputError("missing_eos_penalty and missing_eos_score exclude each other.")


@_with_help
@dataclass
class CandidatesConfig(SamplingConfig, TrainingArguments):
    """Between 1 and 2: K completions per prompt for the labeler to rank (InstructGPT 3.5)."""

    per_device_eval_batch_size: int = 64
    num_candidates: int = 4
    gold: str | None = None


@_with_help
@dataclass
class EvaluateConfig(SamplingConfig, TrainingArguments):
    """After the stages: checkpoints side by side on held-out prompts."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("evaluate")

    dataset_name: str | None = None
    dataset_train_split: str = "train"
    per_device_eval_batch_size: int = 64
    models: list[str] | None = None
    judges: list[str] | None = None
    baseline: str | None = None
    reference: str | None = None
    demonstrations_name: str | None = None
    best_of_n: int = 16
