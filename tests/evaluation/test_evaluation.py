import gc
import json
import math
import shutil
import weakref

import pytest
import torch
import yaml
from conftest import byte_tokenizer
from datasets import Dataset
from test_recipes import chat, write
from trl import ModelConfig

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.evaluation import evaluate as evaluation
from trl_instruct.evaluation import measurement
from trl_instruct.evaluation.evaluate import evaluate
from trl_instruct.evaluation.measurement import completion_loss
from trl_instruct.evaluation.statistics import repetition
from trl_instruct.models.load import load_policy
from trl_instruct.recipes.options import named_sources

pytestmark = pytest.mark.slow  # every test samples from several models

PROMPTS = [{"prompt": f"Q{i}: ", "number": i} for i in range(8)]
DEMONSTRATIONS = [{"prompt": f"Q{i}: ", "completion": f"answer {i}"} for i in range(4)]
NUMBERS = {
    "path",
    "scores",
    "kl",
    "length",
    "ended",
    "repetition",
    "distinct_1",
    "distinct_2",
    "perplexity",
    "completion_loss",
}
QUICK = {"use_cpu": True, "disable_tqdm": True, "response_length": 6, "best_of_n": 4}


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def number(prompts, completions, number):
    return [float(n) for n in number]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_policy, tokenizer):
    """Two policies that differ, the second with ends."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        policy = make_policy(seed=seed)
        policy.generation_config.eos_token_id = [256, *range(64 * seed)]
        policy.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in ("one", "two")}


def run(models, folder, rows=PROMPTS, judges=None, **options):
    judges = {"length": length, "number": number} if judges is None else judges
    given = {**QUICK, **options}
    return evaluate(models, Dataset.from_list(rows), folder, judges=judges, **given)


@pytest.fixture(scope="module")
def result(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "all"
    shown = Dataset.from_list(DEMONSTRATIONS)
    return run(folders, folder, demonstrations=shown, reference="two")


def test_what_is_measured(result, folders):
    found = result.metrics
    assert (found["baseline"], found["reference"], found["prompts"]) == ("one", "two", 8)
    assert found["judges"] == ["length", "number"]
    one, two = found["models"]["one"], found["models"]["two"]
    assert set(one) == NUMBERS and set(two) == NUMBERS | {"win_rate"}
    assert two["path"] == str(folders["two"])
    for name, model in found["models"].items():
        points = found["points"][name]
        assert model["scores"]["number"]["mean"] == 3.5  # the further column reached the judge
        assert model["scores"]["length"]["mean"] == sum(points["scores"]["length"]) / 8
        assert model["length"] == sum(points["lengths"]) / 8
        assert 0 < model["distinct_1"] <= 1 and 0 <= model["repetition"] < 1
        assert model["perplexity"] == pytest.approx(math.exp(model["completion_loss"]))
    assert two["kl"] == 0.0 and one["kl"] > 0
    assert one["ended"] < two["ended"] <= 1
    wins = [
        (a > b) + (a == b) / 2
        for a, b in zip(
            found["points"]["two"]["scores"]["length"],
            found["points"]["one"]["scores"]["length"],
            strict=True,
        )
    ]
    assert two["win_rate"]["length"]["mean"] == sum(wins) / 8
    # Eight ties, with the ninth value's variance of a coin: Wilson's for 8 * 9 values.
    assert two["win_rate"]["number"] == pytest.approx(
        {"mean": 0.5, "low": 0.38747, "high": 0.61253, "length_controlled": 0.5}, abs=1e-5
    )


def test_fluency_is_that_of_the_completions_in_the_baselines_tokens(result, tokenizer):
    """The byte tokenizer: a token is a byte. All 8 completions are among the samples."""
    for name, model in result.metrics["models"].items():
        texts = [sample[name]["completion"].encode() for sample in result.metrics["samples"]]
        assert len(texts) == 8
        assert model["repetition"] == repetition(texts)
        assert model["distinct_1"] == len(set(b"".join(texts))) / sum(map(len, texts))
        pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
        assert model["distinct_2"] == len(set(pairs)) / len(pairs)


def test_the_loss_is_each_models_own(result, folders, tokenizer):
    shown = Dataset.from_list(DEMONSTRATIONS)
    for name, folder in folders.items():
        expected = completion_loss(load_policy(folder, ModelConfig()), tokenizer, shown)
        assert result.metrics["models"][name]["completion_loss"] == pytest.approx(expected)


def test_best_of_n_is_of_the_reference_by_the_first_judge(result):
    best = result.metrics["best_of_n"]
    assert (best["model"], best["judge"]) == ("two", "length")
    assert [point["n"] for point in best["points"]] == [1, 2, 4]
    lengths = [point["scores"]["length"] for point in best["points"]]
    assert lengths == sorted(lengths) and lengths[2] > lengths[0]
    assert [point["scores"]["number"] for point in best["points"]] == pytest.approx([3.5] * 3)


def test_what_is_left_in_the_folder(result, folders):
    written = json.loads((result.path / "evaluation.json").read_text())
    assert written == result.metrics
    assert {path.name for path in result.path.iterdir()} == {
        "config.yaml",
        "evaluation.json",
        "evaluation.png",
        "manifest.json",
        "metrics.json",
    }
    config = yaml.safe_load((result.path / "config.yaml").read_text())
    assert config["models"] == [f"{name}={path}" for name, path in folders.items()]
    assert "judges" not in config  # functions in memory
    sample = written["samples"][0]
    assert sample["prompt"] == "Q0: "
    assert sample["two"]["number"] == 0.0
    assert sample["two"]["length"] == len(sample["two"]["completion"])


def test_the_same_again_whatever_the_order_of_the_reference(result, folders, tmp_path):
    """Each model draws with a seed of its own; which of them comes last changes nothing."""
    again = run(folders, tmp_path / "again", reference="one").metrics
    assert again["points"] == result.metrics["points"]
    assert again["models"]["one"]["kl"] == 0.0 and again["models"]["two"]["kl"] > 0
    other = run(folders, tmp_path / "other", seed=7).metrics
    assert other["points"] != again["points"]


def test_a_model_against_itself_draws_other_samples(folders, tmp_path):
    twice = {"one": folders["one"], "again": folders["one"]}
    found = run(twice, tmp_path / "e").metrics
    assert found["models"]["again"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert found["points"]["one"] != found["points"]["again"]


def test_one_model_is_in_memory_at_a_time(folders, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def counted(*arguments, **options):
        gc.collect()
        most.append(len(alive))
        policy = load_policy(*arguments, **options)
        alive.add(policy)
        return policy

    monkeypatch.setattr(measurement, "load_policy", counted)
    run({**folders, "three": folders["one"]}, tmp_path / "e", judges={}, reference="two")
    assert most == [0, 0, 0]


def test_a_model_of_other_tokens_has_no_kl(folders, tmp_path, make_policy):
    odd = byte_tokenizer()
    odd.add_tokens(["<more>"])
    policy = make_policy(vocab_size=259)
    policy.save_pretrained(tmp_path / "odd")
    odd.save_pretrained(tmp_path / "odd")
    found = run({**folders, "odd": tmp_path / "odd"}, tmp_path / "e").metrics["models"]
    assert found["odd"]["kl"] is None and found["two"]["kl"] > 0


def test_messages_reach_a_base_model_without_a_template(
    folders, tmp_path, make_policy, chat_tokenizer
):
    make_policy(seed=3).save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    rows = [chat({"prompt": row["prompt"]}) for row in PROMPTS]

    def roles(prompts, completions):
        assert {m["role"] for reply in completions for m in reply} == {"assistant"}
        return [1.0] * len(prompts)

    models = {"one": folders["one"], "chat": tmp_path / "chat"}
    found = run(models, tmp_path / "e", rows, {"roles": roles}).metrics
    assert found["models"]["one"]["scores"]["roles"]["mean"] == 1.0
    with pytest.raises(InputError, match="no chat template"):
        run(folders, tmp_path / "f", rows, {"roles": roles})


def test_without_judges_and_with_a_model_in_memory(policy, tokenizer, tmp_path, capsys):
    found = run({"it": policy}, tmp_path / "e", judges={}, processing_class=tokenizer).metrics
    assert found["best_of_n"] is None and found["models"]["it"]["scores"] == {}
    assert found["models"]["it"]["path"] is None
    assert "8 prompts" in capsys.readouterr().out
    assert not (tmp_path / "e" / "evaluation.png").exists()


def test_what_a_reward_models_folder_tells(folders, tmp_path, saved_reward_model, capsys):
    judge = tmp_path / "rm"
    shutil.copytree(saved_reward_model, judge)
    (judge / "metrics.json").write_text('{"accuracy": 0.7, "ceiling": 0.75, "pairs": 3}')
    found = run(folders, tmp_path / "e", judges={"rm": judge}, best_of_n=1).metrics
    assert found["reward_models"] == {"rm": {"accuracy": 0.7, "ceiling": 0.75}}
    assert found["best_of_n"] is None
    assert "rm: accuracy on held-out pairs 0.700 (noise ceiling 0.750)" in capsys.readouterr().out


def test_many_texts_are_judged_some_at_a_time(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "JUDGED_AT_ONCE", 3)
    calls = []

    def counted(prompts, completions, number):
        calls.append(len(prompts))
        return number

    found = run({"one": folders["one"]}, tmp_path / "e", judges={"n": counted}).metrics
    assert calls == [3, 3, 2, *[3] * 10, 2]  # 8 prompts, and 4 samples of each
    assert found["points"]["one"]["scores"]["n"] == list(range(8))
    assert found["best_of_n"]["points"][2]["scores"]["n"] == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "No model was given: set models"),
        ({"baseline": "three"}, "baseline is 'three'; the models are one, two."),
        ({"reference": "three"}, "reference is 'three'"),
        ({"models": {"prompt": "x"}}, "'prompt' is a reserved key of the samples"),
        ({"judges": {"completion": length}}, "'completion' is a reserved key"),
        ({"judges": {"rm": "nowhere"}}, "'nowhere'"),
        ({"models": {"one": "./nowhere"}}, "No tokenizer could be loaded"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"best_of_n": 0}, "best_of_n is 0; it must be at least 1."),
        ({"rows": [{"question": "p"}]}, "`prompt` missing"),
        ({"rows": [{"prompt": "p" * 125}]}, "Prompt 1 is 125 tokens long"),
        ({"model_name_or_path": "x"}, "list the checkpoints in models"),
    ],
)
def test_mistakes_leave_nothing(folders, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(**{"models": folders, "folder": tmp_path / "e", **changes})
    assert not (tmp_path / "e").exists()


def test_a_models_own_folder_is_not_overwritten(folders):
    with pytest.raises(InputError, match="is the folder of a model, which would be lost"):
        run(folders, folders["two"], overwrite_output_dir=True)
    assert (folders["two"] / "model.safetensors").is_file()


def test_of_two_models_one_name():
    with pytest.raises(InputError, match="Two of the models are called 'sft': a/sft and b/sft"):
        named_sources(["a/sft", "b/sft"], "models")
    assert named_sources(["http://x/y?a=b", "my=http://x/?a=b"], "judges") == {
        "y?a=b": "http://x/y?a=b",
        "my": "http://x/?a=b",
    }


def test_the_bar_covers_all_work(folders, tmp_path, monkeypatch):
    bars = []
    original = evaluation.progress_bar

    def kept(*arguments, **options):
        bars.append(original(*arguments, **{**options, "disable": False}))
        return bars[0]

    monkeypatch.setattr(evaluation, "progress_bar", kept)
    run(folders, tmp_path / "e", demonstrations=Dataset.from_list(DEMONSTRATIONS))
    assert bars[0].n == bars[0].total == (2 * 8 + 4 * 8) * 3 + 2 * 4


def test_from_the_command_line(folders, tmp_path, saved_reward_model, capsys):
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    arguments = ["--models", str(folders["one"]), f"other={folders['two']}"]
    arguments += ["--judges", f"rm={saved_reward_model}", "--dataset_name", str(prompts)]
    arguments += ["--output_dir", str(tmp_path / "e"), "--use_cpu", "--response_length", "4"]
    cli.main(["evaluate", *arguments])
    told = capsys.readouterr().out
    assert "win rate against one" in told and "other " in told
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((tmp_path / "e" / "config.yaml").read_text()))
    )
    first = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    cli.main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--overwrite_output_dir"])
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text()) == first
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--dataset_name", str(prompts), "--output_dir", str(tmp_path / "f")])
    assert "No model was given" in capsys.readouterr().err


def test_the_kl_is_to_the_reference_over_own_samples(folders, tmp_path, monkeypatch):
    """Log-probabilities by plain forward passes over the texts that were sampled."""
    kept = {}
    original = measurement.sample

    def keep(sampler, *arguments, **options):
        sampled = original(sampler, *arguments, **options)
        kept[sampler.policy.config._name_or_path] = sampled
        return sampled

    monkeypatch.setattr(measurement, "sample", keep)
    found = run(folders, tmp_path / "e", judges={}).metrics["models"]["two"]["kl"]
    prompts, sampled = kept[str(folders["two"])]
    total = 0.0
    for row in range(8):
        begin, ids = len(prompts[row]), torch.tensor([prompts[row] + sampled[row].ids])
        for sign, name in ((1, "two"), (-1, "one")):
            with torch.no_grad():
                model = load_policy(folders[name], ModelConfig()).eval()
                logprobs = model(ids).logits[0, begin - 1 : -1].log_softmax(-1)
            total += sign * logprobs.gather(1, ids[0, begin:].unsqueeze(1)).sum().item()
    assert found == pytest.approx(total / 8, rel=1e-4)
