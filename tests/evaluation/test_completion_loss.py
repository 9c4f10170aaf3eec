"""The loss on demonstrations is the one that SFT minimises."""

import pytest
import torch
from datasets import Dataset
from test_recipes import QUICK, chat
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from trl_instruct.configs import SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.evaluation.measurement import completion_loss

ROWS = [{"prompt": f"{'long ' * i}Q{i}: ", "completion": "answer " * (1 + i % 3)} for i in range(6)]


def token_by_token(policy, rows, eos=256):
    """-log p of every completion byte and the EOS, one text at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt, completion = row["prompt"].encode(), row["completion"].encode()
        ids = [*prompt, *completion, eos]
        with torch.no_grad():
            logprobs = policy(torch.tensor([_as_tokens(ids)])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= logprobs[place - 1, _as_tokens(ids)[place]].item()
            count += 1
    return total / count


def _as_tokens(ids):
    """Bytes in the byte tokenizer's own order of its alphabet."""
    from conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    return [i if i == 256 else tokenizer(chr(i))["input_ids"][0] for i in ids]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_mean_over_all_completion_tokens(policy, tokenizer, batch_size):
    found = completion_loss(policy, tokenizer, Dataset.from_list(ROWS), batch_size=batch_size)
    assert found == pytest.approx(token_by_token(policy, ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "messages"])
def test_it_is_the_loss_of_sft(saved_policy, tokenizer, chat_tokenizer, tmp_path, form):
    """TRL's own evaluation in one batch, so that its mean is over the same tokens."""
    is_chat = form == "messages"
    rows = Dataset.from_list([chat(row) for row in ROWS] if is_chat else ROWS)
    reader = chat_tokenizer if is_chat else tokenizer
    options = {**QUICK, "per_device_eval_batch_size": 6, "output_dir": str(tmp_path)}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(saved_policy),
        SFTConfig(**options),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=reader,
    )
    expected = trainer.evaluate()["eval_loss"]
    model = AutoModelForCausalLM.from_pretrained(saved_policy)
    assert completion_loss(model, reader, rows) == pytest.approx(expected, rel=1e-5)


def test_an_eos_that_is_there_is_not_doubled(policy, tokenizer):
    ended = [{**row, "completion": row["completion"] + "<eos>"} for row in ROWS]
    both = (completion_loss(policy, tokenizer, Dataset.from_list(rows)) for rows in (ROWS, ended))
    assert next(both) == next(both)


def test_what_exceeds_the_context_is_cut_from_the_right(policy, tokenizer):
    """Context 128: 8 tokens of prompt leave 120 of the completion, and no EOS."""
    whole = [{"prompt": "12345678", "completion": "x" * 500}]
    found = completion_loss(policy, tokenizer, Dataset.from_list(whole))
    ids = torch.tensor([tokenizer("12345678" + "x" * 120)["input_ids"]])
    with torch.no_grad():
        logprobs = policy(ids).logits[0, 7:-1].log_softmax(-1)
    expected = -logprobs.gather(1, ids[0, 8:].unsqueeze(1)).mean().item()
    assert found == pytest.approx(expected)


def test_a_prompt_that_fills_the_context(policy, tokenizer):
    rows = Dataset.from_list([ROWS[0], {"prompt": "p" * 128, "completion": "a"}])
    with pytest.raises(InputError, match="Demonstration 2: the prompt is 128 tokens .*context 128"):
        completion_loss(policy, tokenizer, rows)


def test_progress_is_told(policy, tokenizer):
    told = []
    rows = Dataset.from_list(ROWS)
    completion_loss(policy, tokenizer, rows, batch_size=4, progress=told.append)
    assert told == [1, 4, 1]  # the shortest would be more than a fifth of padding beside the next
