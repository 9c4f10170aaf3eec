"""Pairs in TRL's preference format: from rankings, and from pairs files."""

import hashlib
import json
from functools import partial
from itertools import combinations
from random import Random
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from trl_instruct.console import get_logger, plural
from trl_instruct.data import records
from trl_instruct.data.conversion import mixed, read
from trl_instruct.data.dialogues import extract_prompt, keep_dialogue, take_off_prompts
from trl_instruct.data.rankings import Ranking, RankingCounts, canonical_ranking, canonical_rankings
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.sources import AnyDataset, Record, Source, first_record, iterate, map_records
from trl_instruct.data.ties import TIES, wins
from trl_instruct.errors import InputError

logger = get_logger(__name__)

WHICH = ("all", "adjacent", "best_vs_rest")


def rankings_to_pairs(
    dataset: AnyDataset,
    *,
    which: str = "all",
    ties: str = "drop",
    margin: bool = False,
    max_pairs: int | None = None,
    seed: int = 0,
    counts: RankingCounts | None = None,
) -> AnyDataset:
    """Rankings -> pairs `prompt`, `chosen`, `rejected` for TRL's RewardTrainer and DPOTrainer.

    InstructGPT trains on all C(K,2) pairs without the ties (3.5, C.2). A batched map keeps memory
    flat. All other columns are dropped: TRL's pairs have no place for `labeler` and `weight`.

    Args:
        dataset: rankings from `load_rankings` (numbers, not labels); a stream gives a stream.
        which: "all"; "adjacent", responses of neighbouring ranks; "best_vs_rest", the best response
            (each of them, if they tie) against every other.
        ties: "drop", or "half": a tie gives two rows, one per order, so its target is one half.
            "adjacent" includes all ties, "best_vs_rest" those among the best.
        margin: add `margin`, the difference of the two scores (0 for a tie).
        max_pairs: most comparisons per ranking (a tie counts as one), drawn with `seed`
            independently of the order of rows and responses.
        counts: the counts of the rankings are added to it (when streaming: as rows are read).

    Raises:
        InputError: an unknown option; a faulty ranking; a margin without scores; no pairs.

    >>> pairs = rankings_to_pairs(Dataset.from_list([
    ...     {"prompt": "2+2=", "responses": ["5", "4", "22"], "ranks": [2, 1, 3]}
    ... ]))
    >>> [(pair["chosen"], pair["rejected"]) for pair in pairs]
    [('4', '5'), ('5', '22'), ('4', '22')]
    """
    _check_options(which, ties, max_pairs)
    where = Source.of(dataset)
    first = first_record(dataset, where)
    records.require_columns(first, where, ("prompt", "responses"), "A ranking")
    counts = RankingCounts() if counts is None else counts
    form, start = records.form_of(first), (counts.records, counts.ties)
    columns = ("prompt", "chosen", "rejected", *["margin"] * margin)
    options: Any = {"which": which, "ties": ties, "max_pairs": max_pairs, "seed": seed}

    def expand(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {name: [] for name in columns}
        for row, *values in zip(rows, *batch.values(), strict=True):
            with where.located(row):
                ranking = canonical_ranking(dict(zip(batch, values, strict=True)), form=form)
                if margin and ranking.scores is None:
                    raise InputError("margin=True needs `scores`; this ranking has only an order.")
            counts.update(ranking.counts)
            for chosen, rejected in ranking_to_pairs(ranking, **options):
                table["prompt"].append(ranking.prompt)
                table["chosen"].append(ranking.responses[chosen])
                table["rejected"].append(ranking.responses[rejected])
                if margin and ranking.scores:
                    table["margin"].append(ranking.scores[chosen] - ranking.scores[rejected])
        return table

    pairs = map_records(
        dataset,
        expand,
        with_indices=True,
        batched=True,
        batch_size=250,
        remove_columns=list(first),
        features=dataset.features and _pair_features(dataset.features, form, margin),
    )
    if isinstance(pairs, Dataset):
        done = plural(counts.records - start[0], "ranking"), plural(len(pairs), "pair")
        tied = plural(counts.ties - start[1], "tie")
        logger.info("%s -> %s (%s; %s: %s)", *done, which, tied, ties)
        if not len(pairs):
            raise InputError(f"{where.name}: no ranking has a pair with a winner ({counts}).")
    return pairs


def ranking_to_pairs(
    ranking: Ranking,
    *,
    which: str = "all",
    ties: str = "drop",
    max_pairs: int | None = None,
    seed: int = 0,
) -> list[tuple[int, int]]:
    """Index pairs (chosen, rejected) of one ranking; arguments as `rankings_to_pairs`."""
    ranks = ranking.ranks
    reach = 1 if which == "adjacent" else max(ranks)
    compared = []
    for i, j in combinations(range(len(ranks)), 2):
        chosen, rejected = (i, j) if ranks[i] <= ranks[j] else (j, i)
        if which == "best_vs_rest" and ranks[chosen] != 1:
            continue
        near = ranks[rejected] - ranks[chosen] <= reach
        if near and wins(ranks[chosen], ranks[rejected], ties=ties):
            compared.append((chosen, rejected))
    if max_pairs is not None and len(compared) > max_pairs:
        drawn = sorted(compared, key=lambda pair: _lot(ranking, pair, seed))[:max_pairs]
        compared = [pair for pair in compared if pair in drawn]
    both = ((i, j) for pair in compared for i, j in (pair, pair[::-1]))
    return [(i, j) for i, j in both if wins(ranks[i], ranks[j], ties=ties)]


def load_pairs(
    source: Any,
    split: str = "train",
    streaming: bool = False,
    *,
    counts: RankingCounts | None = None,
    reading: Reading = AS_PUBLISHED,
) -> AnyDataset:
    """Load pairs: `prompt`, `chosen`, `rejected`, optional `margin`; text or messages.

    A missing `prompt` is what chosen and rejected both begin with (TRL's implicit prompt): all
    shared messages; in text, all up to the last shared "\\n\\nAssistant:" of a dialogue, else all
    shared text. A text `prompt` that is a message of the conversations is left out; a prompt that
    both replies repeat is taken off. Other columns are kept. A pair whose chosen and rejected are
    equal is left out, counted in `counts` and logged. Of published rankings and pairs, all pairs
    with a winner are read. Arguments as `load_rankings`.

    Raises:
        InputError: a missing column; a field null, empty, malformed or of two formats; no shared
            prompt; a margin that is not a finite number; no pairs left.

    >>> pair = load_pairs(Dataset.from_list([{
    ...     "chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello!",
    ...     "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: Hey.",
    ... }]))[0]
    >>> pair["prompt"], pair["chosen"], pair["rejected"]
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Hello!', ' Hey.')
    """
    if isinstance(source, list):
        return mixed(partial(load_pairs, counts=counts, reading=reading), source, streaming)
    dataset, where, shape = read(source, split, streaming, "ranking", reading)
    if shape is not None:
        return rankings_to_pairs(canonical_rankings(dataset, where, reading, counts))
    return canonical_pairs(dataset, where, reading, counts)


def canonical_pairs(
    dataset: AnyDataset, where: Source, reading: Reading, counts: RankingCounts | None
) -> AnyDataset:
    """Pairs that were read, in one form; the rest is as in `load_pairs`."""
    first = first_record(dataset, where)
    records.require_columns(first, where, ("chosen", "rejected"), "A pair")
    dataset, first = keep_dialogue(dataset, where, first, "chosen")
    implicit = "prompt" not in first
    if implicit:
        records.check_implicit(first, where)
    else:
        dataset = take_off_prompts(dataset, where, ("chosen", "rejected"))
    form = records.form_of({"prompt": first["chosen"]} if implicit else first)
    check = partial(records.check_pair, form=form, implicit=implicit)
    dataset = reading.checked(dataset, check, where)
    counts = RankingCounts() if counts is None else counts
    where = (reading.found or [where])[-1]

    def differs(record: Record, row: int) -> bool:
        same = record["chosen"] == record["rejected"]
        if same and not counts.duplicates:
            logger.warning("%s: chosen equals rejected; such pairs are left out", where.where(row))
        counts.update(RankingCounts(1, 2 - same, 1 - same, 0, int(same), int(same)))  # of K = 2
        return not same

    none = "chosen is the same as rejected in all {} pairs."
    kept = reading.keep(dataset, differs, where, none)
    if isinstance(dataset, Dataset):
        rows = len(dataset)
        logger.info("%s: %s, %d left out", where.name, plural(rows, "pair"), rows - len(kept))
    if not implicit:
        return kept
    features = kept.features and Features({**kept.features, "prompt": kept.features["chosen"]})
    return map_records(kept, extract_prompt, features=features)


def split_by_prompt(
    dataset: Dataset, test_size: float | int, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Split rankings, pairs or any records into train and test with no prompt on both sides.

    The split depends only on the seed and the prompts' text (of messages, roles and contents), not
    on the order of rows. White space around a text or a message's content is ignored.

    Args:
        dataset: rows with `prompt`, text or messages.
        test_size: the fraction of distinct prompts to test on (between 0 and 1), or their number.

    Raises:
        InputError: a streamed dataset; no `prompt`; a side would be empty.

    >>> rows = Dataset.from_list([{"prompt": p, "n": n} for n, p in enumerate("abcabc")])
    >>> train, test = split_by_prompt(rows, test_size=1)
    >>> len(train), len(test), set(train["prompt"]) & set(test["prompt"])
    (4, 2, set())
    """
    if isinstance(dataset, IterableDataset):
        raise InputError("split_by_prompt needs all rows at once: load the data without streaming.")
    found, where = dataset.column_names, Source.of(dataset)
    records.require_columns(found, where, ("prompt",), "A split by prompt")
    keys = [_digest(seed, prompt_key(prompt)) for prompt in iterate(dataset, "prompt")]
    prompts = sorted(set(keys))
    wanted = test_size if isinstance(test_size, int) else round(test_size * len(prompts))
    if not 0 < wanted < len(prompts):
        raise InputError(
            f"test_size={test_size} puts {wanted} of {plural(len(prompts), 'distinct prompt')} on "
            "the test side; both sides need at least one. Change test_size or give more prompts."
        )
    tested = set(prompts[:wanted])
    rows: dict[bool, list[int]] = {False: [], True: []}
    for row, key in enumerate(keys):
        rows[key in tested].append(row)
    return dataset.select(rows[False]), dataset.select(rows[True])


def bootstrap(dataset: Dataset, seed: int) -> Dataset:
    """As many prompts as there are, drawn with replacement, each with all its rows (Efron 1979).

    About 63 % of the prompts are in it. The dataset is as in `split_by_prompt`.

    >>> rows = Dataset.from_list([{"prompt": p, "n": n} for n, p in enumerate("aabc")])
    >>> bootstrap(rows, seed=0)["prompt"][:]
    ['b', 'c', 'c']
    """
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(iterate(dataset, "prompt")):
        groups.setdefault(prompt_key(prompt), []).append(row)
    drawn = Random(seed).choices(list(groups.values()), k=len(groups))
    return dataset.select(sorted(row for rows in drawn for row in rows))


def _check_options(which: str, ties: str, max_pairs: int | None) -> None:
    for name, value, known in (("which", which, WHICH), ("ties", ties, TIES)):
        if value not in known:
            raise InputError(f"{name}={value!r}; one of {', '.join(known)} is needed.")
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs={max_pairs}; a number >= 1 is needed, or None for all.")


def _pair_features(features: Features, form: str, margin: bool) -> Features:
    reply = records.reply_type(features, form)
    kinds = {"prompt": features["prompt"], "chosen": reply, "rejected": reply}
    return Features({**kinds, "margin": Value("float64")} if margin else kinds)


def content_key(content: Any) -> str:
    """The text of a content, for comparisons: of messages, their roles and contents as JSON."""
    if isinstance(content, str):
        return content
    return json.dumps([[message["role"], message["content"]] for message in content])


def prompt_key(prompt: Any) -> str:
    """`content_key` of a prompt without the white space around its text or each message's."""
    if isinstance(prompt, str):
        return prompt.strip()
    return content_key([{**one, "content": (one["content"] or "").strip()} for one in prompt])


def _digest(seed: int, *texts: str) -> bytes:
    return hashlib.blake2b(json.dumps([seed, *texts]).encode(), digest_size=8).digest()


def _lot(ranking: Ranking, pair: tuple[int, int], seed: int) -> bytes:
    """The key by which a pair is drawn; for a tie it is the same in either order."""
    texts = [content_key(ranking.responses[index]) for index in pair]
    if ranking.ranks[pair[0]] == ranking.ranks[pair[1]]:
        texts.sort()
    return _digest(seed, content_key(ranking.prompt), *texts)
