"""Tokens drawn in batches that share prompts and shrink are those of each text alone."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from trl_instruct.errors import InputError
from trl_instruct.generation.sampling import generate
from trl_instruct.generation.token_sampling import Draw, Sampling, caches_rows

KINDS = ["llama", "gpt2", "gpt_neox", "opt", "qwen3", "falcon_h1", "lfm2", "mamba", "rwkv"]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13], [14, 15, 16]]
STOPS = [256, *range(0, 250, 3)]  # a third of all tokens, so that rows end one after the other
LENGTH = 9


def test_each_token_is_drawn_as_often_as_its_probability_says():
    """(0.1, 0, 0.6, 0.3) squared at temperature 1/2, and rows that differ."""
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    rows = torch.stack([probabilities.log(), probabilities.flip(0).log()]).repeat(20_000, 1)
    torch.manual_seed(0)
    left = Draw(temperature=0.5)(None, rows)
    assert (left == 0).sum(dim=1).eq(1).all()
    assert left.isneginf().sum() == 3 * len(rows)
    drawn = left.argmax(dim=1).view(-1, 2)
    expected = torch.tensor([0.01, 0.0, 0.36, 0.09]) / 0.46
    for tokens, expect in zip(drawn.T, (expected, expected.flip(0)), strict=True):
        share = tokens.bincount(minlength=4) / len(tokens)
        torch.testing.assert_close(share, expect, atol=0.01, rtol=0)
        assert share[expect == 0] == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-320, float("nan")])
def test_a_temperature_at_which_the_softmax_overflows(temperature):
    with pytest.raises(InputError, match="at least 0.000001 is needed"):
        Draw(temperature)


def alone(policy, prompt, stops=STOPS):
    """The likeliest tokens behind a prompt, one forward pass over all of the text for each."""
    text = list(prompt)
    while len(text) < len(prompt) + LENGTH and not set(text[len(prompt) :]) & set(stops):
        text.append(policy(torch.tensor([text])).logits[0, -1].argmax().item())
    return text[len(prompt) :]


def likeliest(policy, prompts, **options):
    """At temperature 0 (nearly) the sampler is a function of its prompt."""
    fields = {"response_length": LENGTH, "temperature": 1e-4, "eos_token_ids": STOPS, **options}
    sampling = Sampling(**{name: fields.pop(name) for name in Sampling._fields if name in fields})
    tokens, lengths, *_ = generate(policy, prompts, sampling, **fields)
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_those_of_each_prompt_alone(make_policy, kind, copies):
    policy = make_policy(kind).eval()
    drawn = likeliest(policy, PROMPTS, copies=copies, batch_size=4 * copies)
    expected = [alone(policy, prompt) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 1
    assert drawn == [row for row in expected for _ in range(copies)]


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 3])
def test_stop_strings_end_completions_one_after_the_other(policy, tokenizer, copies):
    policy.eval()
    letters = {t: tokenizer.decode([t]) for t in range(256)}
    stops = [t for t in STOPS if letters.get(t, "").isascii() and letters.get(t)]
    given = {"stop_strings": [letters[t] for t in stops], "tokenizer": tokenizer}
    prompts = [[n, n + 1] for n in range(40)]
    drawn = likeliest(policy, prompts, eos_token_ids=[256], copies=copies, **given)
    expected = [alone(policy, prompt, [*stops, 256]) for prompt in prompts]
    assert len(set(map(len, expected))) > 3
    assert drawn == [row for row in expected for _ in range(copies)]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_window_that_slides_slides_on(make_policy, copies):
    policy = make_policy("mistral", sliding_window=4).eval()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    expected = [row for prompt in prompts for row in [alone(policy, prompt)] * copies]
    assert likeliest(policy, prompts, copies=copies) == expected


def test_no_more_rows_at_once_than_asked_for(policy):
    expected = likeliest(policy, PROMPTS, copies=3)
    shapes = rows_and_tokens(policy)
    assert likeliest(policy, PROMPTS, copies=3, batch_size=2) == expected
    assert max(rows for rows, _ in shapes) == 2


def test_an_adapter_draws_in_the_same_way(policy):
    model = get_peft_model(policy, LoraConfig(target_modules="all-linear")).eval()
    assert likeliest(model, PROMPTS, copies=2)[::2] == [alone(policy, p) for p in PROMPTS]


def test_prompt_tuning_draws_what_it_reads(policy):
    model = get_peft_model(policy, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not caches_rows(model)
    model.eval()
    assert likeliest(model, PROMPTS[:1], copies=2) == [alone(model, PROMPTS[0])] * 2


def rows_and_tokens(policy):
    """Shape of the tokens in each pass of the policy from now on."""
    likeliest(policy, [[5]])  # what kind of model it is, is found out once
    shapes = []
    embedding = policy.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    return shapes


def test_a_prompt_is_read_once_for_all_its_completions(policy):
    policy.config.use_cache = False  # as trainers save it
    shapes = rows_and_tokens(policy)
    likeliest(policy, [[5, 6, 7, 8], [9, 10, 11, 12]], copies=4, response_length=1)
    assert shapes == [(2, 3), (8, 1)]


@pytest.mark.parametrize("by_string", [False, True], ids=["EOS", "stop string"])
def test_completions_that_have_ended_are_computed_no_further(policy, tokenizer, by_string):
    policy.eval()
    stops, options = STOPS, {}
    if by_string:
        letters = {t: tokenizer.decode([t]) for t in range(64)}
        stops = [256, *(t for t, letter in letters.items() if letter.isascii() and letter)]
        strings = [letters[t] for t in stops[1:]]
        options = {"eos_token_ids": [256], "stop_strings": strings, "tokenizer": tokenizer}
    lengths = [len(alone(policy, prompt, stops)) for prompt in PROMPTS]
    assert len(set(lengths)) > 1
    shapes = rows_and_tokens(policy)
    likeliest(policy, PROMPTS, **options)
    for step, (rows, tokens) in enumerate(shapes[1:], start=1):
        going_on = sum(length > step for length in lengths)
        assert tokens == 1
        assert going_on <= rows < going_on / 0.75 + 1
    assert len(shapes) == max(lengths)
