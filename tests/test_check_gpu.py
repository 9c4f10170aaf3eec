"""benchmarks/check_gpu.py on a CPU: every part runs through, on shapes that show nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "check_gpu.py"

pytestmark = pytest.mark.slow  # starts Python six times


@pytest.fixture(scope="module")
def parts():
    """The lines of all parts, by name."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = map(json.loads, done.stdout.splitlines())
    assert head["card"].startswith("no GPU")
    return {line.pop("part"): line for line in lines}


def test_every_part_runs(parts):
    assert [name for name, line in parts.items() if "error" in line or "left out" in line] == []
    assert len(parts) == 9


def test_what_can_be_checked_without_a_gpu_is_right(parts):
    assert parts["first_step"]["val/ratio"] == pytest.approx(1, abs=1e-2)
    assert parts["first_step"]["objective/kl"] == pytest.approx(0, abs=1e-2)
    assert parts["resume"]["equal"] is True
    assert len(set(parts["resume"]["unbroken"])) == 3
    assert set(parts["reward_model"]) >= {"K4_sdpa", "K9_sdpa", "K4_eager", "K9_eager"}


def test_no_part_begins_after_the_time():
    command = [sys.executable, str(SCRIPT), "--minutes", "0", "--parts", "rates"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "left out" in json.loads(done.stdout.splitlines()[-1])
