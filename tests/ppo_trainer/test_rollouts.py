from itertools import chain

import pytest
import torch
from conftest import completion_logprobs
from peft import PromptTuningConfig, get_peft_model

from trl_instruct.generation.logits import join, spread
from trl_instruct.generation.sampling import pad_prompts
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer.rollouts import (
    PolicyAndValue,
    Rollout,
    ValueModel,
    prompt_batches,
    state_values,
    with_logprobs,
)

KINDS = ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "rwkv", "mamba"]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
COMPLETIONS = [[20, 21, 256], [22, 23, 24], [256]]


def batch(rows=(0, 1, 2), prompt_padding=0, completion_padding=256, width=4):
    """Prompts and completions above as `completion_logprobs` takes them."""
    prompt_ids, prompt_lengths = pad_prompts([PROMPTS[row] for row in rows], torch.device("cpu"))
    for ids, length in zip(prompt_ids, prompt_lengths, strict=True):
        ids[: len(ids) - length] = prompt_padding
    completions = [COMPLETIONS[row] for row in rows]
    filled = [c + [completion_padding] * (width - len(c)) for c in completions]
    lengths = torch.tensor([len(c) for c in completions])
    return prompt_ids, prompt_lengths, torch.tensor(filled), lengths


@torch.no_grad()
def completion_values(value, *tokens):
    """Value of the state in which each completion token was chosen, 0 behind the end."""
    mask = right_padded_mask(tokens[3], tokens[2].shape[1])
    return spread(state_values(value, join(*tokens)), mask)


@torch.no_grad()
def plain_logprobs(model, prompt, completion, temperature):
    """One text, no padding, no mask, no positions: log_softmax of a plain forward pass."""
    text = prompt + completion
    logits = model.eval()(torch.tensor([text])).logits[0, -len(text) :]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_a_plain_forward_pass(make_policy, kind):
    model = make_policy(kind).eval()
    logprobs = completion_logprobs(model, *batch(), temperature=0.7)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = plain_logprobs(model, prompt, completion, 0.7)
        torch.testing.assert_close(logprobs[row, : len(completion)], torch.tensor(expected))
        assert not logprobs[row, len(completion) :].any()


def test_tokens_that_prompt_tuning_puts_in_front_are_none_of_the_text(policy):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(policy, tuning).eval()
    logprobs = completion_logprobs(model, *batch([1]), temperature=0.7)
    expected = plain_logprobs(model, PROMPTS[1], COMPLETIONS[1], 0.7)
    torch.testing.assert_close(logprobs[0, :3], torch.tensor(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_read_before_each_token(make_reward_model, kind):
    """V(s_t) is the classifier's score of the text up to, not including, token t."""
    model = make_reward_model(kind).eval()
    values = completion_values(ValueModel(model), *batch())
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for t in range(len(completion)):
            text = torch.tensor([prompt + completion[:t]])
            with torch.no_grad():
                expected = model(text).logits[0, 0]
            torch.testing.assert_close(values[row, t], expected)
        assert not values[row, len(completion) :].any()


def test_the_trained_module_computes_what_was_sampled(policy, reward_model):
    model = PolicyAndValue(policy, ValueModel(reward_model))
    tokens = batch(width=3)
    mask = right_padded_mask(tokens[3], 3)
    logprobs, _, values = model(join(*tokens), tokens[2][mask], 0.7)
    expected = completion_logprobs(policy, *tokens, temperature=0.7)
    torch.testing.assert_close(logprobs, expected[mask])
    torch.testing.assert_close(values, completion_values(model.value, *tokens)[mask])


@pytest.mark.parametrize(("apart", "passes"), [(5e-5, 1), (2e-4, 3)])
def test_what_the_policy_said_while_it_drew_stands_if_it_says_it_again(
    policy, reward_model, make_policy, apart, passes
):
    """One forward pass, of two episodes, instead of one of all; reference and values are read."""
    model, other, read = PolicyAndValue(policy, ValueModel(reward_model)), make_policy(seed=1), []
    tokens = batch()
    mask = right_padded_mask(tokens[3], 4)
    own = torch.where(mask, completion_logprobs(policy, *tokens, temperature=0.7), 3.0)
    blank = torch.zeros(3, 4)
    rollout = Rollout(*tokens, mask[:, 0], blank, blank, blank, blank[:, 0], own + apart)
    policy.lm_head.register_forward_hook(lambda *given: read.append(1))
    how = {"temperature": 0.7, "batch_size": 2}
    found = with_logprobs(rollout, model, other, by_policy=True, **how)
    assert len(read) == passes and found.sampler_logprobs is None
    expected = torch.where(mask, own + apart * (passes == 1), 0.0)
    torch.testing.assert_close(found.logprobs, expected, atol=1e-6, rtol=0)
    plain = with_logprobs(rollout, model, other, **how)
    torch.testing.assert_close(plain.logprobs, torch.where(mask, own, 0.0), atol=1e-6, rtol=0)
    assert plain.sampler_logprobs is rollout.sampler_logprobs
    for name in ("ref_logprobs", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))


def test_padding_content_batch_composition_and_order_do_not_matter(policy, reward_model):
    value = ValueModel(reward_model)
    logprobs = completion_logprobs(policy, *batch(), temperature=1.0)
    values = completion_values(value, *batch())
    others = [
        ([0, 1, 2], {"prompt_padding": 257, "completion_padding": 3}),
        ([2, 0, 1], {}),
        ([1, 0], {}),
        ([2], {}),
    ]
    for rows, padding in others:
        tokens = batch(rows, **padding)
        torch.testing.assert_close(
            completion_logprobs(policy, *tokens, temperature=1.0), logprobs[rows]
        )
        torch.testing.assert_close(completion_values(value, *tokens), values[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_the_unembedding_runs_on_the_tokens_of_completions_only(make_policy, kind):
    policy, shapes = make_policy(kind), []
    head = policy.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    completion_logprobs(policy, *batch(), temperature=1.0)
    assert shapes == [(1, sum(map(len, COMPLETIONS)), 258)]


def test_a_model_whose_unembedding_is_no_module_gives_the_same(policy, monkeypatch):
    expected = completion_logprobs(policy, *batch(), temperature=1.0)
    monkeypatch.setattr(policy, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(completion_logprobs(policy, *batch(), temperature=1.0), expected)


def test_a_text_stands_without_a_gap_and_its_states_before_each_chosen_token():
    sequences = join(*batch())
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert sequences.input_ids.shape == (3, max(map(len, texts)))
    for row, text in enumerate(texts):
        assert sequences.input_ids[row, : len(text)].tolist() == text
        assert sequences.attention_mask[row].sum() == len(text)
        first = len(PROMPTS[row]) - 1
        chosen = list(range(first, first + len(COMPLETIONS[row])))
        assert sequences.states[row].nonzero().flatten().tolist() == chosen


def test_a_rollout_keeps_nothing_of_the_size_of_the_vocabulary_and_is_indexed_as_one():
    prompt_ids, prompt_lengths, completion_ids, lengths = batch()
    zeros = torch.zeros(3, 4)
    ended = torch.tensor([True, False, True])
    rollout = Rollout(
        prompt_ids, prompt_lengths, completion_ids, lengths, ended, zeros, zeros, zeros, zeros[:, 0]
    )
    assert all(field is None or field.dim() <= 2 for field in rollout)
    assert rollout.mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    chosen = rollout.select(torch.tensor([2, 0]))
    assert chosen.prompt_lengths.tolist() == [5, 3]
    assert chosen.completion_ids.tolist() == [[256] * 4, [20, 21, 256, 256]]


def test_every_prompt_is_used_equally_often_in_a_fresh_order():
    batches = list(prompt_batches(10, 4, 5, seed=1))
    assert [len(rows) for rows in batches] == [4] * 5
    used = list(chain.from_iterable(batches))
    assert sorted(used[:10]) == sorted(used[10:]) == list(range(10))
    assert used[:10] != used[10:]
    assert batches == list(prompt_batches(10, 4, 5, seed=1))
    assert batches != list(prompt_batches(10, 4, 5, seed=2))
    assert sorted(next(prompt_batches(3, 7, 1, seed=0)))[:2] == [0, 0]  # fewer than a batch
