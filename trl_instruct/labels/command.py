"""`trl-instruct label`: candidates, or answers of checkpoints without their names, for people."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_instruct.console import plural, say, table
from trl_instruct.data import records
from trl_instruct.data.conversion import read
from trl_instruct.data.labels import MOST_RESPONSES, LabelStore
from trl_instruct.data.orders import ORDERS
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.sources import LABEL_STORE, Record, first_record, iterate
from trl_instruct.errors import InputError
from trl_instruct.files import CONFIG_FILE
from trl_instruct.generation.sampling import Sampling
from trl_instruct.labels.comparisons import answers_of, comparison, comparison_rows
from trl_instruct.labels.server import LabelPage, serve
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.option_checks import check_numbers
from trl_instruct.recipes.chain import remember_reading
from trl_instruct.recipes.options import named_sources

# What a file may say about the order already: the labeler is not to know.
HIDDEN = (*ORDERS, "gold_scores", "labeler", "weight")


def label(options: Namespace) -> None:
    """Fill the store with what is new, and serve the page until it is ended."""
    check_numbers(options)
    models = named_sources(options.models or [], "models")
    remember_reading(options, *models.values())
    ranked, asked = ([], {}) if options.report else _sources(options, models)
    address = options.store or _address(options, models)
    if not (ranked or asked or "://" in address or Path(address).expanduser().is_file()):
        raise InputError(f"{address}: no such store of labels; give candidates, or --dataset_name.")
    store = LabelStore(address)
    if not options.report:
        added = store.add(ranked, options.split) + store.add(_compared(options, models, asked))
        if not (count := len(store.items())):
            raise InputError(f"{address} holds no prompts yet; give a folder of candidates.")
        say(f"{address}: {plural(count, 'prompt')}, {added} of them new")
        answer = None
        if models:
            sampling = _sampling(options)

            def answer(prompt: str) -> dict[str, str]:
                given = answers_of(models, [prompt], typed=Reading.of(options), **sampling)
                return {name: text for name, (text,) in given.items()}

        page = LabelPage(store, options.labels_per_prompt, tuple(options.questions), answer)
        serve(page, options.host, options.port)
    compared, rows = comparison_rows(store)
    for line in (compared, *table(rows)) if rows else ():
        say(line)
    told = sum(answer.action == "label" for answer in store.answers())
    say(f"labels: {told} in {store.address}; for a reward model: rm --dataset_name {store.address}")


def _address(options: Namespace, models: Mapping[str, Any]) -> str:
    """Where labels are kept: beside the folders of stages, in none of them."""
    if options.source and LABEL_STORE.fullmatch(options.source):
        return options.source
    if not options.source and not (models and options.dataset_name):
        raise InputError(
            "There is nothing to label: give a folder of candidates, a store of labels, or "
            "--models and --dataset_name."
        )
    path = Path(options.source or next(iter(models.values()))).expanduser()
    folder = path.parent if options.source and path.is_file() else path
    if folder == path or (folder / CONFIG_FILE).is_file():
        folder = folder.parent
    return str(folder / ("labels.db" if options.source else "comparisons.db"))


def _sources(options: Namespace, models: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Candidates to rank, and the columns of prompts that models are to answer."""
    ranked, asked = [], {}
    if options.source and not LABEL_STORE.fullmatch(options.source):
        ranked = list(_candidates(options.source, options.split))
    if models and options.dataset_name:
        tokenizer = load_tokenizer(next(iter(models.values())))
        given = options.dataset_name, options.split, tokenizer, None, Reading.of(options)
        asked = records.prompts_of(*given)[:]
    return ranked, asked


def _compared(
    options: Namespace, models: Mapping[str, Any], asked: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The models' answers to each prompt."""
    if asked:
        answers = answers_of(models, asked["prompt"], columns=asked, **_sampling(options))
        for row, prompt in enumerate(asked["prompt"]):
            yield comparison(prompt, {name: texts[row] for name, texts in answers.items()})


def _candidates(source: str, split: str) -> Iterator[dict[str, Any]]:
    """Records to rank: without repeated responses, and without any order that they have."""
    file = Path(source).expanduser() / f"{split}.jsonl"  # of the stage `candidates`
    given = (str(file), "train") if file.is_file() else (source, split)
    dataset, where, _ = read(*given, False, "ranking", AS_PUBLISHED)
    first = first_record(dataset, where)
    records.require_columns(first, where, ("prompt", "responses"), "A candidate")
    form = records.form_of(first)

    def check(record: Record) -> None:
        records.check_prompt(record, form=form)
        for index, response in enumerate(record["responses"]):
            records.check_content(f"responses[{index}]", response)
        if not 2 <= (count := len(_distinct(record["responses"]))) <= MOST_RESPONSES:
            raise InputError(f"`responses` has {count} that differ; the page shows 2 to 9.")

    for record in iterate(AS_PUBLISHED.checked(dataset, check, where)):
        kept = {name: value for name, value in record.items() if name not in HIDDEN}
        yield {**kept, "responses": _distinct(record["responses"])}


def _distinct(responses: list[Any]) -> list[Any]:
    return list({json.dumps(response): response for response in responses}.values())


def _sampling(options: Namespace) -> dict[str, Any]:
    given = options.response_length, None, options.stop_strings, options.temperature
    return {"sampling": Sampling(*given), "seed": options.seed}
