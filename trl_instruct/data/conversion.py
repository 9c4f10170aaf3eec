"""Read a source: a published shape is recognised and said, and gives records of one kind.

What a file does not give is counted, with the reason, in one line. Several datasets become one.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from trl.scripts.utils import DatasetConfig

from trl_instruct.console import get_logger, plural
from trl_instruct.data import sources
from trl_instruct.data.orders import dense_ranks, is_number
from trl_instruct.data.reading import Reading, rename
from trl_instruct.data.recognition import Shape, shape_of
from trl_instruct.data.rendering import ARGUMENTS
from trl_instruct.data.shapes import with_system_message
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate
from trl_instruct.errors import NOT_AS_EXPECTED, InputError, explained, kind_of

logger = get_logger(__name__)

NEEDS = {
    "demonstration": ("prompt", "completion", "tools"),
    "ranking": ("prompt", "responses", "ranks", "scores", "labeler", "weight"),
    "prompt": ("prompt", "tools"),
}
GIVES = {"demonstration": "completion", "ranking": "responses", "prompt": "prompt"}
BLANK: tuple[Any, ...] = (None, "", [], {})
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


def read(
    source: Any, split: str, streaming: bool, kind: str, reading: Reading
) -> tuple[AnyDataset, Source, Shape | None]:
    """A source's records as `kind` (a key of NEEDS), where errors find them, and their shape."""
    where = Source.of(source, split)
    dataset = rename(sources.load_records(source, split, streaming), where, reading)
    first = _typical_record(dataset, where)
    headed = {} if "prompt" in first else with_system_message(first)
    if any(turns != first[name] for name, turns in headed.items()):
        logger.warning("%s: the system prompt beside messages is put before them", where.name)
        dataset = sources.map_records(dataset, with_system_message, features=dataset.features)
    shape = shape_of(first := {**first, **headed}, kind)
    if shape is not None:
        return *_convert(dataset, where, shape, _Counts(kind), reading), shape

    def with_prompt(record: Record, row: int) -> dict[str, Any]:
        with where.located(row):
            return {"prompt": reading.prompt_of(record)}

    asked = "prompt" in first or (reading.strict and "messages" in first)
    if reading.writes_prompts() and (asked or reading.prompt_template):
        dataset = sources.map_records(dataset, with_prompt, with_indices=True)
    elif "prompt" in first and (unread := _unread(first)):
        logger.warning(
            "%s: `%s` stands beside `prompt` and is not read; --prompt_template '{%s}\\n{prompt}' "
            "would join them",
            *(where.name, unread, unread),
        )
    return dataset, where, None


def mixture_of(entries: Sequence[Any]) -> list[DatasetConfig]:
    """The datasets that a config lists, each as TRL's `DatasetConfig`; InputError if it is none."""
    mixture = []
    for entry in entries:
        with explained(f"datasets has the entry {kind_of(entry)}; a path and options are needed"):
            given = DatasetConfig(**entry) if not isinstance(entry, DatasetConfig) else entry
            if not (given.path and isinstance(given.path, str) and isinstance(given.split, str)):
                raise TypeError("path and split are text")
        mixture.append(given)
    if not mixture:
        raise InputError("datasets is an empty list; give at least one dataset.")
    return mixture


def mixed(load: Callable[..., AnyDataset], entries: Sequence[Any], streaming: bool) -> AnyDataset:
    """Datasets, each read as its own shape by `load(entry, split, streaming)`, one after the other.

    Each `fraction` is a share of the result, as in TRL: no dataset is repeated, and the first rows
    of each are taken. Columns that not all of them have are null in the others.
    """
    mixture = mixture_of(entries)
    parts = [load(entry, entry.split, streaming) for entry in mixture]
    shares: list[Any] = [getattr(entry, "fraction", None) for entry in mixture]
    if any(share is not None for share in shares):
        if streaming or not all(is_number(share) and share > 0 for share in shares):
            raise InputError("fraction: give it for each, above 0, and for none that streams.")
        whole = sum(shares)
        total = min(len(p) * whole / share for p, share in zip(parts, shares, strict=True))
        counts = [round(share / whole * total) for share in shares]
        parts = [part.select(range(n)) for part, n in zip(parts, counts, strict=True)]
    names = ", ".join(entry.path for entry in mixture)
    with explained(f"The datasets {names} do not go together"):
        return concatenate_datasets(parts)


def _unread(first: Record) -> str | None:
    """A text column that others join to the prompt, if it has text that is not in it."""
    for name in sources.NAMES["beside_prompt"].split():
        value = first.get(name)
        if isinstance(value, str) and value.strip() and value.strip() not in str(first["prompt"]):
            return name
    return None


def _typical_record(dataset: AnyDataset, source: Source) -> dict[str, Any]:
    """The first record; where it is null or empty, the first value of 100 that is not."""
    found = first_record(dataset, source)
    for record in islice(iterate(dataset, source=source), 100):
        for name, value in record.items():
            if found.get(name) in BLANK and value not in BLANK:
                found[name] = value
    return found


def _convert(
    dataset: AnyDataset, where: Source, shape: Shape, counts: "_Counts", reading: Reading
) -> tuple[AnyDataset, Source]:
    """The records that a file of a published shape gives; what it does not give is told."""
    options: dict[str, Any] = {"where": where, "shape": shape, "counts": counts, "reading": reading}
    if isinstance(dataset, IterableDataset):
        if shape.group:
            raise InputError(
                f"{where.name}: read as {shape.name}, whose records lie in several rows: that "
                "cannot be streamed. Leave out streaming."
            )
        logger.warning("%s: read as %s", where.name, shape.told)
        given = dict(options, rows=dataset)
        return IterableDataset.from_generator(_streamed, gen_kwargs=given), where
    found = list(_records(iterate(dataset, source=where), **options))
    told = counts.told(where, shape, len(dataset), len(found))
    if not found:
        raise InputError(f"{told}. Give a file that holds {counts.kind}s.")
    logger.warning("%s", told)
    every = dict.fromkeys(name for _, record in found for name in record)  # ranks or scores
    with explained(f"{told}, but they are not of one form"):
        converted = Dataset.from_list([{**every, **record} for _, record in found])
    return converted, where.narrowed([row for row, _ in found])


def _streamed(rows: Any, counts: "_Counts", **options: Any) -> Iterator[dict[str, Any]]:
    yield from (one for _, one in _records(rows, counts=_Counts(counts.kind), **options))


def _records(
    rows: Iterable[Record], *, where: Source, shape: Shape, counts: "_Counts", reading: Reading
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What the rows give, each record with the number of its (first) row."""
    for number, members in _grouped(rows, shape.group):
        try:
            published = f"the row is not as {shape.name} is published"
            with where.located(number), explained(published):
                given = _given(shape, members, counts.kind, reading)
                fitting = [record for one in given if (record := counts.fit(one, number))]
        except InputError as fault:
            reading.leave_out(fault)
            counts.left_out["a faulty row"] += 1
            continue
        for record in fitting:
            kept = {k: v for k, v in members[0].items() if k in ARGUMENTS and v is not None}
            if counts.kind == "prompt" and not shape.group:  # other columns go to the reward
                kept = {k: v for k, v in members[0].items() if k not in REWARD_ARGUMENTS}
            yield number, {**kept, **record}


def _given(shape: Shape, members: list[Record], kind: str, reading: Reading) -> list[Any]:
    """What rows that belong together give, with the columns and prompts that the user wants."""
    try:
        given = shape.read(members if shape.group else members[0])
    except InputError:
        prompt = _held_prompt(members[0]) if kind == "prompt" else None
        if prompt is None:  # a prompt needs no choice between responses
            raise
        given = {"prompt": prompt}
    row, order, found = members[0], {"ranks", "scores"}, []
    named = {n: row[n] for n in NEEDS[kind] if n in reading.columns and row.get(n) is not None}
    for name in {"responses", *order} & set(named):
        if not isinstance(named[name], list):  # PKU's `ranks` is an index
            del named[name]
    for record in given if isinstance(given, list) else [given]:
        if isinstance(record, dict):
            if order & set(named):
                record = {name: value for name, value in record.items() if name not in order}
            record = {**record, **named}
            if record.get("prompt") and reading.writes_prompts():
                record["prompt"] = reading.prompt_of({**row, "prompt": record["prompt"]})
        found.append(record)
    return found


def _held_prompt(row: Record) -> Any:
    """The prompt of a row, also inside what Argilla and Label Studio export."""
    inside = (row.get(name) for name in ("fields", "data"))
    held = [row, *(part for part in inside if isinstance(part, Mapping))]
    return next((part["prompt"] for part in held if isinstance(part.get("prompt"), str)), None)


def _grouped(
    rows: Iterable[Record], group: Callable[[Record], Any] | None
) -> Iterator[tuple[int, list[Record]]]:
    """Rows that belong together, in the order of their first, with its number."""
    if group is None:
        yield from ((number, [row]) for number, row in enumerate(rows))
        return
    found: dict[str, tuple[int, list[Record]]] = {}
    for number, row in enumerate(rows):
        try:
            value = group(row)
        except NOT_AS_EXPECTED:
            value = number  # alone: its reading tells what is wrong with it
        found.setdefault(_key(value), (number, []))[1].append(row)
    yield from found.values()


class _Counts:
    """Why rows gave no record of a kind."""

    def __init__(self, kind: str):
        self.kind = kind
        self.left_out: Counter[str] = Counter()
        self.dropped = 0  # responses
        self.cut = 0  # dialogues
        self.seen: dict[str, int] = {}

    def fit(self, record: dict[str, Any] | str, row: int) -> dict[str, Any] | None:
        """The record with what its kind needs; None, counted, if it lacks that."""
        if isinstance(record, str):
            self.left_out[record] += 1
            return None
        first = None  # the row that gave the prompt
        if self.kind == "prompt":
            record["prompt"] = record.get("asked", record["prompt"])
            key = _key(record["prompt"])
            first = self.seen.get(key)
            self.seen.setdefault(key, row)
        other = {"completion", "responses"} & set(record)
        if first == row or (other and GIVES[self.kind] not in record):
            return None  # another record of the row or kind: a demonstration among rankings
        if reason := self._fault(record, repeated=first is not None):
            self.left_out[reason] += 1
            return None
        self.cut += self.kind == "demonstration" and "cut" in record
        return {name: record[name] for name in NEEDS[self.kind] if name in record}

    def _fault(self, record: dict[str, Any], repeated: bool) -> str:
        """Why the kind cannot use the record; empty if it can."""
        if not record["prompt"]:
            return "an empty prompt"
        if self.kind == "prompt":
            return "a repeated prompt" if repeated else ""
        if "why" in record or GIVES[self.kind] not in record:
            return record.get("why", "no answer")
        if self.kind == "ranking":
            return self._prune(record)
        reply = record["completion"]
        return "no answer" if reply is None else "an empty reply" * _is_empty(reply)

    def _prune(self, record: dict[str, Any]) -> str:
        """Leave out responses without text or place; the reason if fewer than two remain."""
        order = "ranks" if "ranks" in record else "scores"
        given = list(zip(record["responses"], record.get(order) or [], strict=False))
        written = [pair for pair in given if not _is_empty(pair[0])]
        kept = [pair for pair in written if pair[1] is not None]
        if len(kept) < 2:
            few = ("no answer", "only one response")
            found = few[len(given)] if len(given) < 2 else "an empty reply"
            return found if len(written) < 2 else "no order"
        if all(response == kept[0][0] for response, _ in kept):
            return "the same response twice"
        self.dropped += len(given) - len(kept)
        record["responses"] = [response for response, _ in kept]
        numbers = [float(number) for _, number in kept]
        record[order] = numbers if order == "scores" else dense_ranks(numbers)
        return ""

    def told(self, where: Source, shape: Shape, rows: int, found: int) -> str:
        """The line that says how a file was read."""
        text = f"{where.name}: read as {shape.told}: {rows:,} rows give {plural(found, self.kind)}"
        reasons = [f"{count:,} {why}" for why, count in self.left_out.items()]
        text += f"; left out: {', '.join(reasons)}" if reasons else ""
        text += f"; also {self.dropped:,} responses without text or place" if self.dropped else ""
        return text + f"; {self.cut:,} dialogues cut to a question and its reply" * bool(self.cut)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_empty(reply: Any) -> bool:
    """Whether a reply, text or messages, says nothing."""
    if isinstance(reply, list):
        reply = reply[-1].get("content") if reply else None
    return not isinstance(reply, str) or not reply.strip()
