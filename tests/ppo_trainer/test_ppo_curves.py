"""What a PPO run shows of itself."""

import sys
from types import ModuleType

import pytest
from conftest import letters
from datasets import Dataset
from matplotlib.figure import Figure
from test_recipes import PROMPTS, QUICK_PPO, vowels

from trl_instruct.ppo_trainer import curves
from trl_instruct.ppo_trainer.curves import PANELS, plot
from trl_instruct.recipes.ppo import ppo


@pytest.mark.slow
def test_the_figure_has_every_curve(tmp_path, monkeypatch):
    names = [name for _, first, second in PANELS for name in (first, second) if name]
    logs = [{"step": step, **dict.fromkeys(names, step / 2)} for step in (1, 2)]
    logs.append({"train_runtime": 1.0, "step": 2})
    kept = []

    from matplotlib.figure import Figure

    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: kept.append(self) or original(self, *a, **k)
    )
    plot(logs, tmp_path / "ppo.png")
    lines = [line for axes in kept[0].axes for line in axes.get_lines() if len(line.get_xdata())]
    assert len(lines) == len(names) == 8
    assert all(list(line.get_ydata()) == [0.5, 1.0] for line in lines)
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("logs", "marker"), [(1, "o"), (2, "None")])
def test_a_single_log_is_a_dot(logs, marker):
    axes = Figure().subplots()
    history = [{"step": step, "objective/kl": 0.5} for step in range(logs)]
    curves.plot_panel(axes, history, "KL", "objective/kl", "")
    (line, *_) = axes.lines
    assert (line.get_marker(), len(line.get_xdata())) == (marker, logs)


def test_what_is_shown_of_a_sample_cannot_disturb_the_screen():
    told = curves.sample_text(1, 2, "Q\x1b[2J", "a\x1b[2J", 0.5)
    assert "\x1b" not in told and told.count("\\x1b[2J") == 2


class Tracker(ModuleType):
    """Stands for wandb or trackio: a run, tables, and what was logged."""

    def __init__(self, name, run="one"):
        super().__init__(name)
        self.run, self.logged = run, []
        self.Table = lambda dataframe: dataframe.to_dict("list")
        self.log = self.logged.append


def test_samples_go_to_the_trackers_that_have_tables(monkeypatch):
    trackers = {name: Tracker(name) for name in ("wandb", "trackio")}
    for name, tracker in trackers.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    columns = {"completion": ["a", "b"], "score": [1.0, 2.0]}
    curves.log_samples(["tensorboard"], columns)
    curves.log_samples(["tensorboard", "trackio"], columns)
    assert trackers["trackio"].logged == [{"completions": columns}]
    assert trackers["wandb"].logged == []
    curves.log_samples(["wandb"], columns)
    trackers["wandb"].run = None
    curves.log_samples(["wandb"], columns)
    assert trackers["wandb"].logged == [{"completions": columns}]


@pytest.mark.slow
def test_a_run_logs_its_samples_as_a_table(make_trainer, prompts, monkeypatch):
    tracker = Tracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    trainer = make_trainer(max_steps=2, num_sample_generations=1)
    trainer.args.report_to = ["trackio"]  # without the callback, which needs the real one
    trainer.train()
    (table,) = (logged["completions"] for logged in tracker.logged)
    assert list(table) == ["step", "prompt", "completion", "score"]
    assert table["step"] == [2] * 8
    assert set(table["prompt"]) <= set(prompts)
    assert table["score"] == pytest.approx(letters(None, table["completion"]))


@pytest.mark.slow
def test_samples_are_shown_as_often_as_asked_and_curves_saved(saved_policy, tmp_path, capsys):
    options = {**QUICK_PPO, "max_steps": 5}
    prompts = Dataset.from_list(PROMPTS)
    result = ppo(saved_policy, vowels, prompts, tmp_path / "x", num_sample_generations=2, **options)
    told = capsys.readouterr().out
    assert [step for step in range(1, 6) if f"[{step}/5] > Q" in told] == [3, 5]
    assert (result.path / curves.FIGURE).is_file()
    ppo(saved_policy, vowels, prompts, tmp_path / "y", num_sample_generations=0, **options)
    assert "/5] > Q" not in capsys.readouterr().out


def test_a_sample_as_the_terminal_shows_it_and_when():
    shown = curves.sample_text(2, 9, "Name a bird.\n", "An owl.\nA crow.", 0.5)
    assert shown == "[2/9] > Name a bird.\n      An owl. | A crow.  [score 0.50]"
    assert [step for step in range(1, 10) if curves.is_due(step, 9, times=3)] == [3, 6, 9]
