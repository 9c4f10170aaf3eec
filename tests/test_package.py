"""What `pip install` from the repository brings along."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_instruct"


def test_every_file_that_is_not_python_is_packaged():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["trl_instruct"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others and packaged == others
