"""The files of a stage: written completely or not at all, NaN as null."""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# Written when a stage starts and when it ends: a folder with only the first holds a run cut short.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"


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
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, allow_nan=False)
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
    if isinstance(content, dict):
        return {key: nulls_as_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [nulls_as_nan(value) for value in content]
    return math.nan if content is None else content


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
