"""The pieces in other TRL projects: its stock trainers take them as they are."""

import pytest
import trl
from datasets import Dataset
from test_http import running
from test_judge import endpoint
from test_recipes import RANKINGS, chat, vowels
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_instruct.data.pairs import load_pairs, rankings_to_pairs
from trl_instruct.data.rankings import load_rankings
from trl_instruct.rewards.classifier import ClassifierReward
from trl_instruct.rewards.combined import (
    Bounded,
    Clipped,
    Ensemble,
    LengthPenalty,
    Normalised,
    WeightedSum,
)
from trl_instruct.rewards.function import call_reward, reward_name
from trl_instruct.rewards.http import HTTPReward
from trl_instruct.rewards.judge import LLMJudge
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.rewards.server import RewardServer

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


async def politely(prompts, completions, **columns):
    return [1.0 for _ in completions]


@pytest.fixture
def every_adapter(reward_model, make_reward_model, chat_tokenizer):
    """One of each, a server and a judge's endpoint running; at the end those that remember."""
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    with running(RewardServer(politely)) as server, endpoint(lambda question: "Score: 3") as judge:
        model = RewardModel(reward_model, chat_tokenizer)
        classifier = make_reward_model(id2label=labels)
        yield [
            model,
            ClassifierReward(classifier, "POSITIVE", tokenizer=chat_tokenizer),
            HTTPReward(server.url),
            LLMJudge(judge[0], "small", "Rate {completion}", low=0, high=5),
            LengthPenalty(0.1),
            politely,
            WeightedSum([model, politely], [1.0, 2.0]),
            Ensemble([model, LengthPenalty(0.2)], "pessimistic"),
            Bounded(model),
            Clipped(Normalised(model), low=-3, high=3),
        ]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
@pytest.mark.parametrize("form", ["text", "chat"])
def test_every_adapter_drops_in(
    method, form, saved_policy, every_adapter, chat_tokenizer, tmp_path
):
    try:
        config, trainer = getattr(trl, f"{method}Config"), getattr(trl, f"{method}Trainer")
    except RuntimeError as error:  # TRL 1.12 needs `requests` here and does not declare it
        pytest.skip(f"{method}Trainer cannot be imported: {error.__cause__}")
    rows = [{"prompt": f"Q{i}: ", "answer": str(i)} for i in range(4)]
    seen = []

    def counted(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer))
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return vowels(prompts, texts)

    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    made = trainer(
        model=str(saved_policy),  # RLOO loads its reference by name
        reward_funcs=[*every_adapter, counted],
        args=config(output_dir=str(tmp_path), logging_steps=1, **options, **QUICK),
        train_dataset=Dataset.from_list(rows if form == "text" else [chat(row) for row in rows]),
        processing_class=chat_tokenizer,
    )
    made.train()
    ((prompts, completions, answer),) = seen
    (log,) = [log for log in made.state.log_history if "rewards/counted/mean" in log]
    assert log["disagreement"] > 0  # of the ensemble
    for adapter in every_adapter[:-1]:
        scores = call_reward(adapter, prompts, completions, {"answer": answer})
        mean = log[f"rewards/{reward_name(adapter)}/mean"]
        assert mean == pytest.approx(sum(scores) / 4, rel=1e-4, abs=1e-6)
    assert log[f"rewards/{reward_name(every_adapter[-1])}/mean"] == pytest.approx(0.0, abs=1e-5)
