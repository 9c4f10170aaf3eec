"""Stages found by what their configs name."""

import json
import math
from types import SimpleNamespace

import pytest
import yaml

from trl_instruct import InputError
from trl_instruct.data.reading import Reading
from trl_instruct.files import write_json
from trl_instruct.recipes.chain import read_chain, remember_reading


def stage(folder, name, logs=(), **config):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps({"stage": name, "seconds": 1.0}))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(logs)}))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    base = stage(tmp_path / "base", "pretrain", dataset_name="tiny:pretraining")
    sft = stage(tmp_path / "sft", "sft", model_name_or_path=base, dataset_name="d.jsonl")
    data = stage(tmp_path / "candidates", "candidates", model_name_or_path=sft)
    named = {"model_name_or_path": sft, "dataset_name": f"{data}/train.jsonl"}
    rm = stage(tmp_path / "rm", "rm", **named)
    named = {"model_name_or_path": sft, "reward_model_path": rm, "dataset_name": None}
    logs = [{"step": 1, "loss": 2.0}, {"step": 2, "other": 3.0}]
    stage(tmp_path / "ppo", "ppo", logs, **named)
    return tmp_path


def test_all_stages_in_the_order_they_ran(folders):
    chain = read_chain(folders / "ppo")
    assert list(chain) == ["pretrain", "sft", "candidates", "rm", "ppo"]
    assert chain["rm"].folder == folders / "rm"
    assert chain["ppo"].curve("loss") == [(1, 2.0)]
    assert list(read_chain(folders / "sft")) == ["pretrain", "sft"]


def test_null_in_metrics_is_nan_again(tmp_path):
    stage(tmp_path / "rm", "rm")
    metrics = {"stage": "rm", "accuracy_low": math.nan, "by_k": {"2": {"accuracy_low": math.nan}}}
    write_json(tmp_path / "rm" / "metrics.json", metrics)
    assert "null" in (tmp_path / "rm" / "metrics.json").read_text()
    read = read_chain(tmp_path / "rm")["rm"].metrics
    assert math.isnan(read["accuracy_low"]) and math.isnan(read["by_k"]["2"]["accuracy_low"])


def test_the_nearest_stage_of_a_name_counts(folders):
    sft = folders / "sft"
    stage(folders / "again", "ppo", model_name_or_path=str(folders / "ppo"))
    chain = read_chain(folders / "again")
    assert chain["ppo"].folder == folders / "again"
    assert chain["sft"].folder == sft


def test_a_stage_that_names_itself_ends_the_search(tmp_path):
    stage(tmp_path / "sft", "sft", model_name_or_path=str(tmp_path / "sft"))
    assert list(read_chain(tmp_path / "sft")) == ["sft"]


def test_several_rewards_and_hub_ids_are_no_folders(tmp_path):
    named = {"model_name_or_path": "gpt2", "reward_model_path": ["a", "b"]}
    stage(tmp_path / "ppo", "ppo", **named)
    assert list(read_chain(tmp_path / "ppo")) == ["ppo"]


def test_metrics_of_something_else_beside_the_data_are_passed_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metrics.json").write_text("[1, 2]")
    stage(tmp_path / "rm", "rm", dataset_name=f"{tmp_path}/data/rankings.jsonl")
    assert list(read_chain(tmp_path / "rm")) == ["rm"]


def test_a_folder_without_a_finished_stage_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "gone", "a\0b", "x" * 5000):
        with pytest.raises(InputError, match="holds no finished stage"):
            read_chain(folder)


@pytest.mark.parametrize(
    "name, content",
    [
        *(("config.yaml", text) for text in (b"", b"- a\n- b\n", b"a: [", bytes(9), b"\xff\xfe")),
        *(("metrics.json", text) for text in (b"", b"[1]", b'{"stage": ', b"null", b"\xff\xfe")),
        *(("trainer_state.json", text) for text in (b"", b"[1]", b"\xff\xfe")),
    ],
)
def test_damaged_files_of_a_stage_are_named(tmp_path, name, content):
    """Of the stage itself in one line, of an earlier one as a gap."""
    sft = stage(tmp_path / "sft", "sft", output_dir="sft", dataset_name="d.jsonl")
    stage(tmp_path / "ppo", "ppo", model_name_or_path=sft)
    (tmp_path / "sft" / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"sft' is damaged: .*{name}") as caught:
        read_chain(sft)
    assert "\n" not in str(caught.value)
    chain = read_chain(tmp_path / "ppo")
    assert list(chain) == ["ppo"] and chain["ppo"].gaps == (str(caught.value),)


def test_a_stage_that_is_gone_is_a_gap_and_a_hub_id_is_none(tmp_path):
    gone = str(tmp_path / "gone")
    named = {
        "model_name_or_path": gone,
        "reward_model_path": "org/model",
        "dataset_name": "org/set",
    }
    stage(tmp_path / "ppo", "ppo", **named)
    assert read_chain(tmp_path / "ppo")["ppo"].gaps == (
        f"model_name_or_path is {gone!r}, which is gone",
    )


def test_rewards_in_code_are_not_gone_and_members_are_found(tmp_path):
    stage(tmp_path / "ppo", "ppo", reward_model_path=str(tmp_path / "rewards.py:brevity"))
    assert read_chain(tmp_path / "ppo")["ppo"].gaps == ()
    stage(tmp_path / "member-1", "rm")
    members = [str(tmp_path / "member-1"), str(tmp_path / "rewards.py:brevity")]
    stage(tmp_path / "careful", "ppo", reward_model_path=members)
    assert list(read_chain(tmp_path / "careful")) == ["rm", "ppo"]


@pytest.mark.parametrize("config", ["defaults:\n- base\n", "[1]", "a: ["])
def test_files_of_another_tool_are_no_stage(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    for metrics in ('{"step": 1}\n{"step": 2}\n', "[1]", '{"loss": 1.0}'):
        (tmp_path / "metrics.json").write_text(metrics)
        with pytest.raises(InputError, match="holds no finished stage"):
            read_chain(tmp_path)
        remember_reading(SimpleNamespace(columns=None), tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0")
    with pytest.raises(InputError, match="holds no finished stage"):
        read_chain(tmp_path)


def plain(**options):
    names = ("columns", "prompt_template", "prompt_suffix", "faults")
    options = {**dict.fromkeys(names), "on_bad_record": "error", "remembered": False, **options}
    return SimpleNamespace(**options)


def test_how_an_earlier_stage_read_is_checked(tmp_path):
    """Its folder may come from elsewhere."""
    given = {"prompt_template": "{q}", "columns": ["prompt=q", "odd"], "prompt_suffix": "\n"}
    config = plain(prompt_suffix="")
    remember_reading(config, "org/model", stage(tmp_path / "sft", "sft", **given))
    assert (config.prompt_template, config.prompt_suffix, config.remembered) == ("{q}", "", True)
    assert Reading.of(config).columns == {"prompt": "q", "odd": ""}  # no such column: none is taken
    for number, wrong in enumerate(
        [{"columns": [5]}, {"prompt_template": 5}, {"prompt_suffix": []}]
    ):
        folder = stage(tmp_path / str(number), "sft", **given | wrong)
        with pytest.raises(InputError, match=rf"{number}/config.yaml: {next(iter(wrong))} is "):
            remember_reading(plain(), folder)
