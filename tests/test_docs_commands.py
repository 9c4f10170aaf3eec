"""Each command in the README, CONTRIBUTING.md and docs/ runs, or stands in NOT_RUN with its reason.

Commands stand in code blocks and in backquotes. Files that they name are made here, small models
stand in for real ones, and the stages are shortened.
"""

import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from test_docs import PAGES, ROOT
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, write
from test_shapes import ALPACA

import trl_instruct
from trl_instruct import cli
from trl_instruct.configs import PPOConfig
from trl_instruct.labels import command as label_command
from trl_instruct.recipes import flags as flags_of_stages

STARTS = "make|trl-instruct|python|accelerate|pip|ssh|bash|curl|trackio"
# Commands, or how several begin, and why no test runs them to their end.
NOT_RUN = {
    "make sft rm ppo CONFIG=qwen3-hh": "needs the Hub and a GPU",
    "make ppo CONFIG=gpt2-imdb": "needs the Hub",
    "make check-data CONFIG=qwen3-hh": "needs the Hub",
    "trl-instruct merge runs/qwen3-hh": "needs the Hub and a GPU",
    "make sft rm ppo CONFIG=smollm2": "an hour or more",
    "make": "minutes or more; CI runs install, check, docs, test, and sft rm ppo report",
    "bash .ci/run": "CI itself",
    "python": "minutes",
    "accelerate launch": "minutes; tests/models/test_sharding.py launches each config",
    "accelerate estimate-memory": "another tool, not used",
    "pip install": "changes the environment",
    "trackio show": "a page that stays open",
    "ssh": "needs another machine",
    "trl-instruct label runs/mine/candidates --store postgresql": "needs a database server",
    "trl-instruct serve-reward --reward_model_path": "serves until interrupted",
    "curl": "needs the server of the line above; tests/rewards/test_http.py has one",
}
# In the order of the pipeline; merge takes the adapter that is there at first.
ORDER = ["init", "merge", "pretrain", "sft", "candidates", "label", "rm", "average", "ppo"]
ORDER += ["check", "evaluate", "report", "export"]
CANDIDATES = [{"prompt": f"Q{n}: ", "responses": list("abcd")} for n in range(8)]
SHORT = {
    "sft": QUICK,
    "rm": {**QUICK, "eval_size": 0.25},
    "ppo": QUICK_PPO,
    "check": QUICK,
    "candidates": {"response_length": 4, "use_cpu": True, "overwrite_output_dir": True},
    "evaluate": {"response_length": 4, "use_cpu": True, "best_of_n": 2},
    "pretrain": {**QUICK, "vocab_size": 300, "max_length": 16},
}


def commands(text: str) -> list[str]:
    """The commands on a page: of code blocks without a language, and in backquotes."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    code = "\n".join(block for language, block in blocks if not language).replace("\\\n", " ")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+# .*", "", line) for line in code.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose)
    return [" ".join(line.split()) for line in lines if re.match(rf"({STARTS}) ", line)]


PAGES_WITH_COMMANDS = [*PAGES, "CONTRIBUTING.md"]
ALL = {c for p in PAGES_WITH_COMMANDS for c in commands((ROOT / p).read_text(encoding="utf-8"))}
# Those that name a command alone are left out.
WHOLE = {c for c in ALL if len(c.split()) > 2 and "--help" not in c}


def why_not(command: str) -> str | None:
    if "http://" in command:
        return NOT_RUN["curl"]
    if "recipes/configs/mine" in command:
        return "tests/recipes/test_init.py checks what init writes"
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def place(command: str) -> float:
    """Later than PPO, if its result is shown to people."""
    after = "label --models" in command or "label runs/mine/comparisons.db" in command
    return ORDER.index("ppo") + 0.5 if after else ORDER.index(command.split()[1])


RUN = sorted((c for c in WHOLE if why_not(c) is None), key=lambda c: (place(c), c))


def test_commands_are_found():
    text = "`make x`, `x`\n```\n$ not this\npip install a \\\n  b  # c\n```\n"
    text += "```python\nmake y\n```\n"
    assert commands(text) == ["pip install a b", "make x"]
    assert len(RUN) > 12 and all(command.startswith("trl-instruct ") for command in RUN)
    assert [start for start in NOT_RUN if not any(c.startswith(start) for c in ALL)] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(c for c in ALL if c.startswith("make ")))
def test_make_knows_what_to_do(command):
    """Its targets, the configs that it names, and the rules that lead there."""
    mine = {"CONFIG=mine": "CONFIG=tiny", "DATA=../shared/data": "DATA=."}
    words = [mine.get(word, word) for word in shlex.split(command)]
    make = [*["make", "-n", "-o", "install", "-o", "install-trl112"], *words[1:]]
    told = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True)
    assert told.stdout


@pytest.mark.parametrize("command", sorted(c for c in ALL if re.search(r"[\w/]+\.py", c)))
def test_scripts_and_configs_are_there(command):
    named = re.findall(r"(?:recipes|benchmarks)/[\w/.-]+\.(?:py|yaml)", command)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    if "recipes/ppo.py" in command and "--config recipes" in command:
        given = shlex.split(command.partition("recipes/ppo.py ")[2].replace("...", "runs/x"))
        flags_of_stages.parse(PPOConfig, given)


@pytest.fixture
def project(tmp_path, monkeypatch, saved_policy, saved_reward_model):
    """A folder with all that the commands name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "runs/tiny/sft"):
        shutil.copytree(saved_policy, folder)
    functions = (ROOT / "docs" / "reward_functions.md").read_text("utf-8").split("```python\n")[1]
    Path("rewards.py").write_text(functions.partition("```")[0])
    shutil.copytree(saved_reward_model, "runs/other/rm")
    write(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    write(tmp_path / "rankings.jsonl", RANKINGS)
    write(tmp_path / "prompts.jsonl", PROMPTS)
    write(tmp_path / "text.jsonl", [{"text": f"A line of text, number {n}."} for n in range(40)])
    write(tmp_path / "alpaca_data.json", ALPACA)
    votes = {"question": "Q: ", "answers": ["bad", "good one", "fair"], "votes": [0, 2, 1]}
    write(tmp_path / "votes.jsonl", [votes | {"question": f"Q{n}: "} for n in range(8)])
    Path("qa.csv").write_text("q,a\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(8)))
    Path("sft.yaml").write_text(
        "model_name_or_path: gpt2\ndataset_name: demonstrations.jsonl\noutput_dir: runs/checked\n"
    )

    def label(page, host, port):
        """Everything that is there, in the order that is there."""
        for item in page.store.items():
            ranks = {"ranks": list(range(1, len(item.responses) + 1))}
            page.store.save(f"anna-{item.key}", item.key, "anna", "label", ranks)

    monkeypatch.setattr(label_command, "serve", label)
    return tmp_path


def flags(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.mark.slow
def test_the_commands_run(project, capsys):
    adapter = {**QUICK, "use_peft": True, "lora_r": 2, "output_dir": "runs/sft"}
    cli.main(["sft", "--config", "sft.yaml", *flags(adapter)])
    for command in RUN:
        _, name, *arguments = shlex.split(command)
        short = dict(SHORT.get(name, {}))
        if name in ("sft", "rm", "ppo"):
            short["overwrite_output_dir"] = True
        if "label --models" in command:
            short["response_length"] = 4
        if name == "init":
            shutil.rmtree("recipes", ignore_errors=True)
        if name == "export":
            Path(arguments[1]).unlink(missing_ok=True)
        cli.main([name, *arguments, *flags(short)])
    assert "labels.db: 8 prompts, 8 of them new" in capsys.readouterr().out
    for folder in ("sft", "rm", "ppo", "candidates", "evaluation"):
        assert (project / "runs" / "mine" / folder).is_dir()
    assert not Path("runs/checked").exists()


# Pages with blocks of Python that no other test runs, and the folders that they fill.
PYTHON = {
    "README.md": ["runs/sft", "runs/rm", "runs/ppo"],
    "docs/lora.md": ["runs/sft", "runs/rm", "runs/ppo"],
    "docs/people.md": [],
    "docs/reward_functions.md": ["runs/mine/short"],
    "docs/reward_model.md": ["runs/mine/rm"],
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON)
def test_the_python_runs(page, project, monkeypatch, saved_policy, make_reward_model, tokenizer):
    """With the options of a short run."""
    for name, short in {"sft": QUICK, "rm": {**QUICK, "eval_size": 0.25}, "ppo": QUICK_PPO}.items():
        call = partial(getattr(trl_instruct, name), **short, overwrite_output_dir=True)
        monkeypatch.setattr(trl_instruct, name, call, raising=False)
    shutil.copytree(saved_policy, "runs/mine/sft")
    make_reward_model(id2label={0: "NEGATIVE", 1: "POSITIVE"}).save_pretrained("runs/sentiment")
    tokenizer.save_pretrained("runs/sentiment")
    Path("runs/mine/candidates").mkdir()
    write(project / "runs" / "mine" / "candidates" / "train.jsonl", CANDIDATES)
    cli.main(["label", "runs/mine/candidates"])
    monkeypatch.syspath_prepend(project)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL):
        exec(block, names)
    sys.modules.pop("rewards", None)
    if "pairs" in names:
        assert set(names["pairs"].column_names) == {"prompt", "chosen", "rejected"}
        assert len(names["pairs"]) > 8
    assert [folder for folder in PYTHON[page] if not Path(folder, "metrics.json").exists()] == []
    assert "pairs" in names or PYTHON[page]
