"""PPO on the same rollouts in one process or several: python tests/processes.py FOLDER [HOW].

torchrun --nproc_per_node 2 tests/processes.py FOLDER [HOW]; HOW: skip or stop (what to do if the
reward fails on one process's prompt), one_base (the models are adapters over one base), no_average
(of the policy's weights), bf16 (and no average), or rm (a reward model is evaluated instead).
"""

import math
import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from conftest import PROMPTS, byte_tokenizer, letters, tiny_model
from datasets import Dataset
from trl import ModelConfig

from trl_instruct.configs import PPOConfig, RewardConfig
from trl_instruct.files import write_json
from trl_instruct.generation import sampling
from trl_instruct.models.shared_base import SharedBase, view_of
from trl_instruct.ppo_trainer.trainer import PPOTrainer
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer
from trl_instruct.rewards.combined import Ensemble
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import score_head

ITERATIONS = 2


def prepared(policy, prompts, sampling, *, eos_token_ids, **options):
    """The same completion for a prompt in every process: 1 to C tokens, some without EOS."""
    max_new_tokens, rows = sampling.response_length, []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(prompt))
        rows.append(torch.randint(97, 123, (max_new_tokens,), generator=generator))
    completions = torch.stack(rows)
    lengths = torch.tensor([1 + sum(prompt) % max_new_tokens for prompt in prompts])
    ended = lengths < max_new_tokens
    completions[ended, lengths[ended] - 1] = eos_token_ids[0]
    return completions, lengths, ended


def in_order(trainer):
    """Minibatches with the same episodes for any number of processes."""
    return lambda: torch.arange(trainer.local_batch_size).split(trainer.minibatch_size)


def fsdp(trainer):
    return trainer.accelerator.distributed_type == DistributedType.FSDP


def after_each_backward(trainer):
    """After each, whether the policy's gradients are where an optimizer reads them: the shards."""
    backward, seen = trainer.accelerator.backward, []

    def spy(loss, **options):
        backward(loss, **options)
        seen.append(all(weight.grad is not None for weight in trainer.policy.parameters()))

    trainer.accelerator.backward = spy
    return seen


def halved(prompts, completions):
    return [score / 2 for score in letters(prompts, completions)]


def failing(prompts, completions):
    """`letters`, but no score for two prompts."""
    scores = letters(prompts, completions)
    return [math.nan if p in PROMPTS[3:5] else s for p, s in zip(prompts, scores, strict=True)]


def one_base(folder):
    """Policy, reference, reward and value over the base in `base`, next to the folder."""
    base = SharedBase(folder.parent / "base", ModelConfig(use_peft=True))
    torch.manual_seed(0)
    policy, value = base.policy(), base.fresh_classifier()
    judge = RewardModel(base.fresh_classifier(), byte_tokenizer())
    torch.nn.init.normal_(score_head(judge.model).weight)
    return policy, view_of(policy).requires_grad_(False), judge, value


def evaluated(folder):
    """Metrics of a reward model on five rankings, which two processes cannot share evenly."""
    rankings = [
        {
            "prompt": prompt,
            "responses": list("abcde")[: 2 + row % 4],
            "ranks": [*range(1, 3 + row % 4)],
        }
        for row, prompt in enumerate(PROMPTS[:5])
    ]
    options = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = RankingRewardTrainer(
        model=tiny_model(classifier=True),
        args=RewardConfig(per_device_eval_batch_size=1, disable_tqdm=True, **options),
        train_dataset=Dataset.from_list(rankings),
        eval_dataset=Dataset.from_list(rankings),
        processing_class=byte_tokenizer(),
    )
    found = trainer.evaluate()
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    return trainer, {name: found[f"eval_{name}"] for name in names}


def main(folder, how=None):
    if how == "rm":
        trainer, found = evaluated(folder)
        if trainer.is_world_process_zero():
            write_json(folder / "metrics.json", found)
        return
    on_error = how if how in ("skip", "stop") else None
    several = Ensemble([letters, halved], "pessimistic")
    policy, ref_policy, judge = tiny_model(), None, failing if on_error else several
    value = tiny_model(classifier=True, seed=1)
    if how == "one_base":
        policy, ref_policy, judge, value = one_base(folder)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sampling.generate = prepared
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=how == "bf16",
            per_device_train_batch_size=2 // processes,
            gradient_accumulation_steps=2,
            num_mini_batches=2,
            response_length=6,
            max_steps=ITERATIONS,
            learning_rate=1e-3,
            warmup_steps=0,
            lr_scheduler_type="constant",
            whiten_rewards=True,
            missing_eos_penalty=0.5,
            adaptive_kl_target=0.001,
            adaptive_kl_horizon=40,
            ema_decay=None if how in ("no_average", "bf16") else 0.5,
            ptx_coef=0.1,
            ptx_max_length=8,
            ptx_rows_per_episode=1,
            gradient_checkpointing=False,
            save_strategy="steps",
            save_steps=1,
            disable_tqdm=True,
            report_to="none",
            on_error=on_error or "stop",
        ),
        processing_class=byte_tokenizer(),
        model=policy,
        ref_model=ref_policy,
        reward_model=judge,
        gold=letters,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        value_model=value,
        ptx_dataset=Dataset.from_dict({"text": [f"some text {row}" for row in range(30)]}),
    )
    trainer.minibatches = in_order(trainer)
    reduced = after_each_backward(trainer)
    trainer.train(resume_from_checkpoint=(folder / "checkpoint-1").is_dir() or None)
    trainer.save_model(str(folder))
    logs = [{k: v for k, v in log.items() if k != "eps"} for log in trainer.state.log_history]
    if trainer.is_world_process_zero():
        plugin = trainer.accelerator.state.fsdp_plugin if fsdp(trainer) else None
        policy = plugin and plugin.mixed_precision_policy
        told = {"reduced": reduced, "reduce_dtype": str(policy and policy.reduce_dtype)}
        write_json(folder / "logs.json", {"processes": processes, "logs": logs, **told})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    # All results are written. On a busy machine the interpreter's end meets gloo's threads, which
    # may abort the process ("terminate called without an active exception").
    os._exit(0)
