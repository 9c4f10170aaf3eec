import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, write

from trl_instruct import cli
from trl_instruct.configs import PPOConfig, SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.recipes.flags import parse

pytestmark = pytest.mark.slow  # whole stages

ROOT = Path(__file__).parents[1]


def flags(options):
    return [f"--{name}={value}" for name, value in options.items()]


def yaml_file(path, **options):
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return str(path)


@pytest.fixture
def given(tmp_path, saved_policy):
    """A YAML file that is right, the options in it and the folder of the output."""
    demonstrations = write(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    options = {
        "model_name_or_path": str(saved_policy),
        "dataset_name": str(demonstrations),
        "output_dir": str(tmp_path / "sft"),
        **QUICK,
    }
    return yaml_file(tmp_path / "sft.yaml", **options), options, tmp_path / "sft"


def fails(capsys, *arguments):
    """The one line that a mistake ends in."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in told.err and "usage" not in told.err
    last = told.err.strip().splitlines()[-1]
    assert last.startswith(f"{arguments[0]}: error: ")
    assert len([line for line in told.err.splitlines() if "error" in line]) == 1
    return last


# ---- what works ----------------------------------------------------------------------------------


def test_the_stages_from_the_command_line(given, tmp_path, capsys):
    config, _, policy = given
    cli.main(["sft", "--config", config, "--learning_rate", "1e-3"])
    assert f"policy: {policy}" in capsys.readouterr().out
    assert yaml.safe_load((policy / "config.yaml").read_text())["learning_rate"] == 1e-3

    prompts = str(write(tmp_path / "prompts.jsonl", PROMPTS))
    rankings = str(write(tmp_path / "rankings.jsonl", RANKINGS))
    options = {"model_name_or_path": policy, "dataset_name": rankings, "eval_size": 0.25}
    cli.main(["rm", *flags({**options, "output_dir": tmp_path / "rm", **QUICK})])
    assert "longer answer wins" in capsys.readouterr().out

    options = {"model_name_or_path": policy, "dataset_name": prompts, **QUICK_PPO}
    options |= {"reward_model_path": tmp_path / "rm", "eval_dataset_name": prompts}
    cli.main(["ppo", *flags({**options, "output_dir": tmp_path / "ppo"})])
    told = capsys.readouterr().out
    assert "8 test prompts" in told and "KL to SFT" in told
    assert json.loads((tmp_path / "ppo" / "summary.json").read_text())["prompts"] == 8


def test_a_reward_model_from_yaml(given, tmp_path, saved_policy, capsys):
    demonstrations = given[1]["dataset_name"]
    rated = [{**row, "ratings": ["fair", "good", "ok"]} for row in RANKINGS]
    rankings = write(tmp_path / "rated.jsonl", [{**row, "ranks": None} for row in rated])
    options = {
        "model_name_or_path": str(saved_policy),
        "dataset_name": str(rankings),
        "demonstrations_name": demonstrations,
        "rating_order": ["good", "ok", "fair", "poor"],
        "eval_size": 0.25,
        "output_dir": str(tmp_path / "rm"),
        **QUICK,
    }
    cli.main(["rm", "--config", yaml_file(tmp_path / "rm.yaml", **options)])
    assert "shift" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "rm" / "config.yaml").read_text())
    for name in ("demonstrations_name", "rating_order"):
        assert written[name] == options[name]
    arguments = flags({**options, "rating_order": "good", "truncate_prompt": True})
    arguments += ["--rating_order", "good", "ok", "fair", "--overwrite_output_dir"]
    cli.main(["rm", *arguments])
    written = yaml.safe_load((tmp_path / "rm" / "config.yaml").read_text())
    assert written["rating_order"] == ["good", "ok", "fair"]
    assert written["truncate_prompt"]


def test_candidates_from_the_command_line(given, tmp_path, saved_policy):
    prompts = str(write(tmp_path / "prompts.jsonl", PROMPTS))
    options = {"model_name_or_path": saved_policy, "dataset_name": prompts, "response_length": 3}
    cli.main(["candidates", *flags({**options, "output_dir": tmp_path / "c", "use_cpu": True})])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "README.md",
        "config.yaml",
        "manifest.json",
        "metrics.json",
        "train.jsonl",
    ]


def test_candidates_of_the_splits_that_are_named(tmp_path, saved_policy):
    prompts = str(write(tmp_path / "prompts.jsonl", PROMPTS))
    options = {
        "model_name_or_path": saved_policy,
        "dataset_name": prompts,
        "dataset_train_split": "train[:3]",
        "eval_dataset_name": prompts,
        "dataset_test_split": "train[3:5]",
        "response_length": 3,
        "output_dir": tmp_path / "c",
        "use_cpu": True,
    }
    cli.main(["candidates", *flags(options)])
    metrics = json.loads((tmp_path / "c" / "metrics.json").read_text())
    assert {name: metrics[name]["prompts"] for name in ("train", "test")} == {"train": 3, "test": 2}


def test_the_config_of_a_run_is_a_config(given, capsys):
    config, _, policy = given
    cli.main(["sft", "--config", config])
    first = (policy / "model.safetensors").read_bytes()
    cli.main(["sft", "--config", str(policy / "config.yaml"), "--overwrite_output_dir"])
    assert (policy / "model.safetensors").read_bytes() == first


def test_flags_win_over_the_file_and_both_spellings_count(given):
    config, _, _ = given
    for spelling in (["--config", config], [f"--config={config}"]):
        arguments = [*spelling, "--learning-rate=1e-6", "--lora_r", "3"]
        parsed, model_config = parse(SFTConfig, arguments)
        assert (parsed.learning_rate, model_config.lora_r) == (1e-6, 3)
        assert parsed.max_steps == QUICK["max_steps"]


def test_numbers_that_yaml_reads_as_text(tmp_path):
    (tmp_path / "x.yaml").write_text("output_dir: x\nlearning_rate: 1e-5\nkl_coef: 5e-2\n")
    config, _ = parse(PPOConfig, ["--config", str(tmp_path / "x.yaml")])
    assert (config.learning_rate, config.kl_coef) == (1e-5, 0.05)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, command in cli.COMMANDS.items():
        assert f"{name} {command.__doc__.splitlines()[0]}" in told


@pytest.mark.parametrize("stage", cli.COMMANDS)
def test_every_stage_has_help(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([stage, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    own = {"serve-reward": "--port", "evaluate": "--best_of_n", "candidates": "--num_candidates"}
    own |= {"report": "--evaluation", "merge": "--dtype", "export": "--rating_order"}
    own |= {"average": "output_dir"}
    own |= {"label": "--labels_per_prompt", "check": "sft", "init": "--like"}
    known = own.get(stage, "--learning_rate")
    assert known in told and "%%" not in told


def test_help_of_a_stage_gives_the_papers_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ppo", "--help"])
    assert stopped.value.code == 0
    assert "beta of the KL penalty (C.4: 0.02" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "sft", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sft"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nsft: interrupted\n"


# ---- mistakes ------------------------------------------------------------------------------------


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1e-5"], "Unknown option 'learning_rat' for SFTConfig. Did you mean"),
        (["--learning_rat=1e-5"], "Did you mean 'learning_rate'?"),
        (["--overwrite"], "Unknown option 'overwrite'"),  # no abbreviation of ..._output_dir
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float"),
        (["--learning_rate"], "expected one argument"),
        (["--packing", "perhaps"], "packing"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--lr_scheduler_kwargs", "{min"], "'{min' is not a JSON object"),
        (["stray"], "Arguments that belong to no option: stray."),
        (["--config"], "--config needs a YAML file; 'nothing' was given"),
        (["--config", "missing.yaml"], "--config needs a YAML file; 'missing.yaml' was given"),
        (["--config=missing.yaml"], "'missing.yaml' was given"),
        (["--output_dir", "x"], "No dataset was given: set dataset_name"),
        (["--dataset_name", "{prompts}"], "sft needs output_dir"),
        (["--dataset_name", "{prompts}", "--output_dir", "x"], "No model was given"),
        (["--pad_to_multiple_of", "[1]", "--seed", "1"], "pad_to_multiple_of: invalid "),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    line = fails(capsys, "sft", *[a.format(prompts=path) if "{p" in a else a for a in arguments])
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message", "library"),
    [
        (["--eval_strategy", "steps"], "you didn't pass an `eval_dataset`", None),
        (["--report_to", "wandb"], "requires wandb to be installed", "wandb"),
        (["--deepspeed", "ds.json"], "'deepspeed>=", "deepspeed"),
        (["--use_liger_kernel", "true"], "liger-kernel", "liger_kernel"),
        (["--dataloader_drop_last", "true"], "drops all of the 2 training rows: a batch", None),
        (["--metric_for_best_model", "accuracy"], "'accuracy'; sft measures the loss", None),
        (["--gradient_checkpointing_kwargs", "x"], "kwargs is 'x'; a JSON object is", None),
        (["--accelerator_config", "no.json"], "accelerator_config: [Errno 2] No such file", None),
        (["--activation_offloading", "true"], "off a GPU; there is none", None),
        (["--learning_rate", "nan"], "learning_rate is nan", None),
        (["--adam_beta1", "1.5"], "cannot be used: Invalid beta parameter at index 0: 1.5", None),
        (["--push_to_hub", "true"], "https://huggingface.co", None),
        (["--lora_target_modules", "lm_head", "--use_peft", "true"], "`lm_head` is ", None),
    ],
)
def test_faults_that_libraries_find(
    saved_policy, tmp_path, monkeypatch, capsys, arguments, message, library
):
    if library and importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed, so that it does not fail")
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS[:2])
    (tmp_path / "ds.json").write_text("{}")
    given = ["--model_name_or_path", str(saved_policy), "--dataset_name", path]
    given += ["--output_dir", "x", "--use_cpu", "true", "--report_to", "none", *arguments]
    assert message in fails(capsys, "sft", *given)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1.0}, "bad.yaml: Unknown option 'learning_rat' for SFTConfig. Did you"),
        ({"lora": {"r": 8}}, "bad.yaml: Unknown option 'lora' for SFTConfig."),
        ({"learning_rate": [1, 2]}, "bad.yaml: learning_rate is list [1, 2]; float is needed."),
        ({"max_steps": 1.5}, "bad.yaml: max_steps is float 1.5; int is needed."),
        ({"weight_decay": 10**400}, "0000...; float is needed."),
        ({"max_steps": "ten"}, "invalid int value: 'ten'"),
        ({"packing": 3}, "bad.yaml: packing is int 3; bool is needed."),
        ({"packing": "maybe"}, "maybe"),
        ({"seed": None}, "bad.yaml: seed is null or absent; int is needed."),
        ({"model_name_or_path": "no/such/model"}, "'no/such/model'"),
        ({"model_name_or_path": "./nowhere"}, "'./nowhere'"),
        ({"model_name_or_path": None}, "No model was given"),
        ({"dataset_name": "nothere.jsonl"}, "nothere.jsonl: no such file or folder"),
        ({"dataset_name": None}, "No dataset was given"),
        ({"load_in_8bit": True}, "Set use_peft as well"),
        ({"chat_template_path": "no.jinja"}, "chat_template_path 'no.jinja': there is no such"),
    ],
)
def test_bad_yaml(given, tmp_path, capsys, changes, message):
    _, options, output = given
    bad = yaml_file(tmp_path / "bad.yaml", **{**options, **changes})
    assert message in fails(capsys, "sft", "--config", bad)
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "is not a YAML file"),
        ("- one\n- two", "holds list ['one', 'two']; lines of `option: value` are needed"),
        ("", "holds null"),
        ("3: 4", "Unknown option 3"),
    ],
)
def test_files_that_are_no_config(tmp_path, capsys, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in fails(capsys, "ppo", "--config", tmp_path / "bad.yaml")


def test_ppo_without_a_reward(given, tmp_path, capsys):
    _, options, _ = given
    arguments = {k: options[k] for k in ("model_name_or_path", "dataset_name", "output_dir")}
    assert "needs reward_model_path" in fails(capsys, "ppo", *flags(arguments))


def test_candidates_without_prompts_or_policy(tmp_path, saved_policy, capsys):
    out = {"output_dir": tmp_path / "c"}
    arguments = {**out, "dataset_name": "tiny:prompts"}
    assert "No model was given" in fails(capsys, "candidates", *flags(arguments))
    arguments = {**out, "model_name_or_path": saved_policy}
    assert "No dataset was given" in fails(capsys, "candidates", *flags(arguments))
    assert not (tmp_path / "c").exists()


def test_an_error_of_many_lines_takes_one(monkeypatch, capsys):
    def raises(arguments):
        raise InputError("one\n  two")

    monkeypatch.setitem(cli.COMMANDS, "sft", raises)
    assert fails(capsys, "sft") == "sft: error: one two"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG])
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, number):
    def raises(arguments):
        raise OSError(number, os.strerror(number), "\x1b[2J" + "x" * 5000)

    monkeypatch.setitem(cli.COMMANDS, "sft", raises)
    told = fails(capsys, "sft")
    assert told.startswith(f"sft: error: {os.strerror(number)}: \\x1b[2Jxxx")
    assert len(told) < 500 and "\n" not in told


@pytest.mark.parametrize(
    ("inner", "outer", "told"),
    [
        (
            None,
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "No space left",
        ),
        (
            RuntimeError("basic_ios::clear: iostream error"),
            RuntimeError("pos"),
            "Is the disk full?",
        ),
    ],
)
def test_a_full_disk_behind_a_librarys_error(monkeypatch, capsys, inner, outer, told):
    def raises(arguments):
        raise outer from inner

    monkeypatch.setitem(cli.COMMANDS, "sft", raises)
    assert told in fails(capsys, "sft")


@pytest.mark.parametrize(
    "script",
    sorted({*cli.COMMANDS} - {"average", "export", "init", "label", "merge", "serve-reward"}),
)
def test_the_scripts_are_the_commands(script):
    text = (ROOT / "recipes" / f"{script}.py").read_text()
    assert f'main(["{script}", *sys.argv[1:]])' in text


def test_what_a_user_sees(given, tmp_path):
    """Our lines and the progress of real work, and nothing of the libraries besides."""
    config, _, policy = given
    arguments = [f"--config={config}", "--disable_tqdm=false", "--gradient_checkpointing=true"]
    ran = subprocess.run(
        [sys.executable, ROOT / "recipes" / "sft.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    memory, _, rest = ran.stdout.partition("activations 2.1\n")
    plan, _, rest = rest.partition("\n")
    assert plan.startswith("sft: 8 rows in batches of 4: 2 optimizer steps a pass")
    assert ran.returncode == 0 and memory.startswith("sft: memory\n"), ran.stderr
    told = rest.splitlines()
    assert [told[0], told[1]] == [f"policy: {policy}", "No fault found."]
    assert told[-1] == f"report: {policy}/report.html" and len(told) == 6
    shown = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert not [line for line in shown if not any(s in line for s in ("it/s", "s/it", "examples"))]
    assert [line for line in shown if line.startswith("sft: 100%")]
    assert "Writing model shards" not in ran.stderr and "Loading weights" not in ran.stderr


def test_a_mistake_from_a_shell(tmp_path):
    ran = subprocess.run(
        [sys.executable, ROOT / "recipes" / "sft.py", "--learning_rat", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines() == [
        "sft: error: Unknown option 'learning_rat' for SFTConfig. Did you mean 'learning_rate'?"
    ]


def test_candidates_with_two_processes(tmp_path, saved_policy):
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {"model_name_or_path": saved_policy, "dataset_name": prompts, "response_length": 3}
    options |= {"output_dir": tmp_path / "c", "use_cpu": True}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / "recipes" / "candidates.py"), *flags(options)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    rows = (tmp_path / "c" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]


def test_evaluate_takes_models_by_name(capsys):
    told = fails(capsys, "evaluate", "--model_name_or_path", "gpt2", "--output_dir", "x")
    assert "model_name_or_path is not an option here: list the checkpoints in models" in told
