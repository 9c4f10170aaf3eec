import math

import pytest
from datasets import Dataset

from trl_instruct.reward_trainer import tables
from trl_instruct.reward_trainer.evaluation import evaluate_reward
from trl_instruct.reward_trainer.tables import plot, render

RANKINGS = [
    {
        "prompt": f"p{i}",
        "responses": ["x" * (1 + i % 3), "y" * 2, "z" * (4 - i % 2)][: 2 + i % 2],
        "scores": [float(i % 2), 0.5, 0.1][: 2 + i % 2],
        "ranks": [1 + (i % 2 == 0), 1 + (i % 2), 3][: 2 + i % 2],
        "gold_scores": [1.0, 0.0, 0.5][: 2 + i % 2],
        "labeler": labeler,
    }
    for i in range(40)
    for labeler in ("a", "b")
]


@pytest.fixture(scope="module")
def evaluation(tokenizer):
    def reward(prompts, completions):
        return [len(text) % 3 - 0.5 for text in completions]

    return evaluate_reward(reward, Dataset.from_list(RANKINGS), tokenizer)


def test_the_table_holds_what_was_measured(evaluation, tmp_path):
    metrics = {**evaluation.metrics, "shift": -1.25, "std": 0.5}
    text = render(metrics, tmp_path / "rm.png")
    accuracy = f"{metrics['accuracy']:.3f} [{metrics['accuracy_low']:.3f}, "
    for part in (
        "40 held-out prompts, ",
        f"figure: {tmp_path / 'rm.png'}",
        f"accuracy (95 %)       {accuracy}",
        "longer answer wins",
        f"noise ceiling       {metrics['ceiling']:.3f}",
        f"best of K on top      {metrics['best_of_k']:.3f} [",
        f"chance: {metrics['best_of_k_chance']:.3f}",
        "labelers agree      1.000 [0.",
        f"log-loss              {metrics['log_loss']:.3f}",
        f"calibration error     {metrics['calibration_error']:.3f}",
        f"perfect: {metrics['calibration_floor']:.3f}, up to 0.",
        "Spearman",
        "shift                 -1.250",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[1:])) < 80


def test_the_table_leaves_out_what_was_not(evaluation, tmp_path):
    known = {k: v for k, v in evaluation.metrics.items() if k not in ("ceiling", "agreement")}
    text = render(known, tmp_path)
    assert not any(word in text for word in ("ceiling", "agree", "shift"))
    only_shift = render({"shift": 1.0, "std": 0.5}, tmp_path)
    assert only_shift == "shift  +1.000  demonstrations: sd 0.500"


def test_the_table_of_labelers(tmp_path):
    known = {"mean": 0.25, "low": 0.125, "high": 0.5, "pairs": 1200}
    judged = {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 1.0}
    labelers = {"\x1b[1mbob": {"rankings": 1001, **known}, "anna": {"rankings": 7}}
    text = render({"labelers": labelers, "by_labeler": {"anna": judged}}, tmp_path)
    assert text.strip() == "\n".join(
        (
            "labeler     rankings  agrees with others (95 %)  pairs  the model agrees",
            "\\x1b[1mbob  1,001     0.250 [0.125, 0.500]       1,200  -",
            "anna        7         -                          0      0.750 [0.500, 1.000]",
        )
    )
    many = {f"l{i}": {"rankings": 1} for i in range(23)}
    lines = render({"labelers": many}, tmp_path).splitlines()
    assert (lines[-2].split()[0], lines[-1][:10]) == ("l19", "and 3 more")


@pytest.mark.slow
def test_the_figure(evaluation, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(tables, "_plot_lengths", lambda axes, *_: drawn.append(axes.get_figure()))
    plot(evaluation, tmp_path / "a.png")
    (figure,) = drawn
    assert isinstance(figure, Figure)
    by_k, by_distance, calibration, _ = figure.axes
    lines = {line.get_label(): line for line in by_k.get_lines()}
    cells = evaluation.metrics["by_k"].values()
    assert list(lines["longer answer wins"].get_ydata()) == [c["length_accuracy"] for c in cells]
    assert list(lines["noise ceiling"].get_ydata()) == [c["ceiling"] for c in cells]
    assert lines["labelers agree (all pairs)"].get_ydata()[0] == 1.0
    assert {"reward model", "chance"} <= {text.get_text() for text in by_k.get_legend().get_texts()}
    assert by_distance.get_xticklabels()[0].get_text().startswith("1\n")
    title = calibration.get_title()
    for name in ("calibration_error", "calibration_floor", "calibration_floor_high"):
        assert f"{evaluation.metrics[name]:.3f}" in title
    (bars,) = [c for c in by_k.containers if c.get_label() == "reward model"]
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [pytest.approx([c["accuracy_low"], c["accuracy_high"]]) for c in cells]


@pytest.mark.slow
def test_the_figure_is_a_png_whatever_is_unknown(evaluation, tmp_path):
    metrics = {k: v for k, v in evaluation.metrics.items() if k not in ("ceiling", "agreement")}
    cell = {"accuracy": 1.0, "accuracy_low": math.nan, "accuracy_high": math.nan}
    metrics["by_k"] = {"2": {**cell, "length_accuracy": 0.0, "pairs": 1}}
    metrics["length_correlation"] = math.nan
    plot(evaluation._replace(metrics=metrics), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
