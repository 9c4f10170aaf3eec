"""Terminal output: harmless messages hidden, untrusted text escaped, progress bars.

Only library messages that are known to be harmless here are hidden. The package hides them when
it is imported: one of them comes with the import of bitsandbytes.
"""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm.auto import tqdm

from trl_instruct.errors import printable, redact

# Tokenizers warn when data workers fork, and fall back to one thread.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

HARMLESS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "models" / "harmless.yaml").read_text(encoding="utf-8")
)
# Libraries with handlers of their own.
LOGGING = ("transformers", "datasets", "huggingface_hub")


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(redact(record.getMessage())), ()
    return True


def silence_harmless_warnings() -> None:
    """Hide the known ones, from the warnings module and the libraries' loggers."""
    for text in HARMLESS["warnings"]:
        warnings.filterwarnings("ignore", message=text)
    for name in HARMLESS["logs"]:
        logging.getLogger(name).addFilter(
            lambda r: not re.match(HARMLESS["logs"][r.name], r.getMessage(), re.DOTALL)
        )


def quiet_libraries() -> None:
    """Hide the progress bars of model files; make what libraries log `printable`."""
    from transformers.utils import logging as transformers_logging

    handlers = [h for name in LOGGING for h in logging.getLogger(name).handlers]
    for handler in (logging.lastResort, *handlers):
        if handler is not None:
            handler.addFilter(_make_printable)
    transformers_logging.set_tqdm_hook(
        lambda bar, args, kwargs: bar(
            *args, **{**kwargs, "disable": kwargs.get("desc") in HARMLESS["bars"]}
        )
    )


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the report on a missing head: the caller raises on any other missing weight."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def get_logger(name: str) -> logging.Logger:
    """The package's logger of that name, whose messages may hold any text."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def say(text: str, file: TextIO | None = None, *, secret: bool = False) -> None:
    """Print text from anywhere, redacted unless its secret is to be told, and `printable`."""
    tqdm.write(printable(text if secret else redact(text)), file=file)  # above a progress bar
    (file or sys.stdout).flush()


def one_line(content: Any) -> str:
    """A text, or messages, on one line, escaped as in `printable`."""
    text = content if isinstance(content, str) else " / ".join(m["content"] for m in content)
    return printable(" | ".join(text.strip().splitlines()))


def brief(text: str, most: int = 200) -> str:
    """The beginning of a text, on one line."""
    line = one_line(text[: 2 * most])
    return line if len(line) <= most else f"{line[:most]}..."


def shown(value: Any) -> str:
    """The beginning of a value as in Python, even if it is an int of too many digits."""
    try:
        return brief(repr(value), most=80)
    except Exception:
        return f"of type {type(value).__name__}"


def in_markdown(text: str) -> str:
    """A text as it is, on one line, in Markdown: no markup, no HTML, no end of a table's cell."""
    return re.sub(r"[]&<>[|`*~#$!\\]|\b_|_\b", lambda c: f"&#{ord(c[0])};", one_line(text))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of rows with aligned columns."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]


def progress_bar(name: str, total: int, **options: Any) -> tqdm:
    """A progress bar over `total` steps; `options` are tqdm's."""
    pause = 0.2 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    return tqdm(desc=one_line(name), total=total, mininterval=pause, dynamic_ncols=True, **options)


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
