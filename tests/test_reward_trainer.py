"""The ranking trainer: the paper's batch element gives what the pairs of each prompt give."""

import math

import pytest
import torch
from datasets import Dataset

from trl_instruct.configs import RewardConfig
from trl_instruct.losses import ranking_loss
from trl_instruct.reward_trainer import RankingCollator, RankingRewardTrainer

RANKINGS = [
    {"prompt": "a: ", "responses": ["yes", "no way", "maybe so"], "ranks": [1, 3, 2]},
    {"prompt": "a longer one: ", "responses": ["x", "y z"], "ranks": [2, 1]},
    {"prompt": "tied: ", "responses": ["p", "q", "r r"], "ranks": [1, 1, 2]},
]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_loss_is_averaged_per_prompt_first():
    """Three pairs of one prompt weigh as much as the one pair of the other."""
    scores = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 99.0]])
    ranks = torch.tensor([[1, 3, 2], [2, 1, 0]])
    first = (log_sigmoid(1.5) + log_sigmoid(1.0) + log_sigmoid(0.5)) / 3
    second = log_sigmoid(3.0)
    torch.testing.assert_close(ranking_loss(scores, ranks).item(), -(first + second) / 2)


def test_ties_are_no_pairs_and_a_ranking_without_any_does_not_count():
    scores = torch.tensor([[2.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    ranks = torch.tensor([[1, 1, 2], [1, 1, 1]])
    expected = -(log_sigmoid(2.0) + log_sigmoid(1.0)) / 2
    torch.testing.assert_close(ranking_loss(scores, ranks).item(), expected)
    assert ranking_loss(scores[1:], ranks[1:]).item() == 0.0


def test_loss_pulls_the_better_response_up():
    scores = torch.zeros(1, 2, requires_grad=True)
    ranking_loss(scores, torch.tensor([[2, 1]])).backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]


def test_collator_pads_responses_and_ranks():
    batch = RankingCollator(pad_token_id=9)(
        [
            {"response_ids": [[1, 2], [3]], "ranks": [2, 1]},
            {"response_ids": [[4], [5], [6, 7]], "ranks": [1, 2, 3]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9], [4, 9], [5, 9], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0], [1, 0], [1, 1]]
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 2, 3]]


def trainer_for(model, tokenizer, folder, rankings=RANKINGS, **options):
    settings = {"per_device_train_batch_size": 4, "max_length": 64, "use_cpu": True, **options}
    config = RewardConfig(
        output_dir=str(folder), gradient_checkpointing=False, save_strategy="no", **settings
    )
    return RankingRewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rankings),
        processing_class=tokenizer,
    )


def test_batch_loss_equals_each_text_scored_alone(reward_model, tokenizer, tmp_path):
    trainer = trainer_for(reward_model, tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch).item()

    def score(prompt, response):
        ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return reward_model(input_ids=ids).logits.item()

    per_prompt = []
    for record in RANKINGS:
        scored = [
            (rank, score(record["prompt"], response))
            for rank, response in zip(record["ranks"], record["responses"], strict=True)
        ]
        pairs = [(a, b) for rank, a in scored for other, b in scored if rank < other]
        per_prompt.append(sum(-log_sigmoid(a - b) for a, b in pairs) / len(pairs))
    assert loss == pytest.approx(sum(per_prompt) / 3, rel=1e-5)


def test_overlong_response_is_left_out_and_counted(reward_model, tokenizer, tmp_path):
    long = {"prompt": "b: ", "responses": ["x", "long " * 40, "y"], "ranks": [1, 2, 3]}
    useless = {"prompt": "c: ", "responses": ["x", "long " * 40], "ranks": [1, 2]}
    trainer = trainer_for(reward_model, tokenizer, tmp_path, [*RANKINGS, long, useless])
    assert trainer.overlong == 2
    assert trainer.train_dataset["ranks"][3] == [1, 3]
    assert len(trainer.train_dataset) == 4


def test_a_prompt_that_is_too_long_loses_its_beginning(reward_model, tokenizer, tmp_path):
    long = {"prompt": "long " * 20, "responses": ["x", "y " * 10, "z" * 99], "ranks": [1, 2, 3]}
    trainer = trainer_for(
        reward_model, tokenizer, tmp_path, [*RANKINGS, long], truncate_prompt=True
    )
    assert (trainer.truncated, trainer.overlong) == (1, 1)
    kept = [tokenizer.decode(row) for row in trainer.train_dataset["response_ids"][3]]
    prompt = ("long " * 20)[-43:]  # 43 + 20 + EOS = 64
    assert kept == [prompt + "x<eos>", prompt + "y " * 10 + "<eos>"]


def test_it_learns_the_order(reward_model, tokenizer, tmp_path):
    trainer = trainer_for(
        reward_model, tokenizer, tmp_path, learning_rate=3e-3, max_steps=30, logging_steps=1
    )
    trainer.train()
    history = [log for log in trainer.state.log_history if "accuracy" in log]
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < 0.1 < 0.5 < history[0]["loss"]
