import copy
import math
from itertools import chain

import pytest
import torch
from conftest import completion_logprobs
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from trl_instruct.errors import InputError
from trl_instruct.generation.sampling import pad_prompts
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer import token_statistics
from trl_instruct.ppo_trainer.advantages import gae, kl_per_token, masked_whiten
from trl_instruct.ppo_trainer.metrics import (
    check_finite,
    episode_metrics,
    policy_metrics,
    value_metrics,
)
from trl_instruct.ppo_trainer.micro_batch import ppo_sums
from trl_instruct.ppo_trainer.rollouts import Rollout

# Plain gradient descent: unlike Adam's, its update tells how large the gradient was.
SGD = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def trained(trainer):
    """Weights of policy and value after training."""
    trainer.train()
    return weights(trainer.model)


def distance(before, after):
    return math.sqrt(sum((after[name] - before[name]).square().sum() for name in before))


def count_steps(trainer):
    steps = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(trainer.state.global_step))
    trainer.train()
    hook.remove()
    return steps


def lora(policy):
    torch.manual_seed(3)
    return get_peft_model(policy, LoraConfig(target_modules="all-linear", init_lora_weights=True))


def losses(trainer, rollout, advantages, returns):
    return ppo_sums(trainer.model_wrapped, rollout, advantages, returns, args=trainer.args)


def hand_made_rollout(trainer, completions, lengths, filler=0.0):
    """Episodes whose log-probabilities are the policy's own; `filler` stands behind their end."""
    prompt_ids, prompt_lengths = pad_prompts([[5, 6, 7], [8]], torch.device("cpu"))
    tokens = (prompt_ids, prompt_lengths, torch.tensor(completions), torch.tensor(lengths))
    logprobs = completion_logprobs(trainer.policy, *tokens, temperature=trainer.args.temperature)
    behind = torch.arange(logprobs.shape[1]) >= tokens[3].unsqueeze(1)
    fields = (logprobs, logprobs - 0.5, logprobs * 0.3)
    fields = (torch.where(behind, filler, field) for field in fields)
    return Rollout(*tokens, torch.tensor([True, False]), *fields, torch.tensor([1.0, 2.0]))


def test_bf16_holds_while_sampling_and_measuring(make_trainer, monkeypatch):
    """And the logits stay as they are, twice as small as in float32, until they are read."""
    trainer, seen, read = make_trainer(bf16=True, max_steps=1), [], []
    real = token_statistics.logprobs_in_parts

    def spy(logits, *given, **options):
        read.append(logits.dtype)
        return real(logits, *given, **options)

    monkeypatch.setattr(token_statistics, "logprobs_in_parts", spy)
    head = trainer.policy.lm_head
    head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert set(read) == {torch.bfloat16}
    assert trainer.state.log_history[0]["objective/kl"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("num_mini_batches", [1, 2, 4])
def test_a_minibatch_is_an_optimizer_step(make_trainer, num_mini_batches):
    trainer = make_trainer(
        num_mini_batches=num_mini_batches,
        num_ppo_epochs=3,
        per_device_train_batch_size=2,
        max_steps=2,
    )
    assert trainer.batch_size == 2 * num_mini_batches
    steps = count_steps(trainer)
    assert steps == [0] * 3 * num_mini_batches + [1] * 3 * num_mini_batches


def test_accumulation_holds_on_the_last_batch(make_trainer, prompts):
    trainer = make_trainer(
        train_dataset=Dataset.from_dict({"prompt": prompts[:10]}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_mini_batches=1,
        max_steps=-1,
        num_train_epochs=1,
    )
    assert count_steps(trainer) == [0, 1]  # 10 prompts, 8 episodes an iteration


def test_every_ppo_epoch_takes_every_episode_once_in_a_fresh_order(make_trainer):
    trainer = make_trainer(num_ppo_epochs=3, num_mini_batches=4, per_device_train_batch_size=2)
    rollout = trainer.sample(list(range(8)))._replace(scores=torch.arange(8.0))
    minibatches = []

    def step(rollout, advantages, returns):
        assert torch.equal(rollout.scores, advantages[:, 0])
        assert torch.equal(rollout.scores, returns[:, 0])
        minibatches.append(rollout.scores.tolist())
        return {"val/ratio": 1.0, "policy/approxkl": 0.0}

    trainer.step = step
    torch.manual_seed(0)
    trainer.update(rollout, *[rollout.scores.unsqueeze(1)] * 2)
    assert [len(minibatch) for minibatch in minibatches] == [2] * 12
    epochs = [list(chain.from_iterable(minibatches[n : n + 4])) for n in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_step_descends_the_policy_loss_plus_vf_coef_times_the_value_loss(make_trainer):
    trainer = make_trainer(vf_coef=0.3, cliprange_value=100.0, **SGD)
    trainer.begin_training()
    rollout = hand_made_rollout(trainer, [[20, 256, 9], [21, 22, 23]], [2, 3])
    advantages, returns = torch.where(rollout.mask, 1.5, 0.0), torch.where(rollout.mask, 2.0, 0.0)
    sums = losses(trainer, rollout, advantages, returns)
    loss = (sums["loss/policy"] + 0.3 * sums["loss/value"]) / 5  # real tokens
    named = dict(trainer.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    expected = {n: named[n].detach() - 0.01 * g for n, g in zip(named, gradients, strict=True)}
    trainer.step(rollout, advantages, returns)
    torch.testing.assert_close({name: named[name].detach() for name in named}, expected)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_at_first_the_value_function_may_train_alone(make_trainer, optim):
    """Then the policy's steps are those of a run without: AdamW counts none before."""
    trainer = make_trainer(value_warmup_iterations=2, optim=optim, weight_decay=0.1, max_steps=3)
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            moved.append([distance(b, weights(m)) for m, b in zip(models, before, strict=True)])

    models = trainer.policy, trainer.value_model
    before = [weights(model) for model in models]
    trainer.add_callback(Watch())
    trainer.train()
    assert [policy > 0 for policy, _ in moved] == [False, False, True]
    assert all(value > 0 for _, value in moved)
    if optim == "adamw_torch":
        state = trainer.optimizer.state
        steps = [{int(state[p]["step"]) for p in model.parameters()} for model in models]
        assert steps == [{2}, {6}]  # two minibatches an iteration


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_the_update_has_the_gradients_norm_unless_clipped(make_trainer, max_grad_norm):
    trainer = make_trainer(
        optim="sgd", learning_rate=1.0, num_mini_batches=1, max_grad_norm=max_grad_norm
    )
    before = weights(trainer.model)
    moved = distance(before, trained(trainer))
    logged = trainer.state.log_history[0]["grad_norm"]
    assert logged > 0.1
    assert moved == pytest.approx(max_grad_norm or logged, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_how_a_minibatch_is_cut_into_micro_batches_changes_nothing(make_trainer, epochs):
    options = {"num_ppo_epochs": epochs, "max_steps": 2, **SGD}
    whole = make_trainer(per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    cut = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    before = weights(whole.model)
    after = trained(whole)
    assert distance(before, after) > 0.01
    torch.testing.assert_close(trained(cut), after)
    keys = ("loss/policy", "loss/value", "policy/entropy", "grad_norm", "val/ratio")
    for one, other in zip(whole.state.log_history[:2], cut.state.log_history[:2], strict=True):
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_eos_gets_its_gradient_where_pad_is_eos(make_trainer, eos_padded_tokenizer, kind):
    """At ratio 1 the loss of one token is -A * ratio: its gradient is that of -A * logprob."""
    trainer = make_trainer(kind, processing_class=eos_padded_tokenizer)
    rollout = hand_made_rollout(trainer, [[20, 256, 256, 256], [21, 22, 23, 24]], [2, 4])
    advantages = torch.tensor([[0.0, 1.5, 9.0, 9.0], [0.0] * 4])  # 1.5 for the EOS itself
    losses(trainer, rollout, advantages, rollout.values)["loss/policy"].backward()
    plain = copy.deepcopy(trainer.policy)
    plain.zero_grad()
    logits = plain(torch.tensor([[5, 6, 7, 20]])).logits[0, -1]
    (-1.5 * torch.log_softmax(logits, dim=-1)[256]).backward()
    for ours, expected in zip(trainer.policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_losses_and_metrics_are_sums_over_real_tokens(make_trainer):
    trainer = make_trainer(temperature=0.7)
    completions, lengths = [[20, 256, 9, 9], [21, 22, 23, 9]], [2, 3]
    rollout = hand_made_rollout(trainer, completions, lengths)
    junk = hand_made_rollout(trainer, [[20, 256, 3, 4], [21, 22, 23, 5]], lengths, math.nan)
    advantages = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.5, 3.0, -1.0, 0.0]])
    behind = torch.where(rollout.mask, 0.0, math.nan)
    sums = losses(trainer, rollout, advantages, rollout.values)
    # at ratio 1 the policy loss is -A
    assert sums["loss/policy"].item() == pytest.approx(-(1.0 - 2.0 + 0.5 + 3.0 - 1.0), rel=1e-5)
    assert sums["val/ratio"].item() == pytest.approx(5.0)
    texts = ([5, 6, 7, 20, 256], 2), ([8, 21, 22, 23], 0)  # and the state before the first token
    states = [trainer.policy(torch.tensor([ids])).logits[0, at:-1] for ids, at in texts]
    entropy = torch.distributions.Categorical(logits=torch.cat(states) / 0.7).entropy()
    torch.testing.assert_close(sums["policy/entropy"], entropy.sum())
    torch.testing.assert_close(losses(trainer, junk, advantages + behind, junk.values), sums)


def test_both_clips_are_around_what_was_sampled(make_trainer):
    """At a ratio of e, and with values that were 1000: whatever the models, the clips decide."""
    trainer = make_trainer(cliprange=0.1, cliprange_value=0.5)
    rollout = hand_made_rollout(trainer, [[20, 256, 9], [21, 22, 23]], [2, 3])
    rollout = rollout._replace(
        logprobs=rollout.logprobs - 1, values=torch.full_like(rollout.values, 1000.0)
    )
    advantages = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]])
    sums = losses(trainer, rollout, advantages, torch.zeros_like(advantages))
    assert sums["loss/policy"].item() == pytest.approx(-1.1 * 4.5 + math.e * 3.0, rel=1e-5)
    assert sums["loss/value"].item() == pytest.approx(5 * 0.5 * 999.5**2, rel=1e-5)
    clipped = [sums[name].item() for name in ("policy/clipfrac", "val/clipfrac")]
    assert clipped == [3.0, 5.0]
    trainer = make_trainer(cliprange=0.1, cliprange_high=0.4, dual_clip=2.0)
    sums = losses(trainer, rollout, advantages, torch.zeros_like(advantages))
    assert sums["loss/policy"].item() == pytest.approx(-1.4 * 4.5 + 2.0 * 3.0, rel=1e-5)
    assert sums["policy/clipfrac"].item() == 5.0


def test_episode_metrics_by_hand_whatever_the_padding(make_trainer):
    trainer = make_trainer()
    for filler in (0.0, math.nan):
        rollout = hand_made_rollout(trainer, [[20, 256, 9], [21, 22, 23]], [2, 3], filler)
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs)  # 0.5 per token
        metrics = episode_metrics(rollout, kl, kl_coef=0.1)
        real = rollout.logprobs[rollout.mask]
        expected = {
            "objective/kl": (1.0 + 1.5) / 2,
            "objective/kl_k3": (math.exp(-0.5) - 1 + 0.5) * 5 / 2,
            "objective/non_score_reward": -0.125,
            "objective/scores": 1.5,
            "objective/rlhf_reward": 1.375,
            "objective/length": 2.5,
            "objective/ended": 0.5,
            "objective/entropy": -real.sum().item() / 2,
        }
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
            expected, rel=1e-5
        )


def test_value_metrics_by_hand():
    """Real returns 1, 3, 5: variance 4; what the values do not explain, 1, 0, 1: variance 1/3."""
    values = torch.tensor([[0.0, 3.0, 99.0], [4.0, 99.0, 99.0]])
    returns = torch.tensor([[1.0, 3.0, -99.0], [5.0, -99.0, -99.0]])
    metrics = value_metrics(values, returns, right_padded_mask(torch.tensor([2, 1]), 3))
    assert metrics["val/mean"].item() == pytest.approx(7 / 3)
    assert metrics["val/explained_variance"].item() == pytest.approx(11 / 12)
    flat = value_metrics(values, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert flat["val/explained_variance"] == 0.0


def test_how_far_the_policy_has_moved_by_hand():
    """Half the squared log-ratio: 0.5 * log(2)^2 each, whichever way."""
    moved = policy_metrics(torch.tensor([2.0, 0.5]).log(), torch.zeros(2))
    half = 0.5 * math.log(2) ** 2
    expected = {"policy/approxkl": [half] * 2, "val/ratio": [2, 0.5]}
    assert {name: values.tolist() for name, values in moved.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }


def test_advantages_are_whitened_over_the_batch(make_trainer):
    trainer = make_trainer(gamma=0.9, lam=0.5)
    rollout = hand_made_rollout(trainer, [[20, 256, 9], [21, 22, 23]], [2, 3])
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -3.0]])
    advantages, returns = trainer.advantages(rollout, rewards)
    real = advantages[rollout.mask]
    torch.testing.assert_close(real.mean(), torch.tensor(0.0))
    torch.testing.assert_close(real.std(), torch.tensor(1.0))
    assert not advantages[~rollout.mask].any()
    # the last return of an episode is its last reward, unwhitened
    torch.testing.assert_close(returns[[0, 1], [1, 2]], torch.tensor([1.0, -3.0]))
    plain, expected = gae(rewards, rollout.values, rollout.mask, gamma=0.9, lam=0.5)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, masked_whiten(plain, rollout.mask))


def test_rewards_hold_the_kl_penalty_and_the_score(make_trainer):
    rollout = hand_made_rollout(make_trainer(), [[20, 256, 9], [21, 22, 23]], [2, 3])
    rewards, kl = make_trainer(kl_coef=0.1).rewards(rollout)
    torch.testing.assert_close(kl[rollout.mask], torch.full((5,), 0.5))
    expected = torch.tensor([[-0.05, 0.95, 0.0], [-0.05, -0.05, 1.95]])
    torch.testing.assert_close(rewards, expected)
    whitened, _ = make_trainer(kl_coef=0.1, whiten_rewards=True).rewards(rollout)
    real = whitened[rollout.mask]
    torch.testing.assert_close(real.std(), torch.tensor(1.0))
    torch.testing.assert_close(real.mean(), expected[rollout.mask].mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("opt", {"layerdrop": 0.5}),
        ("falcon", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),  # layers read their config
        ("mixtral", {"router_jitter_noise": 0.5, "num_local_experts": 2}),
    ],
)
def test_the_first_ratio_is_1_with_the_models_dropout_off(
    make_trainer, make_policy, make_reward_model, kind, rates
):
    """As long as no step is taken, the policy is the one that sampled, at any temperature."""
    policy = make_policy(kind, **rates)
    trainer = make_trainer(
        **{"model": policy, "value_model": make_reward_model(kind, seed=1, **rates)},
        **{"learning_rate": 0.0, "temperature": 0.7, "max_steps": 2},
        **{"num_ppo_epochs": 2, "kl_coef": 0.0},
    )
    trainer.train()
    assert {name: getattr(policy.config, name) for name in rates} == rates
    for log in trainer.state.log_history[:2]:
        assert log["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert log["policy/approxkl"] < 1e-9
        assert log["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(make_trainer):
    trainer = make_trainer()
    torch.nn.init.constant_(trainer.model.value.model.score.weight, math.nan)
    before = weights(trainer.policy)
    with pytest.raises(FloatingPointError, match=r"is nan in iteration 1\. Lower learning_rate"):
        trainer.train()
    torch.testing.assert_close(weights(trainer.policy), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["loss/policy", "loss/value"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_either_loss_must_be_a_number(name, number):
    losses = {"loss/policy": torch.tensor(1.0), "loss/value": torch.tensor(1.0)}
    check_finite(losses, 3)
    with pytest.raises(FloatingPointError, match=f"{name} is {number} in iteration 3"):
        check_finite({**losses, name: torch.tensor(number)}, 3)


def test_policy_and_value_learn_and_the_reference_stays(make_trainer):
    trainer = make_trainer()
    ref, before = weights(trainer.ref_model), weights(trainer.model)
    torch.testing.assert_close(ref, weights(trainer.policy), rtol=0, atol=0)
    after = trained(trainer)
    torch.testing.assert_close(weights(trainer.ref_model), ref, rtol=0, atol=0)
    for part in ("policy", "value"):
        names = [name for name in before if name.startswith(part)]
        assert any(not torch.equal(before[name], after[name]) for name in names)


def test_a_given_reference_is_used_and_frozen(make_trainer, make_policy):
    ref = make_policy(seed=5).train()
    trainer = make_trainer(ref_model=ref)
    rollout = trainer.sample(list(range(8)))
    expected = completion_logprobs(ref, *rollout[:4], temperature=1.0)
    torch.testing.assert_close(rollout.ref_logprobs, expected)
    assert not ref.training
    assert not any(parameter.requires_grad for parameter in ref.parameters())


@pytest.mark.slow
def test_a_lora_policy_trains_its_adapter_against_its_own_base(make_trainer, make_policy):
    plain = make_policy()
    trainer = make_trainer(model=lora(make_policy()), max_steps=2)
    before = weights(trainer.policy)
    trainer.train()
    for name, after in trainer.policy.state_dict().items():
        assert torch.equal(before[name], after) == ("lora_" not in name)
    rollout = trainer.sample([0, 1, 2])
    expected = completion_logprobs(plain, *rollout[:4], temperature=1.0)
    torch.testing.assert_close(rollout.ref_logprobs, expected)
    assert not torch.allclose(rollout.logprobs, rollout.ref_logprobs)
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("role", ["ref_model", "reward_model", "value_model"])
def test_one_object_in_two_roles_is_an_error(make_trainer, policy, reward_model, role):
    models = {"model": policy, "value_model": reward_model}
    models[role] = reward_model if role == "reward_model" else policy
    with pytest.raises(InputError, match=f"{role}.* are the same object"):
        make_trainer(**models)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda policy: policy, lora], ids=["full", "lora"])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_gives_the_same_update(make_trainer, make_policy, wrap, kwargs):
    plain = make_trainer(model=wrap(make_policy()), **SGD)
    saving = make_trainer(
        model=wrap(make_policy()),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
        **SGD,
    )
    before = weights(plain.model)
    after = trained(plain)
    assert distance(before, after) > 0.001
    torch.testing.assert_close(trained(saving), after)


@pytest.mark.slow
def test_text_prompts_and_further_columns_reach_the_reward(make_trainer, prompts):
    calls = []

    def judge(prompts, completions, number, **columns):
        calls.append((prompts, completions, number, columns))
        return [0.0] * len(completions)

    rows = {"prompt": prompts, "number": list(range(16)), "source": ["x"] * 16}
    trainer = make_trainer(
        reward_model=judge, train_dataset=Dataset.from_dict(rows), max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    assert len(calls) == 4  # 2 uses of 16 prompts, 8 a time
    used = [number for call in calls for number in call[2]]
    assert sorted(used[:16]) == sorted(used[16:]) == list(range(16))
    for asked, completions, numbers, columns in calls:
        assert asked == [prompts[number] for number in numbers]
        assert set(columns) == {"source", "completion_ids", "log_metric"}  # as in TRL
        assert columns["source"] == ["x"] * 8
        decode = trainer.processing_class.decode
        for ids, text in zip(columns["completion_ids"], completions, strict=True):
            assert text in (decode(ids), decode(ids[:-1]))  # without what ended it
        assert all(isinstance(text, str) and "<eos>" not in text for text in completions)


def test_conversational_prompts_get_messages_as_completions(make_trainer, prompts, chat_tokenizer):
    calls = []

    def judge(prompts, completions):
        calls.append((prompts, completions))
        return [0.0] * len(completions)

    chats = [[{"role": "user", "content": text}] for text in prompts]
    trainer = make_trainer(
        processing_class=chat_tokenizer,
        reward_model=judge,
        train_dataset=Dataset.from_dict({"prompt": chats}),
    )
    assert chat_tokenizer.decode(trainer.prompts[0]) == "u:prompt 0: \na:"
    trainer.train()
    ((asked, answered),) = calls
    assert all(messages in chats for messages in asked)
    assert [[message["role"] for message in answer] for answer in answered] == [["assistant"]] * 8


def test_the_scores_belong_to_their_episodes(make_trainer, prompts, tokenizer):
    """Sampling sorts by length; completions, logprobs and scores come back in the rows' order."""
    trainer = make_trainer(
        reward_model=lambda prompts, completions: [float(len(p)) for p in prompts],
        local_rollout_forward_batch_size=2,
        response_length=6,
    )
    rows = [5, 2, 9, 0, 14]
    rollout = trainer.score(trainer.sample(rows), rows)
    assert rollout.scores.tolist() == [len(prompts[row]) for row in rows]
    expected = completion_logprobs(trainer.policy, *rollout[:4], temperature=1.0)
    torch.testing.assert_close(rollout.logprobs, expected)
    for row, ids, length in zip(rows, rollout.prompt_ids, rollout.prompt_lengths, strict=True):
        assert tokenizer.decode(ids[-length:]) == prompts[row]


def test_a_completion_without_eos_pays_the_penalty(make_trainer):
    def one(prompts, completions):
        return [1.0] * len(completions)

    trainer = make_trainer(reward_model=one, missing_eos_penalty=3.0)
    rollout = hand_made_rollout(trainer, [[20, 256, 256], [21, 22, 23]], [2, 3])
    assert trainer.score(rollout, [0, 1]).scores.tolist() == [1.0, -2.0]
    assert make_trainer(reward_model=one).score(rollout, [0, 1]).scores.tolist() == [1.0, 1.0]


def test_a_reward_model_scores_with_the_policys_tokenizer(
    make_trainer, reward_model, tokenizer, prompts
):
    trainer = make_trainer(reward_model=reward_model)
    rollout = trainer.score(trainer.sample([3]), [3])
    kept = rollout.completion_lengths[0] - int(rollout.ended[0])
    ids = tokenizer(prompts[3])["input_ids"] + rollout.completion_ids[0, :kept].tolist()
    with torch.no_grad():
        expected = reward_model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits[0]
    torch.testing.assert_close(rollout.scores, expected)


def test_a_bad_reward_or_prompt_is_an_error(make_trainer, make_policy):
    with pytest.raises(InputError, match="'<lambda>' returned 1 scores for 8 completions"):
        make_trainer(reward_model=lambda prompts, completions: [0.0]).train()
    with pytest.raises(InputError, match="Prompt 1 has no tokens"):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": [""]}))
    with pytest.raises(InputError, match="leaves 28"):
        make_trainer(response_length=100, train_dataset=Dataset.from_dict({"prompt": ["x" * 29]}))


# ---- KL control ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_beta_follows_the_kl_to_its_target(make_trainer):
    """Against a reference that is no nearer than its own KL allows, beta rises by 0.2 * 8 / 40."""
    options = {"max_steps": 3, "kl_coef": 0.1, "adaptive_kl_horizon": 40}
    trainer = make_trainer(adaptive_kl_target=1e-6, **options)
    trainer.train()
    logs = trainer.state.log_history
    betas = [0.1]
    for log in logs:
        assert log["objective/kl_coef"] == pytest.approx(betas[-1])
        error = min(0.2, max(-0.2, log["objective/kl"] / 1e-6 - 1))
        betas.append(betas[-1] * (1 + error * 8 / 40))
        expected = log["objective/scores"] - log["objective/kl_coef"] * log["objective/kl"]
        assert log["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-6)
    assert trainer.kl_coef == pytest.approx(betas[-1])
    assert betas[1] == pytest.approx(0.1 * 0.96)  # the first KL is 0, below the target
    fixed = make_trainer(**options)
    fixed.train()
    assert {log["objective/kl_coef"] for log in fixed.state.log_history} == {0.1}


def test_beta_stays_while_the_policy_does(make_trainer):
    options = {"kl_coef": 0.1, "adaptive_kl_target": 6.0, "adaptive_kl_horizon": 40}
    trainer = make_trainer(value_warmup_iterations=1, **options)
    trainer.adapt_kl_coef({"objective/kl": 0.0})
    assert trainer.kl_coef == 0.1
    trainer.state.global_step = 1
    trainer.adapt_kl_coef({"objective/kl": 0.0})
    assert trainer.kl_coef < 0.1


def test_beta_adapts_to_the_target_and_horizon_given(make_trainer):
    trainer = make_trainer(kl_coef=0.1, adaptive_kl_target=6.0, adaptive_kl_horizon=40)
    trainer.adapt_kl_coef({"objective/kl": 5.7})  # 5 % below, 8 of 40 episodes
    assert trainer.kl_coef == pytest.approx(0.1 * (1 - 0.05 * 8 / 40))


def test_beta_is_what_the_rewards_are_made_with(make_trainer):
    trainer = make_trainer(kl_coef=0.1)
    rollout = hand_made_rollout(trainer, [[20, 256, 9], [21, 22, 23]], [2, 3])
    trainer.kl_coef = 0.4
    rewards, _ = trainer.rewards(rollout)
    expected = [[-0.2, 0.8, 0.0], [-0.2, -0.2, 1.8]]  # KL 0.5 per token, scores 1 and 2
    torch.testing.assert_close(rewards, torch.tensor(expected))


@pytest.mark.slow
def test_an_iteration_ends_early_where_the_policy_has_moved_too_far(make_trainer):
    options = {"num_ppo_epochs": 3, "learning_rate": 0.01}
    steps = count_steps(make_trainer(target_kl=1e-5, **options))
    assert 1 < len(steps) < 6  # the first step of an iteration always has approxkl 0
    trainer = make_trainer(target_kl=1e-5, **options)
    assert trainer.train().metrics["policy/steps"] == len(steps)
    assert len(count_steps(make_trainer(target_kl=1e9, **options))) == 6


# ---- value model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_value_function_has_its_own_learning_rate(make_trainer):
    trainer = make_trainer(value_learning_rate=0.0, max_steps=2)
    before = weights(trainer.model)
    after = trained(trainer)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("value.")
    trainer = make_trainer(learning_rate=0.0, value_learning_rate=0.01)
    before = weights(trainer.policy)
    torch.testing.assert_close(trained(trainer) and weights(trainer.policy), before, rtol=0, atol=0)


def test_both_learning_rates_follow_the_schedule(make_trainer):
    trainer = make_trainer(
        max_steps=4, learning_rate=1.0, value_learning_rate=0.5, lr_scheduler_type="linear"
    )
    trainer.begin_training()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1.0, 0.5}
    trained_by = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert trained_by == {id(p) for p in trainer.model.parameters()}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.8, 0.4}


# ---- stop strings --------------------------------------------------------------------------------


def test_the_reward_does_not_see_the_stop_string_and_the_policy_learns_it(
    make_trainer, make_policy
):
    """A tenth of the letters ends a completion; that letter is a token of the loss, as EOS is."""
    seen = []

    def record(prompts, completions):
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(
        model=make_policy(),
        reward_model=record,
        stop_strings=list("abcdefghij0123456789 "),
        missing_eos_penalty=1.0,
        response_length=20,
    )
    rollout = trainer.score(trainer.sample(range(8)), range(8))
    assert rollout.ended.any()
    texts = trainer.processing_class.batch_decode(
        [row[:n] for row, n in zip(rollout.completion_ids, rollout.completion_lengths, strict=True)]
    )
    for raw, text, ended, score in zip(texts, seen, rollout.ended, rollout.scores, strict=True):
        assert score == (0.0 if ended else -1.0)
        assert not set(text) & set(trainer.args.stop_strings)
        assert raw == text or raw[:-1] == text or raw == text + "<eos>"
    assert (rollout.logprobs[rollout.mask] != 0).all()
