"""Where the command line starts, with nothing loaded yet: `python -m trl_instruct sft ...`."""

import gc
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """`cli.main`, with the libraries loaded in three quarters of the time.

    While they load, Python would look for garbage again and again among what stays to the end.
    """
    gc.disable()
    from trl_instruct import cli

    gc.freeze()
    gc.enable()
    cli.main(argv)


if __name__ == "__main__":
    main()
