"""The moving average of the policy."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_instruct.ppo_trainer.ema import MovingAverage


def test_the_average_by_hand(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.75)
    for weight in (5.0, 9.0):
        model.weight.data.fill_(weight)
        average.update()
    assert average.average["weight"].item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9
    with average.applied():
        assert model.weight.item() == 3.75
    assert model.weight.item() == 9.0 and average.average["weight"].item() == 3.75
    average.save(tmp_path / "ema.safetensors")
    other = MovingAverage(model, decay=0.75)
    other.load(tmp_path / "ema.safetensors")
    assert other.average["weight"].item() == 3.75


def test_the_average_of_bfloat16_weights_keeps_its_small_steps():
    """0.992 keeps 0.8 % of the way to the weights: less than bfloat16 can add to 1."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.992)
    model.weight.data.fill_(1.25)
    for _ in range(100):
        average.update()
        with average.applied():
            assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1.25
    assert average.average["weight"].item() == pytest.approx(1.25 - 0.25 * 0.992**100, abs=1e-5)


def test_only_what_trains_is_averaged():
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    assert set(MovingAverage(model, 0.5).average) == {"weight"}


def test_the_average_is_what_is_saved_as_the_result(make_trainer, tmp_path):
    """One step an iteration, and with a decay of 1 nothing of it reaches the average."""
    trainer = make_trainer(
        ema_decay=1.0, max_steps=2, num_mini_batches=1, save_strategy="steps", save_steps=2
    )
    start = {name: w.clone() for name, w in trainer.policy.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "result"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "result").state_dict()
    torch.testing.assert_close(saved, start, rtol=0, atol=0)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "checkpoint-2")
    now = trainer.policy.state_dict()
    torch.testing.assert_close(checkpoint.state_dict(), now, rtol=0, atol=0)
    assert any(not torch.equal(start[name], now[name]) for name in start)


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_the_average_moves_with_every_optimizer_step(make_trainer, num_mini_batches):
    trainer = make_trainer(ema_decay=0.0, num_mini_batches=num_mini_batches)
    trainer.train()
    for name, weight in trainer.policy.named_parameters():
        torch.testing.assert_close(trainer.average.average[name], weight, rtol=0, atol=0)
