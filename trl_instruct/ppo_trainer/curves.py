"""What a PPO run shows: a completion now and then, and its curves at the end."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame
from transformers.integrations import TensorBoardCallback

from trl_instruct.console import one_line, say, table
from trl_instruct.rewards.function import as_text

FIGURE = "ppo.png"
LOGGED_SAMPLES = 16
LINE, FAINT = "#0072b2", "#d55e00"
# Title, metric, and a second metric on the same axes.
PANELS: tuple[tuple[str, str, str], ...] = (
    ("score, and score minus KL penalty", "objective/scores", "objective/rlhf_reward"),
    ("KL to the reference, nats per completion", "objective/kl", ""),
    ("entropy, nats per token", "policy/entropy", ""),
    ("length, tokens", "objective/length", ""),
    ("share of tokens clipped: policy, value", "policy/clipfrac", "val/clipfrac"),
    ("explained variance of the returns", "val/explained_variance", ""),
)


def sample_text(step: int, steps: int, prompt: Any, completion: str, score: float) -> str:
    """One prompt and completion of an iteration, for the terminal."""
    asked, said = one_line(prompt), one_line(completion)
    place = f"[{step}/{steps}]"
    return f"{place} > {asked}\n{' ' * len(place)} {said}  [score {score:.2f}]"


def is_due(step: int, steps: int, *, times: int) -> bool:
    """Whether this is one of `times` evenly spaced steps, which include the last step."""
    return step * times // steps > (step - 1) * times // steps


def show_samples(
    step: int, steps: int, columns: Mapping[str, Sequence[Any]], *, trackers: Any, callbacks: Any
) -> None:
    """Print the first of some episodes' completions; log all to the trackers, as a table."""
    prompt, completion, score = (columns[n][0] for n in ("prompt", "completion", "score"))
    say(sample_text(step, steps, prompt, completion, score))
    prompts = list(map(as_text, columns["prompt"]))
    columns = {"step": [step] * len(prompts), **columns, "prompt": prompts}
    log_samples(trackers, columns)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            rows = [[*map(str, row)] for row in (columns, *zip(*columns.values(), strict=True))]
            callback.tb_writer.add_text("completions", "\n    ".join(["", *table(rows)]), step)


def log_samples(trackers: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Log completions as a table, as TRL's GRPOTrainer does, to wandb and trackio if in use."""
    for name in {"wandb", "trackio"}.intersection(trackers):
        tracker = importlib.import_module(name)
        if name == "trackio" or tracker.run is not None:  # else disabled by an environment variable
            tracker.log({"completions": tracker.Table(dataframe=DataFrame(columns))})


def plot(log_history: list[dict[str, Any]], path: Path) -> None:
    """Plot the curves of a run from its trainer's `log_history` into a .png."""
    from matplotlib.figure import Figure  # takes a second; without pyplot it needs no display

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        plot_panel(axes, log_history, *panel)
    figure.savefig(path, dpi=100)


def plot_panel(axes: Any, log_history: list[dict[str, Any]], title: str, *names: str) -> None:
    """Plot one or two metrics over the iterations."""
    for name, color in zip(names, (LINE, FAINT), strict=False):
        points = [(log["step"], log[name]) for log in log_history if name in log]
        label = name.removeprefix("objective/")
        plot_line(axes, points, color=color, label=label)
    if all(names):
        axes.legend(fontsize="small")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.3)


def plot_line(axes: Any, points: list[tuple[int, float]], **look: Any) -> None:
    """A line through points of step and value; a single one is a dot."""
    steps, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, values, marker="o" if len(points) == 1 else None, **look)
