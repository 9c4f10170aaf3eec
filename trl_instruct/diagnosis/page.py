"""One page that says how the stages went: diagnosis, table, figures, completions."""

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, UndefinedError

from trl_instruct.console import one_line
from trl_instruct.diagnosis.findings import diagnose, verdict
from trl_instruct.errors import InputError, explained, needs_extra
from trl_instruct.evaluation.tables import tables
from trl_instruct.files import list_too, nulls_as_nan, read_json, written_at_once
from trl_instruct.intervals import plot_intervals
from trl_instruct.ppo_trainer.curves import FAINT, LINE, PANELS, plot_line, plot_panel
from trl_instruct.recipes.chain import FinishedStage, read_chain
from trl_instruct.reward_trainer.tables import plot_accuracy, plot_calibration

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
MOST_SAMPLES = 12

FIGURES = yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))
COLOURS = ("#888888", LINE, FAINT, "#009e73")
MOST_POINTS = 1000


def report(
    folder: str | os.PathLike,
    *,
    evaluation: str | os.PathLike | None = None,
    comparisons: str | os.PathLike | None = None,
    output_file: str | os.PathLike | None = None,
) -> Path:
    """Write one self-contained HTML page on a finished stage and those it came from.

    Findings come first, each with its figure, threshold and advice; then the stages side by side,
    figures, completions. Model outputs and data are escaped; the page loads and runs nothing.

    Args:
        folder: output folder of `sft`, `rm` or `ppo`.
        evaluation: the JSON that `evaluate` saved: models side by side, best-of-n, completions.
        comparisons: the store of blind comparisons that `label --models` filled.
        output_file: default: report.html in the folder.

    Returns:
        Path of the page.

    Raises:
        InputError: no finished stage in the folder, or a damaged one; a file that is not an
            evaluation, or no store of comparisons; a place that cannot be written to.
    """
    chain, compared = read_chain(folder), read_evaluation(evaluation)
    people = read_comparisons(comparisons)
    path = Path(output_file or Path(folder) / REPORT)
    damaged = f"{os.fspath(folder)!r}, a stage before it or the evaluation is damaged"
    try:
        with explained(damaged):
            findings = diagnose(chain)
            page = Environment(autoescape=True, undefined=StrictUndefined)
            text = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
                title=f"How {Path(folder)} was made",
                verdict=verdict(findings),
                findings=findings,
                stages=chain,
                key_figures=key_figures,
                evaluation=compared,
                samples=compared.get("samples", [])[:MOST_SAMPLES],
                tables=tables(compared) if compared else [],
                people=people,
                figures=list(figures(chain, compared)),
            )
    except UndefinedError as error:
        raise InputError(f"{damaged} ({error}).") from error
    try:
        with written_at_once(path) as file:
            file.write(text)
        list_too(path)
    except OSError as error:
        raise InputError(f"The report cannot be written to {str(path)!r}: {error}.") from error
    return path


def summary_lines(
    chain: Mapping[str, FinishedStage], evaluation: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """The page in a few lines: the verdict, key figures of stages and models, the findings."""
    findings = diagnose(chain)
    yield verdict(findings)
    for name, run in chain.items():
        yield f"{name:<10} {key_figures(name, run)}"
    for name, model in (evaluation or {}).get("models", {}).items():
        scores = [f"{judge} {score['mean']:.3f}" for judge, score in model["scores"].items()]
        yield f"{one_line(name):<10} held out: {', '.join(scores)}"
    for finding in findings:
        yield f"{finding.stage}: {finding.told} ({finding.figure})"
        if finding.level != "fine":
            yield f"    {finding.advice}"


def key_figures(name: str, run: FinishedStage) -> str:
    """The key figures of a stage in one line."""
    metrics = run.metrics
    if name == "rm" and "accuracy" in metrics:
        limit = f", ceiling {metrics['ceiling']:.3f}" if "ceiling" in metrics else ""
        longer = f"longer answer wins {metrics['length_accuracy']:.3f}"
        return f"held-out accuracy {metrics['accuracy']:.3f} ({longer}{limit})"
    if name == "ppo" and run.curve("objective/kl"):
        shown = {"score": "scores", "gold": "gold", "KL": "kl", "length": "length"}
        curves = {label: run.curve(f"objective/{key}") for label, key in shown.items()}
        ends = [f"{n} {c[0][1]:.2f} -> {c[-1][1]:.2f}" for n, c in curves.items() if c]
        return ", ".join(ends)
    if name == "sft" and metrics.get("eval_loss") is not None and "base_loss" in metrics:
        return f"held-out loss {metrics['base_loss']:.3f} -> {metrics['eval_loss']:.3f}"
    if name == "candidates":
        counts = {part: found for part, found in metrics.items() if isinstance(found, dict)}
        return ", ".join(f"{part}: {n['responses']:,} responses" for part, n in counts.items())
    return f"training loss {metrics['train_loss']:.3f}" if "train_loss" in metrics else ""


def read_evaluation(path: str | os.PathLike | None) -> dict[str, Any]:
    """What `evaluate` saved; empty for None. InputError if it is something else."""
    if path is None:
        return {}
    file = Path(path)
    if not file.is_file():
        raise InputError(f"evaluation {str(file)!r}: no such file. Run evaluate first.")
    with explained(f"evaluation {str(file)!r} is not JSON"):
        content = read_json(file)
    if not isinstance(content, dict) or not {"models", "judges", "points"} <= set(content):
        raise InputError(f"evaluation {str(file)!r} is not what `evaluate` saves.")
    return {**content, "models": nulls_as_nan(content["models"])}


def read_comparisons(store: str | os.PathLike | None) -> tuple[str, list[list[str]]] | None:
    """What people said about checkpoints, as a line and a table; None if no store is given."""
    if store is None:
        return None
    if "://" not in os.fspath(store) and not Path(store).is_file():
        raise InputError(f"comparisons {str(store)!r}: no such file. Run label --models first.")
    with needs_extra("label"):
        from trl_instruct.data.labels import LabelStore
        from trl_instruct.labels.comparisons import comparison_rows
    return comparison_rows(LabelStore(os.fspath(store)))


def figures(
    chain: Mapping[str, FinishedStage], evaluation: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """Title, caption and source (an SVG as a data URI) of all figures that the measurements allow.

    `evaluation` is empty if there is none.
    """
    sft, rm, ppo = (chain.get(name) for name in ("sft", "rm", "ppo"))
    if ppo and ppo.curve("objective/kl"):
        yield _figure(FIGURES["frontier"], _plot_frontier, ppo, evaluation.get("best_of_n"))
    if evaluation.get("judges"):
        yield _figure(FIGURES["scores"], _plot_scores, evaluation)
        yield _figure(FIGURES["lengths"], _plot_lengths, evaluation)
    if sft and sft.curve("loss"):
        yield _figure(FIGURES["sft"], _plot_sft, sft)
    if rm and rm.curve("accuracy"):
        yield _figure(FIGURES["rm"], _plot_lines, rm, {"loss": LINE, "accuracy": FAINT})
    if rm and "accuracy" in rm.metrics:
        given = rm.metrics, "by_distance", "difference of the two ranks"
        yield _figure(FIGURES["rm_accuracy"], plot_accuracy, *given)
        yield _figure(FIGURES["rm_calibration"], plot_calibration, rm.metrics)
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
