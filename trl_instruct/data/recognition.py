"""Which published shape a file has, told by its columns."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_instruct.data import shapes
from trl_instruct.data import tool_exports as tools
from trl_instruct.data.dialogues import prompt_in_dialogue
from trl_instruct.data.sources import NAMES, Record


class Shape(NamedTuple):
    """A published shape.

    `columns` in any case; `a[].b` is a list `a` of objects with `b`, `a[]` one of other values,
    `a|b` one of two columns.
    With `group`, `read` takes all rows of which this gives one value. `kind` is the only one
    that it gives; `says` is what was taken, where a file holds more than one.
    """

    name: str
    columns: str
    read: Callable[[Any], Any]
    group: Callable[[Record], Any] | None = None
    kind: str | None = None
    says: str = ""

    @property
    def told(self) -> str:
        """Name and choice, for the line that says how a file was read."""
        return f"{self.name} ({self.says})" if self.says else self.name


UNPAIRED = Shape(
    "unpaired preferences", "", shapes.unpaired, lambda row: shapes.judged(row)["prompt"]
)
ARGILLA = Shape("Argilla's table", "", tools.argilla_table)
RATED = Shape("rated pairs", "", shapes.pairs, says="equal ratings are a tie")
HH = Shape("HH-RLHF", "", shapes.pairs)


def _listed(read: str, group: str | None = None, **given: Any) -> Shape:
    """A shape as shapes.yaml lists it: with the names of its function, and of a column."""
    reader = vars(tools).get(read) or getattr(shapes, read)
    value_of = partial(reduce, getitem, group.split(".")) if group else None
    return Shape(read=reader, group=value_of, **given)


_PARTS = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
JUDGED, PLAIN = ([_listed(**entry) for entry in _PARTS[part]] for part in ("judged", "plain"))


def shape_of(first: Record, kind: str) -> Shape | None:
    """The published shape of a file, by its first record and the kind that is wanted, or None."""
    if {"prompt", "responses"} <= set(first):
        return None
    replies = {"completion", "messages"}
    replies |= set() if "prompt" in first else {"conversations", "output", "response"}
    label = str(first.get(shapes.key_of(first, "label", "kto_tag") or ""))
    if label.lower() in NAMES["judged"].split() and replies & set(first):
        return UNPAIRED
    if kind == "demonstration" and {"prompt", "completion"} <= set(first):
        return None
    if _has_answers(first):
        return ARGILLA
    if {"chosen", "rejected"} <= set(first) and "conversations" not in first:
        if shapes.ratings_of(first):
            return RATED
        if "prompt" not in first and str(first["chosen"]).startswith("\n\nHuman:"):
            return HH
    ultrachat = kind == "prompt" and prompt_in_dialogue(first, "messages")
    for shape in JUDGED if "prompt" in first and not ultrachat else JUDGED + PLAIN:
        needed = [paths.split("|") for paths in shape.columns.split()]
        held = all(any(_holds(first, path) for path in paths) for paths in needed)
        if held and shape.kind in (None, kind):
            return shape
    return None


def _has_answers(first: Record) -> bool:
    """Whether a column holds Argilla's answers: `<question>.responses`, or `user_id`, `value`."""
    heads = [value[0] for value in first.values() if isinstance(value, list) and value]
    answers = any(isinstance(head, Mapping) and {"user_id", "value"} <= set(head) for head in heads)
    return answers or any(name.endswith(".responses") for name in first)


def _holds(first: Record, path: str) -> bool:
    """Whether the record has a column, or what `path` says of its value."""
    name, _, inside = path.partition(".")
    key = next((column for column in first if column.lower() == name.removesuffix("[]")), None)
    value = first[key] if key else None
    if name.endswith("[]"):
        value = value[0] if isinstance(value, list) and value else None
        if not inside:
            return value is not None and not isinstance(value, Mapping)
    if inside:
        return isinstance(value, Mapping) and inside in value
    return key is not None
