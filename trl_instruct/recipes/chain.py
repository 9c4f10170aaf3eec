"""The chain of stages that led to a folder: config, metrics and logs of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from trl_instruct.configs import StageConfig
from trl_instruct.data.sources import AnyDataset, Source, first_record, name_of
from trl_instruct.errors import InputError
from trl_instruct.files import CONFIG_FILE, METRICS_FILE, read_json, read_metrics
from trl_instruct.recipes.options import check_types

STAGE_NAMES = ("pretrain", "sft", "candidates", "rm", "ppo")


class FinishedStage(NamedTuple):
    """A finished stage: folder, resolved options, metrics, and logs, oldest first."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    logs: list[dict[str, Any]]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Step and value of each log that has the metric."""
        return [(log["step"], log[name]) for log in self.logs if name in log]


def read_chain(folder: str | os.PathLike) -> dict[str, FinishedStage]:
    """The finished stage in a folder and those it came from, by name, in the order they ran.

    Their configs name the folders: model, reward model, data. Of several stages with one name,
    the nearest counts; folders that have moved are left out.

    Raises:
        InputError: the folder holds no finished stage.
    """
    path = Path(folder)
    if not _is_finished(path):
        raise InputError(
            f"{str(path)!r} holds no finished stage: {CONFIG_FILE} and {METRICS_FILE} are needed. "
            "Give the output_dir of sft, rm or ppo."
        )
    found: dict[str, FinishedStage] = {}
    waiting, seen = [path], set()
    while waiting:
        path = waiting.pop(0)
        if path.resolve() in seen or not _is_finished(path):
            continue
        seen.add(path.resolve())
        run = _read(path)
        found.setdefault(run.metrics.get("stage", ""), run)
        waiting += _came_from(run.config)
    return {name: found[name] for name in STAGE_NAMES if name in found}


def remember_reading(config: Any, *models: Any) -> None:
    """Read files as the first of the models read its own, unless the config says otherwise."""
    for model in models:
        folder = Path(name_of(model) or "nowhere")
        if not _is_finished(folder):
            continue
        given = _read(folder).config
        known = {n: given.get(n) for n in ("columns", "prompt_template", "prompt_suffix")}
        check_types(known, StageConfig, f"{folder / CONFIG_FILE}: ")
        config.remembered = config.columns is None and known["columns"] is not None
        for name, value in known.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        return


def check_format(prompts: AnyDataset, tokenizer: Any, **models: Any) -> None:
    """InputError if a model, named by its role, was trained on text and the prompts are messages.

    Or the other way round. Text that holds a special token of the template is messages already.
    """
    first = first_record(prompts, Source.of(prompts))["prompt"]
    given = "text" if isinstance(first, str) else "messages"
    if given == "text" and any(token in first for token in tokenizer.get_added_vocab()):
        return
    for role, model in models.items():
        name = name_of(model)
        known = read_metrics(name).get("format", given) if name else given
        if known != given:
            raise InputError(
                f"`prompt` is {given}, but the {role.replace('_', ' ')} {name} was trained on "
                f"{known}, as its metrics.json tells. Give the prompts as {known}."
            )


def _is_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_FILE, METRICS_FILE))


def _read(folder: Path) -> FinishedStage:
    config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    logs = read_json(folder / TRAINER_STATE_NAME).get("log_history", [])
    return FinishedStage(folder, config, read_metrics(folder), logs)


def _came_from(config: dict[str, Any]) -> Iterator[Path]:
    """Folders that a config names."""
    for name in ("model_name_or_path", "reward_model_path"):
        if isinstance(config.get(name), str):
            yield Path(config[name])
    if isinstance(config.get("dataset_name"), str):
        yield Path(config["dataset_name"]).parent
