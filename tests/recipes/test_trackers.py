"""What the trackers of report_to keep of a run, read back from their own files."""

import importlib.util
import json
import sqlite3
import struct
import sys
from collections import defaultdict

import pytest
from conftest import letters
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO

from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.sft import sft

pytestmark = pytest.mark.slow  # whole stages

ONCE = "train_runtime train_samples_per_second train_steps_per_second train_loss total_flos"
INSTALLED = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]


def needs(tracker):
    reason = f"{tracker} is not installed: pip install '.[{tracker}]'"
    return pytest.mark.skipif(tracker not in INSTALLED, reason=reason)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, saved_policy):
    """A folder with ppo, then sft, in one process, told to all trackers that are installed."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        # A test before may have loaded it: it reads the variable once, and keeps the folder.
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
                patch.setattr(module, "TRACKIO_DIR", folder / "trackio")
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(folder))):
            patch.setenv(f"WANDB_{name}", value)
        told, prompts = {"report_to": INSTALLED}, Dataset.from_list(PROMPTS)
        options = {**QUICK_PPO, **told, "max_steps": 3, "num_sample_generations": 2}
        ppo(saved_policy, letters, prompts, folder / "ppo", **options)
        rows = Dataset.from_list(DEMONSTRATIONS)
        sft(saved_policy, rows, folder / "sft", eval_dataset=rows, **{**QUICK, **told})
    return folder


def logged(folder, *, once=False):
    """Curves by the trackers' names: step and value of each log."""
    curves = defaultdict(list)
    for log in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
        for name, value in log.items():
            if name != "step" and (once or name not in ONCE.split()):
                kind, _, rest = name.partition("_")
                name = f"eval/{rest}" if kind == "eval" else f"train/{name}"
                curves[name].append((log["step"], value))
    return curves


def curves_of(rows):
    """The same from rows of a tracker that keeps the step as a metric."""
    curves = defaultdict(list)
    for row in rows:
        for name in row.keys() - {"train/global_step"}:
            if "/" in name:
                curves[name].append((row["train/global_step"], row[name]))
    return curves


def same(curves, expected):
    assert curves.keys() == expected.keys()
    for name in expected:
        assert curves[name] == [(step, pytest.approx(v, rel=1e-6)) for step, v in expected[name]]


def check_table(rows, step):
    assert len(rows) == 4
    for row in rows:
        assert list(row) == ["step", "prompt", "completion", "score"] and row["step"] == step
        assert {"prompt": row["prompt"]} in PROMPTS
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx(letters(None, [row["completion"] for row in rows]))


@needs("tensorboard")
@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_tensorboard(runs, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (runs / stage).glob("runs/*/*")  # the last evaluation is in it
    events = EventAccumulator(str(file)).Reload()
    names = events.Tags()["scalars"]
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}
    same(curves, logged(runs / stage, once=True))
    if stage == "sft":
        assert [step for step, _ in curves["eval/loss"]] == [0, 2]
        return
    tables = events.Tensors("completions/text_summary")
    assert [table.step for table in tables] == [2, 3]
    for table in tables:
        head, *lines = table.tensor_proto.string_val[0].decode().strip("\n").splitlines()
        assert head.startswith(" " * 4)  # in Markdown, as it is
        assert head.split() == ["step", "prompt", "completion", "score"] and len(lines) == 4
        for line in lines:
            step, prompt, *_, score = line.split()
            assert (step, {"prompt": f"{prompt} "} in PROMPTS) == (str(table.step), True)
            assert float(score) > 0


@needs("trackio")
def test_trackio(runs):
    with sqlite3.connect(runs / "trackio" / "huggingface.db") as db:
        kept = db.execute("select run_id, metrics from metrics order by id").fetchall()
    found = defaultdict(list)
    for run, metrics in kept:
        found[run].append(json.loads(metrics))
    for stage, rows in zip(("ppo", "sft"), found.values(), strict=True):
        tables = [row.pop("completions")["_value"] for row in rows if "completions" in row]
        same(curves_of(filter(None, rows)), logged(runs / stage))
        for step, table in zip((2, 3) if stage == "ppo" else (), tables, strict=True):
            check_table(table, step)


def wandb_history(path):
    """Rows of a .wandb file: records in blocks of 32 KB, each part with length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # complete
            record, whole = Record.FromString(whole), b""
            items = record.history.item
            if items:
                yield {
                    "/".join([i.key or "", *i.nested_key]): json.loads(i.value_json) for i in items
                }


@needs("wandb")
def test_wandb_offline(runs):
    files = sorted(runs.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    for stage, file in zip(("ppo", "sft"), files, strict=True):
        rows = [{k.strip("/"): v for k, v in row.items()} for row in wandb_history(file)]
        scalars = [row for row in rows if not any(name.startswith("completions") for name in row)]
        same(curves_of(scalars), logged(runs / stage))
        paths = [file.parent / "files" / r["completions/path"] for r in rows if r not in scalars]
        for step, path in zip((2, 3) if stage == "ppo" else (), paths, strict=True):
            table = json.loads(path.read_text(encoding="utf-8"))
            check_table([dict(zip(table["columns"], r, strict=True)) for r in table["data"]], step)
