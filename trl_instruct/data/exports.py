"""Rankings as files: our records, pairs, and what Label Studio and Argilla hold.

Our own readers read all of them back. The tools hold texts, each labeler's order, and the labeler.
"""

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from trl_instruct.console import in_markdown, plural
from trl_instruct.data.orders import dense_ranks
from trl_instruct.data.pairs import rankings_to_pairs
from trl_instruct.data.preferences import as_rankings
from trl_instruct.data.sources import Record, iterate
from trl_instruct.errors import InputError, kind_of, redact
from trl_instruct.files import written_at_once

FORMATS = (
    *("rankings", "pairs", "label-studio-ranker", "label-studio-pairwise", "label-studio-rating"),
    *("argilla-ranking", "argilla-rating"),
)


def export(rows: Dataset, path: Path, to: str) -> str:
    """Write rankings or pairs to a new file, JSON Lines or a tool's JSON, or to a new folder, named
    without an ending: with a dataset card. Returns a line that tells what it holds, and what not.

    A tool gets a task a ranking; as pairwise, a task for each pair that has a winner. A rating is
    the number of ranks from the worst up, whose rating is 1. `to` is one of `FORMATS`.
    """
    tool, _, kind = to.rpartition("-")
    ending = ".json" if tool else ".jsonl"
    folder = path if not (tool or path.suffix or path.exists()) else None
    path = folder / "train.jsonl" if folder else path
    if path.exists() or path.suffix != ending:
        fault = "it exists" if path.exists() else f"its name does not end with {ending}"
        raise InputError(f"{path} cannot be written as {to}: {fault}. Name a new file.")
    form = as_rankings if to != "pairs" else rankings_to_pairs
    data = rows if to == "pairs" and "chosen" in rows.column_names else form(rows)
    kept = {"labeler"} if tool else set(data.column_names)
    kept |= {"prompt", "responses", "ranks", "chosen", "rejected"}
    lost = sorted(set(rows.column_names) - kept)
    given = written = list(iterate(data))
    if kind == "pairwise":
        written = [pair for record in given for pair in _pairs(record)]
    elif kind in ("ranker", "ranking"):
        written = [row for row in given if len(set(row["ranks"])) == len(row["ranks"])]
    if not written:
        raise InputError(f"{to} holds no ties, and each of the {len(given)} rankings has some.")
    if written != given and kind == "pairwise":
        lost += ["ties", "which pairs are one ranking"]
    elif written != given:
        left = plural(len(given) - len(written), "ranking")
        lost += [f"{left} with ties (--to {tool}-rating holds them)"]
    if tool:
        written = [_task(record, tool, kind) for record in written]
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in written]
    with written_at_once(path) as file:
        file.write("[" + ",\n".join(lines) + "]" if tool else "\n".join([*lines, ""]))
    if folder:
        write_card(folder, folder.name, f"{plural(len(lines), to.removesuffix('s'))}, as exported.")
    told = f"{path}: {plural(len(lines), 'task' if tool else kind.removesuffix('s'))}"
    return told + f"; not held there: {', '.join(lost)}" * bool(lost)


def write_card(folder: Path, name: str, made: str) -> None:
    """Write README.md, the dataset card of a folder of JSON Lines; `made` says what it is."""
    files = sorted(folder.glob("*.jsonl"))
    with files[0].open(encoding="utf-8") as file:
        columns = list(json.loads(file.readline() or "{}"))
    splits = [{"split": path.stem, "path": path.name} for path in files]
    configs = [{"config_name": "default", "data_files": splits}]
    head = DatasetCardData(license="unknown", tags=["trl-instruct", "rlhf"], configs=configs)
    told: Any = {"md": in_markdown, "name": name, "made": redact(made), "columns": columns}
    template = str(Path(__file__).with_name("card.md"))
    DatasetCard.from_template(head, template, **told).save(folder / "README.md")


def _pairs(record: Record) -> Iterator[dict[str, Any]]:
    """Each pair of a ranking that has a winner, as a ranking of two."""
    for both in combinations(zip(record["responses"], record["ranks"], strict=True), 2):
        responses, ranks = map(list, zip(*both, strict=True))
        if ranks[0] != ranks[1]:
            yield {**record, "responses": responses, "ranks": dense_ranks(ranks)}


def _task(record: Record, tool: str, kind: str) -> dict[str, Any]:
    """A ranking as a record of Argilla 2 (its `to_json`), or a task of Label Studio (its JSON)."""
    labeler, ranks = record.get("labeler"), record["ranks"]
    names = [f"response_{place}" for place in range(1, len(ranks) + 1)]
    names = ["left", "right"] if kind == "pairwise" else names
    texts = dict(zip(names, map(_text, record["responses"]), strict=True))
    order = [name for _, name in sorted(zip(ranks, names, strict=True))]
    stars = {name: max(ranks) + 1 - rank for name, rank in zip(names, ranks, strict=True)}
    held = {"prompt": record["prompt"], **texts}
    if tool == "argilla":
        values: dict[str, Any] = {f"{name}_rating": value for name, value in stars.items()}
        values = {"ranking": order} if kind == "ranking" else values
        answers = {name: [{"value": v, "user_id": labeler}] for name, v in values.items()}
        return {"fields": held, "responses": answers}
    if kind == "ranker":
        listed = [{"id": name, "title": name, "body": text} for name, text in texts.items()]
        held = {"prompt": record["prompt"], "items": listed}
    given: Any = {
        "ranker": [("rank", "items", {"ranker": {"rank": order}})],
        "pairwise": [("comparison", "comparison", {"selected": order[0]})],
        "rating": [(f"{name}_rating", name, {"rating": value}) for name, value in stars.items()],
    }
    results = [
        {"from_name": tag, "to_name": about, "type": kind, "value": value}
        for tag, about, value in given[kind]
    ]
    user = None if labeler is None else {"id": str(labeler), "email": str(labeler)}
    return {"data": held, "annotations": [{"completed_by": user, "result": results}]}


def _text(response: Any) -> str:
    """The text of a response; of messages, of the only one."""
    if isinstance(response, str):
        return response
    if len(response) == 1 and isinstance(response[0]["content"], str):
        return response[0]["content"]
    raise InputError(f"A response is {kind_of(response)}; tools hold one text: use --to rankings.")
