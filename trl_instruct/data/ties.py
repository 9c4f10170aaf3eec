"""Which of two responses wins, by their ranks. Only this module decides ties."""

from typing import Any

TIES = ("drop", "half")


def wins(rank: Any, other: Any, *, ties: str = "drop") -> Any:
    """1 if a response beats another, 0 if it loses; a tie gives 0 ("drop") or 0.5 ("half").

    InstructGPT drops ties (C.2). With "half" the target of the comparison is one half. Ranks are
    numbers, or tensors of them whose shapes broadcast; the lower is the better.

    >>> wins(1, 2), wins(2, 1), wins(2, 2), wins(2, 2, ties="half")
    (1.0, 0.0, 0.0, 0.5)
    """
    return 1.0 * (rank < other) + (0.5 if ties == "half" else 0.0) * (rank == other)
