"""Checkpoints side by side on held-out prompts: scores, win rates, KL, perplexity, fluency."""

import os
import statistics
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from accelerate import PartialState
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig
from trl_instruct.console import progress_bar, say
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import load_demonstrations, prompts_of
from trl_instruct.data.sources import name_of
from trl_instruct.errors import InputError, redact
from trl_instruct.evaluation.measurement import ModelMeasurement, Subject, measure, shown_samples
from trl_instruct.evaluation.statistics import best_of_n, distinct, repetition, win_rate
from trl_instruct.evaluation.tables import FIGURE, plot, render
from trl_instruct.files import read_metrics, write_json
from trl_instruct.intervals import mean_interval
from trl_instruct.models.properties import ModelSource, is_nameless
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.recipes.chain import check_format, remember_reading
from trl_instruct.recipes.options import data_of, named_source, stage_options
from trl_instruct.recipes.stage import StageResult, run_stage
from trl_instruct.rewards.function import RewardFunction
from trl_instruct.rewards.load import load_reward
from trl_instruct.types import Tokenizer

EVALUATION_FILE = "evaluation.json"
SAVED_SAMPLES = 20


def evaluate(
    models: Mapping[str, ModelSource],
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    judges: Mapping[str, Any] | None = None,
    demonstrations: Any = None,
    processing_class: Tokenizer | None = None,
    config: EvaluateConfig | None = None,
    model_config: ModelConfig | None = None,
    **options: Any,
) -> StageResult:
    """Measure checkpoints side by side on held-out prompts; print the table, save JSON and figure.

    One checkpoint is in memory at a time. The judges are loaded first, wait on the CPU, and score
    all completions one judge after the other. Several processes share out prompts and completions.

    Args:
        models: checkpoints by name (base, SFT, ...), each a model as in `sft` or an adapter folder.
        dataset: prompts (`prompt`; further columns reach the judges); named as in `sft`.
        output_dir: folder for evaluation.json and evaluation.png.
        judges: rewards by name, each as `load_reward` takes it: a reward model, a gold scorer, a
            classifier, the address of a served judge, ...
        demonstrations: `prompt`, `completion`, to measure the perplexity on.
        processing_class: the tokenizer of models (and judges) in memory.
        config, model_config: `EvaluateConfig` and TRL's `ModelConfig`; or their fields as
            `options`: baseline, reference, best_of_n, response_length, temperature, ...

    Returns:
        The folder, with the content of evaluation.json. `models`, by name: `scores` (per judge mean
        and 95 % interval), `win_rate` against the baseline (per judge `win_rate`), `kl` to the
        reference (nats per completion, mean over its own samples; None if their tokens differ),
        `length` (tokens, EOS included), `ended` (share with EOS), `repetition` and `distinct_1`,
        `distinct_2` (on tokens of the baseline's tokenizer), `completion_loss` (nats per token) and
        `perplexity`. `best_of_n`: the reference's curve by the first judge. `points`: lengths and
        scores per prompt. `reward_models`: accuracy and ceiling from the judges' folders.
        `samples`: the first completions.

    Raises:
        InputError: no model, an unknown baseline or reference, a bad record, a prompt too long for
            a model's context, a missing judge or model, an output_dir that is taken.
    """
    config, model_config = stage_options(
        EvaluateConfig, config, model_config, output_dir, dataset, options, trains=False
    )
    judges = judges or {}
    _check_names(models, judges, config)
    config.models, config.judges = _as_listed(models), _as_listed(judges)
    source = named_source(demonstrations, config, "demonstrations_name")
    trust: Any = {"trust_remote_code": config.trust_remote_code}
    remember_reading(config, *models.values())
    reading = Reading.of(config)
    tokenizers = _tokenizers(models, processing_class, **trust)
    tokenizer = tokenizers[config.baseline or next(iter(models))]
    given, split = data_of(dataset, config), config.dataset_train_split
    prompts = prompts_of(given, split, tokenizer, config.opening_length, reading)
    shown = None if source is None else load_demonstrations(source, reading=reading.of_another())
    for name, rows in product(models, filter(None, (prompts, shown))):
        check_format(rows, tokenizers[name], **{f"model_{name}": models[name]})
    several = config.best_of_n if judges and config.best_of_n > 1 else 0
    subject = Subject(config, model_config, dict(models), tokenizers, prompts, shown, several)
    with run_stage("evaluate", config, model_config) as run:
        how: Any = {"batch_size": config.per_device_eval_batch_size, **trust}
        rewards = {name: load_reward(j, processing_class, **how) for name, j in judges.items()}
        known = {
            name: {what: metrics[what] for what in ("accuracy", "ceiling") if what in metrics}
            for name, judge in judges.items()
            if "accuracy" in (metrics := read_metrics(judge))
        }
        run.begin()
        evaluation = {**measured_evaluation(subject, rewards), "reward_models": known}
        if run.is_main:
            write_json(run.new / EVALUATION_FILE, evaluation)
            plot(evaluation, run.new / FIGURE)
            say(render(evaluation))
            say(f"\nEvaluation: {run.folder / EVALUATION_FILE}   figure: {run.folder / FIGURE}")
        run.write_metrics({"prompts": evaluation["prompts"], "models": len(models)})
        return StageResult(run.folder, evaluation)


def _as_listed(sources: Mapping[str, Any]) -> list[str] | None:
    """The sources as the config lists them; None if one of them is only in memory."""
    listed = [f"{name}={path}" for name, source in sources.items() if (path := name_of(source))]
    return listed if len(listed) == len(sources) else None


def _check_names(
    models: Mapping[str, ModelSource], judges: Mapping[str, Any], config: EvaluateConfig
) -> None:
    """InputError for unknown or reserved names, or if output_dir would overwrite a model."""
    if not models:
        raise InputError("No model was given: set models to one or more name=folder, or Hub ids.")
    for option in ("baseline", "reference"):
        name = getattr(config, option)
        if name is not None and name not in models:
            raise InputError(f"{option} is {name!r}; the models are {', '.join(models)}.")
    for names, taken in ((models, "prompt"), (judges, "completion")):
        if taken in names:
            raise InputError(f"{taken!r} is a reserved key of the samples; choose another name.")
    real = os.path.realpath
    for source in (*models.values(), *judges.values()):
        folder = name_of(source)
        if folder and config.output_dir and real(folder) == real(config.output_dir):
            raise InputError(
                f"output_dir {config.output_dir!r} is the folder of a model, which would be lost. "
                "Choose another output_dir."
            )


def _tokenizers(
    models: Mapping[str, ModelSource], processing_class: Tokenizer | None, **trust: Any
) -> dict[str, Tokenizer]:
    """One per model; without a chat template (base models) it takes that of the first with one."""
    tokenizers = {}
    for name, source in models.items():
        given = processing_class if is_nameless(source) else None
        tokenizers[name] = load_tokenizer(source, given, **trust)
    template = next((t.chat_template for t in tokenizers.values() if t.chat_template), None)
    for tokenizer in tokenizers.values():
        tokenizer.chat_template = tokenizer.chat_template or template
    return tokenizers


def measured_evaluation(subject: Subject, rewards: dict[str, RewardFunction]) -> dict[str, Any]:
    """The content of evaluation.json, except `reward_models`."""
    drawn = len(subject.prompts) * (len(subject.models) + subject.several)
    read = len(subject.models) * len(subject.demonstrations or ())
    processes = PartialState()
    off = subject.config.disable_tqdm or not processes.is_main_process
    total = -(-(drawn * (1 + len(rewards)) + read) // processes.num_processes)
    with progress_bar("evaluate", total, unit="text", disable=off) as bar:
        models, several = measure(subject, rewards, bar.update)
    best_of = None
    if several:
        first = next(iter(rewards))
        points = best_of_n(several[first], several)
        best_of = {"model": subject.reference, "judge": first, "points": points}
    return {
        "baseline": subject.baseline,
        "reference": subject.reference,
        "prompts": len(subject.prompts),
        "judges": list(rewards),
        "models": {name: _numbers(subject, name, models) for name in models},
        "best_of_n": best_of,
        "points": {
            name: {"lengths": [len(one.ids) for one in m.sampled], "scores": m.scores}
            for name, m in models.items()
        },
        "samples": shown_samples(subject.prompts["prompt"][:SAVED_SAMPLES], models),
    }


def _numbers(subject: Subject, name: str, models: Mapping[str, ModelMeasurement]) -> dict[str, Any]:
    """The entry of one model in evaluation.json."""
    _, sampled, kl, scores, loss = models[name]
    texts = [completion.text for completion in sampled]
    spoken = subject.tokenizers[subject.baseline](texts, add_special_tokens=False)
    numbers = {
        "path": redact(name_of(subject.models[name])),
        "scores": {judge: mean_interval(s)._asdict() for judge, s in scores.items()},
        "kl": None if kl is None else statistics.fmean(kl),
        "length": statistics.fmean(len(completion.ids) for completion in sampled),
        "ended": statistics.fmean(completion.ended for completion in sampled),
        "repetition": repetition(spoken["input_ids"]),
        "distinct_1": distinct(spoken["input_ids"], 1),
        "distinct_2": distinct(spoken["input_ids"], 2),
        "perplexity": None if loss is None else torch.tensor(loss).double().exp().item(),
        "completion_loss": loss,
    }
    if name != subject.baseline:
        baseline = models[subject.baseline]
        # In characters, as in AlpacaEval, since tokenizers may differ.
        letters = [[len(one.text) for one in drawn] for drawn in (sampled, baseline.sampled)]
        numbers["win_rate"] = {
            judge: win_rate(own, baseline.scores[judge], *letters) for judge, own in scores.items()
        }
    return numbers
