import pytest
from matplotlib.figure import Figure

from trl_instruct.evaluation.tables import plot, render


def interval(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.2}


def model(mean, kl, rate=None):
    numbers = {
        "scores": {"rm": interval(mean), "gold": interval(mean / 2)},
        "kl": kl,
        "length": 11.25,
        "ended": 0.5,
        "repetition": 0.125,
        "distinct_1": 0.25,
        "distinct_2": 0.75,
        "perplexity": None,
        "completion_loss": None,
    }
    if rate is not None:
        both = {**interval(rate), "length_controlled": rate - 0.05}
        numbers["win_rate"] = {"rm": both, "gold": both}
    return numbers


@pytest.fixture
def evaluation():
    said = {"completion": "a\x1b[2J\nb", "rm": 1.0, "gold": 0.25}
    points = [{"n": n, "kl": n / 4, "scores": {"rm": n / 2, "gold": n / 8}} for n in (1, 2)]
    return {
        "baseline": "sft",
        "reference": "sft",
        "prompts": 7,
        "judges": ["rm", "gold"],
        "models": {"sft": model(0.5, 0.0), "ppo": model(0.9, 1.5, 0.75), "odd": model(0, None, 0)},
        "best_of_n": {"model": "sft", "judge": "rm", "points": points},
        "points": {},
        "reward_models": {"rm": {"accuracy": 0.7}},
        "samples": [{"prompt": "Name \x07one.\n", "sft": said, "ppo": said, "odd": said}],
    }


def test_the_tables(evaluation):
    text = render(evaluation)
    rows = [line.split() for line in text.splitlines()]
    assert rows[5][:7] == ["ppo", "0.900", "[0.800,", "1.100]", "0.450", "[0.350,", "0.650]"]
    assert rows[5][7:] == ["1.50", "11.2", "50%"]
    assert rows[6][7] == "-"  # no KL
    assert "win rate against sft" in text
    wins = next(row for row in rows if row[:2] == ["ppo", "0.750"])
    assert wins[1:5] == wins[5:] == ["0.750", "[0.650,", "0.950]", "0.700"]
    assert ["ppo", "0.125", "0.250", "0.750", "-"] in rows
    assert ["n", "=", "2", "0.50", "1.000", "0.250"] in rows
    assert "rm: accuracy on held-out pairs 0.700\n" in text


def test_what_a_model_says_cannot_disturb_the_screen(evaluation):
    text = render(evaluation)
    assert "\x1b" not in text and "\x07" not in text
    assert "a\\x1b[2J | b   [rm 1.00  gold 0.25]" in text
    assert "> Name \\x07one." in text


def test_one_model_has_no_win_rate(evaluation):
    alone = {**evaluation, "models": {"sft": model(0.5, 0.0)}, "best_of_n": None, "samples": []}
    text = render(alone)
    assert "win rate" not in text and "best of" not in text


@pytest.mark.slow
def test_the_figure(evaluation, tmp_path, monkeypatch):
    kept = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: kept.append(self) or original(self, *a, **k)
    )
    plot(evaluation, tmp_path / "e.png")
    scores, _, wins, _, frontier, gold = kept[0].axes
    assert [t.get_text() for t in scores.get_xticklabels()] == ["sft", "ppo", "odd"]
    assert [t.get_text() for t in wins.get_xticklabels()] == ["ppo", "odd"]
    curve, *models = frontier.get_lines()
    assert list(curve.get_xdata()) == [0.25, 0.5] and list(curve.get_ydata()) == [0.5, 1.0]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in models] == [(0.0, 0.5), (1.5, 0.9)]
    assert list(gold.get_lines()[0].get_ydata()) == [0.125, 0.25]
    assert {"1", "2", "sft", "ppo"} == {text.get_text() for text in frontier.texts}
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_figure_without_a_curve_or_a_judge(evaluation, tmp_path):
    plot({**evaluation, "best_of_n": None, "judges": ["rm"]}, tmp_path / "e.png")
    assert (tmp_path / "e.png").is_file()
    plot({**evaluation, "judges": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
