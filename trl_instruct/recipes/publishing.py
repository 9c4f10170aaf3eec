"""A stage's folder on the Hub: its model card; as it is, in one commit."""

import contextlib
import copy
import math
import os
import re
from glob import escape
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers.trainer_utils import HubStrategy

from trl_instruct.configs import StageConfig
from trl_instruct.console import in_markdown, one_line
from trl_instruct.errors import located, redact
from trl_instruct.files import listed_files, read_json
from trl_instruct.models.resuming import all_checkpoints
from trl_instruct.recipes.options import option_errors
from trl_instruct.recipes.run_files import BASE, IN_CHECKPOINTS, fits

# What a checkpoint has for resuming alone.
FOR_RESUMING = {*IN_CHECKPOINTS} - {"*.model", "additional_chat_templates"}
# Of an earlier commit: an adapter beside merged weights would be applied to them.
REPLACED = "*.safetensors *.safetensors.index.json adapter_* checkpoint-* *training_args.bin"
# The metrics of a model, for the head of its card; others are of its training.
JUDGED = ["eval_loss", "accuracy", "log_loss", "objective/scores", "objective/gold", "objective/kl"]


def without_secrets(config: StageConfig) -> StageConfig:
    """The config for a trainer, which pickles it and tells trackers: no secrets, and no pushing."""
    public, known = copy.copy(config), vars(config)
    secret = {name: value for name, value in redact(known).items() if value != known[name]}
    public.__dict__.update(secret, push_to_hub=False)
    return public


def create_repository(config: StageConfig, kind: str = "model") -> str | None:
    """The id of the repository (of a model or dataset) to push to, made if missing; or None."""
    if not config.push_to_hub:
        return None
    api, revision = HfApi(token=config.hub_token), config.hub_revision
    name = config.hub_model_id or Path(str(config.output_dir)).absolute().name
    with option_errors():
        options: Any = {"repo_type": kind, "exist_ok": True}
        made = api.create_repo(name, private=config.hub_private_repo, **options)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(made.repo_id, branch=revision, **options)
    return made.repo_id


def hub_id(name: str) -> str | None:
    """The name if it looks like an id on the Hub, and nothing here has it."""
    here = os.path.exists(name) or hasattr(transformers, name)  # a model in memory has its class's
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not here else None


def origin(model: str | None, config: StageConfig) -> dict[str, Any]:
    """Base and licence of what is made from a model, as its card here or on the Hub tells."""
    known: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # there is none, or it is not as it should be
        known = ModelCard.load(Path(model or "nowhere") / "README.md").data.to_dict()
    base = (model and hub_id(model)) or known.get("base_model")
    if config.push_to_hub and base and known.get("license", "unknown") == "unknown":
        with contextlib.suppress(Exception):
            known = ModelCard.load(base, token=config.hub_token).data.to_dict()
    licence = {name: known.get(name) for name in ("license", "license_name", "license_link")}
    return {"base_model": base, **licence, "license": licence["license"] or "unknown"}


def model_card(
    folder: Path, name: str, stage: str, config: Any, base: str | None, metrics: dict[str, Any]
) -> ModelCard:
    """A stage's README.md, for the model in a folder; `name` is of its repository, `base` of the
    model that the stage started from, if any."""
    adapter = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    classes = read_json(folder / "config.json").get("architectures") or ["AutoModel"]
    names = [config.dataset_name, *(part["path"] for part in config.datasets or ())]
    source = ", ".join(filter(None, names)) or "in memory"
    task = "text-classification" if stage == "rm" else "text-generation"
    held_out = (stage != "ppo" and config.eval_dataset_name) or source
    there, here = hub_id(held_out), one_line(Path(held_out).name)  # no path of this machine
    on: Any = {"dataset_type": there or "local", "dataset_name": there or here}
    results = [
        EvalResult(task, **on, metric_type=m.rpartition("/")[2], metric_name=m, metric_value=value)
        for m, value in metrics.items()
        if m in JUDGED and math.isfinite(value)
    ]
    short = one_line(name.rpartition("/")[2])
    head = {**origin(base, config), "library_name": "peft" if adapter else "transformers"}
    head |= {"pipeline_tag": task, "tags": ["trl-instruct", "trl", stage]}
    head |= {"datasets": [name for name in names if name and hub_id(name)] or None}
    head |= {"model_name": short, "eval_results": results} if results else {}
    told: Any = {"md": in_markdown, "name": short, "repository": name, "stage": stage, "base": base}
    told |= {"source": source, "adapter": adapter, "metrics": metrics}
    own_base = adapter and Path(adapter).resolve() == Path(config.output_dir).resolve() / BASE
    told |= {"own_head": not hasattr(transformers, classes[0]), "own_base": own_base}
    told |= {"figure": next((path.name for path in folder.glob("*.png")), None)}
    template = str(Path(__file__).with_name("card.md"))
    card = ModelCard.from_template(ModelCardData(**head), template, **told)
    return ModelCard(redact(str(card)), ignore_metadata_errors=True)


def publish(folder: Path, config: StageConfig, repository: str, kind: str = "model") -> None:
    """Upload what a finished stage wrote, and the checkpoints of hub_strategy, in one commit."""
    first = {HubStrategy.CHECKPOINT: -1, HubStrategy.ALL_CHECKPOINTS: 0}.get(config.hub_strategy)
    names = list(listed_files(folder))
    for checkpoint in [] if first is None else all_checkpoints(folder)[first:]:
        held = (n for n in listed_files(checkpoint) if not fits(n.partition("/")[0], FOR_RESUMING))
        names += [f"{checkpoint.name}/{name}" for name in held]
    with located(f"The result is in {folder}, but it is not on the Hub"), option_errors():
        HfApi(token=config.hub_token).upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message="End of training",
            revision=config.hub_revision,
            allow_patterns=[escape(name) for name in names],
            delete_patterns=REPLACED.split(),
        )
