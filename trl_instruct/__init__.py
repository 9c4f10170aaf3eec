"""InstructGPT in three calls: supervised fine-tuning, a reward model from rankings, PPO."""

import importlib.metadata
from typing import Any

from trl_instruct.console import silence_harmless_warnings

# In the order of the pipeline. Loaded on first use: `import trl_instruct` stays light.
_EXPORTS = {
    "pretrain": "recipes.pretrain",
    "sft": "recipes.sft",
    "sample_candidates": "recipes.candidates",
    "rm": "recipes.rm",
    "evaluate_reward": "reward_trainer.evaluation",
    "ppo": "recipes.ppo",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.evaluate",
    "report": "diagnosis.page",
    "SFTConfig": "configs",
    "RewardConfig": "configs",
    "PPOConfig": "configs",
    "EvaluateConfig": "configs",
    "load_demonstrations": "data.records",
    "load_rankings": "data.rankings",
    "load_pairs": "data.pairs",
    "load_prompts": "data.records",
    "Reading": "data.reading",
    "rankings_to_pairs": "data.pairs",
    "split_by_prompt": "data.pairs",
    "RewardModel": "rewards.reward_model",
    "load_reward": "rewards.load",
    "ClassifierReward": "rewards.classifier",
    "HTTPReward": "rewards.http",
    "RewardServer": "rewards.server",
    "LLMJudge": "rewards.judge",
    "WeightedSum": "rewards.combined",
    "Clipped": "rewards.combined",
    "Normalised": "rewards.combined",
    "LengthPenalty": "rewards.combined",
    "TimeLimit": "rewards.combined",
    "RankingRewardTrainer": "reward_trainer.trainer",
    "PPOTrainer": "ppo_trainer.trainer",
    "RewardModule": "ppo_trainer.upstream",
    "StageResult": "recipes.stage",
    "InputError": "errors",
}
__all__ = list(_EXPORTS)

silence_harmless_warnings()  # before the first import of a library that warns


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("trl-instruct")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_instruct' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_instruct.{_EXPORTS[name]}"), name)
