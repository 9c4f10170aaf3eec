"""PPO as in InstructGPT: the loop reads as the paper."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from trl_instruct.configs import PPOConfig
from trl_instruct.data.records import require_columns
from trl_instruct.data.sources import Source
from trl_instruct.errors import InputError
from trl_instruct.generation.engines import sampler_of
from trl_instruct.generation.sampler import Sampler, SamplerError, draw_in_all
from trl_instruct.generation.sampling import pad_prompts, prompt_tokens
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.models import sharding
from trl_instruct.models.properties import evaluating, model_name
from trl_instruct.models.tokenizers import check_tokenizer
from trl_instruct.option_checks import check_arguments
from trl_instruct.padding import unpadded
from trl_instruct.ppo_trainer import rollouts
from trl_instruct.ppo_trainer.advantages import (
    adapted_kl_coef,
    advantages_and_returns,
    kl_per_token,
    masked_moments,
    masked_whiten,
    token_rewards,
)
from trl_instruct.ppo_trainer.curves import LOGGED_SAMPLES, is_due, show_samples
from trl_instruct.ppo_trainer.ema import MovingAverage
from trl_instruct.ppo_trainer.iteration_trainer import IterationTrainer, set_learning_rate
from trl_instruct.ppo_trainer.metrics import check_finite, iteration_metrics, step_means, told_means
from trl_instruct.ppo_trainer.micro_batch import add_ptx_gradient, ppo_sums
from trl_instruct.ppo_trainer.ptx import PretrainingRows, pretraining_rows
from trl_instruct.ppo_trainer.roles import check_roles, place_frozen, reference_for
from trl_instruct.ppo_trainer.rollout_scores import judged_metrics, rollout_scores, without_eos
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue, Rollout, ValueModel
from trl_instruct.ppo_trainer.run_state import restore, save_rest
from trl_instruct.rewards.function import RewardError, RewardFunction, as_completions
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.types import Model, Tokenizer


class PPOTrainer(IterationTrainer):
    """Proximal policy optimisation of a language model against a reward (InstructGPT 3.5, C.4).

    One `global_step` is one iteration: sample a rollout batch, score it, compute advantages, take
    `num_ppo_epochs` passes of `num_mini_batches` optimizer steps over it.

    Args:
        processing_class: the policy's tokenizer; if it has no pad token, EOS is used.
        model: the policy; with LoRA, only its adapter trains.
        ref_model: frozen reference of the KL penalty; None: a copy of the policy (LoRA: its base).
        reward_model: a reward function (see `rewards/function.py`), or a scalar sequence
            classifier with the policy's tokenizer.
        train_dataset: column `prompt` (text or messages); other columns go to the reward.
        value_model: a scalar sequence classifier with the policy's tokenizer; every weight that is
            not frozen trains.
        ptx_dataset: pretraining text (column `text`) for PPO-ptx, if `ptx_coef` is not 0.
        sampler: what draws the completions (`generation/sampler.py`); default: as `args` says.
        gold: a reward that is logged as objective/gold but not trained on: if it falls while the
            score rises, the policy exploits its reward.

    Raises:
        InputError: one model in two roles, a tokenizer without EOS, prompts that are empty, too
            long or lack a chat template, a reward that fails, an unsupported launch.
        FloatingPointError: a loss that is not a finite number.
    """

    args: PPOConfig
    processing_class: Tokenizer

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Tokenizer,
        model: Model,
        ref_model: Model | None,
        reward_model: RewardFunction | Model,
        train_dataset: Dataset,
        value_model: Model,
        ptx_dataset: Dataset | IterableDataset | None = None,
        gold: RewardFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
        sampler: Sampler | None = None,
        **others: Any,
    ):
        check_arguments(others, PPOConfig.REFUSED)
        require_columns(train_dataset.column_names, Source.of(train_dataset), ["prompt"], "PPO")
        check_roles(model, ref_model, reward_model, value_model)
        check_tokenizer(processing_class, model_name(model))
        self.ref_model = reference_for(model, ref_model, args)
        if isinstance(reward_model, nn.Module):
            reward_model = RewardModel(reward_model, processing_class)
        self.reward, self.gold = reward_model, gold
        rollouts.disable_dropout_and_rescaling(model)
        rollouts.disable_dropout_and_rescaling(value_model)
        super().__init__(
            model=PolicyAndValue(model, ValueModel(value_model)),
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if args.stop_when_exploited and gold is None:
            raise InputError(
                "stop_when_exploited watches gold, a judge that is not trained on: give a member "
                "that is left out of the reward, a second reward model, or `tiny`."
            )
        sharding.check_launch(self.accelerator, [model, value_model], args)
        frozen = self.accelerator, self.ref_model, [self.reward, self.gold], processing_class
        self.in_use = place_frozen(*frozen, args=args, trained=[model, value_model])
        self.kl_coef, self.judged = args.kl_coef, []
        self.skipped = 0
        self.average: MovingAverage | None = None
        self.pretraining: PretrainingRows | None = None
        if args.ptx_coef:
            self.pretraining = pretraining_rows(ptx_dataset, processing_class, args)
        self.prompts, self.cut_prompts = prompt_tokens(
            train_dataset[:], processing_class, model, args
        )
        self.minibatch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sharding.load_unsharded()  # models loaded later (checkpoints, comparisons) are whole
        clip, size = args.max_grad_norm or 0.0, self.minibatch_size
        sharding.configure(self.accelerator, episodes=size, max_grad_norm=clip)
        self.local_batch_size = self.minibatch_size * args.num_mini_batches
        self.batch_size = self.local_batch_size * self.accelerator.num_processes
        episodes = args.total_episodes or int(args.num_train_epochs * len(train_dataset))
        iterations = math.ceil(episodes / self.batch_size)
        self.num_iterations = args.max_steps if args.max_steps > 0 else iterations
        self.iterations_per_epoch = len(self.prompts) / self.batch_size
        self.sampler = sampler or sampler_of(args)
        self.sampler.begin(self.policy, processing_class, self.accelerator)

    @property
    def policy(self) -> Model:
        """The policy without the processes' wrappers."""
        return self.accelerator.unwrap_model(self.model).policy

    @property
    def value_model(self) -> Model:
        """The value model without the processes' wrappers."""
        return self.accelerator.unwrap_model(self.model).value.model

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run all iterations; return their number and the last metrics.

        `resume_from_checkpoint` is as in `find_checkpoint`. A resumed run ends with the weights of
        an uninterrupted one.
        """
        self.begin(resume_from_checkpoint)
        for rows in islice(self.prompt_batches(), self.state.global_step, None):
            self.begin_iteration()
            self.started = time.perf_counter()
            rollout = self.sample(rows)
            rollout = self.score(rollout, rows)
            rewards, kl = self.rewards(rollout)
            advantages, returns = self.advantages(rollout, rewards)
            measured = self.second_opinion(rollout, rows) | self.measure(rollout, kl, returns)
            self.judge_weights(measured, may_fail="objective/gold" if self.gold else None)
            stats = self.update(rollout, advantages, returns)
            metrics = measured | stats | self.progress()
            self.adapt_kl_coef(metrics)
            self.end_iteration(metrics)
            self.show(rollout, rows)
            if self.control.should_training_stop:
                break
        return self.end_training()

    def prompt_batches(self) -> Iterator[list[int]]:
        """Rows of the prompt dataset: this process's part of each rollout batch."""
        first, stride = self.accelerator.process_index, self.accelerator.num_processes
        sizes = (len(self.prompts), self.batch_size, self.num_iterations)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        for batch in rollouts.prompt_batches(*sizes, seed=seed):
            yield batch[first::stride]

    @torch.no_grad()
    def sample(self, rows: Sequence[int]) -> Rollout:
        """Sample completions of these prompts, with log-probabilities and values; no scores yet."""
        prompts = [self.prompts[row] for row in rows]
        model = self.accelerator.unwrap_model(self.model)
        size = self.args.local_rollout_forward_batch_size
        sampling = Sampling.of(self.args, self.args.rollout_batch_size or size)
        gathered = sharding.gathered_weights(self.accelerator, self.model_wrapped)
        with self.saved_on(SamplerError), gathered:
            drawn = draw_in_all(self.sampler, prompts, sampling)
            tokens = *pad_prompts(prompts, drawn.ended.device), *drawn[:3]
            blank = torch.zeros_like(drawn.completion_ids, dtype=torch.float32)  # not known yet
            rollout = Rollout(*tokens, blank, blank, blank, blank[:, 0], drawn.logprobs)
            how: Any = {"temperature": self.args.temperature, "by_policy": drawn.by_policy}
            given = rollout, model, self.ref_model
            with evaluating(model), self.accelerator.autocast(), self.in_use(self.ref_model):
                return rollouts.with_logprobs(*given, batch_size=size, **how)

    def score(self, rollout: Rollout, rows: Sequence[int]) -> Rollout:
        """The rollout with the reward's score of each completion, adjusted for a missing EOS.

        If the reward fails, the state before this iteration is saved and the run ends; with
        `on_error: skip`, the score is NaN and the episode is left out of the update.
        """
        given = self.reward_inputs(rollout, rows)
        skip = self.args.on_error == "skip"
        with self.saved_on(RewardError), self.in_use(self.reward):
            found, self.skipped = rollout_scores(self.reward, *given, rows=rows, skip=skip)
        scores = torch.tensor(found, device=rollout.scores.device)
        return rollout._replace(scores=without_eos(scores, rollout.ended, self.args))

    def reward_inputs(
        self, rollout: Rollout, rows: Sequence[int]
    ) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """The arguments of a reward function: prompts, completions, columns and, as in TRL,
        `log_metric(name, value)`, whose values of an iteration are logged by their mean."""
        columns = self.train_dataset.select(list(rows))[:]
        prompts = columns.pop("prompt")
        texts = rollout.texts(self.processing_class, self.args.stop_strings)
        ids = unpadded(rollout.completion_ids, rollout.completion_lengths)
        columns |= {"completion_ids": ids, "log_metric": self.log_metric}
        return prompts, as_completions(prompts, texts), columns

    def second_opinion(self, rollout: Rollout, rows: Sequence[int]) -> dict[str, float]:
        """objective/gold, from a reward that is not trained on; if it fails, the run continues."""
        if self.gold is None:
            return {}
        given, iteration = self.reward_inputs(rollout, rows), self.state.global_step + 1
        with self.in_use(self.gold):
            return judged_metrics(self.gold, *given, rows=rows, iteration=iteration)

    def rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Per-token rewards including the KL penalty, and the KL itself: each `(B, C)`."""
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs)
        lengths = rollout.completion_lengths
        rewards = token_rewards(rollout.scores, kl, lengths, kl_coef=self.kl_coef)
        if self.args.whiten_rewards:
            rewards = self.whiten(rewards, rollout.mask, shift_mean=False)
        return rewards, kl

    def advantages(self, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened GAE advantages, and returns: each `(B, C)`."""
        args, given = self.args, (rewards, rollout.values, rollout.mask)
        lams: Any = {"lam": args.lam, "lam_alpha": args.lam_alpha, "value_lam": args.value_lam}
        advantages, returns = advantages_and_returns(*given, gamma=args.gamma, **lams)
        return self.whiten(advantages, rollout.mask), returns

    def whiten(self, values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
        """Values `(B, C)` whitened over the tokens of all processes."""
        moments = masked_moments(*self.accelerator.gather((values, mask)))
        return masked_whiten(values, mask, shift_mean=shift_mean, moments=moments)

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Run the PPO epochs, one optimizer step per minibatch; return the mean statistics."""
        self.model.train()
        steps: list[dict[str, float]] = []
        for part in self.minibatches():
            episodes = rollout.select(part)
            if self.skipped and not self.accelerator.reduce(episodes.mask.sum(), "sum"):
                continue
            steps.append(self.step(episodes, advantages[part], returns[part]))
            if steps[-1]["policy/approxkl"] > (self.args.target_kl or math.inf):
                break
        return step_means(steps)

    def minibatches(self) -> Iterator[Tensor]:
        """Rows of this process's rollout, one minibatch at a time, reshuffled in every epoch."""
        for _ in range(self.args.num_ppo_epochs):
            yield from torch.randperm(self.local_batch_size).split(self.minibatch_size)

    def step(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """One optimizer step on one minibatch, accumulated over its micro-batches.

        The loss is the mean over all real tokens of the minibatch, in all processes: how it is
        split into micro-batches changes nothing.
        """
        tokens = self.accelerator.reduce(rollout.mask.sum(), "sum")
        weight = self.accelerator.num_processes / tokens  # processes average their gradients
        stats: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=tokens.device))
        still = self.state.global_step < self.args.value_warmup_iterations  # the policy stays
        if self.pretraining is not None and not still:
            every, mine = self.accelerator.num_processes, self.accelerator.process_index
            count = self.args.ptx_rows_per_episode * len(rollout.scores) * every
            rows = self.pretraining.take(count)[mine::every]
            ptx = add_ptx_gradient(self.accelerator, self.model_wrapped, rows, args=self.args)
            stats["loss/ptx"] = ptx / weight
        micro_batches = rollout.lengths.argsort().split(self.args.per_device_train_batch_size)
        for index, part in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with sharding.micro_batch(self.accelerator, self.model_wrapped, last=last):
                given = (rollout.select(part), advantages[part], returns[part])
                sums = ppo_sums(self.model_wrapped, *given, args=self.args)
                loss = sums["loss/policy"] * (not still) + self.args.vf_coef * sums["loss/value"]
                self.accelerator.backward(loss * weight)
            for name, value in sums.items():
                stats[name] += value.detach()
        means = {name: self.accelerator.reduce(s, "sum") / tokens for name, s in stats.items()}
        check_finite(means, self.state.global_step + 1)
        limit = self.args.max_grad_norm or math.inf
        means["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        if still:
            self.policy.zero_grad()  # no gradient instead of 0: AdamW leaves these weights alone
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return {name: float(value) for name, value in means.items()}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; the value function may have its own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        shared = set(self.policy.parameters())  # shared if the value is a head on the policy
        own = [p for p in self.value_model.parameters() if p not in shared]
        rate = self.args.value_learning_rate
        set_learning_rate(optimizer, own, self.args.learning_rate if rate is None else rate)
        return optimizer

    def begin(self, resume_from_checkpoint: str | bool | None) -> None:
        """Start the run, or resume it from a checkpoint."""
        checkpoint = self.remember(resume_from_checkpoint)
        if self.args.ema_decay is not None:
            self.average = MovingAverage(self.policy, self.args.ema_decay)
        if checkpoint is not None:
            restore(self, checkpoint)
        self.begin_training(checkpoint)

    def measure(self, rollout: Rollout, kl: Tensor, returns: Tensor) -> dict[str, Any]:
        """Metrics of the weights that sampled, over the episodes and tokens of all processes."""
        return {
            **iteration_metrics(self.accelerator, rollout, kl, returns, kl_coef=self.kl_coef),
            **({"objective/skipped": self.skipped} if self.args.on_error == "skip" else {}),
            "objective/kl_coef": self.kl_coef,
            **told_means(self.told_by_rewards),
        }

    def progress(self) -> dict[str, float]:
        """Metrics of the run at the end of an iteration."""
        return {
            "lr": self.lr_scheduler.get_last_lr()[0],
            "eps": self.batch_size / (time.perf_counter() - self.started),
            "episode": (self.state.global_step + 1) * self.batch_size,
        }

    def show(self, rollout: Rollout, rows: Sequence[int]) -> None:
        """Show completions of this iteration, `num_sample_generations` times in a run."""
        step, steps = self.state.global_step, self.num_iterations
        due = is_due(step, steps, times=self.args.num_sample_generations)
        if due and self.is_world_process_zero():
            first = rollout.select(torch.arange(len(rows))[:LOGGED_SAMPLES])
            columns = {
                "prompt": self.train_dataset.select(rows[:LOGGED_SAMPLES])["prompt"][:],
                "completion": first.texts(self.processing_class, self.args.stop_strings),
                "score": first.scores.tolist(),
            }
            given = {"trackers": self.args.report_to, "callbacks": self.callback_handler.callbacks}
            show_samples(step, steps, columns, **given)

    def adapt_kl_coef(self, metrics: dict[str, Any]) -> None:
        """Adapt beta for the next iteration if the KL has a target and the policy trains."""
        target, horizon = self.args.adaptive_kl_target, self.args.adaptive_kl_horizon
        if target is not None and self.state.global_step >= self.args.value_warmup_iterations:
            given = {"target": target, "horizon": horizon, "episodes": self.batch_size}
            self.kl_coef = adapted_kl_coef(self.kl_coef, metrics["objective/kl"], **given)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy (its moving average, if there is one) and tokenizer, for deployment.

        A checkpoint holds the policy that trains, and everything else that a resumed run needs.
        """
        parts = ("policy", "value.model")
        policy, value = sharding.gathered_states(self.accelerator, self.model_wrapped, *parts)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        with nullcontext() if _internal_call or not self.average else self.average.applied():
            self.policy.save_pretrained(folder, state_dict=policy)
        self.processing_class.save_pretrained(folder)
        if _internal_call:
            save_rest(self, folder, value)
