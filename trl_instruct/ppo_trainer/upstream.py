"""The same call driven by TRL's own PPOTrainer (`engine="trl"`), which TRL has up to 1.12.

It is the reference that our trainer is checked against, and the other side of the benchmark. What
TRL does otherwise stays as it is: one optimizer step a pass however many minibatches there are, a
step at every micro-batch in the last batch of a pass over the prompts, no gradient clipping, the
score one position behind the completion's last token, and, with pad == eos, no gradient for EOS.
"""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import TrainOutput

from trl_instruct.configs import PPOConfig, StageConfig
from trl_instruct.errors import InputError
from trl_instruct.generation.sampling import decode, pad_prompts, prompt_tokens
from trl_instruct.models.properties import accepted, unwrapped
from trl_instruct.padding import left_padded_mask, unpadded
from trl_instruct.ppo_trainer.roles import check_roles
from trl_instruct.ppo_trainer.rollouts import disable_dropout_and_rescaling
from trl_instruct.rewards.function import (
    RewardFunction,
    as_completions,
    call_reward,
    parts_of,
    tell_tokenizer,
)
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import score_head, shift_of

# Options of ours that are done with before or after the training itself.
OUTSIDE = {
    "engine",
    "gold",
    "summary_file",
    "opening_length",
    "max_prompt_length",
    "value_model_path",
    "share_base",
    "reward_weights",
}
# Options of TrainingArguments that TRL's PPOTrainer takes and does not read.
UNREAD = {"data_seed", "resume_from_checkpoint", "max_grad_norm"}


class _Prompt(NamedTuple):
    record: Mapping[str, Any]
    ids: Tensor  # as wide as its batch, 0 on padding: what TRL shows a reward model


class RewardModule(nn.Module):
    """Any reward as the `nn.Module` that TRL's PPOTrainer takes for a reward model.

    TRL calls the module under `base_model_prefix` with token ids, hands its last hidden state to
    `score` and reads one position. Here the ids are turned into text, the reward is called, and its
    score stands at every position. Ids alone do not say where the prompt ends, nor what further
    columns it has, so the module sees the batches as they are made, which hold `prompt` beside
    `input_ids`: `PPOTrainer(reward_model=module, data_collator=module.collate, ...)`.

    Args:
        reward: a function `f(prompts, completions, **columns) -> list[float]`, or a `RewardModel`
            (with whatever tokenizer).
        tokenizer: the policy's.
    """

    base_model_prefix = "backbone"

    def __init__(self, reward: RewardFunction, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.reward = reward
        self.tokenizer = tokenizer
        tell_tokenizer(reward, tokenizer)
        models = [getattr(part, "model", None) for part in parts_of(reward)]
        # So that they move to the device with this module.
        self.models = nn.ModuleList(m for m in models if isinstance(m, nn.Module))
        self.score = nn.Identity()
        self.pending: deque[_Prompt] = deque()

    @property
    def backbone(self) -> "RewardModule":
        """What TRL calls with the ids."""
        return self

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch as TRL's PPOTrainer reads it, padded on the left; its prompts are remembered.

        Args:
            rows: `prompt` (text or messages), `input_ids`, and the columns for the reward.

        Raises:
            InputError: rows without `prompt`.
        """
        if "prompt" not in rows[0]:
            raise InputError(
                f"The training data have the columns {sorted(rows[0])}; a RewardModule needs "
                "`prompt` (text or messages) beside `input_ids`."
            )
        ids, lengths = pad_prompts([row["input_ids"] for row in rows], torch.device("cpu"))
        pad = self.tokenizer.pad_token_id
        padded = torch.where(left_padded_mask(lengths, ids.shape[1]), ids, pad)
        shown = padded.masked_fill(padded == pad, 0)
        self.pending.extend(_Prompt(row, ids) for row, ids in zip(rows, shown, strict=True))
        return {"input_ids": padded}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> BaseModelOutput:
        """The rewards of these rows as hidden states `(B, T, 1)`, the same at every position.

        Args:
            input_ids: `(B, T)` prompts and completions, 0 on padding.
            attention_mask: `(B, T)` True on tokens other than the pad token.

        Raises:
            InputError: rows that are not those of `collate`, in their order; a faulty reward.
        """
        prompts = self._remembered(input_ids.cpu())
        width = len(prompts[0].ids)
        asked = [prompt.record["prompt"] for prompt in prompts]
        ids, texts = self._completions(input_ids[:, width:], attention_mask[:, width:])
        names = [name for name in prompts[0].record if name not in ("prompt", "input_ids")]
        columns = {name: [prompt.record[name] for prompt in prompts] for name in names}
        columns["completion_ids"] = ids
        given = call_reward(self.reward, asked, as_completions(asked, texts), columns)
        scores = torch.tensor(given, device=input_ids.device).view(-1, 1, 1)
        hidden = scores.expand(-1, input_ids.shape[1], 1)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))

    def _completions(self, ids: Tensor, mask: Tensor) -> tuple[list[list[int]], list[str]]:
        """Tokens and text of each completion, up to where it ended."""
        counts = mask.bool().cumprod(dim=1).sum(dim=1)
        last = ids.gather(1, (counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        ended = (counts > 0) & (last == self.tokenizer.eos_token_id)
        return unpadded(ids, counts), decode(ids, counts, ended, self.tokenizer)

    def _remembered(self, input_ids: Tensor) -> list[_Prompt]:
        """The prompts of the next rows, after a look at whether they are these rows'."""
        count = min(len(input_ids), len(self.pending))
        prompts = [self.pending.popleft() for _ in range(count)]
        if count < len(input_ids) or any(
            not torch.equal(ids[: len(prompt.ids)], prompt.ids)
            for ids, prompt in zip(input_ids, prompts, strict=True)
        ):
            raise InputError(
                "A RewardModule was asked to score rows that it has not seen made. Pass "
                "data_collator=module.collate to PPOTrainer, one module for one trainer, without "
                "an eval_dataset."
            )
        return prompts


class UpstreamTrainer(Trainer):
    """TRL's PPOTrainer with the constructor of ours: mixed into it by `upstream_trainer`.

    `gold` is not used: TRL's loop has no place where it could be logged.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: RewardFunction | PreTrainedModel,
        train_dataset: Dataset,
        value_model: PreTrainedModel,
        ptx_dataset: None = None,
        gold: RewardFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_roles(model, ref_model, reward_model, value_model)
        _check_architectures(model, value_model)
        self.prompts, self.cut_prompts = prompt_tokens(
            train_dataset["prompt"][:],
            processing_class,
            model,
            max_prompt_length=args.max_prompt_length,
            response_length=args.response_length,
        )
        if isinstance(reward_model, PreTrainedModel):
            reward_model = RewardModel(reward_model, processing_class)
        judge = RewardModule(reward_model, processing_class)
        records = zip(train_dataset, self.prompts, strict=True)
        _prepare(model, value_model, args)
        self.generation_config = model.generation_config
        # TRL fills the sampling settings that it does not name (repetition_penalty, ...) from it.
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
        """Run all iterations; returns the number of iterations and the last metrics."""
        super().train()
        metrics = {**self.metrics, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, metrics["loss/policy"], metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log under our names: TRL appends `_avg` to some."""
        self.metrics = {name.removesuffix("_avg"): value for name, value in logs.items()}
        super().log(dict(self.metrics))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save policy and tokenizer, with the generation_config that the policy came with."""
        sampling, self.policy_model.generation_config = (
            self.policy_model.generation_config,
            self.generation_config,
        )
        super().save_model(output_dir, _internal_call)
        self.policy_model.generation_config = sampling


def upstream_trainer(config: PPOConfig) -> type[UpstreamTrainer]:
    """TRL's own PPOTrainer behind the constructor of ours.

    Completions end at the tokenizer's EOS only, callbacks cannot stop the run, and the metrics are
    those that TRL logs.

    Args:
        config: what it is to run with.

    Raises:
        InputError: a TRL without PPOTrainer; an option that TRL's trainer does not have.
    """
    module = _trl_ppo()
    _check_options(config, module.PPOConfig)
    return type("UpstreamPPOTrainer", (UpstreamTrainer, module.PPOTrainer), {})


def trl_config(config: PPOConfig, num_prompts: int) -> Any:
    """TRL's PPOConfig with the meaning of ours.

    TRL calls minibatches what it cuts a rollout batch into, and yet takes one step a pass over it;
    so the batch is given as one minibatch, whose losses its metrics then average rightly.

    Args:
        config: our options.
        num_prompts: rows of the training data.

    Raises:
        InputError: fewer prompts than a rollout batch needs.
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
    """The module `trl.experimental.ppo`; InputError where TRL has none."""
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


def _check_options(config: PPOConfig, trl_class: Any) -> None:
    """InputError for an option that TRL's trainer does not have and that is not at its default."""
    known = {f.name for kind in (StageConfig, TrainingArguments, trl_class) for f in fields(kind)}
    defaults = {f.name: f.default for f in fields(config)}
    missing = (set(defaults) - known - OUTSIDE) | UNREAD
    set_ones = [
        f"{name} ({getattr(config, name)!r})"
        for name in sorted(missing)
        if getattr(config, name) != defaults[name]
        and not (name == "max_grad_norm" and not config.max_grad_norm)  # no clipping: as TRL does
    ]
    if set_ones:
        raise InputError(
            f"engine='trl' has no {', '.join(set_ones)}: TRL's PPOTrainer does not know it or does "
            "not read it. Leave it at its default, or leave engine at its own."
        )


def _check_architectures(policy: PreTrainedModel, value: PreTrainedModel) -> None:
    for model in (unwrapped(policy), value.base_model):
        if not accepted(model, position_ids=None):
            raise InputError(
                f"{type(model).__name__} takes no position_ids, which TRL's PPOTrainer gives every "
                "model. Leave engine at its default."
            )


def _prepare(policy: PreTrainedModel, value: PreTrainedModel, config: PPOConfig) -> None:
    """What our trainer does to its models and TRL's does not, so that both train the same ones."""
    shift = shift_of(value)
    score_head(value).register_forward_hook(lambda head, inputs, values: values - shift)
    for model in (policy, value):
        disable_dropout_and_rescaling(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)


def _tell_departures(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where TRL's trainer does not do what these options say."""
    told = {
        f"one optimizer step a pass, not num_mini_batches = {config.num_mini_batches}": (
            config.num_mini_batches > 1
        ),
        "a step at every micro-batch in the last batch of a pass over the prompts": (
            config.gradient_accumulation_steps * config.num_mini_batches > 1
        ),
        f"no clipping of gradients, although max_grad_norm is {config.max_grad_norm}": (
            bool(config.max_grad_norm)
        ),
        "no gradient for EOS, because it is the pad token too": (
            tokenizer.pad_token_id == tokenizer.eos_token_id
        ),
    }
    if any(told.values()):
        departures = "; ".join(text for text, applies in told.items() if applies)
        warnings.warn(f"TRL's PPOTrainer departs from these options: {departures}.", stacklevel=3)
