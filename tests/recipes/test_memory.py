"""Bytes by hand."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import LlamaConfig

from trl_instruct.recipes.memory import (
    Estimate,
    Work,
    activation_bytes,
    estimate,
    holdings,
    memory_table,
    optimizer_bytes,
)

SIZES = {"hidden": 10, "layers": 3, "vocabulary": 100, "width": 4}


class Model(nn.Module):
    """20 frozen weights that others may hold as well, and 6 of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.own = nn.Linear(3, 2, bias=False)
        sizes = {"hidden_size": 10, "num_hidden_layers": 3, "vocab_size": 100}
        self.config = LlamaConfig(**sizes, num_attention_heads=1)


@pytest.fixture
def base():
    return nn.Linear(5, 4, bias=False).requires_grad_(False)


def arguments(**options):
    defaults = {"bf16": False, "fp16": False, "optim": "adamw_torch", "world_size": 1}
    defaults |= {"gradient_checkpointing": False, "device": torch.device("cuda")}
    return SimpleNamespace(**{**defaults, **options})


def test_what_each_role_holds(base):
    rows = holdings({"policy": Model(base), "value": Model(base), "ref": None})
    assert [tuple(row) for row in rows] == [
        ("shared", 20, 0, 80, "float32"),
        ("policy", 6, 6, 24, "float32"),
        ("value", 6, 6, 24, "float32"),
    ]


def test_models_apart(base):
    policy, reward = Model(base).half(), Model(nn.Linear(5, 4, bias=False))
    assert [tuple(row) for row in holdings({"policy": policy, "reward": reward})] == [
        ("policy", 26, 6, 52, "float16"),
        ("reward", 26, 26, 104, "float32"),
    ]


def test_packed_weights():
    """64 x 64 numbers of 4 bit are 2048 bytes; their absolute maxima are no parameters."""
    packed = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    packed.weight = packed.weight.to("cpu") if packed.weight.bnb_quantized else packed.weight
    packed(torch.zeros(1, 64))
    (row,) = holdings({"base": packed.requires_grad_(False)})
    assert tuple(row) == ("base", 4096, 0, 2048, "nf4")


@pytest.mark.parametrize(
    ("optim", "size"),
    [
        ("adamw_torch", 8),
        ("adamw_torch_fused", 8),
        ("adamw_bnb_8bit", 2),
        ("paged_adamw_8bit", 2),
        ("paged_adamw_32bit", 8),
        ("paged_lion_8bit", 1),
        ("lion_32bit", 4),
        ("sgd", 0),
        ("adafactor", 0),
    ],
)
def test_the_state_of_optimizers(optim, size):
    assert optimizer_bytes(optim, 1000) == size * 1000


def test_activations():
    """2 rows of 8 tokens: 16 x 10 numbers a layer of 4 bytes; logits of 5 tokens, three times."""
    work = Work(rows=2, length=8, predicted=5)
    logits = 2 * 5 * 100 * 4
    plain = activation_bytes(work, **SIZES, kept=3 * 16)
    assert plain == 16 * (3 * 16 * 10) * 4 + 3 * logits
    spared = activation_bytes(work, **SIZES, kept=3 + 16)
    assert spared == 16 * ((3 + 16) * 10) * 4 + 3 * logits
    two = activation_bytes(work._replace(models=2), **SIZES, kept=3 + 16)
    assert two == 2 * 16 * ((3 + 16) * 10) * 4 + 3 * logits
    read = activation_bytes(work._replace(backward=False), **SIZES, kept=3 * 16)
    assert read == 16 * (2 * 3 * 10) * 4 + logits
    half = activation_bytes(work._replace(backward=False), **{**SIZES, "width": 2}, kept=3 * 16)
    assert half == 16 * (2 * 3 * 10) * 2 + logits // 2
    tiles = activation_bytes(work._replace(tile=300), **SIZES, kept=3 * 16)
    assert tiles == 16 * (3 * 16 * 10) * 4 + 300 * 4
    few = activation_bytes(work._replace(tile=5000), **SIZES, kept=3 * 16)
    assert few == 16 * (3 * 16 * 10) * 4 + logits  # fewer than a tile


def test_an_estimate(base):
    roles = {"policy": Model(base), "value": Model(base)}
    works = [Work(1, 4, 0), Work(2, 4, 0)]
    assert estimate(roles, works, arguments()) == Estimate(
        weights=80 + 2 * 24,
        gradients=2 * 24,
        optimizer=12 * 8,
        copies=0,
        process=0,
        activations=8 * 3 * 16 * 10 * 4,
    )
    spared = estimate(roles, works, arguments(bf16=True, optim="adamw_bnb_8bit"))
    assert (spared.optimizer, spared.activations) == (12 * 2, 8 * 3 * 16 * 10 * 2)
    assert spared.copies == 12 * 2  # of the weights that train, as autocast rounds them
    assert sum(spared) == 128 + 48 + 24 + 24 + 8 * 3 * 16 * 10 * 2


def test_several_processes(base, monkeypatch):
    """DDP's buckets are as large as the gradients; FSDP and ZeRO leave a process its share."""
    roles, works = {"policy": Model(base)}, [Work(1, 4, 0)]
    ddp = estimate(roles, works, arguments(world_size=2))
    assert (ddp.gradients, ddp.optimizer) == (2 * 24, 6 * 8)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = estimate(roles, works, arguments(world_size=2))
    assert (sharded.gradients, sharded.optimizer) == (24 // 2, 6 * 8 // 2)


def test_on_a_cpu_the_process_counts(base):
    """Of a packed model the pages of its file, four bytes a number, stay mapped."""
    works, on_cpu = [Work(1, 4, 0)], arguments(device=torch.device("cpu"))
    assert estimate({"policy": Model(base)}, works, on_cpu).process == 260 * 2**20
    packed = Model(nn.Linear(5, 4, bias=False).requires_grad_(False))
    packed.base.weight.data = packed.base.weight.data.to(torch.int8)
    assert estimate({"policy": packed}, works, on_cpu).process == 260 * 2**20 + 20 * 4


def test_the_table(base):
    big = nn.Linear(2000, 1000, bias=False).requires_grad_(False)
    shown = memory_table({"policy": Model(big), "ref": big}, [Work(8, 64, 0)], arguments())
    assert shown == (
        "memory\n"
        "role    parameters  trainable   MB\n"
        "shared          2M          0  7.6  float32\n"
        "policy           6          6  0.0  float32\n"
        "about 8.6 MB at 8 x 64 tokens: weights 7.6, gradients 0.0, optimizer 0.0, activations 0.9"
    )


def test_frozen_models_that_wait_count_once(base):
    """The reference or the whole reward is there at a time, beside the policy's 24 + 80 bytes."""
    roles = {"policy": Model(base), "ref_policy": Model(nn.Linear(5, 4, bias=False))}
    roles |= {name: Model(nn.Linear(5, 4, bias=False)).half() for name in ("reward", "reward 2")}
    roles["reward 3"] = Model(nn.Linear(5, 4, bias=False)).half()
    work = [Work(1, 2, predicted=1)]
    found = {
        waits: estimate(roles, work, arguments(offload_frozen=waits)).weights
        for waits in (False, True)
    }
    assert found == {False: 104 + 104 + 3 * 52, True: 104 + 3 * 52}
    on_cpu = arguments(offload_frozen=True, device=torch.device("cpu"))
    assert estimate(roles, work, on_cpu).weights == found[False]


def test_under_checkpointing_8_bit_layers_keep_their_inputs(base):
    """Found with the peak of a step: bitsandbytes holds them where torch cannot drop them."""
    packed = Model(nn.Linear(5, 4, bias=False).requires_grad_(False))
    recomputes, works = arguments(gradient_checkpointing=True), [Work(1, 4, 0)]
    found = estimate({"policy": packed}, works, recomputes).activations
    assert found == 4 * (3 + 16) * 10 * 4
    packed.base.weight.data = packed.base.weight.data.to(torch.int8)
    assert estimate({"policy": packed}, works, recomputes).activations == found + 4 * 3 * 7 * 10 * 4
    assert estimate({"policy": packed}, works, arguments()).activations == 4 * 3 * 16 * 10 * 4
