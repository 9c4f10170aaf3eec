"""InstructGPT in three calls: supervised fine-tuning, a reward model from rankings, PPO."""

import importlib.metadata
from typing import Any

from trl_instruct.console import silence_harmless_warnings

# In the order of the pipeline. Loaded on first use: `import trl_instruct` stays light.
_DOORS = {
    "recipes.pretrain": "pretrain",
    "recipes.sft": "sft",
    "recipes.candidates": "sample_candidates",
    "recipes.rm": "rm",
    "reward_trainer.evaluation": "evaluate_reward",
    "recipes.ppo": "ppo",
    "evaluation.compare": "compare",
    "evaluation.evaluate": "evaluate",
    "diagnosis.page": "report",
    "configs": "SFTConfig RewardConfig PPOConfig EvaluateConfig",
    "data.records": "load_demonstrations load_prompts",
    "data.rankings": "load_rankings",
    "data.pairs": "load_pairs rankings_to_pairs split_by_prompt",
    "data.reading": "Reading",
    "rewards.reward_model": "RewardModel",
    "rewards.load": "load_reward",
    "rewards.classifier": "ClassifierReward",
    "rewards.http": "HTTPReward",
    "rewards.server": "RewardServer",
    "rewards.judge": "LLMJudge",
    "rewards.combined": "WeightedSum Ensemble Clipped Bounded Normalised LengthPenalty TimeLimit",
    "reward_trainer.trainer": "RankingRewardTrainer",
    "ppo_trainer.trainer": "PPOTrainer",
    "ppo_trainer.upstream": "RewardModule",
    "recipes.stage": "StageResult",
    "errors": "InputError",
}
_EXPORTS = {name: module for module, names in _DOORS.items() for name in names.split()}
__all__ = list(_EXPORTS)

silence_harmless_warnings()  # before the first import of a library that warns


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("trl-instruct")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trl_instruct' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_instruct.{_EXPORTS[name]}"), name)
