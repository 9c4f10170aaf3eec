"""Several reward models from the same rankings, and the average of their weights."""

import copy
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard
from torch import nn
from torch.optim.swa_utils import AveragedModel
from trl import ModelConfig

from trl_instruct.configs import RewardConfig
from trl_instruct.console import in_markdown, say, table
from trl_instruct.data.preferences import Preferences
from trl_instruct.errors import InputError
from trl_instruct.files import write_json
from trl_instruct.intervals import show_interval
from trl_instruct.models.load import empty_folder, load_reward_model
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.recipes.stage import StageResult, output_folder
from trl_instruct.reward_trainer.evaluation import evaluate_members
from trl_instruct.rewards.function import place_on
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.tokens import same_tokenizer
from trl_instruct.scalar_head import keep_shift, shift_of
from trl_instruct.types import Tokenizer

MEMBERS_APART = 10_007  # seeds of two members' heads
MEMBERS_FILE = "members.json"


def train_members(
    train: Callable[..., StageResult],
    load: Callable[[Tokenizer], Preferences],
    model: ModelSource,
    config: RewardConfig,
) -> StageResult:
    """Train `config.members` reward models in member-1, member-2, ...; each as `rm` leaves it.

    `train` is `rm`, called with a member's config, and `load` reads the preferences; what is held
    out is the same for all. Returns output_dir, with the members' folders and `evaluate_members`.
    """
    folder = output_folder("rm", config)
    if isinstance(model, nn.Module):
        raise InputError(
            "members start from the same model, and the first would train the one that was given. "
            "Give its folder or Hub id."
        )
    results: list[StageResult] = []
    for number in range(1, config.members + 1):
        own = copy.copy(config)
        own.members, own.member = 1, number
        own.output_dir = str(folder / f"member-{number}")
        results.append(train(config=own))
        if config.faults is not None:
            return results[0]
    folders = [str(result) for result in results]
    metrics: dict[str, Any] = {"members": folders}
    if "accuracy" in results[0].metrics:
        metrics["members_accuracy"] = [result.metrics["accuracy"] for result in results]
        trust: Any = {"trust_remote_code": config.trust_remote_code}
        tokenizer = load_tokenizer(folders[0], **trust)
        rewards = [load_reward(folder, **trust) for folder in folders]
        for reward in rewards:
            place_on(reward, PartialState().device)
        metrics |= evaluate_members(rewards, load(tokenizer).held_out, tokenizer)
    if PartialState().is_main_process:
        write_json(folder / MEMBERS_FILE, metrics)
        say(render(metrics))
    PartialState().wait_for_everyone()
    return StageResult(folder, metrics)


def render(metrics: dict[str, Any]) -> str:
    """What the members achieve together, as plain-text tables."""
    if "accuracy" not in metrics:
        return f"{len(metrics['members'])} members"
    alone = ", ".join(f"{accuracy:.3f}" for accuracy in metrics["members_accuracy"])
    rows = [["members against their mean", "its error (95 %)", "disagreement", "pairs"]]
    for part in metrics["by_dissent"]:
        told = show_interval(part["error"]), f"{part['disagreement']:.3f}", f"{part['pairs']:,}"
        rows.append([str(part["dissent"]), *told])
    accuracy = show_interval(metrics["accuracy"])
    return "\n".join([f"accuracy alone {alone}; of their mean {accuracy}", *table(rows)])


def average(
    models: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Average the weights of reward models into one: WARM (Rame et al. 2024), no cost in PPO.

    The models, folders or Hub ids, must have started from the same weights: `rm` with
    `members`. Adapters are merged into their base. The shift is the mean of theirs. Returns the new
    or empty folder, which plain transformers loads. InputError for other shapes or tokenizers, an
    output_dir that is not empty, and as in `load_reward_model`.
    """
    folder = empty_folder(output_dir)
    if len(models) < 2:
        raise InputError("average needs two or more reward models, and a folder for the result.")
    trust: Any = {"trust_remote_code": trust_remote_code}
    first = load_reward_model(models[0], ModelConfig(), **trust)
    tokenizer = load_tokenizer(models[0], **trust)
    averaged, shifts = AveragedModel(first), []
    for source in models:
        model = load_reward_model(source, ModelConfig(), **trust)
        same = [p.shape for p in model.parameters()] == [p.shape for p in first.parameters()]
        if not same or not same_tokenizer(load_tokenizer(source, **trust), tokenizer):
            raise InputError(
                f"{os.fspath(source)!r} has another shape or tokenizer than "
                f"{os.fspath(models[0])!r}; only models that started from one can be averaged."
            )
        averaged.update_parameters(model)
        shifts.append(shift_of(model))
    result: Any = averaged.module
    keep_shift(result, statistics.fmean(shifts), getattr(first.config, "reward_std", 0.0))
    for part in (result, tokenizer):
        part.save_pretrained(folder)
    names = ", ".join(in_markdown(Path(source).name) for source in models)
    head = "library_name: transformers\npipeline_tag: text-classification\ntags: [trl-instruct, rm]"
    ModelCard(
        f"---\n{head}\n---\n\n# {in_markdown(folder.name)}\n\nA reward model: the average of the "
        f"weights of {names}, by `trl-instruct average` (Rame et al. 2024, [WARM]"
        "(https://arxiv.org/abs/2401.12187)). Its config holds the mean of their shifts.\n"
    ).save(folder / "README.md")
    return folder
