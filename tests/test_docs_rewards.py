"""The code in docs/rewards.md runs."""

import re
from pathlib import Path

import pytest
import torch
from test_http import running
from test_judge import endpoint

import trl_instruct
from trl_instruct import RewardServer
from trl_instruct.rewards.function import call_reward, reward_name

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_rules(monkeypatch):
    called = {}
    monkeypatch.setattr(trl_instruct, "ppo", lambda *args, **kwargs: called.update(kwargs))
    exec(BLOCKS[0], names := {})
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
    labels = {"id2label": {0: "toxic", 1: "insult", 2: "POSITIVE"}}
    for name, fields in {"rm": {}, "sentiment": labels, "toxic": labels}.items():
        make_reward_model(**fields).save_pretrained(f"runs/{name}")
        tokenizer.save_pretrained(f"runs/{name}")
    exec(BLOCKS[1], ran := {})
    for name in ("model", "sentiment", "clean", "steady", "total"):
        assert len(call_reward(ran[name], ["a", "b"], ["c", "d"], {})) == 2
    assert ran["model"].model.dtype == torch.bfloat16
    assert reward_name(ran["total"]).startswith("clipped normalised runs/rm + ")
    with endpoint(lambda question: f"It says {question.count('cat')} cats.\n7") as (url, _):
        ran["judge"].url = f"{url}chat/completions"
        assert ran["judge"](["Which?"], ["A cat."]) == [7.0]
    with running(RewardServer(lambda prompts, completions: [2.0 for _ in prompts])) as server:
        ran["remote"].url = server.url
        assert ran["remote"](["a"], ["b"]) == [2.0]
