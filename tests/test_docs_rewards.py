"""The code in docs/rewards.md runs."""

import re
from pathlib import Path

import pytest

import trl_instruct
from trl_instruct.reward_function import call_reward, reward_name

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_rules(monkeypatch):
    called = {}
    monkeypatch.setattr(trl_instruct, "ppo", lambda *args, **kwargs: called.update(kwargs))
    names = {"ppo": trl_instruct.ppo}
    exec(BLOCKS[0], names)
    assert called == {"reward_weights": [1.0, 0.5]}
    texts = ["A rose is red.", "two words "]
    given = (["p", "p"], texts, {"words": [["rose", "lily"], ["two"]]})
    expected = {
        "near_forty_words": [-0.9, -0.95],
        "ends_a_sentence": [1.0, 0.0],
        "required_words": [0.5, 1.0],
    }
    for name, scores in expected.items():
        assert call_reward(names[name], *given) == pytest.approx(scores)


def test_the_adapters(make_reward_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = {0: "toxic", 1: "insult", 2: "POSITIVE"}
    for name in ("sentiment", "toxic"):
        make_reward_model(id2label=labels).save_pretrained(f"runs/{name}")
        tokenizer.save_pretrained(f"runs/{name}")
    adapters = ("ClassifierReward", "HTTPReward", "LLMJudge", "Clipped", "Normalised")
    names = {n: getattr(trl_instruct, n) for n in (*adapters, "WeightedSum", "LengthPenalty")}
    exec(BLOCKS[1], names | (ran := {"RUBRIC": "Rate {completion}"}), ran)
    for name in ("sentiment", "clean"):
        assert len(call_reward(ran[name], ["a", "b"], ["c", "d"], {})) == 2
    assert reward_name(ran["total"]).startswith("clipped normalised http://127.0.0.1:8000/score + ")
