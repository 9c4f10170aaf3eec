"""The notebooks run from their first cell to their last, and show what they say."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from trl_instruct.files import read_json

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


def outputs(book):
    return [output for cell in book.cells for output in cell.get("outputs", [])]


def run(name, folder):
    """Execute a notebook in an empty folder. Returns how many pictures it shows."""
    base = ROOT / "runs" / "tiny" / "base"
    if (base / "metrics.json").is_file():  # as `make base` left it: the same, without its minute
        shutil.copytree(base, folder / "runs" / "notebook" / "base")
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()
    return sum("image/png" in output.get("data", {}) for output in outputs(book))


@pytest.mark.slow
def test_three_calls(tmp_path):
    assert run("three_calls", tmp_path) == 2
    gold = read_json(tmp_path / "runs" / "notebook" / "ppo" / "summary.json")["gold"]
    assert gold["ppo"]["low"] > gold["sft"]["high"] > gold["base"]["high"]


@pytest.mark.slow
def test_rankings_to_dpo(tmp_path):
    assert run("rankings_to_dpo", tmp_path) == 1
    measured = read_json(tmp_path / "runs" / "notebook" / "evaluation" / "evaluation.json")
    gold = {name: model["scores"]["gold"] for name, model in measured["models"].items()}
    assert gold["dpo"]["low"] > gold["sft"]["high"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_is_kept(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert outputs(book) == []
