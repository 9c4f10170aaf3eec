"""Work shared out among processes that each hold whole models: all call, and all get, the same."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed

Row = TypeVar("Row")
Result = TypeVar("Result")


def shared_out(rows: Iterable[Row], work: Callable[[list[Row]], list[Result]]) -> list[Result]:
    """What `work` gives for the rows: each process works on a part, and all get the whole.

    The results are in the order of the rows, and pickled.
    """
    with PartialState().split_between_processes(list(rows)) as mine:
        return gather_object(work(mine) if mine else [])


def seed_process(seed: int) -> None:
    """Seed the random numbers: other ones in each process, which draws for other rows."""
    set_seed(seed + 100_003 * PartialState().process_index)
