"""PPO as in InstructGPT: the loop reads as the paper."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from trl_instruct.advantages import adapted_kl_coef, gae, kl_per_token, token_rewards
from trl_instruct.checkpoints import (
    find_checkpoint,
    fresh_state,
    is_best,
    load_progress,
    load_weights,
    save_checkpoint,
)
from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.losses import entropy, policy_loss, token_logprobs, value_clipped, value_loss
from trl_instruct.masking import masked_moments, masked_whiten
from trl_instruct.models import (
    ValueModel,
    check_tokenizer,
    context_length,
    evaluating,
    reference_of,
    set_learning_rate,
)
from trl_instruct.ppo_metrics import (
    check_finite,
    episode_metrics,
    mean_over_steps,
    policy_metrics,
    value_metrics,
)
from trl_instruct.rewards import (
    RewardFunction,
    RewardModel,
    as_completions,
    call_reward,
    check_roles,
)
from trl_instruct.rollouts import (
    PolicyAndValue,
    Rollout,
    completion_logprobs,
    completion_values,
    join,
    prompt_batches,
    unify_modes,
)
from trl_instruct.sampling import (
    decode,
    eos_token_ids,
    fit_prompts,
    generate,
    pad_prompts,
    tokenize_prompts,
)
from trl_instruct.stage import write_json

VALUE = "value_model"
PROGRESS = "ppo_state.json"
"""In a checkpoint: the value model's folder, and what PPO adds to trainer_state.json."""


class PPOTrainer(Trainer):
    """Proximal policy optimisation of a language model against a reward (InstructGPT 3.5, C.4).

    One `global_step` is one iteration: sample a rollout batch, score it, compute advantages, take
    `num_ppo_epochs` passes of `num_mini_batches` optimizer steps over it.

    Args:
        args: `PPOConfig`.
        processing_class: the policy's tokenizer; without a pad token, EOS serves.
        model: the policy; a LoRA-wrapped one trains its adapter.
        ref_model: frozen reference of the KL penalty; None: a copy of the policy as given, or, for
            a LoRA policy, its base.
        reward_model: a function `f(prompts, completions, **columns) -> list[float]`, or a scalar
            sequence classifier with the policy's tokenizer.
        train_dataset: column `prompt` (text or messages); further columns reach the reward.
        value_model: a scalar sequence classifier with the policy's tokenizer; its every weight
            trains.
        callbacks: as in `transformers.Trainer`.

    Raises:
        InputError: one model in two roles, a tokenizer without EOS, a prompt that is empty or does
            not fit into the context, messages without a chat template, a reward that returns
            anything but one finite number per completion.
        FloatingPointError: a loss that is no finite number.
    """

    args: PPOConfig
    processing_class: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    control: TrainerControl

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None,
        reward_model: RewardFunction | PreTrainedModel,
        train_dataset: Dataset,
        value_model: PreTrainedModel,
        callbacks: list[TrainerCallback] | None = None,
    ):
        check_roles(model, ref_model, reward_model, value_model)
        check_tokenizer(processing_class, model.config._name_or_path)
        self.ref_model = ref_model or reference_of(model)
        if isinstance(reward_model, nn.Module):
            reward_model = RewardModel(reward_model, processing_class)
        self.reward = reward_model
        self.eos_token_ids = eos_token_ids(model, processing_class)
        unify_modes(model)
        unify_modes(value_model)
        super().__init__(
            model=PolicyAndValue(model, ValueModel(value_model)),
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._place_frozen_models()
        self.kl_coef = args.kl_coef
        self.prompts, self.cut_prompts = fit_prompts(
            tokenize_prompts(train_dataset["prompt"][:], processing_class),
            max_prompt_length=args.max_prompt_length,
            response_length=args.response_length,
            context=context_length(model),
        )
        self.minibatch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.local_batch_size = self.minibatch_size * args.num_mini_batches
        self.batch_size = self.local_batch_size * self.accelerator.num_processes
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        self.num_iterations = math.ceil(episodes / self.batch_size)
        if args.max_steps > 0:
            self.num_iterations = args.max_steps

    @property
    def policy(self) -> PreTrainedModel:
        """The policy, outside of whatever the processes wrap it in."""
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def value_model(self) -> PreTrainedModel:
        """The value model, outside of whatever the processes wrap it in."""
        return self.accelerator.unwrap_model(self.model).value.model

    @property
    def sampler(self) -> dict[str, int]:
        """What decides which prompts an iteration takes: a resumed run must have the same."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return {"prompts": len(self.prompts), "batch_size": self.batch_size, "seed": seed}

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run all iterations; returns the number of iterations and the last metrics.

        Args:
            resume_from_checkpoint: folder of a checkpoint to go on from, or True for the last
                whole one in `output_dir`. A run resumed so ends with the weights of a run that was
                never cut.
        """
        self.begin_training(resume_from_checkpoint)
        for rows in islice(self.prompt_batches(), self.state.global_step, None):
            self.begin_iteration()
            rollout = self.sample(rows)
            rollout = self.score(rollout, rows)
            rewards, kl = self.rewards(rollout)
            advantages, returns = self.advantages(rollout, rewards)
            stats = self.update(rollout, advantages, returns)
            self.end_iteration(rollout, kl, returns, stats)
            if self.control.should_training_stop:
                break
        return self.end_training()

    def prompt_batches(self) -> Iterator[list[int]]:
        """Rows of the prompt dataset, this process's part of one rollout batch at a time."""
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        sizes = (len(self.prompts), self.batch_size, self.num_iterations)
        for batch in prompt_batches(*sizes, seed=self.sampler["seed"]):
            yield batch[first::stride]

    @torch.no_grad()
    def sample(self, rows: Sequence[int]) -> Rollout:
        """Completions of these prompts with log-probabilities and values; scores are still 0."""
        prompts = [self.prompts[row] for row in rows]
        completions, lengths, ended = generate(
            self.policy,
            prompts,
            max_new_tokens=self.args.response_length,
            eos_token_ids=self.eos_token_ids,
            stop_strings=self.args.stop_strings,
            tokenizer=self.processing_class,
            temperature=self.args.temperature,
            batch_size=self.args.local_rollout_forward_batch_size,
        )
        prompt_ids, prompt_lengths = pad_prompts(prompts, completions.device)
        tokens = (prompt_ids, prompt_lengths, completions, lengths, ended)
        blank = torch.zeros(completions.shape, device=completions.device)
        rollout = Rollout(*tokens, blank, blank, blank, blank[:, 0])
        batches = self.forward_batches(rollout)
        with evaluating(self.model):
            parts = [self.judge(rollout.select(batch)) for batch in batches]
        back = torch.cat(batches).argsort()
        logprobs, ref_logprobs, values = (torch.cat(p)[back] for p in zip(*parts, strict=True))
        return rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)

    def forward_batches(self, rollout: Rollout) -> tuple[Tensor, ...]:
        """Row indices of a rollout in batches of similar length, so that little is padding."""
        order = (rollout.prompt_lengths + rollout.completion_lengths).argsort()
        return order.split(self.args.local_rollout_forward_batch_size)

    def judge(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, and values: each `(b, C)`."""
        tokens = rollout[:4]
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            logprobs = completion_logprobs(model.policy, *tokens, temperature=self.args.temperature)
            return (
                logprobs,
                self.reference_logprobs(tokens),
                completion_values(model.value, *tokens),
            )

    def reference_logprobs(self, tokens: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Log-probabilities under the reference model: a LoRA policy's is its own base."""
        if self.ref_model is not None:
            return completion_logprobs(self.ref_model, *tokens, temperature=self.args.temperature)
        with self.policy.disable_adapter():
            return completion_logprobs(self.policy, *tokens, temperature=self.args.temperature)

    def score(self, rollout: Rollout, rows: Sequence[int]) -> Rollout:
        """The rollout with the reward's score of each completion, less the missing-EOS penalty."""
        texts = decode(
            rollout.completion_ids,
            rollout.completion_lengths,
            rollout.ended,
            self.processing_class,
            self.args.stop_strings,
        )
        records = self.train_dataset.select(list(rows))[:]
        prompts = records.pop("prompt")
        given = call_reward(self.reward, prompts, as_completions(prompts, texts), records)
        scores = torch.tensor(given, device=rollout.scores.device)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~rollout.ended
        return rollout._replace(scores=scores)

    def rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Per-token rewards with the KL penalty inside, and the KL itself: each `(B, C)`."""
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, estimator=self.args.kl_estimator)
        rewards = token_rewards(
            rollout.scores, kl, rollout.completion_lengths, kl_coef=self.kl_coef
        )
        if self.args.whiten_rewards:
            rewards = self.whiten(rewards, rollout.mask, shift_mean=False)
        return rewards, kl

    def advantages(self, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened advantages, and returns: each `(B, C)`."""
        advantages, returns = gae(
            rewards, rollout.values, rollout.mask, gamma=self.args.gamma, lam=self.args.lam
        )
        return self.whiten(advantages, rollout.mask), returns

    def whiten(self, values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        """Whitened over the tokens of all processes: `(B, C)`."""
        moments = masked_moments(*self.accelerator.gather((values, mask)))
        return masked_whiten(values, mask, shift_mean=shift_mean, moments=moments)

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """The PPO epochs: a fresh shuffle each, one optimizer step a minibatch. Mean statistics."""
        self.model.train()
        steps: list[dict[str, float]] = []
        for rows in self.minibatches():
            steps.append(self.step(rollout.select(rows), advantages[rows], returns[rows]))
            if steps[-1]["policy/approxkl"] > (self.args.target_kl or math.inf):
                break
        return mean_over_steps(steps)

    def minibatches(self) -> Iterator[Tensor]:
        """Rows of this process's rollouts, a minibatch at a time."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(self.local_batch_size).split(self.minibatch_size)

    def step(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """One optimizer step on one minibatch, accumulated over its micro-batches.

        The loss is the mean over all real tokens of the minibatch, in all processes: how it is
        cut into micro-batches changes nothing.
        """
        tokens = self.accelerator.reduce(rollout.mask.sum(), "sum")
        weight = self.accelerator.num_processes / tokens  # processes average their gradients
        stats: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=tokens.device))
        rows = torch.arange(len(rollout.scores), device=tokens.device)
        micro_batches = rows.split(self.args.per_device_train_batch_size)
        for index, part in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model_wrapped):
                sums = self.losses(rollout.select(part), advantages[part], returns[part])
                loss = sums["loss/policy"] + self.args.vf_coef * sums["loss/value"]
                self.accelerator.backward(loss * weight)
            for name, value in sums.items():
                stats[name] += value.detach()
        means = {name: self.accelerator.reduce(s, "sum") / tokens for name, s in stats.items()}
        check_finite(means, self.state.global_step + 1)
        grad_norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.args.max_grad_norm or math.inf
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        means["grad_norm"] = grad_norm
        return {name: float(value) for name, value in means.items()}

    def losses(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """Sums over the real tokens of a micro-batch: the two losses and what is logged."""
        sequences, width = join(*rollout[:4])
        logits, values = self.model_wrapped(sequences, width)
        cut = Rollout(*(f[:, :width] if f.dim() == 2 else f for f in rollout))
        advantages, returns, mask = advantages[:, :width], returns[:, :width], cut.mask
        logprobs = token_logprobs(logits, cut.completion_ids, temperature=self.args.temperature)
        policy = (logprobs, cut.logprobs, advantages)
        value = (values, cut.values, returns)
        clip, value_clip = self.args.cliprange, self.args.cliprange_value
        per_token = {
            "loss/policy": policy_loss(*policy, cliprange=clip),
            "loss/value": value_loss(*value, cliprange_value=value_clip),
            "policy/entropy": entropy(logits.detach(), temperature=self.args.temperature),
            "val/clipfrac": value_clipped(*value, cliprange_value=value_clip).float(),
            **policy_metrics(*policy, cliprange=clip),
        }
        return {name: torch.where(mask, t, 0.0).sum() for name, t in per_token.items()}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; the value function may have a learning rate of its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.value_learning_rate is not None:
            own = list(self.value_model.parameters())
            set_learning_rate(optimizer, own, self.args.value_learning_rate)
        return optimizer

    def begin_training(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Optimizer, scheduler, processes, callbacks: what `Trainer.train` does before its loop."""
        args = self.args
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = find_checkpoint(Path(str(args.output_dir)), resume_from_checkpoint)
            load_weights(self.policy, checkpoint)
            load_weights(self.value_model, checkpoint / VALUE)
        set_seed(args.seed + 100_003 * self.accelerator.process_index)  # ranks must differ
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.create_scheduler(num_training_steps=self.num_iterations)
        self.state = fresh_state(self)
        if checkpoint:
            self.go_on_from(checkpoint)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.max_steps = self.num_iterations
        self.state.num_train_epochs = math.ceil(self.epochs_after(self.num_iterations))
        self.state.compute_steps(args, self.num_iterations)
        handler = self.callback_handler
        handler.model, handler.optimizer = self.model, self.optimizer
        handler.lr_scheduler = self.lr_scheduler
        self.control = handler.on_train_begin(args, self.state, self.control)

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over all of a checkpoint but its weights."""
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        changed = {name: (progress["sampler"][name], now) for name, now in self.sampler.items()}
        for name, (before, now) in changed.items():
            if before != now:
                raise InputError(
                    f"The checkpoint {str(checkpoint)!r} was made with {name} {before}, this run "
                    f"has {now}: it would see other prompts than the run it goes on with. Resume "
                    "with the same data and batch sizes, or start the run afresh."
                )
        self.metrics, self.kl_coef = progress["metrics"], progress["kl_coef"]
        load_progress(self, checkpoint)

    def epochs_after(self, iterations: int) -> float:
        """Passes over the prompts that this many iterations make."""
        return iterations * self.batch_size / len(self.prompts)

    def begin_iteration(self) -> None:
        """Start the clock and tell the callbacks."""
        self.started = time.perf_counter()
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

    def end_iteration(
        self, rollout: Rollout, kl: Tensor, returns: Tensor, stats: dict[str, float]
    ) -> None:
        """Count, adapt the KL penalty, log and, when it is time, save."""
        handler, before = self.callback_handler, self.epochs_after(self.state.global_step)
        self.state.global_step += 1
        self.state.epoch = self.epochs_after(self.state.global_step)
        means = episode_metrics(rollout, kl, kl_coef=self.kl_coef)
        means = {name: self.accelerator.reduce(x, "mean") for name, x in means.items()}
        means |= value_metrics(*self.accelerator.gather((rollout.values, returns, rollout.mask)))
        self.metrics = {
            **{name: float(mean) for name, mean in means.items()},
            **stats,
            "objective/kl_coef": self.kl_coef,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "eps": self.batch_size / (time.perf_counter() - self.started),
            "episode": self.state.global_step * self.batch_size,
        }
        self.lr_scheduler.step()
        if self.args.adaptive_kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                self.metrics["objective/kl"],
                target=self.args.adaptive_kl_target,
                horizon=self.args.adaptive_kl_horizon,
                episodes=self.batch_size,
            )
        self.control = handler.on_step_end(self.args, self.state, self.control)
        if int(self.state.epoch) > int(before):
            self.control = handler.on_epoch_end(self.args, self.state, self.control)
        if self.control.should_log:
            self.log(dict(self.metrics))
        if is_best(self, self.metrics) and self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = True
        if self.control.should_save:
            save_checkpoint(self)
            self.control = handler.on_save(self.args, self.state, self.control)

    def end_training(self) -> TrainOutput:
        """Tell the callbacks; the last iteration's metrics are the result."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        metrics = {**self.metrics, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, metrics["loss/policy"], metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save policy and tokenizer, which is all that is deployed; checkpoints add the value."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        if _internal_call:
            self.value_model.save_pretrained(folder / VALUE)
            progress = {"kl_coef": self.kl_coef, "metrics": self.metrics}
            write_json(folder / PROGRESS, {"sampler": self.sampler, **progress})

    def _place_frozen_models(self) -> None:
        if self.ref_model is not None:
            unify_modes(self.ref_model)
            self.ref_model.eval().requires_grad_(False).to(self.accelerator.device)
        if isinstance(self.reward, RewardModel):
            self.reward.model.to(self.accelerator.device)
