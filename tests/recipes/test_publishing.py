"""push_to_hub: the stage's folder as it is, in one commit, on a Hub that is a folder here."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from test_recipes import DEMONSTRATIONS, LORA, PROMPTS, QUICK, QUICK_PPO, vowels
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_instruct.configs import SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.recipes.ppo import ppo
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

    def create_branch(api, name, *, branch, exist_ok):
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
    assert hub.made == [("mine", SECRETS[0], {"private": True, "exist_ok": True})]
    [(name, files, options)] = hub.commits
    assert (name, options["revision"]) == ("me/mine", None)
    assert {"model.safetensors", "config.json", "README.md", "metrics.json"} <= files
    assert not any("checkpoint" in f or "adapter" in f or f.endswith(".bin") for f in files)
    published = hub.folder / name
    assert not stale.exists() and (published / "LICENSE").exists()
    assert (published / "README.md").read_text() == (folder / "README.md").read_text()
    assert "trl-instruct" in (published / "README.md").read_text()
    model, mine = (AutoModelForCausalLM.from_pretrained(p) for p in (published, folder))
    torch.testing.assert_close(logits(model), logits(mine))


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
    assert {"checkpoint-2/adapter_model.safetensors", "checkpoint-2/optimizer.pt"} <= files
    assert (folder / "checkpoint-1").is_dir() and not any("checkpoint-1" in f for f in files)
    assert not any(f.endswith(("training_args.bin", "ppo_state.json")) for f in files)
    assert not any("value_model" in f or "notes" in f for f in files)
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
