"""How far the labelers are, and how far they agree."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trl_instruct.data.labels import Answer
from trl_instruct.files import nan_as_null


def progress(answers: Sequence[Answer], items: int, labels_per_prompt: int) -> dict[str, Any]:
    """Counts of items, of those with `labels_per_prompt` labels, and of what each labeler did."""
    from trl_instruct.reward_trainer.labelers import Labeled, agreement, reliability  # torch

    ranked = [answer for answer in answers if answer.action == "label"]
    numbers = {key: number for number, key in enumerate({answer.item.key for answer in ranked})}
    labeled = [
        Labeled(numbers[item.key], [*range(len(item.responses))], content["ranks"], 1.0, name, None)
        for item, name, _, content in ranked
    ]
    each = {name: one for name, one in reliability(labeled).items() if "mean" in one}
    found = []
    for name in sorted({answer.labeler for answer in answers}):
        own = [answer for answer in answers if answer.labeler == name]
        labels = [answer.content for answer in own if answer.action == "label"]
        seconds = [content["seconds"] for content in labels if content.get("seconds") is not None]
        found.append(
            {
                "labeler": name,
                "labelled": len(labels),
                "skipped": len(own) - len(labels),
                "flagged": sum(bool(answer.content.get("flag")) for answer in own),
                "seconds": statistics.median(seconds) if seconds else None,
                "agreement": each.get(name),
            }
        )
    counts = Counter(answer.item.key for answer in ranked).values()
    done = sum(count >= labels_per_prompt for count in counts)
    told = {"items": items, "done": done, "agreement": agreement(labeled), "labelers": found}
    return nan_as_null(told)
