"""push_to_hub: the stage's folder as it is, in one commit, on a Hub that is a folder here."""

import fnmatch
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM, PeftModel
from test_recipes import DEMONSTRATIONS, LORA, PROMPTS, QUICK, QUICK_PPO, RANKINGS, vowels, write
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig

from trl_instruct.configs import CandidatesConfig, PPOConfig, RewardConfig, SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.recipes.candidates import candidates
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.publishing import model_card
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft

pytestmark = pytest.mark.slow  # whole stages

SECRETS = ("s3cret-token", "s3cret-password", "s3cret-key")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was asked of the Hub, by its folder in `hub.folder`."""
    calls = SimpleNamespace(made=[], branches=[], commits=[], folder=tmp_path / "hub")

    def create_repo(api, name, *, token=None, **options):
        calls.made.append((name, token or api.token, options))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def create_branch(api, name, *, branch, exist_ok, repo_type):
        calls.branches.append((name, branch))

    def upload_folder(
        api, *, repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **options
    ):
        root, target = Path(folder_path), calls.folder / repo_id
        found = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        taken = set(filter_repo_objects(found, **patterns))
        for pattern in options.pop("delete_patterns", ()):
            for path in [p for p in target.rglob("*") if p.is_file()]:
                if fnmatch.fnmatch(path.relative_to(target).as_posix(), pattern):
                    path.unlink()
        for name in taken:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target / name)
        calls.commits.append((repo_id, taken, options))
        return SimpleNamespace(done=lambda: True)  # a future, for whom one is made

    for method in (create_repo, create_branch, upload_folder):
        monkeypatch.setattr(HfApi, method.__name__, method)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda folder: folder)
    return calls


def logits(model):
    return model(torch.tensor([[72, 105, 32]])).logits.detach()


def test_merged_weights_alone(hub, saved_policy, tmp_path):
    stale = hub.folder / "me" / "mine" / "adapter_config.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    (stale.parent / "LICENSE").touch()
    options = {**QUICK, **LORA, "push_to_hub": True, "merge_adapter": True, "hub_token": SECRETS[0]}
    options |= {"save_strategy": "steps", "save_steps": 1, "hub_private_repo": True}
    demonstrations = Dataset.from_list(DEMONSTRATIONS)
    folder = sft(saved_policy, demonstrations, tmp_path / "mine", **options).path
    asked = {"private": True, "exist_ok": True, "repo_type": "model"}
    assert hub.made == [("mine", SECRETS[0], asked)]
    [(name, files, options)] = hub.commits
    assert (name, options["revision"], options["repo_type"]) == ("me/mine", None, "model")
    assert {"model.safetensors", "config.json", "README.md", "metrics.json"} <= files
    assert not any("checkpoint" in f or "adapter" in f or f.endswith(".bin") for f in files)
    published = hub.folder / name
    assert not stale.exists() and (published / "LICENSE").exists()
    assert (published / "README.md").read_text() == (folder / "README.md").read_text()
    assert "trl-instruct" in (published / "README.md").read_text()
    mine = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(as_the_card_says(published)), logits(mine))


def as_the_card_says(folder):
    """The model that the code in a published card loads, here from the Hub's folder."""
    [code] = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(code.replace(f'"me/{folder.name}"', repr(str(folder))), found)
    assert found["tokenizer"]("a").input_ids
    return found["model"]


class Tracker(TrainerCallback):
    """Keeps what a tracker would send on, and writes a file of its own."""

    def on_train_begin(self, args, state, control, **kwargs):
        (Path(args.output_dir) / "notes.txt").touch()
        self.told = args.to_json_string() + str(args.to_sanitized_dict()) + str(vars(args))


def test_an_adapter_with_its_checkpoints_and_no_secret(hub, saved_policy, tmp_path, capsys):
    adapter = tmp_path / "sft"
    sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), adapter, **QUICK, **LORA)
    tracker, prompts = Tracker(), Dataset.from_list(PROMPTS)
    address = f"http://me:{SECRETS[1]}@host/score?api_key={SECRETS[2]}"
    options = {**QUICK_PPO, **LORA, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    options |= {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_token": SECRETS[0]}
    options |= {"hub_model_id": "us/aligned", "hub_revision": "dev", "callbacks": [tracker]}
    options["reward_model_path"] = address
    (tmp_path / "ppo").mkdir()
    folder = ppo(adapter, vowels, prompts, tmp_path / "ppo", **options).path
    [(name, files, options)] = hub.commits
    assert (name, options["revision"], hub.branches) == ("us/aligned", "dev", [(name, "dev")])
    assert (folder / "checkpoint-1").is_dir() and (
        folder / "checkpoint-2" / "optimizer.pt"
    ).exists()
    model = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    model |= {"tokenizer.json", "tokenizer_config.json", "trainer_state.json"}
    checkpoint = {f for f in files if f.startswith("checkpoint")}
    assert checkpoint == {f"checkpoint-2/{name}" for name in model}
    own = {"config.yaml", "metrics.json", "ppo.png", "base_fingerprint.txt"}
    assert files - checkpoint == model | own
    base = [AutoModelForCausalLM.from_pretrained(saved_policy) for _ in range(3)]
    published, start = (
        logits(PeftModel.from_pretrained(model, path))
        for model, path in zip(base[:2], (hub.folder / name, adapter), strict=True)
    )
    assert not torch.equal(published, start) and not torch.equal(start, logits(base[2]))

    assert not [*folder.rglob("training_args.bin")]
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    said = capsys.readouterr()
    for secret in SECRETS:
        assert not any(secret.encode() in content for content in written)
        assert secret not in said.out + said.err + tracker.told
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["reward_model_path"] == "http://***@host/score?api_key=***"
    assert (saved["push_to_hub"], saved["hub_revision"]) == (True, "dev")


def test_a_saved_config_asks_for_its_secrets(saved_policy, tmp_path):
    options = {**QUICK, "run_name": f"http://me:{SECRETS[0]}@host", "hub_token": SECRETS[1]}
    demonstrations = Dataset.from_list(DEMONSTRATIONS)
    folder = sft(saved_policy, demonstrations, tmp_path / "sft", **options).path
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["run_name"] == "http://***@host" and "hub_token" not in saved
    again = {**saved, "output_dir": str(tmp_path / "again")}
    ready = SFTConfig(**{k: v for k, v in again.items() if k != "model_name_or_path"})
    for given in ({"config": ready}, again):
        with pytest.raises(InputError, match="is .*: no secret is .* Give run_name again"):
            sft(saved_policy, demonstrations, **given)


def test_a_hub_that_does_not_answer(hub, monkeypatch, saved_policy, tmp_path):
    """Known before the first step; after the last one, the result is there."""

    def fails(*args, **options):
        raise ConnectionError("no network")

    options = {**QUICK, "push_to_hub": True, "output_dir": str(tmp_path / "sft")}
    demonstrations = Dataset.from_list(DEMONSTRATIONS)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no network"):
        patch.setattr(HfApi, "create_repo", fails)
        sft(saved_policy, demonstrations, **options)
    assert not (tmp_path / "sft").exists()
    monkeypatch.setattr(HfApi, "upload_folder", fails)
    with pytest.raises(InputError, match="result is in .*sft, but it is not on the Hub: no netw"):
        sft(saved_policy, demonstrations, **options)
    assert (tmp_path / "sft" / "metrics.json").is_file()


def test_an_adapter_brings_the_base_that_nobody_else_has(hub, policy, tokenizer, tmp_path):
    options = {**QUICK, **LORA, "push_to_hub": True, "processing_class": tokenizer}
    sft(policy, Dataset.from_list(DEMONSTRATIONS), tmp_path / "mine", **options)
    torch.testing.assert_close(
        logits(as_the_card_says(hub.folder / "me" / "mine")),
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine")),
    )


def test_a_reward_model_with_its_accuracy_and_figure(hub, saved_policy, tmp_path):
    options = {**QUICK, "push_to_hub": True, "eval_size": 0.25}
    result = rm(saved_policy, Dataset.from_list(RANKINGS), tmp_path / "mine", **options)
    published = hub.folder / "me" / "mine"
    card = ModelCard.load(published / "README.md")
    [found] = [r for r in card.data.eval_results if r.metric_type == "accuracy"]
    assert (found.metric_value, found.task_type) == (
        result.metrics["accuracy"],
        "text-classification",
    )
    assert "![Curves](rm.png)" in card.text and (published / "rm.png").is_file()
    assert as_the_card_says(published).config.num_labels == 1


def test_the_head_of_a_card_is_what_the_hub_reads(tmp_path, monkeypatch):
    """Base, data and licence are named if the Hub has them; cards of folders pass them on."""
    load, asked = ModelCard.load, []

    def loaded(name, token=None):
        asked.append((name, token))
        return load(name) if isinstance(name, Path) else ModelCard("---\nlicense: mit\n---\n")

    monkeypatch.setattr(ModelCard, "load", loaded)
    given = {"output_dir": "x", "use_cpu": True, "push_to_hub": True, "hub_token": SECRETS[0]}
    config = SFTConfig(dataset_name="some/data", eval_dataset_name="some/test", **given)
    metrics = {"train_loss": 1.0, "eval_loss": 0.5, "format": "text"}
    card = model_card(tmp_path, "us/mine", "sft", config, "some/base", metrics)
    card.save(tmp_path / "sft" / "README.md")
    assert asked[-1] == ("some/base", SECRETS[0])
    data = load(tmp_path / "sft" / "README.md").data
    assert (data.base_model, data.license, data.datasets) == ("some/base", "mit", ["some/data"])
    [result] = data.eval_results
    on = (result.dataset_type, result.dataset_name, result.metric_type, result.metric_value)
    assert on == ("some/test", "some/test", "eval_loss", 0.5)
    assert data.to_dict()["model-index"][0]["name"] == "mine"

    asked.clear()
    config = PPOConfig(dataset_name=str(tmp_path), **given)
    metrics = {"objective/scores": float("nan"), "objective/kl": 2.0}
    card = model_card(tmp_path, "us/mine", "ppo", config, str(tmp_path / "sft"), metrics)
    assert (card.data.base_model, card.data.license) == ("some/base", "mit")
    assert card.data.datasets is None and not any(isinstance(name, str) for name, _ in asked)
    assert [r.metric_name for r in card.data.eval_results] == ["objective/kl"]
    config = RewardConfig(dataset_name=str(tmp_path), output_dir="x", use_cpu=True)
    card = model_card(tmp_path, "mine", "rm", config, "other/base", {})
    assert card.data.license == "unknown" and not any(isinstance(name, str) for name, _ in asked)


def test_candidates_are_a_dataset(hub, saved_policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{**p, "topic": "t"} for p in PROMPTS])
    named = {"dataset_name": str(prompts), "eval_dataset_name": str(prompts)}
    options = {"push_to_hub": True, "use_cpu": True, "response_length": 3, "num_candidates": 3}
    config = CandidatesConfig(output_dir=str(tmp_path / "mine"), **named, **options)
    candidates(config, ModelConfig(model_name_or_path=str(saved_policy)))
    [(name, files, options)] = hub.commits
    assert options["repo_type"] == hub.made[0][2]["repo_type"] == "dataset"
    assert files == {"README.md", "config.yaml", "metrics.json", "train.jsonl", "test.jsonl"}
    published = hub.folder / name
    data = load_dataset(str(published))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 8, "test": 8}
    assert data["train"].column_names == ["prompt", "topic", "responses", "ranks"]
    card = DatasetCard.load(published / "README.md")
    assert card.data.license == "unknown" and "| responses | the answers" in card.text
    assert 'load_dataset("me/mine")' in card.text and "ranked by nobody yet" in card.text
