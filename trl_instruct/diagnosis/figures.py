"""The figures of the report, small and separate: a phone shows them one by one."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trl_instruct.intervals import plot_intervals
from trl_instruct.ppo_trainer.curves import FAINT, LINE, PANELS, plot_line, plot_panel
from trl_instruct.recipes.chain import FinishedStage
from trl_instruct.reward_trainer.tables import plot_accuracy, plot_calibration

WORDS = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
COLOURS = ("#888888", LINE, FAINT, "#009e73")
MOST_POINTS = 1000


def figures(
    chain: Mapping[str, FinishedStage], evaluation: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """Title, caption and source (an SVG as a data URI) of all figures that the measurements allow.

    `evaluation` is empty if there is none.
    """
    sft, rm, ppo = (chain.get(name) for name in ("sft", "rm", "ppo"))
    if ppo and ppo.curve("objective/kl"):
        yield _figure(WORDS["frontier"], _plot_frontier, ppo, evaluation.get("best_of_n"))
    if evaluation.get("judges"):
        yield _figure(WORDS["scores"], _plot_scores, evaluation)
        yield _figure(WORDS["lengths"], _plot_lengths, evaluation)
    if sft and sft.curve("loss"):
        yield _figure(WORDS["sft"], _plot_sft, sft)
    if rm and rm.curve("accuracy"):
        yield _figure(WORDS["rm"], _plot_lines, rm, {"loss": LINE, "accuracy": FAINT})
    if rm and "accuracy" in rm.metrics:
        given = rm.metrics, "by_distance", "difference of the two ranks"
        yield _figure(WORDS["rm_accuracy"], plot_accuracy, *given)
        yield _figure(WORDS["rm_calibration"], plot_calibration, rm.metrics)
    for panel in PANELS:
        if ppo and ppo.curve(panel[1]):
            words = {"title": f"PPO: {panel[0]}", "caption": ""}
            yield _figure(words, plot_panel, ppo.logs, *panel)


def _plot_frontier(axes: Any, run: FinishedStage, best_of_n: Mapping[str, Any] | None) -> None:
    kl = run.values("objective/kl")
    for name, colour, label in (("scores", LINE, "score"), ("gold", FAINT, "gold")):
        values = run.values(f"objective/{name}")
        if len(values) == len(kl):
            axes.plot(kl, values, "-", lw=0.6, alpha=0.5, color=colour)
            axes.scatter(kl, values, s=12, color=colour, label=f"PPO, {label}")
    if best_of_n:
        judges = (best_of_n["judge"], *best_of_n["points"][0]["scores"])
        for judge, colour in zip(dict.fromkeys(judges), COLOURS[1:], strict=False):
            points = [(p["kl"], p["scores"][judge]) for p in best_of_n["points"]]
            axes.plot(*zip(*points, strict=True), "x--", color=colour, label=f"best of n, {judge}")
    axes.set(xlabel="KL to the reference, nats per completion", ylabel="mean score")
    axes.legend(fontsize="small")


def _plot_scores(axes: Any, evaluation: Mapping[str, Any]) -> None:
    models, judges = evaluation["models"], evaluation["judges"]
    for number, judge in enumerate(judges):
        scores = {name: model["scores"][judge] for name, model in models.items()}
        look = {"color": COLOURS[1 + number % 3], "label": judge}
        plot_intervals(axes, scores, 0.12 * (number - (len(judges) - 1) / 2), **look)
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
    _plot_lines(axes, run, {"loss": LINE})


def _plot_lines(axes: Any, run: FinishedStage, colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        if points := run.curve(name):
            plot_line(axes, points, color=colour, label=name)
    axes.set_xlabel("step")
    axes.legend(fontsize="small")


def _figure(words: dict[str, str], plot: Callable[..., Any], *given: Any) -> dict[str, str]:
    import matplotlib
    from matplotlib.figure import Figure  # takes a second; needs no screen

    canvas = Figure(figsize=(4.6, 3.3), layout="constrained")
    axes = canvas.subplots()
    plot(axes, *given)
    axes.set_title("")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    # Without a date and with fixed names the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "trl-instruct", "font.size": 9}):
        canvas.savefig(file, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(file.getvalue()).decode()
    return {**words, "source": f"data:image/svg+xml;base64,{encoded}"}
