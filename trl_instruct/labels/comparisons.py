"""Checkpoints compared blindly by people: their answers, and win rates from people's ranks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from trl import ModelConfig

from trl_instruct.console import plural
from trl_instruct.data.labels import LabelStore
from trl_instruct.data.reading import Reading
from trl_instruct.evaluation.measurement import sample
from trl_instruct.evaluation.statistics import win_rate
from trl_instruct.generation.engines import begun
from trl_instruct.generation.sampling import Sampling
from trl_instruct.intervals import mean_interval, show_interval
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer


def answers_of(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    typed: Reading | None = None,
) -> dict[str, list[str]]:
    """Each model's completion of each prompt; one model is loaded at a time, the seed set anew.

    Prompts are those of records, whose other columns the chat template may read; or typed texts.
    `typed` tells how these are written: where it leaves them as they are, they become messages if
    there is a chat template. InputError for a source without language model or tokenizer, and a
    prompt that does not fit into the context.
    """
    answers = {}
    for name, source in models.items():
        tokenizer = load_tokenizer(source)
        asked = list(prompts)
        if typed is not None and typed.writes_prompts():
            asked = [typed.prompt_of({"prompt": text}) for text in prompts]
        elif typed is not None and tokenizer.chat_template is not None:
            asked = [[{"role": "user", "content": text}] for text in prompts]
        policy = load_policy(source, ModelConfig(dtype="float32")).to(PartialState().device)
        given = {**(columns or {}), "prompt": asked}
        _, drawn = sample(begun(policy, tokenizer), given, sampling, seed=seed)
        answers[name] = [completion.text for completion in drawn]
    return answers


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
    ranks, lengths, ratings = (defaultdict[str, list[Any]](list) for _ in range(3))
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
