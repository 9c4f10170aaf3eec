"""Checkpoints side by side in tables and a figure."""

import math
from pathlib import Path
from typing import Any

from trl_instruct.console import one_line, table
from trl_instruct.intervals import plot_intervals, show_interval

FIGURE = "evaluation.png"
SHOWN_SAMPLES = 3
MODEL, LENGTH, CURVE, CHANCE = "#0072b2", "#d55e00", "#009e73", "#888888"
FLUENCY = ("repetition", "distinct_1", "distinct_2", "perplexity")


def render(evaluation: dict[str, Any]) -> str:
    """What `evaluate` measured as plain-text tables, with samples below."""
    lines = [f"\n{evaluation['prompts']} prompts, one completion each"]
    for rows in tables(evaluation):
        lines += ["", *table(rows)]
    for judge, known in evaluation["reward_models"].items():
        ceiling = f" (noise ceiling {known['ceiling']:.3f})" if "ceiling" in known else ""
        lines.append(f"\n{judge}: accuracy on held-out pairs {known['accuracy']:.3f}{ceiling}")
    for sample in evaluation["samples"][:SHOWN_SAMPLES]:
        lines += ["", f"> {one_line(sample['prompt'])}", *table(_sample_rows(evaluation, sample))]
    return "\n".join(lines)


def tables(evaluation: dict[str, Any]) -> list[list[list[str]]]:
    """Rows of scores, win rates, fluency and best of n, under headings; NaN may stand for null."""
    found = [_score_rows(evaluation)]
    if len(evaluation["models"]) > 1 and evaluation["judges"]:
        found.append(_win_rows(evaluation))
    fluency = [["", *(what.replace("_", "-") for what in FLUENCY)]]
    for name, model in evaluation["models"].items():
        fluency.append([name, *(_number(model[what], ".3f") for what in FLUENCY)])
    found.append(fluency)
    if evaluation["best_of_n"]:
        found.append(_best_rows(evaluation))
    return found


def _score_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    judges, reference = evaluation["judges"], evaluation["reference"]
    rows = [["", *(f"{j} (95 %)" for j in judges), f"KL to {reference}", "tokens", "ended"]]
    for name, model in evaluation["models"].items():
        scores = [show_interval(model["scores"][judge]) for judge in judges]
        length = f"{model['length']:.1f}"
        rows.append([name, *scores, _number(model["kl"], ".2f"), length, f"{model['ended']:.0%}"])
    return rows


def _win_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """The win rate by each judge, then the one at equal length."""
    title = f"win rate against {evaluation['baseline']}"
    rows = [[title, *(t for j in evaluation["judges"] for t in (f"{j} (95 %)", "equal length"))]]
    for name, model in evaluation["models"].items():
        cells = []
        for rate in model.get("win_rate", {}).values():
            cells += [show_interval(rate), f"{rate['length_controlled']:.3f}"]
        if cells:
            rows.append([name, *cells])
    return rows


def _best_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    best = evaluation["best_of_n"]
    title = f"best of n samples of {best['model']}, picked by {best['judge']}"
    rows = [[title, "KL", *evaluation["judges"]]]
    for point in best["points"]:
        scores = [f"{point['scores'][judge]:.3f}" for judge in evaluation["judges"]]
        rows.append([f"n = {point['n']}", f"{point['kl']:.2f}", *scores])
    return rows


def _sample_rows(evaluation: dict[str, Any], sample: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in evaluation["models"]:
        given = "  ".join(f"{judge} {sample[name][judge]:.2f}" for judge in evaluation["judges"])
        text = one_line(sample[name]["completion"])
        rows.append([f"  {name}", f"{text}   [{given}]" if given else text])
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def plot(evaluation: dict[str, Any], path: Path) -> None:
    """Save scores, win rates, and score against KL as a .png, a column per judge, if any."""
    from matplotlib.figure import Figure  # takes a second; without pyplot it needs no screen

    judges = evaluation["judges"]
    if not judges:
        return
    figure = Figure(figsize=(5 * len(judges), 10), layout="constrained")
    panels = figure.subplots(3, len(judges), squeeze=False)
    for column, judge in enumerate(judges):
        scores = {name: model["scores"][judge] for name, model in evaluation["models"].items()}
        plot_intervals(panels[0, column], scores, color=MODEL)
        panels[0, column].set(title=f"score by {judge}", ylabel="mean score (95 %)")
        _plot_win_rates(panels[1, column], evaluation, judge)
        _plot_frontier(panels[2, column], evaluation, judge)
    figure.savefig(path, dpi=100)


def _plot_win_rates(axes: Any, evaluation: dict[str, Any], judge: str) -> None:
    won = {n: m["win_rate"] for n, m in evaluation["models"].items() if "win_rate" in m}
    rates = {name: by_judge[judge] for name, by_judge in won.items()}
    plot_intervals(axes, rates, color=MODEL)
    controlled = [rate["length_controlled"] for rate in rates.values()]
    beside = [place + 0.1 for place in range(len(rates))]
    axes.plot(beside, controlled, "x", color=LENGTH, label="at equal length")
    axes.axhline(0.5, ls=":", color=CHANCE, label="equally good")
    axes.set(title=f"wins against {evaluation['baseline']}, by {judge}", ylim=(-0.03, 1.03))
    axes.set_ylabel("win rate (95 %)")
    axes.legend(fontsize="small")


def _plot_frontier(axes: Any, evaluation: dict[str, Any], judge: str) -> None:
    """Score against KL: a point per model, and the best-of-n curve."""
    best = evaluation["best_of_n"]
    if best:
        kl = [point["kl"] for point in best["points"]]
        scores = [point["scores"][judge] for point in best["points"]]
        label = f"best of n of {best['model']} by {best['judge']}"
        axes.plot(kl, scores, "o-", ms=4, color=CURVE, label=label)
        for x, y, point in zip(kl, scores, best["points"], strict=True):
            look = {"color": CURVE, "fontsize": "small"}
            axes.annotate(f"{point['n']}", (x, y), (4, 5), textcoords="offset points", **look)
    for name, model in evaluation["models"].items():
        if model["kl"] is not None and math.isfinite(model["kl"]):
            place = model["kl"], model["scores"][judge]["mean"]
            axes.plot(*place, "s", color=MODEL)
            axes.annotate(name, place, xytext=(4, -12), textcoords="offset points")
    label = f"KL to {evaluation['reference']}, nats per completion"
    axes.set(title=f"{judge} against KL", xlabel=label, ylabel="mean score")
    if best:
        axes.legend(fontsize="small")
