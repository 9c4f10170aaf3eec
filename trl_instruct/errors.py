"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """A user's mistake: data, a path, an option. Nothing has been written when it is raised.

    The message says what was given (with values), what is needed, and what to do about it.
    """
