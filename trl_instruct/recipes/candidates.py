"""Between stages 1 and 2: sample K completions per prompt for a labeler to rank."""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from trl import ModelConfig

from trl_instruct.configs import CandidatesConfig
from trl_instruct.console import progress_bar
from trl_instruct.data.exports import write_card
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import prompts_of
from trl_instruct.errors import InputError
from trl_instruct.files import written_at_once
from trl_instruct.generation.engines import begun
from trl_instruct.generation.sampling import Completion, Sampling, prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.precision import frozen_dtype
from trl_instruct.models.processes import seed_process, shared_out
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.recipes.chain import check_format, remember_reading
from trl_instruct.recipes.dry_run import fitting
from trl_instruct.recipes.options import data_of, held_out_of, stage_options
from trl_instruct.recipes.stage import StageResult, run_stage
from trl_instruct.rewards.function import RewardFunction, as_completions, call_reward, place_on
from trl_instruct.rewards.load import load_reward
from trl_instruct.tiny import SimulatedLabeler
from trl_instruct.types import Tokenizer

Labeler = Callable[[Sequence[float]], Sequence[float]]


def candidates(config: CandidatesConfig, model_config: ModelConfig) -> StageResult:
    """The stage: write train.jsonl and, if there is an eval dataset, test.jsonl."""
    config, model_config = stage_options(
        CandidatesConfig, config, model_config, None, config.dataset_name, {}, trains=False
    )
    policy = model_config.model_name_or_path
    remember_reading(config, policy)
    sources = {"train": (data_of(config.dataset_name, config), config.dataset_train_split)}
    test = held_out_of(config.dataset_name, None, config)
    if test is not None:
        sources["test"] = test
    if config.output_dir:
        for written in Path(config.output_dir).glob("*.jsonl"):
            _check_unranked(written)
    with run_stage("candidates", config, model_config) as run:
        run.begin()
        metrics = {}
        for name, (source, split) in sources.items():
            own: Any = copy.copy(config)
            own.datasets, own.dataset_config, own.dataset_train_split = None, None, split
            own.remembered |= name == "test"  # it need not have the columns of the other
            given = {"config": own, "model_config": model_config}
            counts = sample_candidates(policy, source, run.new / f"{name}.jsonl", **given)
            metrics[name] = counts
            told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
            run.say(f"{run.folder / name}.jsonl: {told}")
        prompts, labeler = config.dataset_name or "several data sets", config.gold or "nobody yet"
        made = f"{config.num_candidates} completions for each prompt of {prompts}, sampled from "
        made += f"{policy}; ranked by {labeler}"
        if run.is_main:
            write_card(run.new, run.repository or run.folder.name, made)
        return run.write_metrics(metrics)


def sample_candidates(
    policy: ModelSource,
    prompts: Any,
    output_file: str | os.PathLike,
    *,
    gold: Any = None,
    labeler: Labeler | None = None,
    processing_class: Tokenizer | None = None,
    config: CandidatesConfig | None = None,
    model_config: ModelConfig | None = None,
    **options: Any,
) -> dict[str, int]:
    """Sample K completions per prompt into a file for ranking (InstructGPT 3.5).

    Each line has the prompt's columns, `responses` and an empty `ranks` for a person to fill in
    (1 = best, equal = tie). With `gold`, a simulated labeler gives `scores` instead, and
    `gold_scores` are its scores without noise. Several processes share out the prompts.

    Args:
        policy: usually the SFT model.
        prompts: prompts, or with `opening_length` texts; named as in `sft`.
        output_file: a .jsonl path.
        gold: the reward that the simulated labeler uses, as in `load_reward`.
        labeler: gold scores of one prompt's candidates -> its own scores; default: gaussian noise
            at which two labelers agree on 73 % of pairs.
        processing_class: the policy's tokenizer, if it is not in the policy's folder.
        config, model_config, options: as in `sft`, with `CandidatesConfig` (num_candidates, ...).

    Returns:
        Counts: prompts, prompts_cut (at max_prompt_length), responses, empty (completions without
        text, left out), duplicates (repeats of a prompt's completion, left out) and
        prompts_left_out (fewer than two responses: nothing to rank).

    Raises:
        InputError: num_candidates below 2, bad prompts, no policy, a tokenizer without EOS, or an
            output_file in which people have filled in ranks.
    """
    config, model_config = stage_options(
        CandidatesConfig, config, model_config, None, prompts, options, trains=False
    )
    count, size = config.num_candidates, config.per_device_eval_batch_size
    path, reading = Path(output_file), Reading.of(config)
    _check_unranked(path)
    trust: Any = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(policy, processing_class, **trust)
    model = load_policy(policy, model_config, **trust).to(PartialState().device)
    source = data_of(prompts, config), config.dataset_train_split
    records = prompts_of(*source, tokenizer, config.opening_length, reading)
    check_format(records, tokenizer, policy=policy)
    sampling = Sampling.of(config, size)
    records = fitting(records, tokenizer, model, reading, sampling)
    token_lists, cut = prompt_tokens(records[:], tokenizer, model, sampling)
    gold = config.gold if gold is None else gold
    if gold is not None:
        gold = load_reward(gold, tokenizer, batch_size=size, **trust)
        place_on(gold, model.device, frozen_dtype(config))
        noise = config.seed + PartialState().process_index
        labeler = labeler or SimulatedLabeler(seed=noise).label
    sampler = begun(model, tokenizer, config)
    seed_process(config.seed)
    counts = Counter(responses=0, empty=0, duplicates=0, prompts_left_out=0)

    def rankings(rows: list[int]) -> list[str]:
        """Lines of the file for these records."""
        asked, main = [token_lists[row] for row in rows], PartialState().is_main_process
        with progress_bar("candidates", len(rows) * count, unit="text", disable=not main) as bar:
            several = sample_several(sampler, asked, count, sampling, bar.update)
            drawn = zip(records.select(rows), several, strict=True)
            made = [_ranking(record, texts, gold, labeler, counts) for record, texts in drawn]
        return [json.dumps(one, ensure_ascii=False) for one in made if one is not None]

    lines = shared_out(range(len(records)), rankings)
    total = {name: sum(c[name] for c in gather_object([counts])) for name in counts}
    if PartialState().is_main_process:
        with written_at_once(path) as file:
            file.writelines(f"{line}\n" for line in lines)
    return {"prompts": len(records), "prompts_cut": cut, **total}


def _check_unranked(path: Path) -> None:
    """InputError if somebody has ranked candidates in a file: they are not written over."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if ranked := len(re.findall(r'"ranks"\s*:\s*(?!null)\S', text)):
        raise InputError(
            f"{str(path)!r} holds {ranked} rankings that somebody filled in; new candidates would "
            "replace them. Move the file to another folder, and name it there as dataset_name of "
            "rm; or choose another output_dir."
        )


def _ranking(
    record: dict[str, Any],
    drawn: list[Completion],
    gold: RewardFunction | None,
    labeler: Labeler | None,
    counts: Counter[str],
) -> dict[str, Any] | None:
    """One record to rank, or None (counted) if there is nothing to rank."""
    written = [completion for completion in drawn if completion.text.strip()]
    distinct: dict[str, list[int]] = {}
    for completion in written:
        distinct.setdefault(completion.text, completion.ids)
    counts["empty"] += len(drawn) - len(written)
    counts["duplicates"] += len(written) - len(distinct)
    if len(distinct) < 2:
        counts["prompts_left_out"] += 1
        return None
    counts["responses"] += len(distinct)
    prompt = record["prompt"]
    responses = as_completions([prompt], list(distinct))
    if gold is None or labeler is None:
        return {**record, "responses": responses, "ranks": None}
    columns = {k: [v] * len(distinct) for k, v in record.items() if k != "prompt"}
    columns["completion_ids"] = list(distinct.values())
    gold_scores = call_reward(gold, [prompt] * len(distinct), responses, columns)
    scores = list(labeler(gold_scores))
    return {**record, "responses": responses, "scores": scores, "gold_scores": gold_scores}
