"""The files of a stage: written completely or not at all, NaN as null."""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

# Written when a stage starts and when it ends: a folder with only the first holds a run cut short.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
PARTIAL = ".*.????????.tmp"  # what is being written; a kill leaves it


@contextlib.contextmanager
def written_at_once(path: Path) -> Iterator[TextIO]:
    """A file to write that appears under its name when it is complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all; NaN becomes null."""
    with written_at_once(path) as file:
        json.dump(_each(content, _finite), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if it is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_metrics(folder: Any) -> dict[str, Any]:
    """The metrics of a stage's folder, with null as NaN; {} if there are none."""
    there = isinstance(folder, str | os.PathLike)
    return nulls_as_nan(read_json(Path(folder) / METRICS_FILE)) if there else {}


def nulls_as_nan(content: Any) -> Any:
    """Turn null back into NaN after `write_json`: the interval of a single measurement."""
    return _each(content, lambda value: math.nan if value is None else value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _each(content: Any, change: Callable[[Any], Any]) -> Any:
    """Nested lists and dicts with each value changed."""
    if isinstance(content, dict):
        return {key: _each(value, change) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_each(value, change) for value in content]
    return change(content)
