"""The chain of stages that led to a folder: config, metrics and logs of each."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from trl_instruct.configs import StageConfig
from trl_instruct.data.sources import AnyDataset, Source, first_record, name_of
from trl_instruct.errors import InputError, kind_of
from trl_instruct.files import CONFIG_FILE, METRICS_FILE, nulls_as_nan
from trl_instruct.recipes.options import check_types

STAGE_NAMES = ("pretrain", "sft", "candidates", "rm", "ppo")


class FinishedStage(NamedTuple):
    """A finished stage: folder, resolved options, metrics, logs (oldest first), missing parts."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    logs: list[dict[str, Any]]
    gaps: tuple[str, ...] = ()

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Step and value of each log that has the metric."""
        return [(log["step"], log[name]) for log in self.logs if name in log]

    def values(self, name: str) -> list[float]:
        """The metric in each log that has it."""
        return [log[name] for log in self.logs if name in log]


def read_chain(folder: str | os.PathLike) -> dict[str, FinishedStage]:
    """The finished stage in a folder and those it came from, by name, in the order they ran.

    Their configs name the folders. Of several stages with one name, the nearest counts. A folder
    that is gone or damaged is a gap of the stage that names it.
    """
    run = _read(Path(folder))
    if run is None:
        raise InputError(
            f"{os.fspath(folder)!r} holds no finished stage: {CONFIG_FILE} and {METRICS_FILE}, as "
            "sft, rm and ppo write them, are needed. Give the output_dir of one of these."
        )
    found: dict[str, FinishedStage] = {}
    waiting, seen = [run], set()
    while waiting:
        run = waiting.pop(0)
        if run.folder.resolve() in seen:
            continue
        seen.add(run.folder.resolve())
        earlier, gaps = _came_from(run)
        found.setdefault(run.metrics["stage"], run._replace(gaps=gaps))
        waiting += earlier
    return {name: found[name] for name in STAGE_NAMES if name in found}


def remember_reading(config: Any, *models: Any) -> None:
    """Read files as the first of the models read its own, unless the config says otherwise."""
    for model in models:
        run = _read(Path(name_of(model) or "nowhere"))
        if run is None:
            continue
        known = {n: run.config.get(n) for n in ("columns", "prompt_template", "prompt_suffix")}
        check_types(known, StageConfig, f"{run.folder / CONFIG_FILE}: ")
        config.remembered = config.columns is None and known["columns"] is not None
        for name, value in known.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        return


def known_form(model: Any) -> str | None:
    """ "text" or "messages", if a model is the result of a stage that tells on which it trained."""
    run = _read(Path(name_of(model) or "nowhere"))
    return run.metrics.get("format") if run else None


def check_format(prompts: AnyDataset, tokenizer: Any, **models: Any) -> None:
    """InputError if the prompts are messages and a model, by its role, knows text; or reverse."""
    first = first_record(prompts, Source.of(prompts))["prompt"]
    given = "text" if isinstance(first, str) else "messages"
    if given == "text" and any(token in first for token in tokenizer.get_added_vocab()):
        return  # text with the special tokens of a template is messages already
    for role, model in models.items():
        known = known_form(model)
        if known and known != given:
            raise InputError(
                f"`prompt` is {given}, but the {role.replace('_', ' ')} {name_of(model)} was "
                f"trained on {known}, as its metrics.json tells. Give the prompts as {known}."
            )


def _read(folder: Path) -> FinishedStage | None:
    """The finished stage in a folder, None if it holds none; InputError for damaged files."""
    files = (folder / name for name in (CONFIG_FILE, METRICS_FILE, TRAINER_STATE_NAME))
    (config, metrics, state), faults = zip(*map(_parsed, files), strict=True)
    finished = metrics.get("stage") in STAGE_NAMES
    fault = next(filter(None, faults), None)
    if fault and (finished or {"output_dir", "dataset_name"} <= set(config)):
        raise InputError(f"The stage in {str(folder)!r} is damaged: {fault}. Run it again.")
    if not finished or not os.path.isfile(folder / CONFIG_FILE):
        return None
    return FinishedStage(folder, config, nulls_as_nan(metrics), state.get("log_history", []))


def _parsed(path: Path) -> tuple[dict[str, Any], str | None]:
    """The mapping in a JSON or YAML file, {} if there is none, and what is wrong with the file."""
    try:
        text = path.read_text(encoding="utf-8") if os.path.isfile(path) else "{}"
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, f"{path.name}: {' '.join(str(error).split())}"
    fault = None if isinstance(content, dict) else f"{path.name} holds {kind_of(content)}"
    return {} if fault else content, fault


def _came_from(run: FinishedStage) -> tuple[list[FinishedStage], tuple[str, ...]]:
    """The finished stages that a config names, and what is wrong with those that are not there."""
    earlier, gaps = [], []
    for name in ("model_name_or_path", "reward_model_path", "dataset_name"):
        given = run.config.get(name)
        given = given[0] if isinstance(given, list) and given else given  # of an ensemble
        if not isinstance(given, str):
            continue
        try:
            if found := _read(Path(given).parent if name == "dataset_name" else Path(given)):
                earlier.append(found)
            elif not (os.path.exists(given) or ".py:" in given) and (
                os.path.isabs(given) or os.path.isdir(os.path.dirname(given))  # no Hub id
            ):
                gaps.append(f"{name} is {given!r}, which is gone")
        except InputError as error:
            gaps.append(str(error))
    return earlier, tuple(gaps)
