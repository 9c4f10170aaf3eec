"""The page: complete, self-contained, and nothing in it runs."""

import json
from html.parser import HTMLParser

import pytest
import yaml

from trl_instruct import InputError, report
from trl_instruct.data.labels import LabelStore
from trl_instruct.diagnosis.page import read_evaluation, summary_lines
from trl_instruct.labels.comparisons import comparison
from trl_instruct.recipes.chain import read_chain

pytestmark = pytest.mark.slow  # whole pages with figures

EVIL = '<script>alert("x")</script><img src="http://evil/x.png">'
PPO = {
    "objective/scores": 0.5,
    "objective/gold": 0.7,
    "objective/rlhf_reward": 0.4,
    "objective/kl": 1.0,
    "objective/length": 10.0,
    "objective/ended": 1.0,
    "policy/entropy": 0.8,
    "policy/clipfrac": 0.4,
    "val/clipfrac": 0.1,
    "val/explained_variance": 0.5,
}


def write(folder, metrics, config, logs):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))


@pytest.fixture
def ppo_folder(tmp_path):
    losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    metrics = {"stage": "sft", "base_loss": 2.0, "eval_loss": 1.5, "seconds": 3.0}
    write(tmp_path / "sft", metrics, {}, losses)
    logs = [{"step": step, **PPO} for step in range(1, 13)]
    config = {"model_name_or_path": str(tmp_path / "sft")}
    write(tmp_path / "ppo", {"stage": "ppo", "seconds": 9.5}, config, logs)
    return tmp_path / "ppo"


@pytest.fixture
def evaluation(tmp_path):
    def model(mean):
        score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        return {
            "path": None,
            "scores": {"rm": score, "gold": score},
            "win_rate": {"rm": {**score, "length_controlled": 0.5}},
            "kl": 1.0,
            "length": 9.0,
            "ended": 0.5,
            "repetition": 0.0,
            "distinct_1": 0.5,
            "distinct_2": 0.75,
            "perplexity": None,
            "completion_loss": None,
        }

    points = {"lengths": [3, 4], "scores": {"rm": [0.1, 0.2], "gold": [0.5, 1.0]}}
    said = {"completion": EVIL, "rm": 0.25, "gold": 1.0}
    content = {
        "baseline": "sft",
        "reference": "sft",
        "prompts": 2,
        "judges": ["rm", "gold"],
        "models": {"sft": model(0.3), EVIL: model(0.6)},
        "best_of_n": {
            "model": "sft",
            "judge": "rm",
            "points": [{"n": n, "kl": 0.1 * n, "scores": {"rm": n, "gold": n}} for n in (1, 2)],
        },
        "points": {"sft": points, "ppo": points},
        "samples": [{"prompt": f"Name {EVIL}", "sft": said, EVIL: said}],
    }
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(content))
    return path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_has_diagnosis_table_figures_and_completions(ppo_folder, evaluation):
    path = report(ppo_folder, evaluation=evaluation)
    assert path == ppo_folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "1 fault found. Begin with ppo" in page.text
    assert "40% of the tokens clipped (threshold: above 30%)" in page.text
    assert "held-out loss 2.000 -> 1.500" in page.text
    assert "0.300 [0.200, 0.400]" in page.text
    assert "rm 0.25, gold 1.00" in page.text
    shown = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert {"Reward against KL", "Score against length", "SFT: loss"} <= set(shown)
    assert len(shown) == len(set(shown)) == 10


def test_what_people_said_about_checkpoints(ppo_folder, tmp_path):
    store = LabelStore(tmp_path / "comparisons.db")
    store.add([comparison("Q", {"sft": "a", EVIL: "b"})])
    path = report(ppo_folder, comparisons=tmp_path / "comparisons.db")
    assert "no blind labels" in path.read_text(encoding="utf-8")
    (item,) = store.items()
    store.save("number-1", item.key, "anna", "label", {"ranks": [2, 1]})
    text = report(ppo_folder, comparisons=tmp_path / "comparisons.db").read_text(encoding="utf-8")
    page = Page(text)
    assert "1 blind label; the same answer: 0 prompts" in page.text
    assert "preferred to sft (95 %)" in page.text and EVIL in page.text
    assert "1.000 [" in page.text and "<script" not in text


def test_a_store_that_is_not_there_is_not_made(ppo_folder, tmp_path):
    with pytest.raises(InputError, match="no such file. Run label --models first."):
        report(ppo_folder, comparisons=tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_texts_of_models_are_shown_and_never_run(ppo_folder, evaluation):
    text = report(ppo_folder, evaluation=evaluation).read_text(encoding="utf-8")
    page = Page(text)
    assert EVIL in page.text
    assert "<script" not in text
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "a")]


def test_the_same_run_gives_the_same_page(ppo_folder, tmp_path):
    first = report(ppo_folder).read_bytes()
    assert report(ppo_folder, output_file=tmp_path / "again.html").read_bytes() == first


@pytest.mark.parametrize(
    "name, content",
    [
        ("../sft/metrics.json", {"stage": "sft", "base_loss": "low", "eval_loss": 1.5}),
        ("trainer_state.json", {"log_history": [{"step": 1, **dict.fromkeys(PPO, "high")}]}),
        ("trainer_state.json", {"log_history": [{"step": [1], **PPO}]}),
        ("trainer_state.json", {"log_history": 3}),
        ("trainer_state.json", {"log_history": [PPO]}),
    ],
)
def test_values_of_wrong_types_are_one_line(ppo_folder, name, content):
    (ppo_folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="a stage before it or the evaluation is damaged"):
        report(ppo_folder)
    assert not (ppo_folder / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"[]", b'{"models": {}}'])
def test_an_evaluation_that_is_none(ppo_folder, evaluation, content):
    evaluation.write_bytes(content)
    with pytest.raises(InputError, match="evaluation '.*evaluation.json' is not"):
        report(ppo_folder, evaluation=evaluation)
    evaluation.write_bytes(b'{"models": {"a": 3}, "judges": ["b"], "points": {}}')
    with pytest.raises(InputError, match="a stage before it or the evaluation is damaged"):
        report(ppo_folder, evaluation=evaluation)


@pytest.mark.parametrize("part", ["completion", "rm"])
def test_a_sample_that_lacks_a_part(ppo_folder, evaluation, part):
    content = json.loads(evaluation.read_text())
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": EVIL}]
    content["samples"].append({**content["samples"][0], "prompt": messages})
    evaluation.write_text(json.dumps(content))
    text = report(ppo_folder, evaluation=evaluation).read_text(encoding="utf-8")
    assert f"user: Hi\nassistant: {EVIL}" in Page(text).text and EVIL not in text
    del content["samples"][0]["sft"][part]
    evaluation.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the evaluation is damaged"):
        report(ppo_folder, evaluation=evaluation)


def test_a_stage_that_is_gone_is_on_the_page(ppo_folder, tmp_path):
    (tmp_path / "sft").rename(tmp_path / "moved")
    page = Page(report(ppo_folder).read_text(encoding="utf-8"))
    assert "A stage before it is not on this page. " in page.text.replace("\n", " ")
    assert f"model_name_or_path is '{tmp_path / 'sft'}', which is gone" in page.text


def test_a_place_that_cannot_be_written_to(ppo_folder, tmp_path):
    with pytest.raises(InputError, match="report cannot be written to '.*metrics.json/page.html'"):
        report(ppo_folder, output_file=ppo_folder / "metrics.json" / "page.html")


def test_a_few_lines_for_the_screen(ppo_folder, evaluation):
    models = list(summary_lines({}, read_evaluation(evaluation)))[1:]
    assert models[0].split() == ["sft", "held", "out:", "rm", "0.300,", "gold", "0.300"]
    lines = list(summary_lines(read_chain(ppo_folder)))
    assert lines[0].startswith("1 fault found")
    assert lines[1].split() == ["sft", "held-out", "loss", "2.000", "->", "1.500"]
    assert "gold 0.70 -> 0.70" in lines[2]
    assert "A lower learning_rate" in lines[-1]


def test_what_a_single_prompt_leaves_unknown(ppo_folder, evaluation):
    content = json.loads(evaluation.read_text())
    for model in content["models"].values():
        for one in (*model["scores"].values(), *model["win_rate"].values()):
            one["low"] = one["high"] = None
    evaluation.write_text(json.dumps(content))
    page = Page(report(ppo_folder, evaluation=evaluation).read_text(encoding="utf-8"))
    assert "0.300 [nan, nan]" in page.text


def test_an_evaluation_without_judges(ppo_folder, evaluation):
    content = json.loads(evaluation.read_text())
    for model in content["models"].values():
        model |= {"scores": {}, "win_rate": {}}
    content |= {"judges": [], "best_of_n": None, "samples": []}
    evaluation.write_text(json.dumps(content))
    page = Page(report(ppo_folder, evaluation=evaluation).read_text(encoding="utf-8"))
    assert "distinct-2" in page.text


@pytest.mark.parametrize(
    ("content", "told"), [(None, "no such file"), ("{", "not JSON"), ("{}", "not what `evaluate`")]
)
def test_an_evaluation_that_is_none_is_an_error_and_writes_nothing(
    ppo_folder, tmp_path, content, told
):
    path = tmp_path / "evaluation.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=told):
        report(ppo_folder, evaluation=path)
    assert not (ppo_folder / "report.html").exists()
