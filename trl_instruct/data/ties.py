"""Which of two responses wins, by their ranks. Here, and nowhere else, ties are decided."""

from typing import Any

TIES = ("drop", "half")


def wins(rank: Any, other: Any, *, ties: str = "drop") -> Any:
    """How much one response wins over another: 1, 0, or what a tie is worth.

    InstructGPT drops ties (C.2). With "half" each of the two wins by half, so that the target of
    the comparison is one half.

    Args:
        rank, other: whole numbers, or tensors of them whose shapes broadcast; 1 = best.
        ties: "drop" or "half".

    >>> wins(1, 2), wins(2, 1), wins(2, 2), wins(2, 2, ties="half")
    (1.0, 0.0, 0.0, 0.5)
    """
    return 1.0 * (rank < other) + (0.5 if ties == "half" else 0.0) * (rank == other)
