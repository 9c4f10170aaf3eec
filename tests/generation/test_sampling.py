"""From prompts to completions."""

import pytest
import torch
from conftest import completion_logprobs
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from trl_instruct.data.rendering import render_prompts
from trl_instruct.errors import InputError
from trl_instruct.generation.sampler import eos_token_ids
from trl_instruct.generation.sampling import (
    decode,
    fit_prompts,
    generate,
    pad_prompts,
    unused_sampling,
)
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.logprobs import entropy, log_distribution, token_logprobs
from trl_instruct.padding import right_padded_mask


def sample(model, prompts, **options):
    fields = {"response_length": 1, "batch_size": 4096, **options}
    sampling = Sampling(**{name: fields.pop(name) for name in Sampling._fields if name in fields})
    torch.manual_seed(0)
    return generate(model, prompts, sampling, **{"eos_token_ids": [256], **fields})[:3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop_strings": ["a", ""]}, r"stop_strings are \['a', ''\]: an empty one ends every"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
    ],
)
def test_stop_strings_that_cannot_work(policy, given, message):
    with pytest.raises(InputError, match=message):
        generate(policy, [[5]], Sampling(2, **given), eos_token_ids=[0])


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "copies"), [(1.0, 1), (0.5, 1), (1.0, 64)])
def test_sampling_is_from_the_full_distribution_at_its_temperature(policy, temperature, copies):
    """The mean log-probability of samples is minus the entropy, whatever the model's own taste."""
    policy.generation_config = GenerationConfig(
        do_sample=True, top_k=3, top_p=0.3, temperature=0.2, repetition_penalty=5.0, min_p=0.5
    )
    prompt = [5, 6, 7]
    prompts = [prompt] * (4096 // copies)
    tokens, _, _ = sample(policy, prompts, temperature=temperature, copies=copies)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[:, -1:]
    log_probs = log_distribution(logits, temperature=temperature)
    logprobs = token_logprobs(log_probs.expand(4096, -1, -1), tokens)
    error = logprobs.std() / 4096**0.5
    assert abs(logprobs.mean() + entropy(log_probs).item()) < 4 * error
    assert len(tokens.unique()) > 50


@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_generation_config_is_back_afterwards(policy, lora):
    own = policy.generation_config = GenerationConfig(top_k=3, eos_token_id=[256, 1])
    model = get_peft_model(policy, LoraConfig(target_modules="all-linear")) if lora else policy
    sample(model, [[5]])
    assert policy.generation_config is own
    assert model.generation_config is own


@pytest.mark.parametrize("copies", [1, 3])
def test_the_log_probabilities_are_those_of_a_forward_pass(policy, tokenizer, copies):
    """Also of rows that go on after others have left the batch."""
    prompts = [[70 + 9 * n] * n for n in (5, 1, 3)] * 4
    how = Sampling(8, temperature=0.7, stop_strings=["a"], batch_size=9)
    stops = {"eos_token_ids": [256, *range(40)], "tokenizer": tokenizer}
    drawn = generate(policy, prompts, how, copies=copies, **stops)
    asked = pad_prompts([p for p in prompts for _ in range(copies)], policy.device)
    with torch.no_grad():
        read = completion_logprobs(policy.eval(), *asked, *drawn[:2], temperature=0.7)
    mask = right_padded_mask(drawn.completion_lengths, 8)
    assert len(drawn.completion_lengths.unique()) > 3
    torch.testing.assert_close(drawn.logprobs[mask], read[mask], atol=1e-5, rtol=0)


def test_completions_stop_at_any_eos_given_and_belong_to_their_prompts(policy):
    stops = [256, *range(64)]
    prompts = [[70 + 9 * n] * n for n in (7, 1, 4, 2, 6, 3, 5)]
    tokens, lengths, ended = sample(
        policy, prompts, response_length=6, eos_token_ids=stops, batch_size=2
    )
    assert tokens.shape == (7, 6)
    assert len(set(lengths.tolist())) > 1
    for row in range(len(prompts)):
        at = [t for t, token in enumerate(tokens[row].tolist()) if token in stops]
        assert ended[row] == bool(at)
        assert lengths[row] == (at[0] + 1 if at else 6)
    # a prompt's tokens decide the distribution: the rows are not mixed up by the sorting
    sharp, _, _ = sample(policy, prompts, temperature=1e-4, batch_size=2)
    assert len(set(sharp.flatten().tolist())) > 4
    for prompt, token in zip(prompts, sharp, strict=True):
        assert policy(torch.tensor([prompt])).logits[0, -1].argmax() == token


def test_generation_leaves_the_mode_as_it_was(make_policy):
    policy = make_policy("gpt2", resid_pdrop=0.9).train()
    first, second = sample(policy, [[5]] * 3)[0], sample(policy, [[5]] * 3)[0]
    assert policy.training
    assert torch.equal(first, second)


def test_messages_go_through_the_chat_template(tokenizer, chat_tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    (tokens,) = render_prompts([messages], chat_tokenizer)
    assert chat_tokenizer.decode(tokens) == "u:Hi\na:"
    assert render_prompts(["Hi"], tokenizer) == [tokenizer("Hi")["input_ids"]]
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        render_prompts([messages], tokenizer)


def test_prompts_are_cut_from_the_left_and_counted():
    prompts = [[1, 2, 3], [4]]
    options = {"response_length": 6, "context": 8}
    assert fit_prompts(prompts, max_prompt_length=2, **options) == ([[2, 3], [4]], 1)
    assert fit_prompts(prompts, max_prompt_length=None, response_length=5, context=8)[1] == 0
    assert fit_prompts(prompts, max_prompt_length=None, response_length=5, context=None)[1] == 0
    with pytest.raises(InputError, match="Prompt 1 is 3 tokens long.*leaves 2"):
        fit_prompts(prompts, max_prompt_length=None, **options)
    with pytest.raises(InputError, match="max_prompt_length 3 .* exceed the model's context of 8"):
        fit_prompts(prompts, max_prompt_length=3, **options)
    with pytest.raises(InputError, match="Prompt 2 has no tokens"):
        fit_prompts([[1], []], max_prompt_length=2, **options)


def test_texts_have_neither_the_eos_nor_what_follows_it(tokenizer):
    (hello,) = tokenizer(["hello"])["input_ids"]
    filler = tokenizer("zz")["input_ids"]
    tokens = torch.tensor([[*hello, 256, *filler], [*hello, *hello[:3]]])
    lengths, ended = torch.tensor([6, 8]), torch.tensor([True, False])
    assert decode(tokens, lengths, ended, tokenizer) == ["hello", "hellohel"]
    # nor an EOS that the tokenizer takes for text, as a model's own may be
    assert decode(tokens, torch.tensor([3, 8]), ended, tokenizer) == ["he", "hellohel"]


def test_a_text_ends_before_the_first_of_its_stop_strings(tokenizer):
    tokens = torch.tensor(tokenizer(["so be it. end! or"])["input_ids"])
    whole = torch.tensor([tokens.shape[1]]), torch.tensor([True])
    assert decode(tokens, *whole, tokenizer, ["!", ". ", "o"]) == ["s"]
    assert decode(tokens, *whole, tokenizer, ["!", ". "]) == ["so be it"]


def test_the_eos_of_tokenizer_and_model_both_end_a_completion(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 256]
    assert eos_token_ids(policy, tokenizer) == [256, 7]
    policy.generation_config.eos_token_id = None
    assert eos_token_ids(policy, tokenizer) == [256]


# ---- stop strings --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stop_string_ends_a_completion_with_its_last_token(policy, tokenizer):
    """One token a byte, so lengths are letters. The prompts hold the string and end in half of it:
    only the completion counts."""
    stops = ["a", "zq"]
    prompts = [tokenizer(text)["input_ids"] for text in ["za z"] * 400]
    tokens, lengths, ended = sample(
        policy, prompts, response_length=30, stop_strings=stops, tokenizer=tokenizer, batch_size=64
    )
    seen = set()
    for row, length, end in zip(tokens.tolist(), lengths.tolist(), ended.tolist(), strict=True):
        raw = tokenizer.decode(row[:length])
        before = tokenizer.decode(row[: length - 1])
        assert not any(stop in before for stop in stops) and "<eos>" not in before
        hits = [what for what in (*stops, "<eos>") if what in raw]
        assert end == bool(hits)
        assert length == 30 or hits
        seen |= set(hits)
    assert {"a", "<eos>"} <= seen
    texts = decode(tokens, lengths, ended, tokenizer, stops)
    assert not any(stop in text for stop in stops for text in texts)


def test_a_stop_string_over_several_tokens(make_policy, tokenizer):
    """A policy that says "xyxyxy..." and stops where the text holds "yxy", at its fourth token."""
    policy = make_policy()
    letters = {t: tokenizer.convert_tokens_to_ids(t) for t in "xy"}

    class Cycle(torch.nn.Module):
        def forward(self, hidden):
            return torch.full((*hidden.shape[:-1], 258), -1e4).index_fill(
                -1, torch.tensor([letters["x"], letters["y"]][self.turn()]), 1e4
            )

        def turn(self):
            self.count = getattr(self, "count", -1) + 1
            return self.count % 2

    policy.lm_head = Cycle()
    sampled = sample(
        policy, [[5], [6, 7]], response_length=9, stop_strings=["yxy"], tokenizer=tokenizer
    )
    assert sampled[1].tolist() == [4, 4] and sampled[2].all()
    assert decode(*sampled, tokenizer, ["yxy"]) == ["x", "x"]


def test_a_special_token_as_a_stop_string(policy, tokenizer):
    tokens, lengths, ended = sample(
        policy,
        [[5]] * 300,
        response_length=20,
        stop_strings=["<pad>"],
        tokenizer=tokenizer,
    )
    last = tokens[torch.arange(300), lengths - 1]
    assert {256, 257} <= set(last[ended].tolist())
    assert set(last[ended].tolist()) == {256, 257}
    assert "<pad>" not in "".join(decode(tokens, lengths, ended, tokenizer, ["<pad>"]))


# ---- settings that would make the log-probabilities another distribution's -----------------------


def test_what_a_models_generation_config_asks_for_in_vain(policy):
    assert unused_sampling(policy) == {}
    policy.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1
    )
    assert unused_sampling(policy) == {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
