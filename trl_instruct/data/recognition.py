"""Which published shape a file has, told by its columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl_instruct.data import shapes
from trl_instruct.data import tool_exports as tools
from trl_instruct.data.dialogues import prompt_in_dialogue
from trl_instruct.data.sources import Record


class Shape(NamedTuple):
    """A published shape.

    `columns` in any case; `a[].b` is a list `a` of objects with `b`, `a[]` one of other values,
    `a|b` one of two columns.
    With `group`, `read` takes all rows that share this column, or its value. `kind` is the only
    one that it gives; `says` is what was taken, where a file holds more than one.
    """

    name: str
    columns: str
    read: Callable[[Any], Any]
    group: str | Callable[[Record], Any] | None = None
    kind: str | None = None
    says: str = ""

    @property
    def told(self) -> str:
        """Name and choice, for the line that says how a file was read."""
        return f"{self.name} ({self.says})" if self.says else self.name


UNPAIRED = Shape(
    "unpaired preferences", "", shapes.unpaired, lambda row: shapes.judged(row)["prompt"]
)
ARGILLA = Shape("Argilla's table", "", tools.argilla_table)
RATED = Shape("rated pairs", "", shapes.rated_pairs, says="equal ratings are a tie")
HH = Shape("HH-RLHF", "", shapes.implicit_pairs)
# Shapes whose columns say more about replies than ours do. The first that fits is read.
JUDGED = (
    Shape(
        *("Argilla's records", "fields responses", tools.argilla),
        says="drafts and answers look alike in this export",
    ),
    Shape("Label Studio's JSON", "data annotations", tools.label_studio, "data.prompt"),
    Shape("Label Studio's JSON_MIN", "annotator annotation_id", tools.label_studio_min, "prompt"),
    Shape("OASST trees", "message_tree_id prompt.role", shapes.oasst_tree),
    Shape("OASST messages", "message_id parent_id role", shapes.oasst_messages, "message_tree_id"),
    Shape(
        *("UltraFeedback", "instruction completions[].response", shapes.ultrafeedback),
        says="scores: overall_score, else fine-grained_score",
    ),
    Shape("Nectar", "prompt answers[].rank", shapes.nectar),
    Shape("distilabel ratings", "instruction generations ratings", shapes.distilabel_ratings),
    Shape("distilabel's QualityScorer", "instruction responses scores", shapes.distilabel_quality),
    Shape("distilabel's PairRM", "input candidates ranks", shapes.distilabel_pairrm),
    Shape("RewardBench 2", "prompt chosen[] rejected[]", shapes.reward_bench),
    Shape(
        *("HelpSteer2's attributes", "prompt response helpfulness", shapes.helpsteer2_attributes),
        *("prompt", None, "scores: helpfulness, unless columns names another"),
    ),
    Shape("HelpSteer2", "response_1 response_2 preference_strength", shapes.helpsteer2),
    Shape("HelpSteer3", "context response1 response2 overall_preference", shapes.helpsteer3),
    Shape("PKU-SafeRLHF", "response_0 response_1 better_response_id", shapes.pku_safe),
    Shape("PKU-SafeRLHF", "response_0 response_1 safer_response_id", shapes.pku_safe),
    Shape("WebGPT comparisons", "question answer_0 answer_1 score_0", shapes.webgpt),
    Shape("TL;DR comparisons", "info summaries choice", shapes.tldr),
    Shape("SHP", "history human_ref_a human_ref_b labels", shapes.shp),
    Shape("Chatbot Arena", "conversation_a conversation_b winner", shapes.arena),
    Shape("TRL's stepwise supervision", "prompt completions[] labels[]", shapes.stepwise),
    Shape("Argilla's pairs", "chosen_response rejected_response", shapes.argilla_pairs),
    Shape("ms-swift's pairs", "messages rejected_response|rejected_messages", shapes.swift_pairs),
    Shape("ShareGPT pairs", "conversations chosen rejected", shapes.sharegpt_pairs),
    Shape("ShareGPT pairs", "messages chosen.role rejected.role", shapes.sharegpt_pairs),
    Shape("OpenRLHF's pairs", "context_messages chosen rejected", shapes.prompted_pairs),
)
# Shapes of files without our column `prompt`.
PLAIN = (
    Shape("Alpaca pairs", "instruction|input|question chosen rejected", shapes.prompted_pairs),
    Shape("pairs without a prompt", "chosen rejected", shapes.implicit_pairs, None, "prompt"),
    Shape("messages", "messages", shapes.dialogue, None, "prompt"),
    Shape("ShareGPT", "conversations", shapes.sharegpt),
    Shape("Alpaca", "instruction output|response", shapes.alpaca),
    Shape("OpenRLHF's demonstrations", "question response", shapes.openrlhf),
    Shape("OpenRLHF's demonstrations", "input output", shapes.openrlhf),
    Shape("OpenRLHF's prompts", "context_messages", shapes.openrlhf_prompts, None, "prompt"),
    Shape("Alpaca's prompts", "instruction", shapes.alpaca, None, "prompt"),
    Shape("OpenRLHF's prompts", "input", shapes.openrlhf_prompts, None, "prompt"),
)


def shape_of(first: Record, kind: str) -> Shape | None:
    """The published shape of a file; None if it has our own fields, or none that is known.

    Judged by its first record, for what is wanted: "demonstration", "ranking" or "prompt".
    """
    if {"prompt", "responses"} <= set(first):
        return None
    replies = {"completion", "messages"}
    replies |= set() if "prompt" in first else {"conversations", "output"}
    labels = [first.get("label"), first.get("kto_tag")]
    # True and false, or 1 and 0 as csv files have it.
    judged = any(isinstance(v, bool | int | float) and v in (0, 1) for v in labels)
    if judged and replies & set(first):
        return UNPAIRED
    if kind == "demonstration" and {"prompt", "completion"} <= set(first):
        return None
    if _has_answers(first):
        return ARGILLA
    if {"chosen", "rejected"} <= set(first) and "conversations" not in first:
        if shapes.ratings_of(first):
            return RATED
        if "prompt" not in first and str(first["chosen"]).startswith("\n\nHuman:"):
            return HH
    ultrachat = kind == "prompt" and prompt_in_dialogue(first, "messages")
    for shape in JUDGED if "prompt" in first and not ultrachat else JUDGED + PLAIN:
        needed = [paths.split("|") for paths in shape.columns.split()]
        held = all(any(_holds(first, path) for path in paths) for paths in needed)
        if held and shape.kind in (None, kind):
            return shape
    return None


def _has_answers(first: Record) -> bool:
    """Whether a column holds Argilla's answers: `<question>.responses`, or `user_id`, `value`."""
    heads = [value[0] for value in first.values() if isinstance(value, list) and value]
    answers = any(isinstance(head, Mapping) and {"user_id", "value"} <= set(head) for head in heads)
    return answers or any(name.endswith(".responses") for name in first)


def _holds(first: Record, path: str) -> bool:
    """Whether the record has a column, or what `path` says of its value.

    >>> _holds({"answers": [{"rank": 1}]}, "answers[].rank"), _holds({"labels": [True]}, "labels[]")
    (True, True)
    """
    name, _, inside = path.partition(".")
    listed = name.endswith("[]")
    key = next((column for column in first if column.lower() == name.removesuffix("[]")), None)
    value = first[key] if key else None
    if listed:
        value = value[0] if isinstance(value, list) and value else None
        if not inside:
            return value is not None and not isinstance(value, Mapping)
    if inside:
        return isinstance(value, Mapping) and inside in value
    return key is not None
