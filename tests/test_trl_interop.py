"""The pieces in other TRL projects: its stock trainers take them as they are."""

import pytest
from datasets import Dataset
from test_recipes import RANKINGS, chat, vowels
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_instruct.pairs import load_pairs, rankings_to_pairs
from trl_instruct.rankings import load_rankings
from trl_instruct.rewards import RewardModel

pytestmark = pytest.mark.slow  # whole stages

QUICK = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "gradient_checkpointing": False,
}
TEXT = rankings_to_pairs(load_rankings(Dataset.from_list(RANKINGS)))
CHAT = rankings_to_pairs(load_rankings(Dataset.from_list([chat(row) for row in RANKINGS])))
IMPLICIT = load_pairs(Dataset.from_list([{"chosen": "Q: good", "rejected": "Q: bad"}] * 4))


@pytest.mark.parametrize("pairs", [TEXT, CHAT, IMPLICIT], ids=["text", "chat", "implicit"])
def test_pairs_feed_the_stock_reward_trainer(pairs, reward_model, chat_tokenizer, tmp_path):
    trainer = RewardTrainer(
        model=reward_model,
        args=RewardConfig(output_dir=str(tmp_path), **QUICK),
        train_dataset=pairs,
        processing_class=chat_tokenizer,
    )
    assert trainer.train().training_loss > 0
    assert len(trainer.train_dataset) == len(pairs)


@pytest.mark.parametrize("pairs", [TEXT, CHAT, IMPLICIT], ids=["text", "chat", "implicit"])
def test_pairs_feed_the_stock_dpo_trainer(pairs, saved_policy, chat_tokenizer, tmp_path):
    trainer = DPOTrainer(
        model=str(saved_policy),
        args=DPOConfig(output_dir=str(tmp_path), **QUICK),
        train_dataset=pairs,
        processing_class=chat_tokenizer,
    )
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("form", ["text", "chat"])
def test_rewards_drop_into_grpo(form, policy, reward_model, chat_tokenizer, tmp_path):
    try:
        from trl import GRPOConfig, GRPOTrainer
    except RuntimeError as error:  # TRL 1.12 needs `requests` here and does not declare it
        pytest.skip(f"GRPOTrainer cannot be imported: {error.__cause__}")
    rows = [{"prompt": f"Q{i}: "} for i in range(4)]
    seen = []

    def counted(prompts, completions, **columns):
        seen.append(len(completions))
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return vowels(prompts, texts)

    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[RewardModel(reward_model, chat_tokenizer), counted],
        args=GRPOConfig(output_dir=str(tmp_path), **options, **QUICK),
        train_dataset=Dataset.from_list(rows if form == "text" else [chat(row) for row in rows]),
        processing_class=chat_tokenizer,
    )
    trainer.train()
    assert sum(seen) == 4
