"""The classic, positive movie reviews: recipes/configs/gpt2-imdb with the Hub replaced, and the
measured twin's own arithmetic."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

import trl_instruct
from trl_instruct import cli
from trl_instruct.data import sources
from trl_instruct.generation.sampling import Completion
from trl_instruct.rewards.classifier import ClassifierReward

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "configs" / "gpt2-imdb" / "ppo.yaml"
QUICK = {
    "use_cpu": "true",
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "response_length": 4,
    "disable_tqdm": "true",
    "report_to": "none",
}


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/imdb_scratch.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "imdb_scratch", ROOT / "benchmarks" / "imdb_scratch.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reviews_of_the_hub():
    """As stanfordnlp/imdb: `text` and `label`, first all negative ones, then all positive ones."""
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    texts = [f"{verdict} film number {row}" for verdict in ("bad", "good") for row in range(300)]
    return Dataset.from_dict({"text": texts, "label": [0] * 300 + [1] * 300}, features=kinds)


@pytest.mark.slow
def test_the_recipe_runs_with_what_the_hub_would_give(
    tmp_path, monkeypatch, saved_policy, make_reward_model, tokenizer
):
    monkeypatch.chdir(ROOT)
    asked, judged = [], []

    def load_dataset(path, split, streaming, **named):
        asked.append((path, split))
        data = reviews_of_the_hub()
        return data if split == "train" else data.select([*range(3), *range(597, 600)])

    def classifier(name, label, measure):
        judged.append((name, label, measure))
        model = make_reward_model(id2label={0: "NEGATIVE", 1: "POSITIVE"})
        return ClassifierReward(model, label, measure=measure, tokenizer=tokenizer)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    monkeypatch.setattr(trl_instruct, "ClassifierReward", classifier, raising=False)
    options = {**QUICK, "model_name_or_path": saved_policy, "output_dir": tmp_path / "ppo"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    cli.main(["ppo", "--config", str(RECIPE), *flags])
    train, held_out = (("stanfordnlp/imdb", part) for part in ("train", "test[:250]+test[-250:]"))
    assert asked == [train, held_out, held_out]  # checked before the training, compared on after it
    assert set(judged) == {("lvwerra/distilbert-imdb", "POSITIVE", "log_odds")}
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    shown = [sample["prompt"] for sample in summary["samples"]]
    assert (summary["prompts"], shown) == (6, ["bad film"] * 3 + ["good fil"] * 2)


def test_where_the_recipe_leaves_its_run():
    """What `make` goes by."""
    options = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert options["output_dir"] == "runs/gpt2-imdb/ppo"
    file, _, name = options["reward_model_path"].partition(":")
    assert (ROOT / file).is_file() and name in (ROOT / file).read_text(encoding="utf-8")


def test_no_review_is_in_two_parts(benchmark):
    rows = [
        {"text": f"{split} {row}", "label": "pos", "split": split}
        for split, count in (("train", 40), ("test", 10))
        for row in range(count)
    ]
    parts = benchmark.split(Dataset.from_list([*rows, *rows[:5]]))
    assert [len(part) for part in parts] == [15, 15, 10, 10]
    assert len({text for part in parts for text in part["text"]}) == 50
    assert set(parts.test["split"]) == {"test"}


@pytest.mark.slow
def test_the_twin_runs(benchmark, tmp_path, monkeypatch):
    """Its steps, small: every number is there and finite."""
    rows = [
        {"text": f"a {word} film, number {row} of {split}", "label": label, "split": split}
        for split, count in (("train", 16), ("test", 4))
        for row in range(count)
        for label, word in (("pos", "good"), ("neg", "bad"))
    ]
    monkeypatch.setattr(benchmark, "RUNS", tmp_path)
    monkeypatch.setattr(benchmark, "BASE", {**benchmark.BASE, "max_steps": 2, "vocab_size": 300})
    episodes = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "max_steps": 1}
    monkeypatch.setattr(benchmark, "PPO", {**benchmark.PPO, **episodes})
    measured = benchmark.run(benchmark.split(Dataset.from_list(rows)))
    before, after = measured["rows"]
    assert before["KL, nats"] == (0, 0, 0) != after["KL, nats"]
    numbers = [
        number for cells in (before, after) for cell in list(cells.values())[1:] for number in cell
    ]
    assert len(numbers) == 2 * 6 * 3 and all(map(math.isfinite, numbers))
    assert set(measured["accuracy"]) == {"judge", "second judge"}
    assert measured["samples"].count("\n") == 1 + 8


def test_the_tables(benchmark):
    said = ["a *b* | c", "<br>\nd\x1b"]
    sampled = [Completion(text, [0] * 4, True) for text in said]
    before, after = (
        benchmark.ModelMeasurement([], sampled, [0.5, 1.5], {"judge": scores}, None)
        for scores in ([1.0, -1.0], [2.0, 2.0])
    )
    lines = benchmark.table([benchmark.row("x", before), benchmark.row("y", after)]).splitlines()
    header = "| policy | judge, log-odds | judge, positive | KL, nats | tokens |"
    assert lines[:2] == [header, "| --- | --- | --- | --- | --- |"]
    # 12.706 sd / sqrt(2): of (1, -1) 12.71, of (0.5, 1.5) 6.35; Wilson's for one of two
    shares = "0.50 [0.09, 0.91]"
    kl = "1.00 [-5.35, 7.35]"
    assert lines[2] == f"| x | 0.00 [-12.71, 12.71] | {shares} | {kl} | 4.00 [4.00, 4.00] |"
    shown = benchmark.samples_table(["p_1", "p2"], before, after).splitlines()
    assert shown[2] == r"| p\_1 | a \*b\* \| c (+1.0) | a \*b\* \| c (+2.0) |"
    assert shown[3] == r"| p2 | \<br\> d\\x1b (-1.0) | \<br\> d\\x1b (+2.0) |"


def test_without_the_data_it_says_so(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["imdb.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "imdb_reviews_5k.jsonl.gz: not measured" in capsys.readouterr().out
