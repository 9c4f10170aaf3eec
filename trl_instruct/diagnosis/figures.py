"""The figures of the report, small and separate: a phone shows them one by one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from trl_instruct.ppo_trainer.curves import FAINT, LINE, PANELS, plot_line, plot_panel
from trl_instruct.recipes.chain import FinishedStage
from trl_instruct.reward_trainer.tables import plot_accuracy, plot_calibration

THIRD = "#009e73"
COLOURS = ("#888888", LINE, FAINT, THIRD)
MOST_POINTS = 1000


class Figure(NamedTuple):
    """A figure of the page: title, caption, and an SVG as a data URI."""

    title: str
    caption: str
    source: str


def figures(chain: Mapping[str, FinishedStage], evaluation: Mapping[str, Any]) -> list[Figure]:
    """All figures that the measurements allow.

    Args:
        evaluation: what `evaluate` saved; empty if it has not run.
    """
    found = [*_results(chain, evaluation)]
    if "sft" in chain:
        found += _sft(chain["sft"])
    if "rm" in chain:
        found += _rm(chain["rm"])
    if "ppo" in chain:
        found += _ppo(chain["ppo"])
    return found


def _results(chain: Mapping[str, FinishedStage], evaluation: Mapping[str, Any]) -> Iterator[Figure]:
    if "ppo" in chain and chain["ppo"].curve("objective/kl"):
        yield _figure(
            "Reward against KL",
            "Each iteration of PPO: its score, and how far the policy is from the reference. "
            "Best-of-n of the SFT model is what the reward model allows without any training.",
            lambda axes: _plot_frontier(axes, chain["ppo"], evaluation.get("best_of_n")),
        )
    if evaluation.get("judges"):
        yield _figure(
            "Scores on held-out prompts",
            "Mean and 95 % interval by each judge.",
            lambda axes: _plot_scores(axes, evaluation),
        )
        yield _figure(
            "Score against length",
            "One point per completion. If the cloud only moves to the right, only the length grew.",
            lambda axes: _plot_lengths(axes, evaluation),
        )


def _sft(run: FinishedStage) -> Iterator[Figure]:
    if run.curve("loss"):
        yield _figure(
            "SFT: loss",
            "Nats per completion token: in training, and held out (base and fine-tuned).",
            lambda axes: _plot_sft(axes, run),
        )


def _rm(run: FinishedStage) -> Iterator[Figure]:
    if run.curve("accuracy"):
        yield _figure(
            "Reward model: training",
            "Loss and accuracy on each batch before the model is trained on it.",
            lambda axes: _plot_lines(axes, run, "step", loss=LINE, accuracy=FAINT),
        )
    if "accuracy" in run.metrics:
        yield _figure(
            "Reward model: accuracy by difference of rank",
            "Held-out pairs. People, too, find responses of similar quality hard to tell apart.",
            lambda axes: plot_accuracy(
                axes, run.metrics, "by_distance", "difference of the two ranks"
            ),
        )
        yield _figure(
            "Reward model: calibration",
            "How often the higher score wins, against how often the difference predicts it.",
            lambda axes: plot_calibration(axes, run.metrics),
        )


def _ppo(run: FinishedStage) -> Iterator[Figure]:
    for panel in PANELS:
        if run.curve(panel[1]):
            yield _figure(f"PPO: {panel[0]}", "", partial(_plot_panel, run, panel))


def _plot_panel(run: FinishedStage, panel: tuple[str, str, str], axes: Any) -> None:
    plot_panel(axes, run.logs, *panel)


def _plot_frontier(axes: Any, run: FinishedStage, best_of_n: Mapping[str, Any] | None) -> None:
    kl = [value for _, value in run.curve("objective/kl")]
    for name, colour, label in (("scores", LINE, "score"), ("gold", FAINT, "gold")):
        values = [value for _, value in run.curve(f"objective/{name}")]
        if len(values) == len(kl):
            axes.plot(kl, values, "-", lw=0.6, alpha=0.5, color=colour)
            axes.scatter(kl, values, s=12, color=colour, label=f"PPO, {label}")
    if best_of_n:
        judges = (best_of_n["judge"], *(j for j in best_of_n["points"][0]["scores"]))
        for judge, colour in zip(dict.fromkeys(judges), (LINE, FAINT, THIRD), strict=False):
            points = [(p["kl"], p["scores"][judge]) for p in best_of_n["points"]]
            axes.plot(*zip(*points, strict=True), "x--", color=colour, label=f"best of n, {judge}")
    axes.set(xlabel="KL to the reference, nats per completion", ylabel="mean score")
    axes.legend(fontsize="small")


def _plot_scores(axes: Any, evaluation: Mapping[str, Any]) -> None:
    models, judges = evaluation["models"], evaluation["judges"]
    for offset, judge in enumerate(judges):
        scores = [model["scores"][judge] for model in models.values()]
        means = [score["mean"] for score in scores]
        halves = [score["high"] - score["mean"] for score in scores]
        places = [place + 0.12 * (offset - (len(judges) - 1) / 2) for place in range(len(models))]
        colour = (LINE, FAINT, THIRD)[offset % 3]
        axes.errorbar(places, means, yerr=halves, fmt="o", capsize=3, color=colour, label=judge)
    axes.set_xticks(range(len(models)), list(models))
    axes.set_ylabel("mean score (95 %)")
    axes.legend(fontsize="small")


def _plot_lengths(axes: Any, evaluation: Mapping[str, Any]) -> None:
    judge = evaluation["judges"][0]
    for (name, points), colour in zip(evaluation["points"].items(), COLOURS, strict=False):
        step = -(-len(points["lengths"]) // MOST_POINTS)
        lengths, scores = points["lengths"][::step], points["scores"][judge][::step]
        axes.plot(lengths, scores, ".", ms=4, alpha=0.4, color=colour, label=name)
    axes.set(xlabel="tokens of the completion", ylabel=f"score ({judge})")
    axes.legend(fontsize="small")


def _plot_sft(axes: Any, run: FinishedStage) -> None:
    held_out = run.curve("eval_loss")
    if run.metrics.get("base_loss") is not None:
        held_out = [(0, run.metrics["base_loss"]), *held_out]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o:", color=FAINT, label="held out")
    _plot_lines(axes, run, "step", loss=LINE)


def _plot_lines(axes: Any, run: FinishedStage, label: str, **colours: str) -> None:
    for name, colour in colours.items():
        points = run.curve(name)
        if points:
            plot_line(axes, points, color=colour, label=name.replace("_", " "))
    axes.set_xlabel(label)
    axes.legend(fontsize="small")


def _figure(title: str, caption: str, plot: Callable[[Any], Any]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # takes a second; needs no screen

    canvas = Canvas(figsize=(4.6, 3.3), layout="constrained")
    axes = canvas.subplots()
    plot(axes)
    axes.set_title("")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    # Without a date and with fixed names the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "trl-instruct", "font.size": 9}):
        canvas.savefig(file, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(file.getvalue()).decode()
    return Figure(title, caption, f"data:image/svg+xml;base64,{encoded}")
