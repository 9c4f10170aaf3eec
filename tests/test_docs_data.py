"""docs/bring_your_data.md: its shapes are those of the code, its code and its lines are true."""

import re
from pathlib import Path

import pytest
import yaml
from test_recipes import DEMONSTRATIONS, QUICK, RANKINGS, write
from test_shapes import ALPACA

from trl_instruct import load_demonstrations, sft
from trl_instruct.data import recognition
from trl_instruct.data.conversion import mixture_of

PAGE = (Path(__file__).parents[1] / "docs" / "bring_your_data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_shape_is_in_the_table():
    own = (
        recognition.UNPAIRED,
        recognition.ARGILLA,
        recognition.RATED,
        recognition.HH,
    )
    known = {shape.name for shape in (*own, *recognition.JUDGED, *recognition.PLAIN)}
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(.+?)`", row)} == known


def test_the_line_that_is_printed(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "alpaca_data.jsonl", ALPACA)
    load_demonstrations("alpaca_data.jsonl")
    (told,) = [record.message for record in caplog.records if "read as" in record.message]
    told = re.sub(r"[\d,]*\d", "N", told.replace(".jsonl", ".json"))
    assert told in re.sub(r"[\d,]*\d", "N", PAGE)


def test_the_mixture():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    first, second = mixture_of(yaml.safe_load(block)["datasets"])
    assert (first.fraction, second.split) == (0.75, "train_sft")


@pytest.mark.slow
def test_the_pieces_in_another_project(saved_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sft(saved_policy, write(tmp_path / "d.jsonl", DEMONSTRATIONS), "runs/sft", **QUICK)
    write(tmp_path / "rankings.jsonl", RANKINGS)
    write(tmp_path / "questions.jsonl", [{"question": f"Q{i}: "} for i in range(4)])
    exec(BLOCKS[0], names := {})
    assert 0 <= names["measured"]["eval_accuracy"] <= 1
    assert len(names["pairs"]) == 3 * len(names["train"])
    try:
        from trl import GRPOTrainer  # noqa: F401
    except RuntimeError as error:  # TRL 1.12 imports requests, which it does not install
        pytest.skip(f"TRL's GRPOTrainer cannot be imported here: {error}")
    exec(BLOCKS[1], names)
    assert names["grpo"].state.global_step == 1
