"""The one exception for mistakes that a user can fix."""


class InputError(ValueError):
    """A user's mistake: data, a path, an option. Nothing has been written when it is raised.

    The message says what was given (with values), what is needed, and what to do about it.
    """
