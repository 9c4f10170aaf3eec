"""The one exception for mistakes that a user can fix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A user's mistake: data, a path, an option. Nothing has been written when it is raised.

    The message says what was given (with values), what is needed, and what to do about it.
    """


@contextmanager
def located(place: str | Callable[[], str]) -> Iterator[None]:
    """Put a place, such as "Prompt 3", in front of an `InputError` raised inside.

    Args:
        place: text, or a function that looks it up, called only on an error.

    >>> with located("Prompt 3"):
    ...     raise InputError("`prompt` is empty.")
    Traceback (most recent call last):
    ...
    trl_instruct.errors.InputError: Prompt 3: `prompt` is empty.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{place if isinstance(place, str) else place()}: {error}") from None
