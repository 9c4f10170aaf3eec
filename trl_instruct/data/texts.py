"""Plain texts, for pre-training and PPO-ptx, and their openings as prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from trl_instruct.console import get_logger
from trl_instruct.data import sources
from trl_instruct.data.mixture import mixed
from trl_instruct.data.reading import AS_PUBLISHED, Reading, rename
from trl_instruct.data.records import check_records, load_prompts, require_columns
from trl_instruct.data.rendering import render_prompt
from trl_instruct.errors import InputError, kind_of

logger = get_logger(__name__)


def load_texts(
    source: Any, split: str = "train", streaming: bool = False, *, reading: Reading = AS_PUBLISHED
) -> sources.AnyDataset:
    """Plain texts for pre-training and the ptx loss: a `text` column. Arguments as `load_records`.

    Rows of white space (paragraph breaks of some corpora) are left out; their number is logged.

    Raises:
        InputError: `text` is missing, null or not text; no row has any text.

    >>> from datasets import Dataset
    >>> load_texts(Dataset.from_list([{"text": "Once upon a time."}, {"text": ""}])).num_rows
    1
    """
    if isinstance(source, list):
        return mixed(partial(load_texts, reading=reading), source, streaming)
    where = sources.Source.of(source, split)
    dataset = rename(sources.load_records(source, split, streaming), where, reading)
    require_columns(sources.first_record(dataset, where), where, ("text",), "A text record")

    def check(record: sources.Record) -> None:
        if not isinstance(record.get("text"), str):
            raise InputError(f"`text` is {kind_of(record.get('text'))}; text is needed.")

    def has_text(record: sources.Record, row: int) -> bool:
        return bool(record["text"].strip())

    dataset = check_records(dataset, where, check, reading)
    where = (reading.found or [where])[-1]
    kept = reading.keep(dataset, has_text, where, "all {} rows have an empty `text`.")
    if isinstance(dataset, IterableDataset):
        logger.info("%s: streaming; rows without text are left out as they come", where.name)
    elif dropped := len(dataset) - len(kept):
        logger.warning("%s: %d rows without text are left out", where.name, dropped)
    return kept


def openings(texts: sources.AnyDataset, tokenizer: Any, length: int) -> sources.AnyDataset:
    """Prompts for PPO from plain texts: the opening of each, as `prompt`; other columns are kept.

    The task of Ziegler et al. 2019, section 3.1: continue texts in a given style.

    Args:
        texts: column `text`, from `load_texts`.
        tokenizer: the policy's.
        length: tokens per opening; a shorter text is used whole.

    Raises:
        InputError: an opening is only white space.
    """

    def opening(batch: Mapping[str, list[str]]) -> dict[str, list[str]]:
        rows = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        starts = [row[:length] for row in rows]
        cut = tokenizer.batch_decode(starts, clean_up_tokenization_spaces=False)
        # A cut between two tokens of one character leaves half of it, which decodes to U+FFFD.
        return {"prompt": [text.rstrip("\ufffd") for text in cut]}

    return load_prompts(sources.map_records(texts, opening, batched=True))


def prompts_of(
    source: Any, split: str, tokenizer: Any, opening_length: int | None, reading: Reading
) -> Dataset:
    """Prompts in every form: `prompt` columns, or the openings of texts.

    If bad records are left out, so are those that the chat template refuses.
    """
    if opening_length:
        return openings(load_texts(source, split, reading=reading), tokenizer, opening_length)
    prompts = load_prompts(source, split, reading=reading)
    if not reading.skips:
        return prompts

    def renders(record: sources.Record) -> None:
        render_prompt(record["prompt"], tokenizer, record)

    return check_records(prompts, reading.source, renders, reading)
