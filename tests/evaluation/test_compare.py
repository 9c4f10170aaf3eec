import json
import shutil

import pytest
import yaml
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, chat, write

from trl_instruct.errors import InputError
from trl_instruct.evaluation.compare import compare, render
from trl_instruct.evaluation.evaluate import evaluate
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
    options = {"eval_dataset_name": prompts, "gold": reward, **QUICK_PPO}
    aligned = ppo(policy, reward, prompts, folder / "ppo", **options)
    return aligned, compare(aligned, eval_dataset=prompts, summary_file=folder / "summary.json")


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
    """From the config alone, with prompts that lie in the folder of a stage."""
    aligned, summary = run
    config = yaml.safe_load((aligned.path / "config.yaml").read_text())
    config["eval_dataset_name"] = str(write(aligned.path / "prompts.jsonl", PROMPTS))
    config["summary_file"] = str(aligned.path.parent / "theirs.json")
    (aligned.path / "config.yaml").write_text(yaml.safe_dump(config))
    assert compare(aligned) == summary
    assert json.loads((aligned.path / "summary.json").read_text()) == summary
    assert not (aligned.path.parent / "theirs.json").exists()


def test_a_split_of_the_prompts_themselves(run, tmp_path):
    """`dataset_test_split` alone: the held-out prompts lie in the same dataset."""
    aligned, _ = run
    prompts = str(aligned.path.parent / "prompts.jsonl")
    options = {**QUICK_PPO, "dataset_test_split": "train[:3]"}
    folders = aligned.path.parent / "sft", aligned.path.parent / "rm"
    again = ppo(*folders, prompts, tmp_path / "ppo", **options)
    assert compare(again, eval_dataset=prompts)["prompts"] == 3
    with pytest.raises(InputError, match="a split of what\\? Name an eval_dataset_name"):
        ppo(*folders, Dataset.from_list(PROMPTS), tmp_path / "other", **options)


def test_messages_are_refused_where_the_policy_knows_text(run, tmp_path):
    aligned, _ = run
    talk = write(tmp_path / "talk.jsonl", [chat(row) for row in DEMONSTRATIONS])
    assert aligned.metrics["format"] == "text"
    message = "`prompt` is messages, but the (policy|model a) .* was trained on text"
    with pytest.raises(InputError, match=message):
        compare(aligned, eval_dataset=talk)
    stages, prompts = aligned.path.parent, Dataset.from_list(PROMPTS)
    options = {**QUICK_PPO, "eval_dataset_name": talk}
    with pytest.raises(InputError, match=message):
        ppo(stages / "sft", stages / "rm", prompts, tmp_path / "ppo", **options)
    with pytest.raises(InputError, match="summary_file needs held-out prompts"):
        ppo(stages / "sft", stages / "rm", prompts, tmp_path / "ppo", **QUICK_PPO, summary_file="s")
    models, options = {"a": aligned}, {"use_cpu": True, "output_dir": tmp_path / "e"}
    with pytest.raises(InputError, match=message):
        evaluate(models, prompts, demonstrations=talk, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_metrics_of_another_kind_beside_a_policy_cost_no_run(run, saved_policy, tmp_path, content):
    shutil.copytree(saved_policy, tmp_path / "policy")
    (tmp_path / "policy" / "metrics.json").write_text(content)
    prompts, reward = Dataset.from_list(PROMPTS), run[0].path.parent / "rm"
    aligned = ppo(tmp_path / "policy", reward, prompts, tmp_path / "ppo", **QUICK_PPO)
    assert "format" not in aligned.metrics and (aligned.path / "model.safetensors").is_file()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_model_path": ["runs/rm", "rules.py:short"]},
            r"'rules.py:short', which is Python",
        ),
        (
            {"reward_model_path": "http://host/score"},
            r"an address.*pass it to compare\(..., reward=",
        ),
        (
            {"gold": "https://me:pw@host/score"},
            r"'https://\*\*\*@host/score', an address.* gold=\)",
        ),
        ({"gold": "rules.py:short"}, r"which is Python code to be run.* compare\(..., gold=\)"),
        ({"eval_dataset_name": "../mine.jsonl"}, r"'../mine.jsonl', which lies in no .* eval_data"),
        ({"eval_dataset_name": "link.jsonl"}, r"which lies in no .* compare\(..., eval_dataset=\)"),
        ({"eval_dataset_name": "~/"}, r"'~/', which lies in no"),
        ({"reward_model_path": [5]}, r"config.yaml: reward_model_path is list \[5\]; "),
        ({"model_name_or_path": 5}, r"config.yaml: model_name_or_path is int 5; "),
    ],
)
def test_a_folder_from_elsewhere_is_not_obeyed(tmp_path, monkeypatch, changes, message):
    """It names no code to run, no address to send to, no file outside, and no place to write."""
    folder, kept = tmp_path / "theirs", str(write(tmp_path / "mine.jsonl", PROMPTS))
    folder.mkdir()
    (folder / "link.jsonl").symlink_to(kept)
    (folder / "rules.py").write_text("raise AssertionError('was run')\n")
    monkeypatch.chdir(folder)
    config = {
        "model_name_or_path": "no/model",
        "reward_model_path": "no/reward",
        "eval_dataset_name": "tiny:test",
        "summary_file": kept,
    }
    finished(folder, "ppo", **config | changes)
    with pytest.raises(InputError, match=message):
        compare(folder)
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == len(PROMPTS)
