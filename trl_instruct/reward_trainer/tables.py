"""The evaluation of a reward model as a short table and a figure."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trl_instruct.console import table
from trl_instruct.intervals import plot_intervals, show_interval, show_metric
from trl_instruct.reward_trainer.evaluation import RewardEvaluation

FIGURE = "rm.png"
ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MODEL, LENGTH, CEILING, LABELERS, CHANCE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#888888"
MOST_POINTS, MOST_LABELERS = 3000, 20


def render(metrics: dict[str, Any], figure: Path) -> str:
    """The metrics of `rm` as plain-text tables, and where the figure is; no metric, no row."""
    shown = [row for needed, *row in ROWS if needed in metrics]
    lines = table([[text.format(**metrics) for text in row] for row in shown])
    if "accuracy" in metrics:
        lines.insert(0, f"{_sizes(metrics)}; figure: {figure}\n")
    return "\n".join([*lines, *_labelers(metrics)])


def _labelers(metrics: dict[str, Any]) -> list[str]:
    """A table of the labelers, the least alike first; [] if there are fewer than two."""
    found, judged = metrics.get("labelers", {}), metrics.get("by_labeler", {})
    rows = [("labeler", "rankings", "agrees with others (95 %)", "pairs", "the model agrees")]
    for name, row in list(found.items())[:MOST_LABELERS]:
        alike = (show_interval(row), f"{row['pairs']:,}") if "pairs" in row else ("-", "0")
        model = show_metric(judged[name], "accuracy") if name in judged else "-"
        rows.append((name, f"{row['rankings']:,}", *alike, model))
    more = len(found) - MOST_LABELERS
    left = [f"and {more:,} more, who agree more; metrics.json has them"] if more > 0 else []
    return ["", *table(rows), *left] if found else []


def plot(evaluation: RewardEvaluation, path: Path) -> None:
    """Save the evaluation as a figure with four panels."""
    from matplotlib.figure import Figure  # takes a second; without pyplot it needs no display

    metrics = evaluation.metrics
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    figure.suptitle(
        f"Reward model on {_sizes(metrics)}: "
        f"accuracy {show_metric(metrics, 'accuracy')}, log-loss {metrics['log_loss']:.3f}"
    )
    plot_accuracy(panels[0, 0], metrics, "by_k", "K, responses in the ranking")
    plot_accuracy(panels[0, 1], metrics, "by_distance", "difference of the two ranks")
    plot_calibration(panels[1, 0], metrics)
    _plot_lengths(panels[1, 1], evaluation)
    figure.savefig(path, dpi=110)


def plot_accuracy(axes: Any, metrics: Mapping[str, Any], key: str, label: str) -> None:
    """Plot accuracy with its interval by K or distance, beside what it is compared with."""
    cells, ends = metrics[key], {"mean": "", "low": "_low", "high": "_high"}
    intervals = {
        f"{name}\n{_short(cell['pairs'])}": {e: cell[f"accuracy{end}"] for e, end in ends.items()}
        for name, cell in cells.items()
    }
    plot_intervals(axes, intervals, color=MODEL, label="reward model")
    lengths = [cell["length_accuracy"] for cell in cells.values()]
    axes.plot(lengths, "x", color=LENGTH, label="longer answer wins")
    if "ceiling" in metrics:
        ceilings = [cell.get("ceiling", math.nan) for cell in cells.values()]
        axes.plot(ceilings, "_", ms=16, mew=2, color=CEILING, label="noise ceiling")
    if "agreement" in metrics:
        agreed = metrics["agreement"]["mean"]
        axes.axhline(agreed, ls="--", color=LABELERS, label="labelers agree (all pairs)")
    axes.axhline(0.5, ls=":", color=CHANCE, label="chance")
    axes.set_ylim(min(0.4, *(cell["accuracy"] for cell in cells.values()), *lengths) - 0.05, 1.0)
    axes.set(xlabel=f"{label} (below: pairs)", ylabel="accuracy (95 %)")
    axes.legend(fontsize="small")


def plot_calibration(axes: Any, metrics: Mapping[str, Any]) -> None:
    """Plot how often the higher score wins, against how often the model expects it."""
    bins = metrics["calibration"]
    floor, high = (metrics.get(f"calibration_floor{end}", math.nan) for end in ("", "_high"))
    perfect = f"perfect: {floor:.3f}, up to {high:.3f}"
    names = ("expected", "observed", "low", "high")
    expected, observed, low, high = np.array([[one[name] for one in bins] for name in names])
    axes.plot([0.5, 1], [0.5, 1], ls=":", color=CHANCE, label="perfect")
    bars = [observed - low, high - observed]
    axes.errorbar(expected, observed, bars, fmt="o-", capsize=4, color=MODEL)
    axes.set(
        title=f"calibration error {metrics['calibration_error']:.3f} ({perfect})",
        xlabel="expected: sigmoid(difference of scores)",
        ylabel="observed: the higher score wins",
        xlim=(0.49, 1.01),
    )
    axes.legend(fontsize="small")


def _plot_lengths(axes: Any, evaluation: RewardEvaluation) -> None:
    """Plot score against length, for evenly spaced responses if there are many."""
    step = -(-len(evaluation.scores) // MOST_POINTS)
    scores, lengths = evaluation.scores[::step], evaluation.lengths[::step]
    axes.plot(lengths, scores, ".", alpha=0.3, color=MODEL)
    correlation = evaluation.metrics["length_correlation"]
    title = f"length, correlation within a prompt {correlation:+.3f} (Spearman)"
    axes.set(title=title, xlabel="tokens of the response", ylabel="score")


def _sizes(metrics: dict[str, Any]) -> str:
    return f"{metrics['eval_prompts']:,} held-out prompts, {metrics['eval_pairs']:,} comparisons"


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count // 1000:,}k"
