"""Entry point of the command line, before any import: `python -m trl_instruct sft ...`."""

import gc
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """`cli.main`, with the libraries loaded in three quarters of the time.

    During loading, Python would search for garbage again and again among objects that are kept.
    """
    gc.disable()
    from trl_instruct import cli

    gc.freeze()
    gc.enable()
    cli.main(argv)


if __name__ == "__main__":
    main()
