"""What a PPO run shows of itself."""

import pytest
from datasets import Dataset
from test_recipes import PROMPTS, QUICK_PPO, vowels

from trl_instruct import ppo_report
from trl_instruct.ppo_report import PANELS, draw
from trl_instruct.recipes import ppo


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
    draw(logs, tmp_path / "ppo.png")
    lines = [line for axes in kept[0].axes for line in axes.get_lines() if len(line.get_xdata())]
    assert len(lines) == len(names) == 8
    assert all(list(line.get_ydata()) == [0.5, 1.0] for line in lines)
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_samples_are_shown_as_often_as_asked_and_curves_saved(saved_policy, tmp_path, capsys):
    options = {**QUICK_PPO, "max_steps": 5}
    prompts = Dataset.from_list(PROMPTS)
    result = ppo(saved_policy, vowels, prompts, tmp_path / "x", num_sample_generations=2, **options)
    told = capsys.readouterr().out
    assert [step for step in range(1, 6) if f"[{step}/5] > Q" in told] == [3, 5]
    assert (result.path / ppo_report.FIGURE).is_file()
    ppo(saved_policy, vowels, prompts, tmp_path / "y", num_sample_generations=0, **options)
    assert "/5] > Q" not in capsys.readouterr().out
