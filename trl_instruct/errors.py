"""The one exception for mistakes that a user can fix, and what no message or file may hold."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

REDACTED = "***"
# What Python raises where content has another type or form than the code expects.
NOT_AS_EXPECTED = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)

# Of the machine: disk full, quota, file or name too long, read-only, no permission.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}

# hub_token, api_key, X-Auth-Token, password; not eos_token, max_tokens.
_SECRET = (
    r"(?:[\w-]*[_-])?(?:(?<!(?:bos|eos|pad|unk|sep|cls)_)(?<!(?:mask|stop)_)token|password|passwd|"
    r"(?:api|access|account|private|secret)[_-]?key|secret|authorization|credentials?)"
)
_IS_SECRET = re.compile(_SECRET, re.IGNORECASE)
_IN_TEXT = re.compile(  # each group is what comes before a secret
    r"(://)[^\s/?#'\"]+(?=@)"  # http://user:password@host
    rf"|([?&](?:{_SECRET}|key|auth|sig|signature)=)[^\s&#'\"]+"
    rf"|((?P<quote>['\"]){_SECRET}(?P=quote)\s*:\s*['\"])[^'\"]+"  # JSON
    r"|(\bBearer\s+)[\w.~+/=-]{8,}"
    r"|\bhf_[A-Za-z0-9]{30,}",  # the Hub's tokens
    re.IGNORECASE,
)


def redact(content: Any) -> Any:
    """The content, text or nested lists and dicts, with passwords, tokens and keys as `***`.

    In text: those in addresses, headers, JSON, tokens of the Hub; in dicts: by the name of the key.
    """
    if isinstance(content, str):
        return _IN_TEXT.sub(lambda m: (m[m.lastindex] if m.lastindex else "") + REDACTED, content)
    if isinstance(content, list | tuple):
        return [redact(value) for value in content]
    if not isinstance(content, Mapping):
        return content
    return {
        k: REDACTED if v and isinstance(v, str) and _IS_SECRET.fullmatch(str(k)) else redact(v)
        for k, v in content.items()
    }


def printable(text: str) -> str:
    """The text, all but line breaks and printable characters (right-to-left marks, too) escaped."""
    rows = text.splitlines()
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in row) for row in rows)


def harmless(text: str, most: int = 10_000) -> str:
    """The text for a message: printable, secrets redacted, the middle of a long one left out."""
    text, half = redact(text), most // 2
    return printable(text if len(text) <= most else f"{text[:half]} ... {text[-half:]}")


class InputError(ValueError):
    """A user's mistake: data, a path, an option. Nothing has been written when it is raised.

    The message, made `harmless`, says what was given (with values), what is needed, what to do.
    """

    def __init__(self, message: str):
        super().__init__(harmless(message))


def kind_of(value: Any) -> str:
    """A value as an error shows it: its type and its beginning."""
    if value is None:
        return "null or absent"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


@contextmanager
def located(place: str | Callable[[], str]) -> Iterator[None]:
    """Put a place, such as "Prompt 3", in front of an `InputError` raised inside.

    The place is text, or a function that looks it up, called only on an error.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{place if isinstance(place, str) else place()}: {error}") from None


@contextmanager
def explained(fault: str) -> Iterator[None]:
    """Turn an error about content that is not as expected into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except NOT_AS_EXPECTED as error:
        raise InputError(f"{fault} ({type(error).__name__}: {summary(error)}).") from error


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Turn a missing package of an extra into an `InputError` that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{error}. Install it: pip install 'trl-instruct[{name}]'.") from error


def summary(error: Exception, most: int = 300) -> str:
    """A library's error in one line: its first, or all of them if the first announces others."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return harmless(" ".join(lines) if lines[0].endswith(":") else lines[0], most)


def refusal(error: BaseException | None) -> str | None:
    """What the machine refused, also behind a library's error; None if it is something else."""
    while error is not None:
        number = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if code in REFUSALS:
            return f"{os.strerror(code)}: {getattr(error, 'filename', None) or 'writing a file'}"
        if "iostream error" in str(error):  # of torch
            return "A file could not be written. Is the disk full?"
        error = error.__cause__ or error.__context__
    return None
