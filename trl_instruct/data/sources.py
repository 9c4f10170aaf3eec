"""Where records come from: a dataset, a file, a folder, the Hub, the embedded tiny world."""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError
from trl.scripts.utils import DatasetConfig

from trl_instruct.console import get_logger
from trl_instruct.errors import InputError, kind_of, located, needs_extra
from trl_instruct.files import MANIFEST_FILE, METRICS_FILE

logger = get_logger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
Record: TypeAlias = Mapping[str, Any]

# What the readers of datasets raise for a file.
UNREADABLE = (ValueError, TypeError, OSError, EOFError, RecursionError, DatasetGenerationError)
BUILDERS = {
    **dict.fromkeys((".json", ".jsonl", ".json.gz", ".jsonl.gz"), "json"),
    **{".csv": "csv", ".parquet": "parquet"},
}
NO_DATA = {*FILES_TO_IGNORE, METRICS_FILE, MANIFEST_FILE}  # .json that is no records
LABEL_STORE = re.compile(r".*\.(db|sqlite)|(sqlite|postgresql|mysql|mariadb)(\+\w+)?://.*", re.I)
NAMES = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
TEXT_CELLS, LIST_CELLS = NAMES["text_cells"].split(), NAMES["list_cells"].split()
CSV_OPTIONS: dict[str, Any] = {
    "keep_default_na": False,
    "na_values": [""],
    "converters": dict.fromkeys(TEXT_CELLS + LIST_CELLS, str),
}


@dataclass(frozen=True)
class Source:
    """A source's name in messages and, for JSON Lines, the file whose lines are counted."""

    name: str
    lines: Path | None = None
    rows: tuple[int, ...] | None = None  # the file's row of each record, if they differ

    @classmethod
    def of(cls, source: Any, split: str = "train") -> "Source":
        if isinstance(source, DatasetConfig):
            return cls.of(source.path, split)
        if not isinstance(source, (str, PathLike)):
            return cls(f"the given {type(source).__name__}")
        if "[" in split:
            return cls(f"{source} ({split})")
        path = Path(fspath(source)).expanduser()
        return cls(str(source), path if path.is_file() and _holds_json_lines(path) else None)

    def narrowed(self, rows: Sequence[int]) -> "Source":
        """The source of some of its records, which then count from 0."""
        return replace(self, rows=tuple(self.rows[row] if self.rows else row for row in rows))

    def where(self, row: int) -> str:
        """Where a user finds row 0, 1, ...: its 1-based line in a JSON Lines file, else its row."""
        row = self.rows[row] if self.rows else row
        if self.lines is None:
            return f"{self.name}, row {row + 1}"
        with _open_text(self.lines) as file:
            numbers = (number for number, line in enumerate(file, start=1) if line.strip())
            return f"{self.name}, line {next(islice(numbers, row, None), row + 1)}"

    def located(self, row: int) -> AbstractContextManager[None]:
        """Put the file and line, or the row, in front of an `InputError` raised inside."""
        return located(partial(self.where, row))


def load_records(source: Any, split: str = "train", streaming: bool = False) -> AnyDataset:
    """Load records from any source, without checking their fields.

    List cells of a csv file (`responses`, `ranks`, `scores`, `ratings`, `messages`) must be JSON.

    Args:
        source: a `datasets.Dataset` or `IterableDataset` (returned unchanged), a `DatasetDict`,
            `"tiny:<split>"` (the embedded world), a local .json, .jsonl, .json.gz, .jsonl.gz, .csv
            or .parquet file, a store of labels (labels.db, its folder, or a database's address), a
            local folder, the id of a dataset on the Hub, or TRL's `DatasetConfig`, with the name of
            a subset, data files, or columns to keep.
        split: which split; a single file has only "train" (slices like `"train[:100]"` work).
        streaming: return an `IterableDataset`, which reads rows on demand.

    Raises:
        InputError: missing file or split, unknown extension, malformed JSON (and line), no records.
    """
    where = Source.of(source, split)
    if isinstance(source, (DatasetDict, datasets.IterableDatasetDict)):
        dataset = _take_split(source, split, where)
    elif isinstance(source, (Dataset, IterableDataset)):
        dataset = source
    elif isinstance(source, DatasetConfig):
        dataset = _load_entry(source, split, streaming, where)
    elif isinstance(source, str) and source.startswith("tiny:"):
        from trl_instruct import tiny  # builds the world only when needed

        try:
            dataset = tiny.split(source.removeprefix("tiny:"))
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
    elif isinstance(source, (str, PathLike)):
        dataset = _load_path(source, split, streaming, where)
    else:
        raise InputError(
            f"Records cannot be loaded from a {type(source).__name__}. Give a file, a folder, a "
            "Hub id or a datasets.Dataset; a list of dicts becomes one with Dataset.from_list."
        )
    first_record(dataset, where)
    is_whole = isinstance(dataset, Dataset) and isinstance(source, (str, PathLike))
    return dataset.to_iterable_dataset() if streaming and is_whole else dataset


def first_record(dataset: AnyDataset, source: Source) -> dict[str, Any]:
    """The first record; InputError if there is none."""
    for record in iterate(dataset, source=source):
        return record
    raise InputError(f"{source.name} holds no records; at least one is needed.")


def iterate(
    dataset: AnyDataset, column: str | None = None, *, source: Source | None = None
) -> Iterator[Any]:
    """Rows, or one column's values, as Python objects, a batch at a time; errors name `source`."""
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    dataset = dataset.with_format(None)
    try:
        for batch in (dataset if column is None else dataset.select_columns([column])).iter(500):
            values = zip(*batch.values(), strict=True)
            yield from (row[0] if column else dict(zip(batch, row, strict=True)) for row in values)
    except UnicodeDecodeError as error:
        place = f"{source.name}: the" if source else "The"
        raise InputError(f"{place} records are not UTF-8 text ({error}); write UTF-8.") from None


def map_records(dataset: AnyDataset, function: Any, **options: Any) -> AnyDataset:
    """`dataset.map` without its cache, whose key does not change with the code of a package."""
    if isinstance(dataset, Dataset):
        options["load_from_cache_file"] = False
    return dataset.map(function, **options)


def name_of(dataset: Any) -> str | None:
    """A dataset's path or id, for the config; None if it is only in memory."""
    return fspath(dataset) if isinstance(dataset, (str, PathLike)) else None


def _load_path(source: str | PathLike, split: str, streaming: bool, where: Source) -> AnyDataset:
    path = Path(fspath(source)).expanduser()
    if (path / "labels.db").is_file():
        source = path = path / "labels.db"
    if LABEL_STORE.fullmatch(str(source)) and ("://" in str(source) or path.is_file()):
        with needs_extra("label"):
            from trl_instruct.data.labels import LabelStore
        return Dataset.from_list(LabelStore(str(source)).records(split))
    if path.is_dir():
        return _load_folder(path, split, streaming, where)
    builder = _builder_of(path)
    if path.is_file() and builder:
        return _load_file(path, builder, split, streaming, where)
    if path.is_file():
        known = ", ".join(BUILDERS)
        raise InputError(f"{where.name}: the extension must be one of {known}, found {path.name!r}")
    if builder or isinstance(source, PathLike) or str(source).startswith((".", "/", "~")):
        raise InputError(f"{where.name}: no such file or folder (looked in {Path.cwd()}).")
    return _load_named(DatasetConfig(str(source)), split, streaming, where)


def _builder_of(path: Path) -> str:
    """What reads a file, by its name; empty if it is no data file."""
    return next((kind for end, kind in BUILDERS.items() if path.name.lower().endswith(end)), "")


def _load_entry(config: DatasetConfig, split: str, streaming: bool, where: Source) -> AnyDataset:
    """What TRL's config of one dataset names."""
    if config.name or config.data_files or config.data_dir:
        dataset = _load_named(config, split, streaming, where)
    else:
        dataset = load_records(config.path, split, streaming)
    if config.columns is None:
        return dataset
    known = first_record(dataset, where)
    if missing := [name for name in config.columns if name not in known]:
        raise InputError(f"{where.name}: no column {missing[0]!r}; there are {', '.join(known)}.")
    return dataset.select_columns(config.columns)


def _load_named(config: DatasetConfig, split: str, streaming: bool, where: Source) -> AnyDataset:
    """A dataset of the Hub, or a builder with its files."""
    options: Any = {n: getattr(config, n) for n in ("name", "data_dir", "data_files")}
    try:
        return load_dataset(config.path, split=split, streaming=streaming, **options)
    except (FileNotFoundError, ConnectionError) as error:
        problem = f"no file or folder here, and not found on the Hub: {error}"
    except (ValueError, DatasetGenerationError) as error:
        problem = f"split {split!r} could not be loaded: {error}"
    raise InputError(f"{where.name}: {problem}")


def _load_folder(path: Path, split: str, streaming: bool, where: Source) -> AnyDataset:
    was_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if not was_saved:
            return _load_kind(path, split, streaming, where)
        saved = datasets.load_from_disk(str(path))
    except InputError:
        raise
    except FileNotFoundError as error:
        known = "whole saved dataset" if was_saved else f"data file ({', '.join(BUILDERS)})"
        raise InputError(f"{where.name}: the folder holds no {known}.") from error
    except (ValueError, LookupError, TypeError, DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{where.name}: split {split!r} could not be loaded: {cause}") from error
    return _take_split(saved, split, where) if isinstance(saved, DatasetDict) else saved


def _load_kind(path: Path, split: str, streaming: bool, where: Source) -> AnyDataset:
    """The files of a folder that `datasets` reads; the log names data files that it leaves out."""
    builder = load_dataset_builder(str(path := path.resolve()))
    named = chain.from_iterable((builder.config.data_files or {}).values())
    read = {Path(file) for file in named}
    files = (file.relative_to(path) for file in path.rglob("*") if file not in read)
    data = (file for file in files if _builder_of(file) and file.name not in NO_DATA)
    hidden = (".", "__")  # as `datasets` sees it
    if unread := sorted(str(f) for f in data if not any(p.startswith(hidden) for p in f.parts)):
        shown = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if unread[3:] else "")
        logger.warning(f"{where.name}: read as {builder.name}; left out by kind or name: {shown}.")
    for file in read:
        _check_start(file, builder.name, Source(str(file)))
    options = CSV_OPTIONS if builder.name == "csv" else {}
    dataset = load_dataset(str(path), split=split, streaming=streaming, **options)
    return _decode_cells(dataset, where, _first_line(min(read))) if options else dataset


def _take_split(splits: Mapping[str, AnyDataset], split: str, where: Source) -> AnyDataset:
    if split not in splits:
        raise InputError(f"{where.name}: no split {split!r}; there are {', '.join(splits)}.")
    return splits[split]


def _load_file(path: Path, builder: str, split: str, streaming: bool, where: Source) -> AnyDataset:
    if split.partition("[")[0] != "train":
        raise InputError(f"{where.name}: no split {split!r}; a single file has only 'train'.")
    _check_start(path, builder, where)
    options = CSV_OPTIONS if builder == "csv" else {}
    files = {"train": glob.escape(str(path))}
    load = partial(load_dataset, builder, data_files=files, split=split, streaming=streaming)
    try:
        try:
            dataset = load(**options)
        except DatasetGenerationError:
            if builder != "json":
                raise
            # A block of 10 MB has another column, or a first value where others have null.
            dataset = load(chunksize=1 << 31)
    except (StopIteration, *UNREADABLE) as error:
        raise _file_fault(error, path, builder, where) from error
    if builder == "csv":
        dataset = _decode_cells(dataset, where, _first_line(path))
    if not streaming:
        return dataset
    inputs = {"dataset": dataset, "path": path, "builder": builder, "where": where}
    return IterableDataset.from_generator(_guarded, gen_kwargs=inputs, features=dataset.features)


def _check_start(path: Path, builder: str, where: Source) -> None:
    """InputError for csv columns that no comma separates, and for what ends pyarrow's reader."""
    start = _first_line(path)
    if builder == "json" and start.startswith("null"):
        raise InputError(f"{where.name} begins with null; a JSON object is needed.")
    other = next((mark for mark in ";\t|" if mark in start), None)
    if builder == "csv" and other and "," not in start:
        raise InputError(
            f"{where.name}: the columns are separated by {other!r}; commas are needed. Save it as "
            "comma-separated csv, or as jsonl."
        )


def _guarded(dataset: IterableDataset, path: Path, builder: str, where: Source) -> Iterator[Record]:
    """Rows of a streamed file; a reader's error becomes an `InputError` with its line."""
    try:
        yield from dataset
    except InputError:
        raise
    except UNREADABLE as error:
        raise _file_fault(error, path, builder, where) from error


def _file_fault(error: Exception, path: Path, builder: str, where: Source) -> InputError:
    """The error for a file that `datasets` could not read, with the first bad line if found."""
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return InputError(f"{where.name} holds no records; at least one is needed.")
    try:
        if builder == "json":
            _parse_json(where, path)
    except InputError as fault:
        return fault
    except (OSError, EOFError, UnicodeDecodeError, RecursionError) as fault:
        return InputError(f"{where.name} cannot be read: {fault}.")
    cause = error.__cause__ or error
    return InputError(f"{where.name} cannot be read as a table of {builder} records: {cause}")


def _parse_json(where: Source, path: Path) -> None:
    """Parse a JSON or JSON Lines file; raise an `InputError` for the first bad line."""
    in_lines = _holds_json_lines(path)
    with _open_text(path) as file:
        for number, text in enumerate(file if in_lines else [file.read()], start=1):
            place = f"{where.name}, line {number}" if in_lines else where.name
            try:
                value = json.loads(text.rstrip()) if text.strip() else {}
                json.dumps(value, ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                shown = text.splitlines()[error.lineno - 1].strip()[:60]
                place = f"{where.name}, line {number + error.lineno - 1}"
                fault = f"malformed JSON ({error.msg}, column {error.colno}): {shown!r}"
                raise InputError(f"{place}: {fault}") from None
            except UnicodeEncodeError as error:  # "\ud83d", whose second half was cut off
                half = error.object[error.start].encode("unicode_escape").decode()
                fault = f"{half} is half of a surrogate pair, not text; remove it."
                raise InputError(f"{place}: {fault}") from None
            if in_lines and not isinstance(value, dict):
                raise InputError(f"{place}: {kind_of(value)}; each line needs a JSON object.")


def _holds_json_lines(path: Path) -> bool:
    """Whether each line of the file is a row: .jsonl, or a .json that opens with a "{...}" line."""
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(".json"):
        return name.endswith(".jsonl")
    first = _first_line(path)
    return first.startswith("{") and first.endswith("}")


def _first_line(path: Path) -> str:
    """The first line that is not blank; empty if there is none, or none that can be read."""
    try:
        with _open_text(path) as file:
            return next((line.strip() for line in file if line.strip()), "")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""


def _open_text(path: Path) -> Any:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")


def _decode_cells(dataset: AnyDataset, where: Source, header: str) -> AnyDataset:
    """Decode a csv file's list cells, which are JSON: '["a", "b"]' -> ["a", "b"]."""
    first = first_record(dataset, where)
    if "__index_level_0__" in first and "__index_level_0__" not in header:  # rows are too wide
        raise InputError(f"{where.name}: rows have more cells than the header. Quote their commas.")
    columns = set(first) & set(LIST_CELLS)

    def decoded(record: Record, row: int) -> dict[str, Any]:
        found = {column: record[column] for column in columns & {*record}}
        for column, cell in found.items():
            try:
                found[column] = None if cell is None else json.loads(cell)
            except json.JSONDecodeError as error:
                fault = f"`{column}` is {kind_of(cell)}; a JSON list is needed ({error})."
                raise InputError(f"{where.where(row)}: {fault}") from None
            if column in ("scores", "ratings") and isinstance(found[column], list):
                found[column] = [float(v) if type(v) is int else v for v in found[column]]
        return found

    return map_records(dataset, decoded, with_indices=True) if columns else dataset
