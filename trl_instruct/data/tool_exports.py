"""Rankings that people gave in Argilla and Label Studio, from what these tools export.

An answer is one labeler's ranking. Suggestions and predictions are a machine's: not read.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_instruct.data.sources import Record
from trl_instruct.errors import InputError, kind_of

Answer = tuple[str, Any, Any, Any]  # question, labeler, value, status


def argilla(row: Record) -> list[Any]:
    """`to_json` of Argilla 2: `fields`, and `responses` by question. It has no status."""
    answers: list[Answer] = []
    for question, given in (row["responses"] or {}).items():
        answers += [(question, a.get("user_id"), a.get("value"), None) for a in given or []]
    return _rankings(row["fields"], answers)


def argilla_table(row: Record) -> list[Any]:
    """Argilla's flat records: `<question>.responses`, `.users`, `.status`; or Argilla 1's."""
    answers: list[Answer] = []
    for name, given in row.items():
        if name.endswith(".responses"):
            nothing = [None] * len(given or [])
            parts = (row.get(f"{name}.{part}") for part in ("users", "status"))
            users, states = (part if nothing and part else nothing for part in parts)
            question = [name.removesuffix(".responses")] * len(nothing)
            answers += zip(question, users, given or [], states, strict=True)
        elif isinstance(given, list) and given and isinstance(given[0], Mapping):
            answers += [(name, a.get("user_id"), a.get("value"), a.get("status")) for a in given]
    others = {answer[0] for answer in answers} | {"id", "_server_id", "external_id", "status"}
    fields = {k: v for k, v in row.items() if "." not in k and k not in others}
    return _rankings(fields, answers)


def _rankings(given: Mapping[str, Any], answers: Iterable[Answer]) -> list[Any]:
    """A ranking for each answer: the options in order, or each with its rank, 1 = best; else for
    each labeler who rated several fields, each in a question that has the field's name in its own.
    """
    fields = _present(given)
    found: list[Any] = []
    rated: dict[str | None, dict[str, Any]] = defaultdict(dict)
    for question, user, value, status in answers:
        if status in ("draft", "discarded"):
            found.append(f"a {status} answer")
            continue
        rates = max((n for n in fields if n != "prompt" and n in question), key=len, default=None)
        if rates and isinstance(value, int | float):
            if rates in rated[_name(user)]:
                raise InputError(f"`{rates}` is rated in two questions; export one of them.")
            rated[_name(user)][rates] = value
            continue
        if not isinstance(value, list) or not value:
            found.append(f"an answer to `{question}`, which ranks nothing")
            continue
        options = [v if isinstance(v, Mapping) else {"value": v} for v in value]
        names = [option["value"] for option in options]
        if not all(name in fields for name in names):
            raise InputError(
                f"`{question}` ranks {', '.join(map(str, names))}, but the fields are "
                f"{', '.join(fields)}. Say which is which, for each: --columns OPTION=FIELD."
            )
        prompt, texts = _text(fields, names, "prompt"), [fields[name] for name in names]
        ranks = [option.get("rank", place) for place, option in enumerate(options, 1)]
        found.append({"prompt": prompt, "responses": texts, "ranks": ranks, "labeler": _name(user)})
    ranked = any(isinstance(record, dict) for record in found)
    for labeler, stars in rated.items():
        if ranked or len(stars) < 2:
            found.append("ratings beside a ranking" if ranked else "a rating of one text alone")
            continue
        texts, prompt = [fields[name] for name in stars], _text(fields, [*stars], "prompt")
        scores = [*map(float, stars.values())]
        found.append({"prompt": prompt, "responses": texts, "scores": scores, "labeler": labeler})
    if any(isinstance(record, dict) for record in found):
        return found
    return [*found, {"prompt": _text(fields, [], "prompt"), "responses": []}]


def label_studio(tasks: Sequence[Record]) -> list[Any]:
    """Tasks with `data` and `annotations`: a Ranker's list, a Pairwise choice, or ratings."""
    found: list[Any] = []
    rated: dict[Any, list[tuple[str, float]]] = {}  # of a labeler; of tasks with several, each
    for task in tasks:
        data, before = _present(task["data"] or {}), len(found) + sum(map(len, rated.values()))
        for annotation in task["annotations"] or []:
            if annotation.get("was_cancelled"):
                found.append("a cancelled answer")
                continue
            labeler, ratings = _name(annotation.get("completed_by")), []
            for result in annotation.get("result") or []:
                value = _present(result["value"])
                if "ranker" in value:
                    found.append({**_ranker(data, value["ranker"]), "labeler": labeler})
                elif "selected" in value:
                    found.append({**_pairwise(data, value["selected"]), "labeler": labeler})
                elif value.get("rating"):  # 0: not set
                    rates = result.get("to_name")  # one of several Rating tags names its text
                    own = rates != "prompt" and isinstance(data.get(rates), str)
                    text = data[rates] if own else _text(data, ["prompt"], "completion")
                    ratings.append((text, float(value["rating"])))
            if len(dict(ratings)) < len(ratings):
                raise InputError("a text has two ratings; export one of their tags.")
            if ratings:
                task_number = len(rated) if len(ratings) > 1 else None
                rated.setdefault((labeler, task_number), []).extend(ratings)
        if len(found) + sum(map(len, rated.values())) == before:
            found.append({"prompt": _text(data, [], "prompt"), "responses": []})
    for (labeler, _), given in rated.items():
        texts, scores = map(list, zip(*given, strict=True))
        prompt = _text(_present(tasks[0]["data"]), [], "prompt")
        found.append({"prompt": prompt, "responses": texts, "scores": scores, "labeler": labeler})
    return found


def label_studio_min(rows: Sequence[Record]) -> list[Any]:
    """JSON_MIN: a row an annotation, the values of each tag in a list beside the data."""
    own = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time")
    tasks = []
    for row in rows:
        data, results = {k: v for k, v in row.items() if k not in own}, []
        for name, given in row.items():
            values = [v for v in given if isinstance(v, Mapping)] if isinstance(given, list) else []
            values = [v for v in values if {"ranker", "selected", "rating"} & set(v)]
            results += [{"value": v, "to_name": name.removesuffix("_rating")} for v in values]
            if values:
                data.pop(name, None)
        annotations = [{"completed_by": row["annotator"], "result": results}]
        tasks.append({"data": data, "annotations": annotations})
    return label_studio(tasks)


def _ranker(data: Mapping[str, Any], order: Any) -> dict[str, Any]:
    """A Ranker's list, best first; the items lie in the one list of the data that has its ids."""
    lists = [*order.values()] if isinstance(order, Mapping) else [order]
    lists = [given for given in lists if given is not None]
    if len(lists) != 1:
        raise InputError(
            "`ranker` has several buckets, and which is better stands in the labeling "
            "configuration alone. Write one list, best first."
        )
    names = [str(name) for name in lists[0]]
    held = {
        field: {str(i.get("id")): i.get("body") or i.get("title") for i in items}
        for field, items in data.items()
        if isinstance(items, list) and all(isinstance(item, Mapping) for item in items)
    }
    fitting = {field: texts for field, texts in held.items() if set(names) <= set(texts)}
    if "responses" not in fitting and len(fitting) != 1:
        found = f"the lists {', '.join(fitting)} have" if fitting else "no list of `data` has"
        raise InputError(
            f"`ranker` has {kind_of(lists[0])}, which {found}. Say which: --columns responses=LIST."
        )
    texts = fitting.get("responses") or next(iter(fitting.values()))
    responses, ranks = [texts[name] for name in names], [*range(1, len(names) + 1)]
    return {"prompt": _text(data, [], "prompt"), "responses": responses, "ranks": ranks}


def _pairwise(data: Mapping[str, Any], selected: str) -> dict[str, Any]:
    """A Pairwise choice; which field is left, the labeling configuration alone says."""
    if not {"left", "right"} <= set(data):
        raise InputError(
            f"the answer is {selected!r}, and which field that is stands in the labeling "
            f"configuration alone; the fields are {', '.join(data)}. Say it: --columns "
            "left=answer1 right=answer2."
        )
    ranks = {"left": [1, 2], "right": [2, 1]}.get(selected, [None, None])
    prompt = _text(data, ["left", "right"], "prompt")
    return {"prompt": prompt, "responses": [data["left"], data["right"]], "ranks": ranks}


def _text(fields: Mapping[str, Any], others: Sequence[Any], wanted: str) -> Any:
    """The field `wanted`, or the only text among the fields that are not `others`."""
    texts = [k for k, v in fields.items() if isinstance(v, str) and k not in others]
    if wanted not in fields and len(texts) != 1:
        raise InputError(
            f"say which field is the {wanted}, of {', '.join(fields)}: --columns {wanted}=FIELD."
        )
    return fields[wanted if wanted in fields else texts[0]]


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _name(labeler: Any) -> str | None:
    found = labeler.get("id") if isinstance(labeler, Mapping) else labeler
    return None if found is None else str(found)
