import json
import os
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import LLAMA
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, LORA, PAIRS, PROMPTS, QUICK, QUICK_PPO, vowels
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from trl_instruct.configs import SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.files import write_json, written_at_once
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.pretrain import pretrain
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.recipes.stage import StageResult, run_stage

DATA = Dataset.from_list(DEMONSTRATIONS)


def new_stage(folder, **options):
    return run_stage("sft", SFTConfig(output_dir=str(folder), **options), ModelConfig())


def listing(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_stage_begins_without_what_the_one_before_left_in_memory(tmp_path):
    module = torch.nn.Linear(2, 2)
    module.forward = partial(lambda own, x: x, module)  # a circle, as accelerate makes one
    left = weakref.ref(module)
    del module
    with new_stage(tmp_path / "sft"):
        assert left() is None


@pytest.mark.slow
def test_weights_that_would_train_in_16_bits_are_refused(saved_policy, tmp_path):
    """In bfloat16 most steps are smaller than the rounding, in every stage alike."""
    half, full = {**QUICK, "dtype": "bfloat16"}, {**QUICK_PPO, "dtype": "float16"}
    shape = {**LLAMA, "dtype": "bfloat16"}
    size = {"vocab_size": 280, "max_length": 64, "architecture_kwargs": shape}
    loaded = AutoModelForCausalLM.from_pretrained(saved_policy, dtype=torch.bfloat16)
    own = {"processing_class": AutoTokenizer.from_pretrained(saved_policy)}
    runs = [
        lambda folder: pretrain(Dataset.from_dict({"text": ["a b"]}), folder, **QUICK, **size),
        lambda folder: sft(saved_policy, DATA, folder, **half),
        lambda folder: sft(loaded, DATA, folder, **own, **QUICK),
        lambda folder: rm(saved_policy, Dataset.from_list(PAIRS), folder, eval_size=0, **half),
        lambda folder: ppo(saved_policy, vowels, Dataset.from_list(PROMPTS), folder, **full),
    ]
    for run in runs:
        with pytest.raises(InputError, match="weight would train in b?float16, .* 2.8 %") as caught:
            run(tmp_path / "x")
        assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()


def test_a_result_is_a_path(tmp_path):
    result = StageResult(tmp_path, {"train_loss": 1.0})
    assert os.path.join(result, "x") == str(tmp_path / "x")
    assert str(result) == str(tmp_path)
    assert pickle.loads(pickle.dumps(result)) == result


def test_json_is_written_at_once_and_nan_as_null(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": "猫"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": None, "b": [None, 1.5], "c": "猫"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["c"] == "猫"
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_half_a_file_never_shows(tmp_path):
    with pytest.raises(RuntimeError), written_at_once(tmp_path / "x.jsonl") as file:
        file.write("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# ---- claiming a folder ---------------------------------------------------------------------------


def test_no_output_dir():
    with (
        pytest.raises(InputError, match="sft needs output_dir"),
        run_stage("sft", SFTConfig(), ModelConfig()),
    ):
        pass


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(InputError, match="holds 'thesis.tex' and no run"):
            sft("nowhere", DATA, tmp_path, **options)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is a file; choose a folder"):
        sft("nowhere", DATA, tmp_path / "x")


def test_a_folder_that_could_not_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match=r"output_dir .*x' is not a folder\. Choose another"):
        sft("nowhere", DATA, tmp_path / "x" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may do all
    with pytest.raises(InputError, match="is not writable"):
        sft("nowhere", DATA, tmp_path / "new" / "deep")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_run_that_was_cut_short_is_called_so(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_stage(tmp_path) as run:
        run.begin()
        (tmp_path / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="holds a run that was cut short.*--overwrite_output_dir"):
        sft("nowhere", DATA, tmp_path)


@pytest.mark.slow
def test_another_run_is_replaced_only_on_demand(saved_policy, tmp_path):
    folder = tmp_path / "run"
    sft(saved_policy, DATA, folder, **QUICK, **LORA)
    (folder / "notes.txt").write_text("mine")
    before = listing(folder)
    with pytest.raises(InputError, match="holds another run.*--overwrite_output_dir"):
        sft(saved_policy, DATA, folder, **QUICK)
    assert listing(folder) == before
    sft(saved_policy, DATA, folder, overwrite_output_dir=True, **QUICK)
    left = {path.name for path in folder.iterdir()}
    assert not left & {"adapter_config.json", "adapter_model.safetensors"}
    assert {"model.safetensors", "metrics.json", "notes.txt"} <= left


@pytest.mark.slow
def test_a_mistake_found_early_costs_no_earlier_run(saved_policy, tmp_path):
    folder = tmp_path / "run"
    sft(saved_policy, DATA, folder, **QUICK)
    before = listing(folder)
    again = {**QUICK, "overwrite_output_dir": True}
    with pytest.raises(InputError, match="No tokenizer could be loaded"):
        sft(tmp_path / "nowhere", DATA, folder, **again)
    with pytest.raises(InputError, match="the prompt alone is 3 tokens and max_length is 3"):
        sft(
            saved_policy,
            Dataset.from_list([{"prompt": "abc", "completion": "d"}]),
            folder,
            max_length=3,
            **again,
        )
    with pytest.raises(InputError, match="is the folder of the model to start from"):
        sft(folder, DATA, folder, **again)
    assert listing(folder) == before


def test_an_early_failure_leaves_no_folder(saved_policy, tmp_path):
    with pytest.raises(InputError):
        sft(
            saved_policy,
            Dataset.from_list([{"prompt": "p" * 200, "completion": "d"}]),
            tmp_path / "new",
            **QUICK,
        )
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        sft(tmp_path / "nowhere", DATA, tmp_path / "empty", **QUICK)
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_a_reward_that_fails_leaves_no_folder(policy, tokenizer, tmp_path, options):
    def broken(prompts, completions):
        return [0.0]

    with pytest.raises(InputError, match="'broken' returned 1 scores for 4 completions"):
        ppo(
            policy,
            broken,
            Dataset.from_list(PROMPTS),
            tmp_path / "x",
            processing_class=tokenizer,
            **QUICK_PPO,
            **options,
        )
    assert not (tmp_path / "x").exists()


# ---- unfinished ----------------------------------------------------------------------------------


def test_an_unfinished_stage_is_no_model(saved_policy, tmp_path):
    folder = tmp_path / "cut"
    policy = AutoModelForCausalLM.from_pretrained(saved_policy)
    with pytest.raises(KeyboardInterrupt), new_stage(folder) as run:
        run.begin()
        policy.save_pretrained(folder)
        raise KeyboardInterrupt
    assert (folder / "config.yaml").is_file()
    for call in (
        lambda out: sft(folder, DATA, out, **QUICK),
        lambda out: rm(folder, Dataset.from_list(PAIRS), out, eval_size=0, **QUICK),
        lambda out: ppo(folder, vowels, Dataset.from_list(PROMPTS), out, **QUICK_PPO),
        lambda out: ppo(saved_policy, folder, Dataset.from_list(PROMPTS), out, **QUICK_PPO),
    ):
        with pytest.raises(InputError, match=r"has not finished: there is no metrics.json"):
            call(tmp_path / "next")
        assert not (tmp_path / "next").exists()


def test_the_folder_tells_running_from_done(tmp_path):
    folder = tmp_path / "run"
    with new_stage(folder) as run:
        assert not folder.exists()
        run.begin()
        assert visible(folder) == ["config.yaml", "manifest.json"]
        run.write_metrics({"x": 1.0})
    assert json.loads((folder / "metrics.json").read_text())["x"] == 1.0


@pytest.mark.slow
def test_resuming_a_finished_run_makes_it_unfinished_until_it_ends(saved_policy, tmp_path):
    folder = tmp_path / "run"
    saving = {**QUICK, "save_strategy": "steps", "save_steps": 1}
    sft(saved_policy, DATA, folder, **saving)
    with pytest.raises(RuntimeError), new_stage(folder, resume_from_checkpoint=True) as run:
        run.begin()
        raise RuntimeError
    assert not (folder / "metrics.json").exists()
    assert (folder / "checkpoint-2").is_dir()


@pytest.mark.parametrize("checkpoint", [True, "runs/none/checkpoint-3"])
def test_nothing_to_resume_from(saved_policy, tmp_path, checkpoint):
    with pytest.raises(InputError, match="there is no whole checkpoint at"):
        sft(saved_policy, DATA, tmp_path / "x", resume_from_checkpoint=checkpoint, **QUICK)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_progress_bar_and_the_lines_for_the_user(saved_policy, tmp_path, capsys):
    sft(saved_policy, DATA, tmp_path / "x", **{**QUICK, "disable_tqdm": False})
    told = capsys.readouterr()
    assert "sft: 100%" in told.err.replace("sft:   0%", "") and "loss=" in told.err
    assert "Writing model shards" not in told.err and "Loading weights" not in told.err
    assert "'loss'" not in told.out
