"""PPO-ptx: rows of pretraining text, and their gradient."""

import json

import pytest
import torch
from datasets import Dataset
from test_ppo_trainer import SGD, weights
from test_recipes import PROMPTS, QUICK_PPO, vowels
from torch.nn.functional import cross_entropy

from trl_instruct.errors import InputError
from trl_instruct.ppo_trainer.micro_batch import ptx_loss
from trl_instruct.ppo_trainer.ptx import PretrainingRows
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue
from trl_instruct.recipes.ppo import ppo

TEXTS = [f"text {row} {'x' * row}" for row in range(7)]


def data(streaming=False):
    dataset = Dataset.from_dict({"text": TEXTS})
    return dataset.to_iterable_dataset() if streaming else dataset


def rows_of(tokenizer, streaming=False, texts=None, seed=0):
    texts = data(streaming) if texts is None else texts
    return PretrainingRows(texts, tokenizer, length=8, seed=seed)


# ---- rows ----------------------------------------------------------------------------------------


def test_a_stream_is_read_end_to_end_and_again(tokenizer):
    whole = "".join(text + "<eos>" for text in TEXTS)
    taken = tokenizer.decode(rows_of(tokenizer, streaming=True).take(20).flatten())
    assert taken == (whole * 3)[: len(taken)] and len(taken) > len(whole)


def test_every_pass_has_every_text_in_a_fresh_order(tokenizer):
    passes = tokenizer.decode(rows_of(tokenizer).take(60).flatten()).split("<eos>")
    first, second = passes[:7], passes[7:14]
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second and first != TEXTS
    other = tokenizer.decode(rows_of(tokenizer, seed=1).take(60).flatten()).split("<eos>")
    assert other[:7] != first


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_go_on_where_they_were_left(tokenizer, streaming):
    rows = rows_of(tokenizer, streaming)
    for taken in range(3, 36, 3):
        rows.take(3)
        resumed, straight = rows_of(tokenizer, streaming), rows_of(tokenizer, streaming)
        resumed.load_state(json.loads(json.dumps(rows.state())))
        straight.take(taken)
        assert torch.equal(resumed.take(30), straight.take(30))


def test_text_without_an_end_is_no_endless_loop(tokenizer):
    nothing = rows_of(tokenizer, texts=data(streaming=True).take(0))
    with pytest.raises(InputError, match="hold no text"):
        nothing.take(1)


# ---- gradient ------------------------------------------------------------------------------------


def test_the_loss_is_that_of_predicting_each_next_token(policy, reward_model):
    ids = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(0))
    loss = ptx_loss(PolicyAndValue(policy, None), ids)
    logits = policy(input_ids=ids).logits
    expected = cross_entropy(logits[:, :-1].reshape(-1, 258), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)


def ptx_trainer(make_trainer, **options):
    defaults = {"ptx_dataset": data(), "ptx_max_length": 8, "ptx_rows_per_episode": 3}
    return make_trainer(**{**defaults, **options})


def test_a_step_descends_gamma_times_the_pretraining_loss_too(make_trainer, tokenizer):
    """Without advantage, value loss or KL the step is the pretraining gradient alone."""
    trainer = ptx_trainer(make_trainer, ptx_coef=0.5, vf_coef=0.0, num_mini_batches=1, **SGD)
    trainer.begin(None)
    before = weights(trainer.policy)
    rollout = trainer.sample(list(range(4)))
    nothing = torch.zeros_like(rollout.logprobs)
    stats = trainer.step(rollout, nothing, nothing)
    after = weights(trainer.policy)
    trainer.policy.load_state_dict(before)
    ids = rows_of(tokenizer, seed=42).take(3 * 4)
    loss = trainer.policy(input_ids=ids, labels=ids).loss
    loss.backward()
    assert stats["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in trainer.policy.named_parameters():
        expected = before[name] - 0.01 * 0.5 * weight.grad
        torch.testing.assert_close(after[name], expected)


@pytest.mark.slow
def test_the_pretraining_gradient_is_added_to_that_of_ppo(make_trainer):
    moved = {}
    for name, options in {
        "ppo": {},
        "ptx": {"ptx_coef": 2.0, "vf_coef": 0.0},
        "both": {"ptx_coef": 2.0},
    }.items():
        trainer = ptx_trainer(make_trainer, **SGD, **options)
        trainer.begin(None)
        before = weights(trainer.policy)
        rollout = trainer.sample(list(range(4)))
        advantages = torch.ones_like(rollout.logprobs)
        advantages = advantages * (name != "ptx")
        trainer.step(rollout, advantages, rollout.values)
        moved[name] = {n: w - before[n] for n, w in weights(trainer.policy).items()}
    total = {n: moved["ppo"][n] + moved["ptx"][n] for n in moved["both"]}
    # differences of weights around 1: half a unit in their last place is 6e-8
    torch.testing.assert_close(moved["both"], total, rtol=1e-4, atol=3e-7)


@pytest.mark.slow
def test_ptx_keeps_what_pretraining_taught(make_trainer):
    """Against a reward that has nothing to do with the text, gamma lowers the text's loss."""
    losses = {}
    for coef in (1e-9, 3.0):
        trainer = ptx_trainer(
            make_trainer, ptx_coef=coef, max_steps=15, reward_model=vowels, learning_rate=0.01
        )
        trainer.train()
        losses[coef] = trainer.state.log_history[-1]["loss/ptx"]
    assert losses[3.0] < 0.7 * losses[1e-9]


# ---- options -------------------------------------------------------------------------------------


def test_a_weight_needs_text_and_text_a_weight(make_trainer, saved_policy, tmp_path):
    with pytest.raises(InputError, match="ptx_coef is 27.8, but there is no pretraining text"):
        make_trainer(ptx_coef=27.8)
    prompts = Dataset.from_list(PROMPTS)
    with pytest.raises(InputError, match="ptx_coef is 0: set ptx_coef to use the text"):
        ppo(saved_policy, vowels, prompts, tmp_path / "x", ptx_dataset=data(), **QUICK_PPO)
    with pytest.raises(InputError, match="A text record needs `text`"):
        ppo(
            saved_policy,
            vowels,
            prompts,
            tmp_path / "x",
            ptx_dataset=prompts,
            ptx_coef=1.0,
            **QUICK_PPO,
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_ptx_from_a_file(saved_policy, tmp_path, streaming):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {"ptx_dataset_name": str(path), "ptx_streaming": streaming, "ptx_max_length": 8}
    result = ppo(
        saved_policy,
        vowels,
        Dataset.from_list(PROMPTS),
        tmp_path / "x",
        ptx_coef=1.0,
        **options,
        **QUICK_PPO,
    )
    assert result.metrics["loss/ptx"] == pytest.approx(5.5, abs=1.0)  # ln 258 = 5.55
