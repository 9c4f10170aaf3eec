"""The help of the commands: what it lists, in how many lines, and that its examples parse."""

import dataclasses
import importlib.metadata
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from trl import ModelConfig

import trl_instruct
from trl_instruct import cli, configs
from trl_instruct.configs import PPOConfig, PretrainConfig, SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.recipes.flags import parse

ROOT = Path(__file__).parents[2]
WITH_CONFIG = [name for name, options in cli.OPTIONS.items() if isinstance(options, type)]
OPTION = re.compile(r"^  (?:-h, )?--([\w-]+)", re.MULTILINE)


def told(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_help_takes_two_screens_and_help_all_has_the_rest(name, capsys):
    shown, whole = (told(capsys, name, flag) for flag in ("--help", "--help-all"))
    assert len(shown.splitlines()) <= 105
    assert f"example:\ntrl-instruct {name} " in shown
    kind = cli.OPTIONS[name]
    fields = {f.name for of in (kind, ModelConfig) for f in dataclasses.fields(of) if f.init}
    listed = {*OPTION.findall(shown)}, {*OPTION.findall(whole)}
    assert listed[0] < listed[1] == fields - kind.REFUSED.keys() | {"help", "help-all", "config"}
    for option in ("output_dir", "dataset_name"):
        assert option in listed[0]
    assert "lora_dropout" not in listed[0] and "adam_beta1" not in listed[0]


def test_a_line_an_option_with_its_default_in_groups(capsys):
    lines = told(capsys, "ppo", "--help").splitlines()
    kl = next(line for line in lines if "--kl_coef" in line)
    assert kl == "  --kl_coef FLOAT" + 21 * " " + (
        "beta of the KL penalty (C.4: 0.02; E.7: 0.01-0.02) [0.02]"
    )
    assert "  --whiten_rewards [BOOL]  " in "\n".join(lines)
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    places = [lines.index(group) for group in groups]
    assert [group.split()[0] for group in groups] == [
        *("options:", "Stage", "Options", "Options", "Model,", "Training", "example:")
    ]
    own, lora, seed = (
        next(i for i, line in enumerate(lines) if line.startswith(f"  --{name} "))
        for name in ("kl_coef", "lora_r", "seed")
    )
    assert places[1] < own < places[2] < places[4] < lora < places[5] < seed < places[6]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_our_help_is_not_cut(name):
    """Its first sentence fits on the line; what another library says may end in dots."""
    parser = cli.parser_of(name)
    for heading, options in parser.grouped.items():
        if "TRL's" not in heading and "transformers'" not in heading:
            texts = {option: given["help"] for option, given in options}
            assert {o: t for o, t in texts.items() if t.endswith(" ...")} == {}
            assert {o: t for o, t in texts.items() if len(t) > 60} == {}


def commands_of(text):
    """The commands in the code blocks of a page, each on one line."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.sub(r"\\\n", " ", blocks).splitlines()
    return [line for line in lines if re.match(r"trl-instruct \w", line)]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [command for page in PAGES for command in commands_of(page.read_text("utf-8"))]
EXAMPLES += [
    str(command.__doc__).split("\n\n")[1].strip()
    for command in cli.COMMANDS.values()
    if "\n\n" in str(command.__doc__)
]


@pytest.mark.parametrize("example", dict.fromkeys(EXAMPLES))
def test_examples_parse_as_they_are_printed(example):
    program, name, *arguments = shlex.split(example, comments=True)
    assert program == "trl-instruct"
    cli.parser_of(name).parse_args(arguments)


def test_the_values_that_help_shows_can_be_typed():
    metadata = {f.name: str(f.metadata.get("help")) for f in dataclasses.fields(PretrainConfig)}
    [fields] = re.findall(r"\{.*\}", metadata["architecture_kwargs"])
    [columns] = re.findall(r"\w+=\w+ \w+=\w+", metadata["columns"])
    arguments = ["--output_dir", "x", "--architecture_kwargs", fields, "--columns"]
    config, _ = parse(PretrainConfig, [*arguments, *columns.split()])
    assert config.architecture_kwargs == {"hidden_size": 128}
    assert config.columns == ["prompt=question", "responses=answers"]


def test_either_spelling_and_values_as_they_are(tmp_path):
    arguments = ["--output-dir=a-b", "--prompt-suffix", "--- x-y", "--no-gradient-checkpointing"]
    config, model_config = parse(PPOConfig, [*arguments, "--use-peft", "--lora-r=3"])
    assert (config.output_dir, config.prompt_suffix) == ("a-b", "--- x-y")
    assert not config.gradient_checkpointing and model_config.lora_r == 3
    (tmp_path / "x.yaml").write_text("output_dir: x")
    with pytest.raises(InputError, match="--config was given twice"):
        parse(SFTConfig, [f"--config={tmp_path}/x.yaml", "--config", "y.yaml"])


def test_version(capsys):
    version = importlib.metadata.version("trl-instruct")
    assert trl_instruct.__version__ == version
    assert told(capsys, "--version") == f"{version}\n"


def test_a_line_a_command(capsys):
    lines = told(capsys, "--help").splitlines()
    for name, command in cli.COMMANDS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == str(command.__doc__).splitlines()[0]


def test_completion_in_bash(tmp_path, capsys):
    pytest.importorskip("shtab")
    script = told(capsys, "--print-completion", "bash")
    asked = """
asked() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  _shtab_trl_instruct trl-instruct "${COMP_WORDS[COMP_CWORD]}"; echo "${COMPREPLY[@]}"
}
asked trl-instruct pp
asked trl-instruct ppo --kl
asked trl-instruct check rm --average_over ''
"""
    (tmp_path / "completion").write_text(script + asked)
    ran = subprocess.run(["bash", tmp_path / "completion"], capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["ppo", "--kl_coef --kl_estimator", "prompts pairs"]


def test_the_version_does_not_load_torch():
    code = "import sys, trl_instruct; trl_instruct.__version__; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n"


def test_every_option_that_a_class_of_ours_declares_has_help():
    for kind in vars(configs).values():
        if dataclasses.is_dataclass(kind) and kind.__module__ == configs.__name__:
            options = {field.name for field in dataclasses.fields(kind)}
            own = options & set(inspect.get_annotations(kind))
            assert set(configs.HELP[kind.__name__]) == own
