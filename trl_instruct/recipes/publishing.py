"""A stage's folder on the Hub: its model card; as it is, in one commit."""

import copy
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from trl_instruct.configs import StageConfig
from trl_instruct.console import in_markdown
from trl_instruct.errors import located, redact
from trl_instruct.files import CONFIG_FILE, listed_files
from trl_instruct.models.resuming import PPO_STATE, all_checkpoints
from trl_instruct.recipes.options import option_errors

# What only resuming needs, or nobody: the pickled arguments, the value model, PPO's progress.
PRIVATE = {TRAINING_ARGS_NAME, "value_model", PPO_STATE}
# Of an earlier commit: an adapter beside merged weights would be applied to them.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "adapter_*", f"*{TRAINING_ARGS_NAME}"]


def without_secrets(config: StageConfig) -> StageConfig:
    """The config for a trainer, which pickles it and tells trackers: no secrets, and no pushing."""
    public, known = copy.copy(config), vars(config)
    secret = {name: value for name, value in redact(known).items() if value != known[name]}
    public.__dict__.update(secret, push_to_hub=False)
    return public


def create_repository(config: StageConfig) -> str | None:
    """The id of the repository to push to, made if it is missing; None without push_to_hub.

    InputError if the Hub does not answer, or does not know the user.
    """
    if not config.push_to_hub:
        return None
    api, revision = HfApi(token=config.hub_token), config.hub_revision
    name = config.hub_model_id or Path(str(config.output_dir)).absolute().name
    with option_errors():
        made = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    return made.repo_id


def model_card(folder: Path, stage: str, config: StageConfig, metrics: dict[str, Any]) -> ModelCard:
    """A stage's README.md: what was trained, on which data, with which metrics."""
    source = in_markdown(str(redact(config.dataset_name)))
    tags = ["trl-instruct", "trl", stage]
    data = ModelCardData(library_name="transformers", tags=tags)
    rows = [
        f"| {in_markdown(k)} | {v:.6g} |" for k, v in metrics.items() if isinstance(v, (int, float))
    ]
    text = [
        f"---\n{data.to_yaml()}\n---",
        f"# {in_markdown(folder.name)}",
        f"Made by the `{stage}` stage of trl-instruct, from the data {source}. All options "
        f"are in `{CONFIG_FILE}`.",
        "| metric | value |\n|---|---|\n" + "\n".join(rows),
        "Method: Ouyang et al. 2022, [Training language models to follow instructions with "
        "human feedback](https://arxiv.org/abs/2203.02155).",
    ]
    return ModelCard(redact("\n\n".join(text)), ignore_metadata_errors=True)


def publish(folder: Path, config: StageConfig, repository: str) -> None:
    """Upload what a finished stage wrote, and the checkpoints that hub_strategy asks for, in one
    commit to the repository (as `create_repository` returned it); InputError if the Hub refuses.
    """
    first = {HubStrategy.CHECKPOINT: -1, HubStrategy.ALL_CHECKPOINTS: 0}.get(config.hub_strategy)
    checkpoints = [] if first is None else all_checkpoints(folder)[first:]
    states = (path.relative_to(folder).as_posix() for c in checkpoints for path in c.rglob("*"))
    names = [name for name in (*listed_files(folder), *states) if not PRIVATE & {*name.split("/")}]
    with located(f"The result is in {folder}, but it is not on the Hub"), option_errors():
        HfApi(token=config.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="End of training",
            revision=config.hub_revision,
            allow_patterns=[escape(name) for name in names],
            delete_patterns=REPLACED,
        )
