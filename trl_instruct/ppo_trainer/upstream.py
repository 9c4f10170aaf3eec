"""TRL's own PPOTrainer (up to TRL 1.12) with our constructor: `engine="trl"`.

Our trainer is tested and benchmarked against it. Where TRL differs, it is left as it is: one
optimizer step per pass however many minibatches there are, a step at every micro-batch in the last
batch of a pass over the prompts, no gradient clipping, the score one position after the
completion's last token, and, with pad == eos, no gradient for EOS.
"""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import TrainOutput

from trl_instruct.configs import PPOConfig, StageConfig
from trl_instruct.errors import InputError
from trl_instruct.generation.sampling import decode, pad_prompts, prompt_tokens
from trl_instruct.models.properties import accepted, unwrapped
from trl_instruct.option_checks import TABLES
from trl_instruct.padding import left_padded_mask, unpadded
from trl_instruct.ppo_trainer.roles import check_roles
from trl_instruct.ppo_trainer.rollouts import disable_dropout_and_rescaling
from trl_instruct.rewards import function
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import score_head, shift_of
from trl_instruct.types import Model, Tokenizer


class RewardModule(nn.Module):
    """Wraps any reward as the `nn.Module` that TRL's PPOTrainer expects as its reward model.

    TRL calls the module under `base_model_prefix` with token ids, passes its last hidden state to
    `score` and reads one position. Here the ids are decoded, the reward is called, and its score is
    at every position. Ids alone do not show where the prompt ends or which columns it has, so the
    module makes the batches: `PPOTrainer(reward_model=module, data_collator=module.collate, ...)`.

    Args:
        reward: a function `f(prompts, completions, **columns) -> list[float]`, or a `RewardModel`
            (with any tokenizer).
        tokenizer: the policy's.
    """

    base_model_prefix = "backbone"

    def __init__(self, reward: function.RewardFunction, tokenizer: Tokenizer):
        super().__init__()
        self.reward = reward
        self.tokenizer = tokenizer
        function.tell_tokenizer(reward, tokenizer)
        # Registered, so they move to the device with this module.
        self.models = nn.ModuleList(function.models_of(reward))
        self.score = nn.Identity()
        # Record and ids, padded with 0 to the width of their batch, as TRL passes them on.
        self.pending: deque[tuple[Mapping[str, Any], Tensor]] = deque()

    @property
    def backbone(self) -> "RewardModule":
        """The module that TRL calls with the ids."""
        return self

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a left-padded batch for TRL's PPOTrainer and remember its prompts.

        Rows have `prompt` (text or messages; InputError if missing), `input_ids`, other columns.
        """
        if "prompt" not in rows[0]:
            raise InputError(
                f"The training data has the columns {sorted(rows[0])}; a RewardModule needs "
                "`prompt` (text or messages) in addition to `input_ids`."
            )
        ids, lengths = pad_prompts([row["input_ids"] for row in rows], torch.device("cpu"))
        pad = self.tokenizer.pad_token_id
        padded = torch.where(left_padded_mask(lengths, ids.shape[1]), ids, pad)
        self.pending.extend(zip(rows, padded.masked_fill(padded == pad, 0), strict=True))
        return {"input_ids": padded}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> BaseModelOutput:
        """The rewards of these rows as hidden states `(B, T, 1)`, the same at every position.

        Args:
            input_ids: `(B, T)` prompts and completions, 0 on padding.
            attention_mask: `(B, T)` True on tokens other than the pad token.

        Raises:
            InputError: these are not the next rows from `collate`; the reward fails.
        """
        records, width = self._remembered(input_ids.cpu())
        asked = [record["prompt"] for record in records]
        own, counts = input_ids[:, width:], attention_mask[:, width:].bool().cumprod(dim=1).sum(1)
        last = own.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = (counts > 0) & (last == self.tokenizer.eos_token_id)
        texts = function.as_completions(asked, decode(own, counts, ended, self.tokenizer))
        names = [name for name in records[0] if name not in ("prompt", "input_ids")]
        columns = {name: [record[name] for record in records] for name in names}
        columns["completion_ids"] = unpadded(own, counts)
        given = function.call_reward(self.reward, asked, texts, columns)
        scores = torch.tensor(given, device=input_ids.device).view(-1, 1, 1)
        hidden = scores.expand(-1, input_ids.shape[1], 1)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))

    def _remembered(self, input_ids: Tensor) -> tuple[list[Mapping[str, Any]], int]:
        """The next records and their prompts' width; InputError if these rows are not theirs."""
        count = min(len(input_ids), len(self.pending))
        prompts = [self.pending.popleft() for _ in range(count)]
        if count < len(input_ids) or any(
            not torch.equal(ids[: len(prompt)], prompt)
            for ids, (_, prompt) in zip(input_ids, prompts, strict=True)
        ):
            raise InputError(
                "A RewardModule got rows to score that its collate did not make. Pass "
                "data_collator=module.collate to PPOTrainer, one module per trainer, without an "
                "eval_dataset."
            )
        return [record for record, _ in prompts], len(prompts[0][1])


class UpstreamTrainer(Trainer):
    """TRL's PPOTrainer with our constructor; it has no place for `gold` and `ptx_dataset`."""

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Tokenizer,
        model: Model,
        ref_model: Model | None,
        reward_model: function.RewardFunction | Model,
        train_dataset: Dataset,
        value_model: Model,
        callbacks: list[TrainerCallback] | None = None,
        **unused: Any,
    ):
        check_roles(model, ref_model, reward_model, value_model)
        _prepare(model, value_model, args)
        self.prompts, self.cut_prompts = prompt_tokens(
            train_dataset[:], processing_class, model, args
        )
        if isinstance(reward_model, Model):
            reward_model = RewardModel(reward_model, processing_class)
        judge = RewardModule(reward_model, processing_class)
        records = zip(train_dataset, self.prompts, strict=True)
        self.generation_config = model.generation_config
        # TRL takes sampling settings that it does not set (repetition_penalty, ...) from here.
        model.generation_config = GenerationConfig(pad_token_id=processing_class.pad_token_id)
        super().__init__(
            args=trl_config(args, len(self.prompts)),
            processing_class=processing_class,
            model=model,
            ref_model=ref_model,
            reward_model=judge,
            train_dataset=[{**record, "input_ids": ids} for record, ids in records],
            value_model=value_model,
            data_collator=judge.collate,
            callbacks=callbacks,
        )
        _tell_departures(args, processing_class)

    def train(self, resume_from_checkpoint: None = None) -> TrainOutput:
        """Run all iterations; return their number and the last metrics."""
        super().train()
        metrics = {**self.metrics, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, metrics["loss/policy"], metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under our names: TRL appends `_avg` to some."""
        self.metrics = {name.removesuffix("_avg"): value for name, value in logs.items()}
        super().log(dict(self.metrics))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, with its original generation_config, and the tokenizer."""
        policy = self.policy_model
        sampling, policy.generation_config = policy.generation_config, self.generation_config
        super().save_model(output_dir, _internal_call)
        policy.generation_config = sampling


def upstream_trainer(config: PPOConfig) -> type[UpstreamTrainer]:
    """TRL's own PPOTrainer with our constructor; InputError for an option that it has not."""
    module = _trl_ppo()
    kinds = (StageConfig, TrainingArguments, module.PPOConfig)
    known = {f.name for kind in kinds for f in fields(kind)}
    defaults = {f.name: f.default for f in fields(config)}
    missing = set(defaults) - known - {*TABLES["trl_outside"].split()}
    missing |= {*TABLES["trl_unread"].split()}
    set_ones = [
        f"{name} ({getattr(config, name)!r})"
        for name in sorted(missing)
        if getattr(config, name) != defaults[name]
        and not (name == "max_grad_norm" and not config.max_grad_norm)  # no clipping, as in TRL
    ]
    if set_ones:
        raise InputError(
            f"engine='trl' has no {', '.join(set_ones)}: TRL's PPOTrainer lacks or ignores it. "
            "Leave it at its default, or use the default engine."
        )
    return type("UpstreamPPOTrainer", (UpstreamTrainer, module.PPOTrainer), {})


def trl_config(config: PPOConfig, num_prompts: int) -> Any:
    """TRL's PPOConfig with the meaning of ours; InputError for fewer prompts than a rollout batch.

    TRL cuts a rollout batch into minibatches but takes only one step per pass over it, so the batch
    is passed as one minibatch, whose losses TRL's metrics then average correctly.
    """
    trl_class = _trl_ppo().PPOConfig
    accumulated = config.gradient_accumulation_steps * config.num_mini_batches
    batch_size = config.per_device_train_batch_size * accumulated * config.world_size
    if num_prompts < batch_size:
        raise InputError(
            f"There are {num_prompts} prompts and a rollout batch has {batch_size}; TRL's "
            "PPOTrainer takes full batches of different prompts only. Lower num_mini_batches, "
            "gradient_accumulation_steps or per_device_train_batch_size."
        )
    episodes = config.total_episodes or int(config.num_train_epochs * num_prompts)
    if config.max_steps > 0:
        episodes = config.max_steps * batch_size
    shared = {f.name for f in fields(config) if f.init} & {f.name for f in fields(trl_class)}
    options = {name: getattr(config, name) for name in shared}
    options |= {"gradient_accumulation_steps": accumulated, "num_mini_batches": 1}
    options |= {"total_episodes": episodes, "stop_token": "eos", "num_sample_generations": 0}
    return trl_class(**options)


def _trl_ppo() -> ModuleType:
    """The module `trl.experimental.ppo`; InputError if this TRL has none."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*importing from 'trl.experimental'")
            import trl.experimental.ppo as module
    except ImportError as error:
        raise InputError(
            "engine='trl' needs TRL's own PPOTrainer, which TRL <= 1.12 has (installed: "
            f"{trl.__version__}): pip install 'trl==1.12.0', or leave engine at its default."
        ) from error
    return module


def _prepare(policy: Model, value: Model, config: PPOConfig) -> None:
    """Change the models as our trainer does and TRL's does not: both then train the same ones."""
    for model in (unwrapped(policy), value.base_model):
        if not accepted(model, position_ids=None):
            raise InputError(
                f"{type(model).__name__} takes no position_ids, which TRL's PPOTrainer passes to "
                "every model. Leave engine at its default."
            )
    shift = shift_of(value)
    score_head(value).register_forward_hook(lambda head, inputs, values: values - shift)
    for model in (policy, value):
        disable_dropout_and_rescaling(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)


def _tell_departures(config: PPOConfig, tokenizer: Tokenizer) -> None:
    """Warn if TRL's trainer does not do what these options say."""
    told, steps, limit = [], config.num_mini_batches, config.max_grad_norm
    if steps > 1:
        told.append(f"one optimizer step per pass, not num_mini_batches = {steps}")
    if config.gradient_accumulation_steps * steps > 1:
        told.append("a step at every micro-batch in the last batch of a pass over the prompts")
    if limit:
        told.append(f"no gradient clipping, although max_grad_norm is {limit}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        told.append("no gradient for EOS, because it is the pad token too")
    if told:
        departures = "; ".join(told)
        warnings.warn(f"TRL's PPOTrainer departs from these options: {departures}.", stacklevel=3)
