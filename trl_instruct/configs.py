"""One dataclass per stage, extending TRL's. Defaults are InstructGPT's published values where they
make sense at any scale; each field's help cites the place in the paper (Ouyang et al. 2022)."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import trl
from transformers import SchedulerType, TrainingArguments

from trl_instruct import option_checks
from trl_instruct.errors import InputError


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help.replace("%", "%%")})  # argparse formats it


# A mixin: if StageConfig were a TrainingArguments itself, its defaults would hide TRL's.
_Mixin: Any = TrainingArguments if TYPE_CHECKING else object


@dataclass
class StageConfig(_Mixin):
    """Options of every stage: its data and its folder."""

    # Options that would be ignored, and names that a user may take for options: why not.
    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("all")
    # With a list, a dry run: faulty records are told there, and nothing is trained.
    faults: ClassVar[list[str] | None] = None
    # Whether the columns are those of an earlier stage; some files may not have them.
    remembered: ClassVar[bool] = False

    output_dir: str | None = _option(None, "Folder of the result.")
    overwrite_output_dir: bool = _option(False, "Replace the run that output_dir holds.")
    resume_from_checkpoint: str | None = _option(
        None,
        "true (the last checkpoint), auto (or begin), or a folder. docs/resume.md says what may "
        "change.",
    )
    dataset_name: str | None = _option(
        None, "A file (json, jsonl, csv, parquet), Hub id or tiny:<split>."
    )
    dataset_config: str | None = _option(None, "Name of the dataset's subset on the Hub.")
    dataset_train_split: str = _option("train", "Split of the dataset to train on.")
    dataset_test_split: str | None = _option(
        None, "Split of eval_dataset_name (default: train) or dataset_name."
    )
    dataset_streaming: bool = _option(False, "Read the dataset while training (sft; max_steps).")
    datasets: list[dict] | None = _option(
        None,
        "Several, in YAML, instead of dataset_name. As TRL writes them: path, name, data_dir, "
        "data_files, split, columns, fraction.",
    )
    eval_dataset_name: str | None = _option(None, "Held-out data, named like dataset_name.")
    columns: list[str] | None = _option(None, "field=column: prompt=question responses=answers.")
    prompt_template: str | None = _option(
        None,
        "Writes text prompts from columns: {instruction}\\n{input}. An empty column goes with the "
        "white space after it. Later stages remember it; '': none.",
    )
    prompt_suffix: str | None = _option(
        None, "What each text prompt ends with, as \\n; later stages remember it; '': nothing."
    )
    on_bad_record: Literal["error", "skip"] = _option(
        "error", "Stop at a faulty record, or skip and count it."
    )
    trust_remote_code: bool = _option(False, "Let models and tokenizers run code from the Hub.")
    merge_adapter: bool = _option(False, "Save a merged full model; checkpoints are adapters.")
    bf16: bool | None = _option(None, "bfloat16 mixed precision; default: if an accelerator has it")

    def __post_init__(self) -> None:
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
        option_checks.check_training(self)


@dataclass
class PretrainConfig(StageConfig, TrainingArguments):
    """Stage 0: a small base model from scratch, on any text, with any architecture."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("pretrain") | dict.fromkeys(
        vars(trl.ModelConfig()), "architecture and architecture_kwargs make the model."
    )

    architecture: str = _option("llama", "A model type of transformers: gpt2, gpt_neox, ...")
    architecture_kwargs: dict[str, Any] | str | None = _option(
        None, 'Fields of its config, as JSON: {"hidden_size": 128}.'
    )
    vocab_size: int = _option(8192, "Size of the byte-level BPE trained on the same text.")
    max_length: int = _option(512, "Tokens in a row.")
    packing: bool = _option(True, "Cut the text into full rows; else one text a row.")
    learning_rate: float = _option(1e-3, "Peak learning rate.")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Cosine to a tenth of the peak.")
    num_train_epochs: float = _option(1.0, "Passes over the text.")

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "architecture_kwargs"]


@dataclass
class SFTConfig(StageConfig, trl.SFTConfig):
    """Stage 1, supervised fine-tuning (InstructGPT C.1)."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("sft")

    learning_rate: float = _option(9.65e-6, "Peak learning rate (C.1: 9.65e-6 for 1.3B and 6B).")
    num_train_epochs: float = _option(16.0, "Passes over the demonstrations (C.1: 16).")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Cosine to 10 % of the peak (C.1).")
    per_device_train_batch_size: int = _option(8, "Sequences per forward pass and device.")
    gradient_accumulation_steps: int = _option(4, "8 x 4 = 32 sequences a step (C.1: 32).")


@dataclass
class RewardConfig(StageConfig, trl.RewardConfig):
    """Stage 2, the reward model (InstructGPT 3.5, C.2)."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("rm")

    learning_rate: float = _option(9e-6, "Peak learning rate (C.2: 9e-6, give or take half).")
    num_train_epochs: float = _option(1.0, "Passes over the rankings (C.2: 1; more overfits).")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Cosine to 10 % of the peak (C.2).")
    per_device_train_batch_size: int = _option(8, "Prompts (C.2) or pairs per pass and device.")
    gradient_accumulation_steps: int = _option(8, "8 x 8 = 64 prompts a step (C.2: 64).")
    forward: Literal["shared_prefix", "grouped", "pairs"] = _option(
        "shared_prefix",
        "How a prompt is computed. shared_prefix: once for all its responses (grouped if the model "
        "cannot); grouped: once for each response; pairs: for both responses of each pair.",
    )
    average_over: Literal["prompts", "pairs"] = _option(
        "prompts", "Mean of the prompts' means (3.5), or of all pairs."
    )
    ties: Literal["drop", "half"] = _option("drop", "Drop ties (C.2), or give both half a win.")
    batch_by_length: bool = _option(True, "Batch by length, in random order, to pad less.")
    eval_size: float = _option(0.1, "Share of prompts held out without eval data; 0: none.")
    demonstrations_name: str | None = _option(
        None, "Demonstrations that are to score 0 on average (3.5). Named like dataset_name."
    )
    early_stopping_patience: int | None = _option(
        None,
        "Evaluations without a better metric before it stops. The metric is metric_for_best_model "
        "(default: held-out accuracy); the best checkpoint is kept; needs eval_ and save_strategy.",
    )
    rating_order: list[str] | None = _option(None, "Rating labels, best first: good ok fair poor.")
    leave_out_labelers: list[str] | None = _option(None, "Do not use these labelers' rankings.")
    truncate_prompt: bool = _option(
        False,
        "Cut prompts if a text exceeds max_length. Else the response is left out. "
        "Responses are never cut.",
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        metric: str | None = getattr(self, "metric_for_best_model", None)
        self.metric_for_best_model = metric or ("accuracy" if self.load_best_model_at_end else None)
        super().__post_init__()


@dataclass
class SamplingConfig(StageConfig):
    """Options of the stages that sample."""

    response_length: int = _option(53, "Longest completion, tokens (TRL: 53).")
    opening_length: int | None = _option(
        None, "Use this many first tokens of each `text` as its prompt; default: use `prompt`."
    )
    max_prompt_length: int | None = _option(
        None, "Longer prompts lose their beginning, and are counted; default: they are an error."
    )
    temperature: float = _option(1.0, "Sampling temperature (C.4: 1); divides the KL's logits too")
    stop_strings: list[str] | None = _option(
        None, "Texts that end a completion, besides EOS; rewards do not see them."
    )


@dataclass
class PPOConfig(SamplingConfig, TrainingArguments):
    """Stage 3, PPO (InstructGPT 3.5, C.4). Fields of TRL's PPOConfig keep their names.

    minibatch = one optimizer step = per_device_train_batch_size x gradient_accumulation_steps x
    processes; a rollout batch = num_mini_batches minibatches; num_ppo_epochs passes over it.
    The defaults are the paper's 512 = 8 x 64, one epoch.
    """

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("ppo")

    engine: Literal["trl_instruct", "trl"] = _option("trl_instruct", "trl: TRL 1.12's PPOTrainer.")
    reward_model_path: list[str] | None = _option(
        None,
        "Reward models, servers (http://...), or rewards.py:brevity. A model is a folder or Hub "
        "id, `tiny` the gold scorer, the rest a reward in a Python file; several are summed.",
    )
    reward_weights: list[float] | None = _option(None, "One per reward (TRL's name); default: 1.")
    gold: str | None = _option(
        None,
        "A reward that judges and is not trained on. It judges the run (objective/gold) and the "
        "result; a reward model or `tiny`.",
    )
    summary_file: str | None = _option(
        None, "File of the comparison on eval_dataset_name; default: in output_dir."
    )
    learning_rate: float = _option(3e-6, "Learning rate after the warm-up (TRL: 3e-6).")
    lr_scheduler_type: str = _option("constant_with_warmup", "Constant after a warm-up (C.4).")
    warmup_steps: float = _option(10, "Iterations of warm-up (C.4: 10, from a tenth).")
    num_train_epochs: float = _option(8.0, "Uses of each prompt (C.4: about 8).")
    total_episodes: int | None = _option(
        None, "Completions to sample in all; default: num_train_epochs x prompts (C.4: 256k)."
    )
    per_device_train_batch_size: int = _option(8, "Episodes per forward pass and device.")
    gradient_accumulation_steps: int = _option(8, "8 x 8 = 64 episodes a minibatch (C.4: 64).")
    num_mini_batches: int = _option(8, "Minibatches, optimizer steps, in a rollout (C.4: 8).")
    num_ppo_epochs: int = _option(1, "Passes over a rollout batch (C.4: 1).")
    local_rollout_forward_batch_size: int = _option(64, "Episodes per device, without gradients.")
    missing_eos_penalty: float | None = _option(
        None, "Subtracted from a score without EOS or stop string; positive."
    )
    missing_eos_score: float | None = _option(
        None, "The score without EOS or stop string, whatever the reward."
    )
    on_error: Literal["stop", "skip"] = _option(
        "stop",
        "If the reward raises or is not finite. stop: saved as before the iteration; skip: the "
        "episode in the update (objective/skipped counts it). If all of a batch fails, stop.",
    )
    kl_coef: float = _option(0.02, "beta of the KL penalty (C.4: 0.02; E.7: 0.01-0.02).")
    adaptive_kl_target: float | None = _option(
        None, "KL per completion, nats, that an adaptive kl_coef holds; default: kl_coef is fixed."
    )
    adaptive_kl_horizon: int = _option(10_000, "Episodes over which kl_coef adapts (TRL: 10000).")
    target_kl: float | None = _option(
        None, "policy/approxkl, nats per token, that ends an iteration; default: never."
    )
    kl_estimator: Literal["k1", "k3"] = _option("k1", "KL per token in the reward; k3 is refused.")
    whiten_rewards: bool = _option(False, "Scale rewards to variance 1, keeping the mean.")
    ptx_coef: float = _option(0.0, "gamma, weight of the pretraining loss (C.4: 27.8)")
    ptx_dataset_name: str | None = _option(None, "Pretraining text (`text`), named as dataset_name")
    ptx_dataset_split: str = _option("train", "Its split.")
    ptx_streaming: bool = _option(False, "Stream it instead of loading it.")
    ptx_max_length: int = _option(512, "Tokens in a row of pretraining text.")
    ptx_rows_per_episode: int = _option(8, "Rows of pretraining text per episode (C.4: 8).")
    ema_decay: float | None = _option(
        None,
        "Save a moving average of the weights (C.4: 0.992). This is its decay per optimizer step.",
    )
    cliprange: float = _option(0.2, "Clip of the importance ratio (C.4: 0.2).")
    cliprange_value: float = _option(0.2, "Clip of the value's change.")
    vf_coef: float = _option(0.1, "Weight of the value loss (TRL: 0.1).")
    value_model_path: str | None = _option(
        None,
        "Value function: a reward model, `policy` or `value_head`. The model is a folder or Hub "
        "id; `policy` gets a zero head. Default: the reward model (3.5), or the policy if the "
        "reward is not a model or has another tokenizer. `value_head`: a head on the policy (one "
        "trunk for both: less memory and time, but not the paper's).",
    )
    share_base: bool | None = _option(
        None,
        "Load the base of several LoRA adapters once. Default: for those of policy, reference, "
        "value and reward that are adapters over it; true: an error if one is not; false: never.",
    )
    value_learning_rate: float | None = _option(
        None, "Learning rate of the value function (C.4: 9e-6); default: learning_rate."
    )
    gamma: float = _option(1.0, "Discount (C.4: none, 1).")
    lam: float = _option(0.95, "lambda of GAE (lm-human-preferences: 0.95).")
    gradient_checkpointing: bool = _option(True, "Recompute activations to save memory.")
    logging_steps: float = _option(1, "Iterations between logs.")
    num_sample_generations: int = _option(5, "How often a run shows a sample (TRL's); 0: never.")
    metric_for_best_model: str | None = _option(
        None,
        "Metric for save_strategy: best and save_total_limit. One of the rollouts (objective/, "
        "val/); default: objective/rlhf_reward, or objective/scores if kl_coef adapts.",
    )

    def __post_init__(self) -> None:
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
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise InputError("missing_eos_penalty and missing_eos_score exclude each other.")
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise InputError(
                f"missing_eos_penalty is {self.missing_eos_penalty}; it is subtracted from the "
                "score, so give a positive number."
            )


@dataclass
class CandidatesConfig(SamplingConfig, TrainingArguments):
    """Between 1 and 2: K completions per prompt for the labeler to rank (InstructGPT 3.5)."""

    per_device_eval_batch_size: int = _option(64, "Completions per forward pass.")
    num_candidates: int = _option(4, "K, completions per prompt (the paper: 4 to 9).")
    gold: str | None = _option(None, "Simulated labeler's reward, with noise; default: people.")


@dataclass
class EvaluateConfig(SamplingConfig, TrainingArguments):
    """After the stages: checkpoints side by side on held-out prompts."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("evaluate")

    dataset_name: str | None = _option(None, "Held-out prompts, named as in `sft`.")
    dataset_train_split: str = _option("train", "Split of the dataset.")
    per_device_eval_batch_size: int = _option(64, "Completions per forward pass.")
    models: list[str] | None = _option(None, "`name=source`, or a source named by its last part.")
    judges: list[str] | None = _option(None, "Rewards that judge, as in `ppo`, each `name=reward`.")
    baseline: str | None = _option(None, "Win rates are against this model; default: the first.")
    reference: str | None = _option(None, "Model for the KL and best of n; default: baseline.")
    demonstrations_name: str | None = _option(None, "Held-out demonstrations, for the perplexity.")
    best_of_n: int = _option(16, "N for best of n by the first judge; 1: none.")
