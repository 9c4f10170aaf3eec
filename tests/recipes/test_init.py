import json
import re
from pathlib import Path

import pytest
import yaml
from test_recipes import RANKINGS, write

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.recipes.init import RECIPES, init, recipe_names


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_under_a_name_of_ones_own(here, capsys):
    cli.main(["init", "mine"])
    written = capsys.readouterr().out.split()
    stages = {f"recipes/configs/mine/{stage}.yaml" for stage in ("sft", "candidates", "rm", "ppo")}
    assert {*written} >= stages | {"recipes/accelerate/ddp.yaml"}
    assert {*written} == {path.as_posix() for path in Path().rglob("*") if path.is_file()}
    text = "".join(path.read_text() for path in Path("recipes/configs/mine").iterdir())
    assert "runs/mine/sft" in text and not re.search(r"[/=]start\b", text)


@pytest.mark.slow
def test_check_accepts_what_it_writes(here, saved_policy, saved_reward_model, capsys):
    init("mine")
    rankings = str(write(here / "rankings.jsonl", RANKINGS))
    policy = ["--model_name_or_path", str(saved_policy)]
    given = {
        "sft": policy,
        "rm": [*policy, "--dataset_name", rankings, "--eval_dataset_name", rankings],
        "ppo": [
            *policy,
            "--dataset_train_split",
            "train[:20]",
            "--reward_model_path",
            str(saved_reward_model),
        ],
    }
    for stage, options in given.items():
        cli.main(["check", stage, "--config", f"recipes/configs/mine/{stage}.yaml", *options])
        assert "check: no faults" in capsys.readouterr().out


def test_every_line_that_a_comment_offers_is_an_option(here):
    """What stands in backquotes as `option: value` parses when it is put in."""
    init("mine")
    for stage in cli.STAGES:
        path = Path(f"recipes/configs/mine/{stage}.yaml")
        offered = re.findall(r"`(\w+: [^`]+)`", path.read_text())
        assert offered
        for line in offered:
            name, value = next(iter(yaml.safe_load(line).items()))
            kept = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != name}
            if name == "load_in_4bit":
                kept["use_peft"] = True
            Path("one.yaml").write_text(json.dumps({**kept, name: value}))
            cli.parse(cli.OPTIONS[stage], ["--config", "one.yaml"])


@pytest.mark.parametrize("like", recipe_names())
def test_a_copy_names_nothing_that_it_has_not(here, like):
    written = init("mine", like)
    for path in written:
        for named in re.findall(r"recipes/[\w./-]+\.(?:py|yaml)", path.read_text()):
            assert Path(named).is_file(), (path, named)
        if path.suffix == ".yaml" and "configs" in path.parts:
            assert yaml.safe_load(path.read_text())["output_dir"].startswith("runs/mine/")


def test_a_changed_config_of_the_launcher_stays(here):
    init("one")
    Path("recipes/accelerate/ddp.yaml").write_text("num_processes: 8")
    assert all("accelerate" not in path.parts for path in init("two"))
    assert Path("recipes/accelerate/ddp.yaml").read_text() == "num_processes: 8"


@pytest.mark.parametrize(
    "name, like, told",
    [
        ("../mine", "start", "'../mine' was given"),
        ("", "start", "'' was given"),
        ("mine", "tinny", "No recipe is called 'tinny'; there are: gpt2-imdb"),
        ("taken", "start", "recipes/configs/taken exists"),
    ],
)
def test_a_name_that_cannot_be(here, name, like, told):
    init("taken")
    before = sorted(here.rglob("*"))
    with pytest.raises(InputError, match=re.escape(told)):
        init(name, like)
    assert sorted(here.rglob("*")) == before
    assert (RECIPES / "configs" / "start").is_dir()
