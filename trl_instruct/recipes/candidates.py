"""Between stages 1 and 2: sample K completions per prompt for a labeler to rank."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from trl_instruct.configs import CandidatesConfig
from trl_instruct.console import progress_bar
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.records import prompts_of
from trl_instruct.errors import InputError
from trl_instruct.files import written_at_once
from trl_instruct.generation.sampling import Completion, Sampling, prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource, model_name
from trl_instruct.models.tokenizers import check_tokenizer, load_tokenizer
from trl_instruct.recipes.chain import check_format, remember_reading
from trl_instruct.recipes.dry_run import fitting
from trl_instruct.recipes.options import data_of, held_out_of, stage_options
from trl_instruct.recipes.stage import StageResult, run_stage
from trl_instruct.rewards.function import RewardFunction, as_completions, call_reward, place_on
from trl_instruct.rewards.load import load_reward
from trl_instruct.tiny import SimulatedLabeler

Labeler = Callable[[Sequence[float]], Sequence[float]]


def candidates(config: CandidatesConfig, model_config: ModelConfig) -> StageResult:
    """The stage: write train.jsonl and, if there is an eval dataset, test.jsonl.

    Only the main process samples: all processes would write the same file.
    """
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
        if not run.is_main:
            return StageResult(run.folder)
        same = "num_candidates response_length opening_length max_prompt_length temperature"
        same += " stop_strings gold seed trust_remote_code"
        options: Any = {name: getattr(config, name) for name in same.split()}
        options |= {"model_config": model_config, "batch_size": config.per_device_eval_batch_size}
        metrics = {}
        for name, (source, split) in sources.items():
            options |= {"split": split, "reading": Reading.of(config, strict=name == "train")}
            counts = sample_candidates(policy, source, run.new / f"{name}.jsonl", **options)
            metrics[name] = counts
            told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
            run.say(f"{run.folder / name}.jsonl: {told}")
        return StageResult(run.folder, run.write_metrics(metrics))


def sample_candidates(
    policy: ModelSource,
    prompts: Any,
    output_file: str | os.PathLike,
    *,
    num_candidates: int = 4,
    response_length: int = 53,
    opening_length: int | None = None,
    max_prompt_length: int | None = None,
    temperature: float = 1.0,
    stop_strings: Sequence[str] | None = None,
    gold: Any = None,
    labeler: Labeler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    split: str = "train",
    processing_class: PreTrainedTokenizerBase | None = None,
    model_config: ModelConfig | None = None,
    reading: Reading = AS_PUBLISHED,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Sample K completions per prompt into a file for ranking (InstructGPT 3.5).

    Each line has the prompt's columns, `responses` and an empty `ranks` for a person to fill in
    (1 = best, equal = tie). With `gold`, a simulated labeler gives `scores` instead, and
    `gold_scores` are its scores without noise.

    Args:
        policy: usually the SFT model.
        output_file: a .jsonl path.
        num_candidates: K; the paper's labelers saw 4 to 9.
        response_length: longest completion, tokens.
        opening_length: of each `text`, this many first tokens are its prompt; None: `prompt` is.
        max_prompt_length: longer prompts lose their beginning; None: they are an error.
        stop_strings: texts that end a completion, besides EOS; they are cut off.
        gold: the reward that the simulated labeler uses, as in `load_reward`.
        labeler: gold scores of one prompt's candidates -> its own scores; default: gaussian noise
            at which two labelers agree on 73 % of pairs.
        seed: for sampling and labeler.
        batch_size: completions per forward pass.
        processing_class: the policy's tokenizer, if it is not in the policy's folder.
        model_config: how to load the policy: dtype, `load_in_8bit`, ...
        reading: names of columns, the prompts' template, what to do with a faulty record.
        trust_remote_code: whether models from the Hub may run their own code.

    Returns:
        Counts: prompts, prompts_cut (at max_prompt_length), responses, empty (completions without
        text, left out), duplicates (repeats of a prompt's completion, left out) and
        prompts_left_out (fewer than two responses: nothing to rank).

    Raises:
        InputError: num_candidates below 2, bad prompts, no policy, a tokenizer without EOS, or an
            output_file in which people have filled in ranks.
    """
    if num_candidates < 2:
        raise InputError(f"num_candidates is {num_candidates}; a ranking needs at least 2.")
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}; to sample, it must be above 0.")
    _check_unranked(Path(output_file))
    trust: Any = {"trust_remote_code": trust_remote_code}
    own = processing_class or load_tokenizer(policy, **trust)
    tokenizer = check_tokenizer(own, model_name(policy))
    model = load_policy(policy, model_config or ModelConfig(), **trust).to(PartialState().device)
    records = prompts_of(prompts, split, tokenizer, opening_length, reading)
    check_format(records, tokenizer, policy=policy)
    lengths = response_length, max_prompt_length
    sampling = Sampling(*lengths, stop_strings, temperature, batch_size)
    records = fitting(records, tokenizer, model, reading, sampling)
    token_lists, cut = prompt_tokens(records[:], tokenizer, model, sampling)
    if gold is not None:
        gold = load_reward(gold, tokenizer, batch_size=batch_size, **trust)
        place_on(gold, model.device)
        labeler = labeler or SimulatedLabeler(seed=seed).label
    set_seed(seed)
    counts = {"prompts": len(records), "prompts_cut": cut}
    counts |= dict.fromkeys(("responses", "empty", "duplicates", "prompts_left_out"), 0)
    total = len(records) * num_candidates
    with (
        progress_bar("candidates", total, unit="text") as bar,
        written_at_once(Path(output_file)) as file,
    ):
        given = model, tokenizer, token_lists, num_candidates
        several = sample_several(*given, sampling, bar.update)
        for record, drawn in zip(records, several, strict=True):
            ranking = _ranking(record, drawn, gold, labeler, counts)
            if ranking is not None:
                file.write(json.dumps(ranking, ensure_ascii=False) + "\n")
    return counts


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
    counts: dict[str, int],
) -> dict[str, Any] | None:
    """One record to rank, or None (counted) if there is nothing to rank."""
    written = [completion for completion in drawn if completion.text.strip()]
    distinct: dict[str, list[int]] = {}
    for completion in written:
        distinct.setdefault(*completion)
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
