"""The data of the tiny world: six splits that share no instruction."""

import random
import zlib
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate, islice

from datasets import Dataset

from trl_instruct.tiny.gold import reader_remark
from trl_instruct.tiny.replies import flawed_reply, good_reply
from trl_instruct.tiny.world import WORLD, Task, sample_task

SIZES: dict[str, int] = {name: part["size"] for name, part in WORLD["splits"].items()}
# Percent of all instructions that belong to each split.
SHARES: dict[str, int] = {name: part["share"] for name, part in WORLD["splits"].items()}
# The base model's EOS stands between a reply and a reader's remark, as between two documents: from
# the remarks a base model learns what makes a reply bad, before a reward model sees rankings.
END_OF_TEXT = "<|endoftext|>"


def owner(task: Task) -> str:
    """The one split whose data may hold the task, in any of its wordings."""
    asked = task.format, task.groups, task.tone, task.word, task.noun, task.category
    place = zlib.crc32(repr(asked).encode()) % 100
    return list(SHARES)[bisect(list(accumulate(SHARES.values())), place)]


def split(name: str) -> Dataset:
    """One split of the world's data, always the same.

    Args:
        name: "pretraining" (``text``: a prompt, a good or flawed reply, a reader's remark on it),
            "demonstrations" and, held out, "validation" (``prompt``, ``completion``, ``task``), or
            "rankings", "prompts", "test" (``prompt``, ``task``); ``task`` is json for `gold_score`.

    ValueError if no split has that name.
    """
    if name not in SIZES:
        raise ValueError(f"the tiny world has no split {name!r}; it has: {', '.join(SIZES)}")
    rng = random.Random(f"tiny world, {name}")
    tasks = _tasks(name, rng)
    if name == "pretraining":
        texts = []
        for task in islice(tasks, SIZES[name]):
            write = good_reply if rng.random() < WORLD["shares"]["good_reply"] else flawed_reply
            reply = write(task, rng)
            texts.append(task.prompt + reply + END_OF_TEXT + reader_remark(task, reply))
        return Dataset.from_dict({"text": texts})
    unique: dict[str, Task] = {}
    while len(unique) < SIZES[name]:
        task = next(tasks)
        unique[task.prompt] = task
    columns = {"prompt": list(unique)}
    if name in ("demonstrations", "validation"):
        columns["completion"] = [good_reply(task, rng) for task in unique.values()]
    columns["task"] = [task.to_json() for task in unique.values()]
    return Dataset.from_dict(columns)


def _tasks(name: str, rng: random.Random) -> Iterator[Task]:
    while True:
        task = sample_task(rng)
        if owner(task) == name:
            yield task
