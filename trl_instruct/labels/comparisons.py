"""Checkpoints compared blindly by people: what they are shown, and win rates from their ranks."""

from collections.abc import Mapping
from typing import Any

from trl_instruct.console import plural
from trl_instruct.data.labels import LabelStore
from trl_instruct.evaluation.statistics import win_rate
from trl_instruct.intervals import mean_interval, show_interval


def comparison(prompt: Any, answers: Mapping[str, str]) -> dict[str, Any]:
    """An item for the store: an answer that several models gave is shown once."""
    sources: dict[str, list[str]] = {}
    for name, text in answers.items():
        sources.setdefault(text, []).append(name)
    return {"prompt": prompt, "responses": list(sources), "sources": list(sources.values())}


def comparison_rows(store: LabelStore) -> tuple[str, list[list[str]]]:
    """How often people prefer each model to the first, and how they rate it: a line and a table.

    A tie counts half, and so does a prompt that all models answer with the same words: nobody is
    asked about it. Several labels of a prompt are one group for the interval.
    """
    compared = [item for item in store.items() if "sources" in item.columns]
    labels = [answer for answer in store.answers() if answer.action == "label"]
    given = [(a.item, a.content) for a in labels if "sources" in a.item.columns]
    if not given:
        return "no blind labels", []
    same = [item for item in compared if len(item.responses) == 1]
    given += [(item, {"ranks": [1]}) for item in same]
    told = f"{plural(len(given) - len(same), 'blind label')}; the same answer: {len(same)} prompts"
    models = [name for names in compared[0].columns["sources"] for name in names]
    numbers = {item.key: number for number, item in enumerate(compared)}
    groups = [numbers[item.key] for item, _ in given]
    ranks: dict[str, list[float]] = {name: [] for name in models}
    lengths: dict[str, list[int]] = {name: [] for name in models}
    ratings: dict[str, list[float]] = {name: [] for name in models}
    for item, content in given:
        for place, names in enumerate(item.columns["sources"]):
            for name in names:
                ranks[name].append(-content["ranks"][place])
                lengths[name].append(len(item.responses[place]))
                rating = (content.get("overall") or {place: None})[place]
                ratings[name] += [] if rating is None else [rating]
    baseline = models[0]
    rows = [["", f"preferred to {baseline} (95 %)", "equal length", "rating, 1 to 7 (95 %)"]]
    for name in models:
        rated = show_interval(mean_interval(ratings[name])._asdict()) if ratings[name] else "-"
        won = ["-", "-"]
        if name != baseline:
            both = ranks[name], ranks[baseline], lengths[name], lengths[baseline]
            rate = win_rate(*both, groups=groups)
            won = [show_interval(rate), f"{rate['length_controlled']:.3f}"]
        rows.append([name, *won, rated])
    return told, rows
