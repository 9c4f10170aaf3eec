"""The seam between PPO and what draws its completions."""

import pytest
import torch

from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.generation import token_sampling
from trl_instruct.generation.sampler import Drawn
from trl_instruct.ppo_trainer import rollouts


class Parrot:
    """A sampler that answers every prompt with its last token, twice and without an end."""

    def begin(self, policy, tokenizer, accelerator):
        self.given, self.followed = (policy, tokenizer, accelerator), []

    def follow(self):
        weights = self.given[0].get_output_embeddings().weight
        self.followed.append(weights.detach().clone())

    def draw(self, prompts, sampling):
        ids = torch.tensor([[prompt[-1]] * 2 for prompt in prompts])
        lengths = torch.full((len(prompts),), 2)
        return Drawn(ids, lengths, torch.zeros(len(prompts), dtype=torch.bool))


def test_a_sampler_of_ones_own_follows_every_update(make_trainer):
    parrot = Parrot()
    trainer = make_trainer(sampler=parrot, max_steps=3, response_length=2, learning_rate=1e-2)
    assert parrot.given[0] is trainer.policy and parrot.given[2] is trainer.accelerator
    rollout = trainer.sample([4, 7])
    assert rollout.completion_ids.tolist() == [[trainer.prompts[row][-1]] * 2 for row in (4, 7)]
    assert not rollout.ended.any()
    parrot.followed.clear()
    trainer.train()
    first, second, third = parrot.followed
    last = trainer.policy.get_output_embeddings().weight
    for before, after in ((first, second), (second, third), (third, last)):
        assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize(("asked", "sampled"), [(None, [2, 2, 1]), (3, [3, 2])])
def test_sampling_has_a_batch_size_of_its_own(make_trainer, monkeypatch, asked, sampled):
    """What is read afterwards keeps the other one."""
    drawn, read = [], []
    draw, with_logprobs = token_sampling.draw, rollouts._with_logprobs_at_once

    def keep_draw(policy, ids, *given, **options):
        drawn.append(len(ids))
        return draw(policy, ids, *given, **options)

    def keep_read(rollout, *given):
        read.append(len(rollout.scores))
        return with_logprobs(rollout, *given)

    monkeypatch.setattr(token_sampling, "draw", keep_draw)
    monkeypatch.setattr(rollouts, "_with_logprobs_at_once", keep_read)
    options = {} if asked is None else {"rollout_batch_size": asked}
    make_trainer(local_rollout_forward_batch_size=2, **options).sample([5, 2, 9, 0, 14])
    assert (drawn, sorted(read)) == (sampled, [1, 2, 2])


def test_a_batch_size_that_means_the_episodes_of_an_iteration():
    """As OpenRLHF's option of that name does."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert PPOConfig(**sizes, num_mini_batches=4, rollout_batch_size=16).rollout_batch_size == 16
    with pytest.raises(InputError, match="is 17, but an iteration has 16 episodes a device"):
        PPOConfig(**sizes, num_mini_batches=4, rollout_batch_size=17)
