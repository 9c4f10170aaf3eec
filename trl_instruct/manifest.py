"""The manifest of a folder: the files that were written there, with their sizes and hashes.

What is listed and unchanged is ours to remove. What is listed and differs was cut short or damaged.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from trl_instruct.files import read_json, write_json

MANIFEST_FILE = "manifest.json"

Mark = dict[str, int | str]  # size in bytes, SHA-256


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """List files of a folder in its manifest; the last thing that is written there.

    Args:
        folder: the one that holds the files.
        names: their paths below the folder, with "/" between; None for all that it holds.
    """
    if names is None:
        names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    listed = sorted(set(names) - {MANIFEST_FILE})
    write_json(folder / MANIFEST_FILE, {name: mark_of(folder / name) for name in listed})


def read_manifest(folder: Path) -> dict[str, Mark]:
    """The files that a folder's manifest lists, by their path below it; {} without a manifest.

    Raises:
        ValueError: the manifest is not JSON.
    """
    return read_json(folder / MANIFEST_FILE)


def listed_files(folder: Path) -> dict[str, Mark]:
    """As `read_manifest`; {} too for a file of another kind, or one that lists files elsewhere."""
    try:
        listed = read_manifest(folder)
    except (OSError, ValueError):
        return {}
    ours = isinstance(listed, dict) and all(
        isinstance(mark, dict) and mark.keys() == {"size", "sha256"} for mark in listed.values()
    )
    inside = ours and not any({"/", ".."} & {*Path(name).parts} for name in listed)
    return listed if inside else {}


def list_too(path: Path) -> None:
    """List one more file in the manifest of its folder, if there is one."""
    if listed := listed_files(path.parent):
        write_json(path.with_name(MANIFEST_FILE), {**listed, path.name: mark_of(path)})


def damage(folder: Path) -> str | None:
    """The first listed file that is missing or differs, and how; None if all are as written."""
    for name, mark in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != mark["size"]:
            return f"{name} has {path.stat().st_size:,} bytes of {mark['size']:,}"
        if mark_of(path) != mark:
            return f"{name} has changed since it was written"
    return None


def mark_of(path: Path) -> Mark:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
