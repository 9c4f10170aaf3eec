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
    """Options of every stage: where the data are, what may be overwritten, ..."""

    # Options that would be ignored, and names that a user may take for options: why not.
    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("all")
    # With a list, a dry run: faulty records are told there, and nothing is trained.
    faults: ClassVar[list[str] | None] = None
    # Whether the columns are those of an earlier stage; some files may not have them.
    remembered: ClassVar[bool] = False

    dataset_name: str | None = _option(
        None, "Training data: a Hub id, a local json / jsonl(.gz) / csv / parquet, or tiny:<split>."
    )
    dataset_config: str | None = _option(None, "Name of the dataset's subset on the Hub.")
    dataset_train_split: str = _option("train", "Split of the dataset to train on.")
    dataset_test_split: str | None = _option(
        None, "Held-out split, of eval_dataset_name (default: train) or else of dataset_name."
    )
    dataset_streaming: bool = _option(False, "Read the dataset while training (sft; max_steps).")
    datasets: list[dict] | None = _option(
        None,
        "Instead of dataset_name, several, in YAML, as TRL writes them: path, name, data_dir, "
        "data_files, split, columns, fraction.",
    )
    eval_dataset_name: str | None = _option(None, "Held-out data, named like dataset_name.")
    columns: list[str] | None = _option(
        None, "Our fields and the file's columns: prompt=question responses=answers scores=votes."
    )
    prompt_template: str | None = _option(
        None,
        "Writes text prompts from columns: {instruction}, a blank line, {input}, ... An empty "
        "column goes with the white space after it. Later stages remember it; '': none.",
    )
    prompt_suffix: str | None = _option(
        None, "What each text prompt ends with, as \\n; later stages remember it; '': nothing."
    )
    on_bad_record: Literal["error", "skip"] = _option(
        "error", "Stop at a faulty record, or leave it out and count it."
    )
    overwrite_output_dir: bool = _option(False, "Replace the run that output_dir holds.")
    trust_remote_code: bool = _option(False, "Let models and tokenizers run code from the Hub.")
    merge_adapter: bool = _option(False, "Save a merged full model; checkpoints keep the adapter.")
    bf16: bool | None = _option(None, "bfloat16 mixed precision; default: if an accelerator has it")

    def __post_init__(self) -> None:
        option_checks.check_finite(self)
        option_checks.check_refused(self.REFUSED, self)
        option_checks.check_numbers(self)
        switches: dict[Any, bool] = {"true": True, "false": False}  # flags are text
        resume: str | bool | None = self.resume_from_checkpoint
        self.resume_from_checkpoint: str | bool | None = switches.get(str(resume).lower(), resume)
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

    architecture: str = _option("llama", "Model type of transformers: llama, gpt2, gpt_neox, ...")
    architecture_kwargs: dict[str, Any] | str | None = _option(
        None, "Fields of that architecture's config, e.g. {hidden_size: 96}."
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

    learning_rate: float = _option(9e-6, "Peak learning rate (C.2: 9e-6; +-50 % does not matter).")
    num_train_epochs: float = _option(1.0, "Passes over the rankings (C.2: 1; more overfits).")
    lr_scheduler_type: str = _option("cosine_with_min_lr", "Cosine to 10 % of the peak (C.2).")
    per_device_train_batch_size: int = _option(8, "Prompts (C.2) or pairs per pass and device.")
    gradient_accumulation_steps: int = _option(8, "8 x 8 = 64 prompts a step (C.2: 64).")
    forward: Literal["shared_prefix", "grouped", "pairs"] = _option(
        "shared_prefix",
        "shared_prefix computes a prompt once for all its responses (grouped if the model cannot); "
        "grouped, once for each response; pairs, both responses of each pair.",
    )
    average_over: Literal["prompts", "pairs"] = _option(
        "prompts", "Average rankings' losses per prompt, then over prompts (3.5); or over pairs."
    )
    ties: Literal["drop", "half"] = _option("drop", "Drop ties (C.2), or give both half a win.")
    batch_by_length: bool = _option(True, "Batch rankings by length, in random order, to pad less.")
    eval_size: float = _option(0.1, "Fraction of prompts held out without eval dataset; 0: none.")
    demonstrations_name: str | None = _option(
        None, "Demonstrations, named like dataset_name, to score 0 on average (3.5); default: none."
    )
    early_stopping_patience: int | None = _option(
        None,
        "Stop after so many evaluations without a better metric_for_best_model (default: the "
        "held-out accuracy), and keep the best checkpoint; needs eval_strategy and save_strategy.",
    )
    rating_order: list[str] | None = _option(None, "Rating labels, best first: good ok fair poor.")
    leave_out_labelers: list[str] | None = _option(None, "Do not use these labelers' rankings.")
    truncate_prompt: bool = _option(
        False,
        "Cut prompts from the left if a response would exceed max_length, rather than leave it "
        "out. Responses are never cut.",
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
        "A reward model's folder or Hub id, `tiny` (the gold scorer), a reward server's http://... "
        "or a function or reward object in a Python file, rewards.py:brevity; several are summed.",
    )
    reward_weights: list[float] | None = _option(None, "One per reward (TRL's name); default: 1.")
    gold: str | None = _option(
        None,
        "A second reward, never trained on, that judges the run (objective/gold) and the result: "
        "a reward model or `tiny`.",
    )
    summary_file: str | None = _option(
        None, "Where the command saves its comparison on eval_dataset_name; default: in output_dir."
    )
    learning_rate: float = _option(3e-6, "Learning rate, constant after the warm-up (TRL: 3e-6).")
    lr_scheduler_type: str = _option("constant_with_warmup", "Constant after a warm-up (C.4).")
    warmup_steps: float = _option(10, "Iterations of warm-up (C.4: 10, from a tenth).")
    num_train_epochs: float = _option(8.0, "Uses of each prompt (C.4: about 8).")
    total_episodes: int | None = _option(
        None, "Completions to sample in all; default: num_train_epochs x prompts (C.4: 256k)."
    )
    per_device_train_batch_size: int = _option(8, "Episodes per forward pass and device.")
    gradient_accumulation_steps: int = _option(8, "8 x 8 = 64 episodes a minibatch (C.4: 64).")
    num_mini_batches: int = _option(8, "Minibatches (optimizer steps) in a rollout batch (C.4: 8).")
    num_ppo_epochs: int = _option(1, "Passes over a rollout batch (C.4: 1).")
    local_rollout_forward_batch_size: int = _option(64, "Episodes per device, without gradients.")
    missing_eos_penalty: float | None = _option(
        None, "Subtracted from the score of a completion without EOS or stop string; positive."
    )
    missing_eos_score: float | None = _option(
        None, "The score of a completion without EOS or stop string, whatever the reward says."
    )
    on_error: Literal["stop", "skip"] = _option(
        "stop",
        "If the reward raises or is not finite: stop, saved as before the iteration, or skip the "
        "episode in the update (objective/skipped counts it). If all of a batch fails, stop.",
    )
    kl_coef: float = _option(0.02, "beta of the KL penalty (C.4: 0.02; 0.01-0.02 best, E.7).")
    adaptive_kl_target: float | None = _option(
        None, "KL per completion, nats, that an adaptive kl_coef holds; default: kl_coef is fixed."
    )
    adaptive_kl_horizon: int = _option(
        10_000, "Episodes over which kl_coef adapts (lm-human-preferences: 10000)."
    )
    target_kl: float | None = _option(
        None, "End an iteration once policy/approxkl, nats per token, exceeds this; default: never."
    )
    kl_estimator: Literal["k1", "k3"] = _option("k1", "KL per token in the reward; k3 is refused.")
    whiten_rewards: bool = _option(False, "Scale the rewards to variance 1, keeping their mean.")
    ptx_coef: float = _option(0.0, "gamma, the weight of the pretraining loss (C.4: 27.8); 0: none")
    ptx_dataset_name: str | None = _option(None, "Pretraining text (`text`), named as dataset_name")
    ptx_dataset_split: str = _option("train", "Its split.")
    ptx_streaming: bool = _option(False, "Stream it instead of loading it.")
    ptx_max_length: int = _option(512, "Tokens in a row of pretraining text.")
    ptx_rows_per_episode: int = _option(8, "Rows of pretraining text per episode (C.4: 8).")
    ema_decay: float | None = _option(
        None,
        "Save a moving average of the weights, with this decay per optimizer step (C.4: 0.992), "
        "if any.",
    )
    cliprange: float = _option(0.2, "Clip of the importance ratio (C.4: 0.2).")
    cliprange_value: float = _option(0.2, "Clip of the value's change.")
    vf_coef: float = _option(0.1, "Weight of the value loss (TRL: 0.1).")
    value_model_path: str | None = _option(
        None,
        "Initial value function: `policy` (with a zero head), or a reward model's folder or Hub "
        "id. Default: the reward model (3.5), or the policy if the reward is not a model or has "
        "another tokenizer. `value_head`: a head on the policy (one trunk for both: less memory "
        "and time, but not the paper's).",
    )
    share_base: bool | None = _option(
        None,
        "Load the base once for those of policy, reference, value and reward that are LoRA "
        "adapters over it (default); true: an error if one is not; false: never.",
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
        "Metric of the rollouts (objective/, val/) for save_strategy: best and save_total_limit; "
        "default: objective/rlhf_reward, or objective/scores if adaptive_kl_target moves kl_coef.",
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
    num_candidates: int = _option(4, "K, completions per prompt (the paper's labelers saw 4 to 9).")
    gold: str | None = _option(None, "Simulated labeler's reward, with noise; default: people.")


@dataclass
class EvaluateConfig(SamplingConfig, TrainingArguments):
    """After the stages: checkpoints side by side on held-out prompts."""

    REFUSED: ClassVar[dict[str, str]] = option_checks.refused_by("evaluate")

    dataset_name: str | None = _option(
        None, "Held-out prompts: a Hub id, a local json / jsonl(.gz) / csv / parquet, tiny:<split>."
    )
    dataset_train_split: str = _option("train", "Split of the dataset.")
    per_device_eval_batch_size: int = _option(64, "Completions per forward pass.")
    models: list[str] | None = _option(None, "`name=source`, or a source named by its last part.")
    judges: list[str] | None = _option(None, "Rewards that judge, as in `ppo`, each `name=reward`.")
    baseline: str | None = _option(None, "Win rates are against this model; default: the first.")
    reference: str | None = _option(None, "Model for the KL and best of n; default: baseline.")
    demonstrations_name: str | None = _option(None, "Held-out demonstrations, for the perplexity.")
    best_of_n: int = _option(16, "N, completions for best of n by the first judge; 1: none.")
