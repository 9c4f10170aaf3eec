"""What a user says about files: names of columns, how prompts are written, what a fault means.

`conversion.py` reads published shapes; all loaders read through its `read`.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, IterableDataset

from trl_instruct.console import get_logger
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate, map_records
from trl_instruct.errors import InputError, kind_of

logger = get_logger(__name__)


@dataclass(frozen=True)
class Reading:
    """What a user says about the files that a chain of stages reads.

    Args:
        columns: our field -> the file's column: `{"prompt": "question", "scores": "votes"}`.
        prompt_template: text prompts, with columns in braces: `"{question}\\n\\nAnswer:\\n"`. An
            empty column goes with the white space that follows it. A prompt that begins and ends
            as the template does has been written by it before.
        prompt_suffix: what each text prompt ends with; one that does already stays as it is.
        on_bad_record: "error" stops at a faulty record, "skip" leaves it out and counts it.
        rating_order: the labels of rankings' `ratings`, best first: `["good", "ok", "poor"]`.
        faults: with a list, faulty records are left out, and each is told there.
        strict: a column that `columns` names must be there; else it is not looked for.
        found: with a list, where the records of each source lie is told there, for later faults.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    prompt_template: str | None = None
    prompt_suffix: str | None = None
    on_bad_record: str = "error"
    rating_order: Sequence[Any] | None = None
    faults: list[str] | None = None
    strict: bool = True
    found: list[Source] | None = None

    @classmethod
    def of(cls, config: Any, *, strict: bool = True) -> "Reading":
        """How a stage's config, or the options of a command, say to read files."""
        names = ("prompt_template", "prompt_suffix", "on_bad_record", "rating_order", "faults")
        same: Any = {name: getattr(config, name, None) for name in names}
        columns = dict(column.partition("=")[::2] for column in config.columns or ())
        return cls(columns, **same, strict=strict and not config.remembered, found=[])

    @property
    def skips(self) -> bool:
        """Whether a faulty record is left out."""
        return self.on_bad_record == "skip" or self.faults is not None

    def leave_out(self, fault: InputError) -> None:
        """Raise a fault, unless its record is left out; then it may be told."""
        if not self.skips:
            raise fault
        if self.faults is not None:
            self.faults.append(str(fault))

    def keep(
        self, dataset: AnyDataset, passes: Callable[[Any, int], bool], source: Source, none: str
    ) -> AnyDataset:
        """The records for which `passes(record, row)`, of a stream as they come; they are placed.

        InputError if there are none: `none` says so, with the number of all in braces.
        """
        kept, place = dataset, source
        if isinstance(dataset, IterableDataset):
            kept = dataset.filter(passes, with_indices=True)
        else:
            records = enumerate(iterate(dataset, source=source))
            rows = [row for row, record in records if passes(record, row)]
            if not rows:
                raise InputError(f"{source.name}: {none.format(len(dataset))}")
            if len(rows) < len(dataset):
                kept, place = dataset.select(rows), source.narrowed(rows)
        if self.found is not None:
            self.found.append(place)
        return kept

    def checked(
        self, dataset: AnyDataset, check: Callable[[Record], Any], source: Source | None = None
    ) -> AnyDataset:
        """The dataset, `check` run on each record, of the last source; faulty ones may go."""
        place = source or self.source

        def passes(record: dict[str, Any], row: int) -> bool:
            try:
                with place.located(row):
                    check(record)
            except InputError as fault:
                self.leave_out(fault)
                return False
            return True

        kept = self.keep(dataset, passes, place, "all {} records are faulty.")
        if isinstance(dataset, Dataset) and len(kept) < len(dataset):
            logger.warning("%s: faulty records left out: %d", place.name, len(dataset) - len(kept))
        return kept

    @property
    def source(self) -> Source:
        """Where the records of the last source lie."""
        return self.found[-1] if self.found else Source("the data")

    def of_another(self) -> "Reading":
        """The same for another source, which need not have the columns."""
        return replace(self, strict=False, found=[])

    def writes_prompts(self) -> bool:
        """Whether prompts are changed."""
        return bool(self.prompt_template or self.prompt_suffix)

    def prompt_of(self, record: Record) -> Any:
        """The prompt of a record, by template and suffix.

        >>> reading = Reading(prompt_template="{instruction}\\n{input}\\n### Response:\\n")
        >>> reading.prompt_of({"instruction": "Name a gem.", "input": ""})
        'Name a gem.\\n### Response:\\n'
        """
        prompt = record.get("prompt")
        if self.prompt_template:
            prompt = _filled(self.prompt_template, record)
        if not self.prompt_suffix:
            return prompt
        if not isinstance(prompt, str):
            raise InputError(
                f"`prompt` is {kind_of(prompt)}; prompt_suffix is for text: '' for none."
            )
        return prompt if prompt.endswith(self.prompt_suffix) else prompt + self.prompt_suffix


AS_PUBLISHED = Reading()


def rename(dataset: AnyDataset, where: Source, reading: Reading) -> AnyDataset:
    """The dataset with its columns renamed, also inside what Argilla and Label Studio export."""
    if not reading.columns:
        return dataset
    first = first_record(dataset, where)
    inside = next((n for n in ("fields", "data") if isinstance(first.get(n), Mapping)), None)
    held = {**first, **(first[inside] if inside else {})}
    names = {}
    for name, column in reading.columns.items():
        clash = name in held and name not in reading.columns.values()
        if column in held and not clash:
            names[column] = name
        elif reading.strict:
            fault = f"there is a column {name!r} too" if clash else f"there is no column {column!r}"
            raise InputError(
                f"{where.name}: columns says {name}={column}, but {fault}. Columns found: "
                f"{', '.join(held)}."
            )
    if inside is None:
        return dataset.rename_columns(names) if names else dataset
    return map_records(
        dataset, lambda row: {inside: {names.get(k, k): v for k, v in (row[inside] or {}).items()}}
    )


def _filled(template: str, record: Record) -> str:
    """The template with the record's columns; an empty one takes the white space after it along."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"prompt_template {template!r} cannot be read: {error}.") from None
    names = [name for _, name, _, _ in parts if name is not None]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and (names == ["prompt"] or not set(names) <= set(record)):
        head, tail = parts[0][0], "" if parts[-1][1] is not None else parts[-1][0]
        if (head or tail) and prompt.startswith(head) and prompt.endswith(tail):
            return prompt
    text, empty = "", False
    for literal, name, _, _ in parts:
        text += literal.lstrip() if empty else literal
        if name is None:
            continue
        if name not in record:
            raise InputError(
                f"prompt_template has {{{name}}}, but there is no column {name!r}. Columns found: "
                f"{', '.join(record)}. Give another prompt_template, or '' for none."
            )
        value = record[name]
        if not isinstance(value, str | None):
            raise InputError(f"`{name}` is {kind_of(value)}; prompt_template takes text.")
        empty = not value
        text += value or ""
    return text
