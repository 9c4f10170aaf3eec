"""Another base in the place of an adapter's own is noticed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_recipes import DEMONSTRATIONS, QUICK, write
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import FINGERPRINT, fingerprint
from trl_instruct.models.load import load_policy
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.recipes.sft import sft


def test_the_same_weights_the_same_fingerprint(tmp_path):
    weights = {"a": torch.randn(300, 100), "b": torch.zeros(3)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    save_file({**weights, "b": torch.ones(3)}, tmp_path / "two" / "model.safetensors")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_a_slight_change_of_all_weights_is_seen(tmp_path):
    weights = torch.randn(700, 1000)
    save_file({"a": weights}, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    save_file({"a": weights * (1 + 1e-6)}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before


def test_what_is_no_folder_with_weights_has_none(tmp_path):
    assert fingerprint("gpt2") is None
    assert fingerprint(tmp_path) is None


@pytest.mark.slow
def test_an_adapter_over_a_base_that_was_trained_again(saved_policy, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(saved_policy, base)
    shown = write(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    adapter = sft(base, shown, tmp_path / "sft", use_peft=True, **QUICK)
    assert (adapter.path / FINGERPRINT).read_text().strip() == fingerprint(base)
    load_policy(adapter, ModelConfig())
    file = base / "model.safetensors"
    save_file({n: w + 0.01 for n, w in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="was trained over other weights than"):
        load_policy(adapter, ModelConfig())
    assert load_tokenizer(adapter)
