import copy
import json

import pytest
from datasets import Dataset
from test_recipes import chat
from trl import ModelConfig

from trl_instruct.configs import CandidatesConfig
from trl_instruct.data.rankings import load_rankings
from trl_instruct.errors import InputError
from trl_instruct.generation import sampling
from trl_instruct.models.adapters import is_quantized
from trl_instruct.recipes import candidates
from trl_instruct.recipes.candidates import sample_candidates
from trl_instruct.rewards.load import load_reward

PROMPTS = [{"prompt": f"Q{i}: ", "topic": f"t{i}"} for i in range(6)]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def sample(policy, tokenizer, path, rows=PROMPTS, **options):
    options = {"response_length": 3, "processing_class": tokenizer, **options}
    counts = sample_candidates(policy, Dataset.from_list(rows), path, **options)
    return counts, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_that_a_person_can_rank(policy, tokenizer, tmp_path):
    counts, rows = sample(policy, tokenizer, tmp_path / "new" / "c.jsonl", num_candidates=3)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["topic"] == prompt["topic"]
        assert row["ranks"] is None
        assert 2 <= len(set(row["responses"])) == len(row["responses"]) <= 3
    responses = sum(len(row["responses"]) for row in rows)
    assert counts == {
        "prompts": 6,
        "prompts_cut": 0,
        "responses": responses,
        "empty": 0,
        "duplicates": 18 - responses,
        "prompts_left_out": 0,
    }
    with pytest.raises(InputError, match="line 1"):  # nobody has ranked them yet
        load_rankings(tmp_path / "new" / "c.jsonl")
    for row in rows:
        row["ranks"] = list(range(1, len(row["responses"]) + 1))
    assert len(load_rankings(Dataset.from_list(rows))) == 6


def test_ranks_that_people_filled_in_are_never_written_over(policy, tokenizer, tmp_path):
    path = tmp_path / "c" / "train.jsonl"
    _, rows = sample(policy, tokenizer, path, num_candidates=3)
    sample(policy, tokenizer, path, num_candidates=3)  # nobody has ranked them
    rows[1]["ranks"] = [1, 2, 2]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    told = r"train.jsonl' holds 1 rankings that somebody filled in.*Move the file to another folder"
    with pytest.raises(InputError, match=told):
        sample(policy, tokenizer, path, num_candidates=3)
    options = {"dataset_name": "tiny:prompts", "overwrite_output_dir": True, "use_cpu": True}
    config = CandidatesConfig(output_dir=str(path.parent), **options)
    with pytest.raises(InputError, match=told):
        candidates.candidates(config, ModelConfig(model_name_or_path="nowhere"))
    assert path.read_text(encoding="utf-8") == before


def test_a_simulated_labeler_scores_them(policy, tokenizer, tmp_path):
    _, rows = sample(policy, tokenizer, tmp_path / "c.jsonl", gold=length, labeler=lambda s: s)
    for row in rows:
        assert row["gold_scores"] == [float(len(text)) for text in row["responses"]]
        assert row["scores"] == row["gold_scores"]
    _, rows = sample(policy, tokenizer, tmp_path / "c.jsonl", gold=length)
    assert any(row["scores"] != row["gold_scores"] for row in rows)


@pytest.mark.slow
def test_any_reward_can_stand_in_for_the_labeler(policy, tokenizer, saved_reward_model, tmp_path):
    _, rows = sample(policy, tokenizer, tmp_path / "c.jsonl", gold=saved_reward_model)
    judge = load_reward(saved_reward_model)
    for row in rows:
        scores = judge([row["prompt"]] * len(row["responses"]), row["responses"])
        assert row["gold_scores"] == pytest.approx(scores)


def test_the_seed_decides(policy, tokenizer, tmp_path):
    first, again, other = (
        sample(policy, tokenizer, tmp_path / "c.jsonl", gold=length, seed=seed)[1]
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_long_prompts_are_cut_on_demand(policy, tokenizer, tmp_path):
    rows = [{"prompt": "p" * 126}, {"prompt": "p"}]
    counts, drawn = sample(policy, tokenizer, tmp_path / "c.jsonl", rows, max_prompt_length=9)
    assert (counts["prompts"], counts["prompts_cut"]) == (2, 1)
    assert drawn[0]["prompt"] == "p" * 126  # the labeler reads all of it


def test_messages(policy, chat_tokenizer, tmp_path):
    rows = [chat({"prompt": row["prompt"]}) for row in PROMPTS]
    _, drawn = sample(policy, chat_tokenizer, tmp_path / "c.jsonl", rows)
    assert drawn[0]["prompt"] == rows[0]["prompt"]
    assert {message["role"] for reply in drawn[0]["responses"] for message in reply} == {
        "assistant"
    }


def test_what_cannot_be_ranked_is_counted(policy, tokenizer, tmp_path, monkeypatch):
    texts = iter(["same", "same", " ", "a", "b", "b"])
    monkeypatch.setattr(sampling, "decode", lambda *_: list(texts))
    options = {"num_candidates": 3, "rows": PROMPTS[:2]}
    counts, rows = sample(policy, tokenizer, tmp_path / "c.jsonl", **options)
    assert [row["responses"] for row in rows] == [["a", "b"]]
    assert counts == {
        "prompts": 2,
        "prompts_cut": 0,
        "responses": 2,
        "empty": 1,
        "duplicates": 2,
        "prompts_left_out": 1,
    }


def test_bad_input_leaves_no_file(policy, tokenizer, tmp_path):
    def broken(prompts, completions, **columns):
        return [1.0]

    for options, message in (
        ({"num_candidates": 1}, "num_candidates is 1; it must be above 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rows": [{"prompt": "p" * 126}]}, "Prompt 1 is 126 tokens long"),
        ({"rows": [{"question": "p"}]}, "`prompt` missing"),
        ({"gold": broken, "labeler": list}, "returned 1 scores for"),
    ):
        with pytest.raises(InputError, match=message):
            sample(policy, tokenizer, tmp_path / "c.jsonl", **options)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="has no EOS token"):
        sample(policy, endless, tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="No model could be loaded"):
        sample(tmp_path / "nowhere", tokenizer, tmp_path / "c.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_policy_is_loaded_as_the_model_config_says(
    saved_policy, tokenizer, tmp_path, monkeypatch
):
    seen = []

    def spy(sampler, *given, **options):
        seen.append(is_quantized(sampler.policy))
        return sampling.sample_several(sampler, *given, **options)

    monkeypatch.setattr(candidates, "sample_several", spy)
    sample(saved_policy, tokenizer, tmp_path / "a.jsonl")
    sample(
        saved_policy, tokenizer, tmp_path / "b.jsonl", model_config=ModelConfig(load_in_8bit=True)
    )
    assert seen == [False, True]
