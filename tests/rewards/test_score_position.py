"""A response's score: the same in a row of its own, in a batch, behind a shared prompt."""

import re
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from trl_instruct.padding import pad_rows, right_padded_mask
from trl_instruct.reward_trainer import prefix, prefix_scores
from trl_instruct.reward_trainer.prefix import share_prefix
from trl_instruct.reward_trainer.prefix_scores import shared_scores, sharing_fault, token_scores
from trl_instruct.rewards.score_position import (
    batched_logits,
    row_scores,
    score_positions,
    scores_at,
)

PROMPTS = [list(range(20, 40)), [50, 51, 52]]
ROWS = [PROMPTS[0] + end for end in ([1, 2, 256], [3, 256], [4, 5, 6, 7, 8, 256])]
ROWS += [PROMPTS[1] + end for end in ([9, 256], [1, 2, 3, 256])]
COUNTS = torch.tensor([3, 2])
LENGTHS = torch.tensor([len(row) for row in ROWS])
IDS = pad_rows(ROWS, 257)
MASK = right_padded_mask(LENGTHS, IDS.shape[1]).long()
SHARES = ["llama", "qwen3", "gpt_neox", "gpt2", "opt"]
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8}


def classifier(kind, **options):
    """A random scalar classifier of an architecture that conftest does not have."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **WIDTHS,
        **{"vocab_size": 258, "pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256},
        **{"num_labels": 1, "initializer_range": 0.3, **options},
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def alone(model):
    """Scores of the rows one at a time, as plain transformers gives them."""
    scores = [model(input_ids=torch.tensor([row])).logits.squeeze() for row in ROWS]
    return torch.stack(scores)


@torch.no_grad()
def shared(model, counts=COUNTS):
    rows = share_prefix(IDS, LENGTHS, counts)
    return shared_scores(model, model, rows, LENGTHS - 1, torch.float32)[0]


def fault(model, dtype=torch.float32, rows=3):
    lengths = LENGTHS[:rows]
    return sharing_fault(model, model, IDS[:rows, : lengths.max()], lengths, dtype)


def test_the_score_stands_at_the_last_token_that_is_no_padding():
    ids = torch.tensor([[5, 6, 2, 2, 2], [2, 2, 5, 6, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert score_positions(ids, mask, None).tolist() == [2, 4]
    assert score_positions(ids, mask, 9).tolist() == [2, 4]
    # Where the model calls the EOS padding, its score stands before it, as it was trained.
    assert score_positions(ids, mask, 2).tolist() == [1, 3]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="FlexAttention on CPU needs a C++ compiler")
def test_a_shared_prompt_with_flex_attention(make_reward_model, monkeypatch):
    """Forward alone: on CPU torch has no backward pass for it."""
    model = make_reward_model().eval()
    expected = shared(model)
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(prefix, "prefix_mask", None)
    torch.testing.assert_close(shared(model), expected)


@pytest.mark.parametrize("kind", SHARES)
def test_a_shared_prompt_changes_no_score(make_reward_model, kind):
    model = make_reward_model(kind).eval()
    expected = alone(model)
    torch.testing.assert_close(row_scores(model, model, IDS, MASK)[0], expected)
    torch.testing.assert_close(shared(model), expected, atol=1e-5, rtol=1e-5)
    assert fault(model) is None


@pytest.mark.parametrize("kind", [*SHARES, "qwen2"])
def test_a_shared_prompt_without_a_mask(make_reward_model, monkeypatch, kind):
    """Found by the check; also rows of one response, and afterwards ordinary padded rows."""
    grouped = {**LLAMA, "num_key_value_heads": 1}
    model = classifier(kind, **grouped) if kind == "qwen2" else make_reward_model(kind).eval()
    expected = alone(model)
    monkeypatch.setattr(prefix_scores, "SPLIT_FROM", 0)
    monkeypatch.setattr(prefix, "prefix_mask", None)
    assert fault(model) is None
    assert model.config._attn_implementation == prefix_scores.SPLIT
    for counts in (COUNTS, torch.tensor([1, 2, 1, 1])):
        torch.testing.assert_close(shared(model, counts), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_scores(model, model, IDS, MASK)[0], expected)


def test_attention_that_is_not_sdpa_keeps_its_mask(reward_model):
    reward_model.eval().set_attn_implementation("eager")
    assert fault(reward_model) is None
    assert reward_model.config._attn_implementation == "eager"
    torch.testing.assert_close(shared(reward_model), alone(reward_model), atol=1e-5, rtol=1e-5)


def test_a_model_that_needs_the_mask_gets_it_back(reward_model, monkeypatch):
    """Its layers see lengths in place of a mask, and do not pass them on."""
    expected = alone(reward_model.eval())
    monkeypatch.setattr(prefix, "split_attention", lambda attend, tensors, lengths: 1 / 0)
    assert fault(reward_model) is None
    assert reward_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(shared(reward_model), expected, atol=1e-5, rtol=1e-5)


def test_left_padding_changes_no_score(reward_model):
    expected = alone(reward_model.eval())
    width = IDS.shape[1]
    ids = torch.stack([row.roll(width - int(n)) for row, n in zip(IDS, LENGTHS, strict=True)])
    mask = MASK.flip(1)
    scores, _ = row_scores(reward_model, reward_model, ids, mask)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_scores_are_read_where_they_are_asked_for_whatever_is_padding(reward_model):
    reward_model.config.pad_token_id = None
    with token_scores(reward_model.eval()) as seen:
        reward_model(input_ids=IDS, attention_mask=MASK)
    columns = torch.tensor([0, 1, 2, 3, 4])
    with scores_at(reward_model, columns, IDS.shape[1]):
        scores = reward_model(input_ids=IDS, attention_mask=MASK).logits.squeeze(-1)
    torch.testing.assert_close(scores, seen[0][1][torch.arange(5), columns])
    assert reward_model.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        reward_model(input_ids=IDS, attention_mask=MASK)


def test_gradients_go_through_the_tokens_that_were_read(reward_model):
    with scores_at(reward_model, LENGTHS - 1, IDS.shape[1]):
        reward_model(input_ids=IDS, attention_mask=MASK).logits.sum().backward()
    given = reward_model.score.weight.grad.clone()
    reward_model.zero_grad()
    sum(reward_model(input_ids=torch.tensor([row])).logits.sum() for row in ROWS).backward()
    torch.testing.assert_close(given, reward_model.score.weight.grad)


def test_a_classifier_with_another_head_reads_its_score_itself():
    model = classifier("bert")
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=MASK).logits.squeeze(-1)
        torch.testing.assert_close(row_scores(model, model, IDS, MASK)[0], expected)
    assert fault(model) == "it has no head `score` on every token"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("qwen2", LLAMA, "nothing"),
        ("phi", {"intermediate_size": 32}, "nothing"),
        ("mistral", {**LLAMA, "sliding_window": 26}, "nothing"),
        (
            "mistral",
            {**LLAMA, "sliding_window": 25},
            "attends to 25 tokens and a response .* has 26",
        ),
        ("gemma2", GEMMA, "nothing"),
        ("gemma2", {**GEMMA, "sliding_window": 8}, "attends to 8 tokens"),
        ("bloom", {}, "ValueError: "),  # makes its own mask
        ("falcon", {}, "hidden states differ by"),  # its classifier knows no positions
    ],
)
def test_who_can_share_is_found_by_trying(kind, options, expected):
    assert re.search(expected, fault(classifier(kind, **options)) or "nothing")


class Deaf(nn.Module):
    """A model that does without one of its arguments where it is new to it, as flash attention."""

    def __init__(self, model, argument):
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, **inputs):
        if inputs["attention_mask"].dim() == 4:
            inputs[self.argument] = None
        return self.model(**inputs)


def test_flash_attention_is_not_even_tried(reward_model):
    """On a GPU its kernels would read beyond the keys, and end the process's use of the device."""
    reward_model.config._attn_implementation = "flash_attention_2"
    reward_model.register_forward_pre_hook(lambda *_: pytest.fail("it was tried"))
    assert "flash_attention_2 does not support the mask" in fault(reward_model)


def test_scores_in_batches_keep_nothing_for_generation(reward_model):
    expected, outputs = alone(reward_model.eval()), []
    reward_model.register_forward_hook(lambda module, given, output: outputs.append(output))
    logits = batched_logits(reward_model, ROWS, 257, batch_size=8)
    torch.testing.assert_close(logits.squeeze(-1), expected, atol=1e-5, rtol=1e-5)
    assert [output.past_key_values for output in outputs] == [None] * len(outputs)


@pytest.mark.parametrize("argument", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_mask_or_positions_is_found_out(make_reward_model, argument, dtype):
    model = make_reward_model("gpt2").to(dtype).eval()
    nn.init.zeros_(model.score.weight)  # the scores themselves tell nothing
    assert fault(model, dtype) is None
    found = sharing_fault(Deaf(model, argument), model, IDS[:3], LENGTHS[:3], dtype)
    assert "hidden states differ by" in found


def test_the_same_response_twice_is_no_fault(reward_model):
    row = torch.tensor([[1, 2, 3, 256]] * 2)
    lengths = torch.tensor([4, 4])
    assert sharing_fault(reward_model.eval(), reward_model, row, lengths, torch.float32) is None


def test_the_last_token_that_is_not_padding():
    ids, mask = torch.tensor([[5, 2, 2], [2, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert score_positions(ids, mask, None).tolist() == [1, 2]
    assert score_positions(ids, mask, 2).tolist() == [0, 2]
