import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer.advantages import (
    adapted_kl_coef,
    advantages_and_returns,
    gae,
    kl_per_token,
    length_adaptive_lam,
    token_rewards,
)
from trl_instruct.ppo_trainer.losses import policy_loss
from trl_instruct.ppo_trainer.rollouts import Rollout
from trl_instruct.ppo_trainer.trainer import PPOTrainer


def test_kl_by_hand():
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    k1 = kl_per_token(logprobs, ref_logprobs)
    k3 = kl_per_token(logprobs, ref_logprobs, estimator="k3")
    torch.testing.assert_close(k1, torch.tensor([[0.5, -1.0]]))  # not clamped at 0
    torch.testing.assert_close(
        k3, torch.tensor([[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]])
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_estimators_are_the_kl_in_expectation(estimator):
    policy, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    kl = kl_per_token(policy.log(), ref.log(), estimator=estimator)
    exact = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    torch.testing.assert_close((policy * kl).sum(), torch.tensor(exact))


VOCABULARY, LETTERS = 64, 26


def trained_on_a_bandit(rewards_of, *, steps):
    """Reference and policy after training on completions of one token, and the tokens' scores.

    A letter has reward 1, any other token 0. The gradient is PPO's in expectation (each token of
    the vocabulary is a completion, weighted by its probability), the step a natural gradient's.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(VOCABULARY, generator=generator).log_softmax(0)
    scores = (torch.arange(VOCABULARY) < LETTERS).float()
    wrong = torch.logsumexp(start[LETTERS:], 0) - torch.logsumexp(start[:LETTERS], 0)
    ref = (start + scores * (wrong + math.log(0.089 / 0.911))).log_softmax(0)
    logits, one = ref.clone().requires_grad_(), torch.ones(VOCABULARY, dtype=torch.long)
    for _ in range(steps):
        logprobs = logits.log_softmax(0)
        old = logprobs.detach()
        rollout = Rollout(
            *(one[:, None], one, torch.arange(VOCABULARY)[:, None], one, one.bool()),
            *(old[:, None], ref[:, None], torch.zeros(VOCABULARY, 1), scores),
        )
        advantages, _ = gae(rewards_of(rollout), rollout.values, rollout.mask, gamma=1, lam=0.95)
        loss, _ = policy_loss(logprobs, old, advantages[:, 0], cliprange=0.2)
        (gradient,) = torch.autograd.grad((old.exp() * loss).sum(), logits)
        logits.data -= 0.1 * gradient / old.exp()
    return ref, logits.detach().log_softmax(0), scores


def test_every_estimator_that_is_allowed_reaches_the_known_optimum():
    """The maximum of E[r] - beta KL(policy || ref) is ref * exp(r / beta), normalised."""
    allowed = []
    for estimator in get_args(get_type_hints(PPOConfig)["kl_estimator"]):
        try:
            args = PPOConfig(output_dir="x", use_cpu=True, kl_estimator=estimator)
        except InputError:
            continue
        allowed.append(estimator)
        trainer = SimpleNamespace(args=args, kl_coef=1.0)
        ref, policy, scores = trained_on_a_bandit(
            lambda rollout, trainer=trainer: PPOTrainer.rewards(trainer, rollout)[0], steps=150
        )
        torch.testing.assert_close(policy, (ref + scores).log_softmax(0))
        assert policy[:LETTERS].exp().sum().item() == pytest.approx(0.2098, abs=1e-4)
    assert allowed == ["k1"]


def test_k3_as_a_reward_misses_it():
    def rewards(rollout):
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, estimator="k3")
        return token_rewards(rollout.scores, kl, rollout.completion_lengths, kl_coef=1.0)

    ref, policy, scores = trained_on_a_bandit(rewards, steps=30)
    reached = (policy.exp() * (scores - (policy - ref))).sum()
    assert policy[:LETTERS].exp().sum() > 0.4
    assert reached < (ref.exp() * scores).sum() < 0.1  # worse than before training


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="'k2'; it must be 'k1' or 'k3'"):
        kl_per_token(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k2")


def test_the_score_falls_on_the_last_token_and_nowhere_else():
    kl = torch.tensor([[1.0, 2.0, 3.0], [-1.0, math.nan, math.nan]])
    rewards = token_rewards(torch.tensor([10.0, -5.0]), kl, torch.tensor([3, 1]), kl_coef=0.1)
    expected = torch.tensor([[-0.1, -0.2, 10.0 - 0.3], [-5.0 + 0.1, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def advantage(rewards, values, t, gamma, lam):
    """Equation 16 of Schulman et al. 2016 as it stands: a discounted sum of TD errors."""
    values = [*values, 0.0]
    errors = [r + gamma * values[i + 1] - values[i] for i, r in enumerate(rewards)]
    return sum((gamma * lam) ** (i - t) * errors[i] for i in range(t, len(rewards)))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_the_naive_sum(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 6])
    mask = right_padded_mask(lengths, 6)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    junk = torch.where(mask, 0.0, math.nan)
    advantages, returns = gae(rewards + junk, values + junk, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths.tolist()):
        row_rewards, row_values = rewards[row, :length].tolist(), values[row, :length].tolist()
        expected = [advantage(row_rewards, row_values, t, gamma, lam) for t in range(length)]
        torch.testing.assert_close(advantages[row, :length], torch.tensor(expected))
        torch.testing.assert_close(
            returns[row, :length], torch.tensor(expected) + values[row, :length]
        )
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_a_lambda_by_length_is_that_of_each_row():
    """alpha 0.5: 0, 1/2 and 2/3 at the lengths 1, 4 and 6."""
    lengths = torch.tensor([1, 4, 6])
    mask = right_padded_mask(lengths, 6)
    rewards, values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    lams = length_adaptive_lam(lengths, alpha=0.5)
    torch.testing.assert_close(lams, torch.tensor([0.0, 0.5, 2 / 3]))
    together = gae(rewards, values, mask, gamma=0.9, lam=lams)
    for row, lam in enumerate(lams.tolist()):
        rows = slice(row, row + 1)
        alone = gae(rewards[rows], values[rows], mask[rows], gamma=0.9, lam=lam)
        torch.testing.assert_close([part[rows] for part in together], list(alone))


def test_advantages_and_returns_may_have_lambdas_of_their_own():
    mask = right_padded_mask(torch.tensor([2, 3]), 3)
    given = *torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)), mask

    def found(**options):
        return advantages_and_returns(*given, gamma=0.9, lam=0.5, **options)

    advantages, returns = gae(*given, gamma=0.9, lam=0.5)
    torch.testing.assert_close(found(), (advantages, returns))
    ahead = gae(*given, gamma=0.9, lam=1.0)[1]
    torch.testing.assert_close(found(value_lam=1.0), (advantages, ahead))
    lams = length_adaptive_lam(torch.tensor([2, 3]), alpha=0.7)
    by_length = gae(*given, gamma=0.9, lam=lams)
    torch.testing.assert_close(found(lam_alpha=0.7), by_length)
    both = found(lam_alpha=0.7, value_lam=1.0)
    torch.testing.assert_close(both, (by_length[0], ahead))


def test_without_discount_and_lambda_1_the_return_is_the_reward_to_come():
    rewards, mask = torch.tensor([[1.0, -2.0, 5.0]]), torch.ones(1, 3, dtype=torch.bool)
    _, returns = gae(rewards, torch.tensor([[7.0, 8.0, 9.0]]), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[4.0, 3.0, 5.0]]))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.105), (60.0, 0.11), (5.4, 0.095), (-1.0, 0.09)],
    ids=["at its target", "above", "far above", "below", "far below"],
)
def test_beta_by_hand(kl, expected):
    """Half a horizon: an error of 10 % changes beta by 5 %, one above 20 % by 10 %."""
    adapted = adapted_kl_coef(0.1, kl, target=6.0, horizon=1000, episodes=500)
    assert adapted == pytest.approx(expected)
