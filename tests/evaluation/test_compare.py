import json

import pytest
import yaml
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, write

from trl_instruct.errors import InputError
from trl_instruct.evaluation.compare import compare, render
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft

pytestmark = pytest.mark.slow  # whole stages


@pytest.fixture(scope="module")
def run(tmp_path_factory, saved_policy):
    """A PPO policy with all that it came from, and its summary."""
    folder = tmp_path_factory.mktemp("run")
    prompts = write(folder / "prompts.jsonl", PROMPTS)
    policy = sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), folder / "sft", **QUICK)
    rankings = Dataset.from_list(RANKINGS)
    reward = rm(policy, rankings, folder / "rm", eval_size=0.25, **QUICK)
    options = {"eval_dataset_name": prompts, "summary_file": folder / "summary.json"}
    aligned = ppo(policy, reward, prompts, folder / "ppo", gold=reward, **options, **QUICK_PPO)
    return aligned, compare(aligned)


def test_what_is_compared(run, saved_policy):
    aligned, summary = run
    assert set(summary["rm"]) == {"base", "sft", "ppo", "accuracy"}
    for name in ("base", "sft", "ppo"):
        score = summary["gold"][name]
        assert score["low"] <= score["mean"] <= score["high"]
        assert 0 <= summary["length"][name] <= 4
        assert 0 <= summary["ended"][name] <= 1
    assert summary["prompts"] == 8
    seconds = dict(summary["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=0.05)
    assert set(seconds) == {"sft", "rm", "ppo"}
    assert len(summary["samples"]) == 5
    assert set(summary["samples"][0]) == {"prompt", "sft", "ppo"}
    assert json.loads((aligned.path.parent / "summary.json").read_text()) == summary


def test_the_same_again(run):
    aligned, summary = run
    assert compare(aligned) == summary


def test_a_split_of_the_prompts_themselves(run, tmp_path):
    """`dataset_test_split` alone: the held-out prompts lie in the same dataset."""
    aligned, _ = run
    prompts = str(aligned.path.parent / "prompts.jsonl")
    options = {**QUICK_PPO, "dataset_test_split": "train[:3]"}
    folders = aligned.path.parent / "sft", aligned.path.parent / "rm"
    again = ppo(*folders, prompts, tmp_path / "ppo", **options)
    assert compare(again)["prompts"] == 3
    with pytest.raises(InputError, match="a split of what\\? Name an eval_dataset_name"):
        ppo(*folders, Dataset.from_list(PROMPTS), tmp_path / "other", **options)


def test_the_table(run):
    _, summary = run
    text = render(summary)
    for part in ("8 test prompts", "base ", "SFT ", "PPO ", "gold score (95 %)", "RM accuracy"):
        assert part in text
    assert text.count("\n> ") == 5


def test_what_a_model_says_cannot_disturb_the_screen(run):
    _, summary = run
    sample = {"completion": "a\x1b[2J\nb", "gold": 0.0, "rm": 0.0}
    shown = render({**summary, "samples": [{"prompt": "p", "sft": sample, "ppo": sample}]})
    assert "\x1b" not in shown
    assert "a\\x1b[2J | b" in shown


def finished(folder, stage, **config):
    """A folder that holds no more of a stage than what says which it was."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps({"stage": stage, "seconds": 1.0}))


def test_what_compare_needs(tmp_path):
    with pytest.raises(InputError, match="holds no finished stage"):
        compare(tmp_path)
    finished(tmp_path, "sft")
    with pytest.raises(InputError, match="holds no policy trained by `ppo`"):
        compare(tmp_path)
    finished(tmp_path, "ppo")
    with pytest.raises(InputError, match="names no model_name_or_path"):
        compare(tmp_path)
    finished(tmp_path, "ppo", model_name_or_path="x")
    with pytest.raises(InputError, match="names no reward_model_path"):
        compare(tmp_path)


def test_a_folder_does_not_run_the_python_file_that_it_names(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("raise AssertionError('was run')\n")
    config = {
        "model_name_or_path": "x",
        "reward_model_path": ["runs/rm", f"{file}:short"],
        "eval_dataset_name": "tiny:test",
    }
    finished(tmp_path, "ppo", **config)
    with pytest.raises(InputError, match=r"Python code to be run. If you trust it, pass it to"):
        compare(tmp_path)
