"""The files of a stage: written completely or not at all, NaN as null, listed in a manifest.

The manifest has their sizes and hashes. What is listed and unchanged is ours to remove; what is
listed and differs was cut short or damaged.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

# Written when a stage starts and when it ends: a folder with only the first holds a run cut short.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
MANIFEST_FILE = "manifest.json"
PARTIAL = ".*.????????.tmp"  # what is being written; a kill leaves it

Mark = dict[str, int | str]  # size in bytes, SHA-256


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
        json.dump(nan_as_null(content), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def nan_as_null(content: Any) -> Any:
    """What is to be JSON, with null for each NaN."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


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


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """List files, by their paths below the folder (None: all), in its manifest, written last."""
    if names is None:
        names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    listed = sorted(set(names) - {MANIFEST_FILE})
    write_json(folder / MANIFEST_FILE, {name: mark_of(folder / name) for name in listed})


def listed_files(folder: Path) -> dict[str, Mark]:
    """The files that a folder's manifest lists; {} without one, or if it is none of ours."""
    try:
        listed = read_json(folder / MANIFEST_FILE)
        ours = all(mark.keys() == {"size", "sha256"} for mark in listed.values())
    except (OSError, ValueError, AttributeError):
        return {}
    inside = not any({"/", ".."} & {*Path(name).parts} for name in listed)
    return listed if ours and inside else {}


def list_too(path: Path) -> None:
    """List one more file in the manifest of its folder, if there is one."""
    if listed := listed_files(path.parent):
        write_json(path.with_name(MANIFEST_FILE), {**listed, path.name: mark_of(path)})


def damage(folder: Path) -> str | None:
    """The first listed file that is missing or differs, and how; None if all are as written."""
    for name, mark in read_json(folder / MANIFEST_FILE).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != mark["size"]:
            return f"{name} has {path.stat().st_size:,} bytes of {mark['size']:,}"
        if mark_of(path) != mark:
            return f"{name} has changed since it was written"
    return None


def mark_of(path: Path) -> Mark:
    """Size in bytes and SHA-256 of a file. One that has not changed for 2 s is hashed once."""
    stat = path.stat()
    settled = time.time() - stat.st_ctime > 2  # of later changes, the time tells
    sha256 = _sha256 if settled else _sha256.__wrapped__
    return {"size": stat.st_size, "sha256": sha256(path.absolute(), stat.st_ino, stat.st_ctime_ns)}


@lru_cache(maxsize=1000)
def _sha256(path: Path, *_: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
