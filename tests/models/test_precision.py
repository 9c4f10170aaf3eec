"""Frozen models in 16 bit, heads in float32."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import byte_tokenizer, completion_logprobs, tiny_model
from peft import LoraConfig, get_peft_model
from test_roles import roles_of
from torch import nn
from trl import ModelConfig

from trl_instruct.configs import SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.generation import sampling
from trl_instruct.models import precision
from trl_instruct.models.precision import autocast_of, cast_lm_head_to_fp32, rounded, store_in
from trl_instruct.models.shared_base import view_of
from trl_instruct.ppo_trainer import roles
from trl_instruct.ppo_trainer.rollouts import ValueModel
from trl_instruct.recipes import options
from trl_instruct.recipes.flags import parse
from trl_instruct.recipes.options import stage_options
from trl_instruct.rewards.function import place_on
from trl_instruct.rewards.reward_model import RewardModel

IDS = torch.tensor([[72, 105, 33, 10, 99]])
HALF = torch.autocast("cpu", torch.bfloat16)


def reward_model(**options):
    return RewardModel(tiny_model(classifier=True, seed=1, **options), byte_tokenizer())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_under_autocast_a_model_in_16_bit_is_the_one_in_32_bit(kind, tied):
    """Bit by bit: autocast rounds the same weights. So the KL to the reference begins at 0."""
    model = tiny_model(kind, tie_word_embeddings=tied).eval()
    half = copy.deepcopy(model)
    store_in(half, torch.bfloat16)
    with HALF:
        torch.testing.assert_close(half(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    dtypes = {name: w.dtype for name, w in half.named_parameters()}
    assert {torch.bfloat16, torch.float32} == {*dtypes.values()}
    assert half.get_input_embeddings().weight.dtype is torch.float32
    assert half.get_output_embeddings().weight.dtype is [torch.bfloat16, torch.float32][tied]
    store_in(model, torch.float32)
    assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_weights_of_models_that_train_keep_their_precision():
    policy = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))
    frozen = view_of(policy).requires_grad_(False)
    store_in(frozen, torch.bfloat16, {*policy.parameters()})
    assert {w.dtype for w in policy.parameters()} == {torch.float32}


def test_a_reward_model_computes_in_its_precision_with_its_head_in_float32():
    reward, exact = reward_model(), reward_model()
    place_on(reward, "cpu", torch.bfloat16)
    assert reward.model.score.weight.dtype is torch.float32
    texts = [["Q: "] * 3, ["yes", "no, never", "a"]]
    scores = reward(*texts)
    with HALF:
        assert scores == exact(*texts)
    assert scores != reward_model()(*texts)
    assert scores == pytest.approx(reward_model()(*texts), abs=0.1)
    assert any(score != torch.tensor(score).bfloat16().item() for score in scores)  # not rounded
    assert type(autocast_of(exact.model)) is not type(autocast_of(reward.model))


def test_values_are_float32_under_autocast():
    value = ValueModel(tiny_model(classifier=True))
    with HALF:
        found = value(IDS, torch.ones_like(IDS), torch.arange(5).unsqueeze(0))
    assert found.dtype is torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("tied", [False, True])
def test_logits_in_float32(tied):
    model = tiny_model(tie_word_embeddings=tied)
    twin, head = copy.deepcopy(model), model.lm_head
    cast_lm_head_to_fp32(model)
    with HALF:
        hidden = model.base_model(IDS).last_hidden_state.float()
        rounded, exact = twin(IDS).logits, copy.deepcopy(model)(IDS).logits
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(exact, hidden @ head.weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=0, atol=0)
    half = tiny_model(tie_word_embeddings=tied).bfloat16()
    cast_lm_head_to_fp32(half)
    assert half(IDS).logits.dtype is torch.float32
    assert half.lm_head.weight.dtype is [torch.float32, torch.bfloat16][tied]


def test_a_head_with_an_adapter_cannot_be_cast():
    config = LoraConfig(target_modules=["lm_head"])
    with pytest.raises(InputError, match="cast_lm_head_to_fp32 needs an lm_head that is a plain"):
        cast_lm_head_to_fp32(get_peft_model(tiny_model(), config))


def test_defaults_on_an_accelerator_and_on_a_cpu(monkeypatch):
    def frozen(**given):
        return precision.frozen_dtype(SimpleNamespace(**{"frozen_dtype": None, **given}))

    assert frozen(bf16=True, use_cpu=False) is torch.float32
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    assert frozen(bf16=True, use_cpu=False) is torch.bfloat16
    assert frozen(bf16=False, use_cpu=False) is frozen(bf16=True, use_cpu=True) is torch.float32
    assert frozen(bf16=True, use_cpu=False, frozen_dtype="float32") is torch.float32
    assert frozen(bf16=False, use_cpu=True, frozen_dtype="bfloat16") is torch.bfloat16


def test_a_base_under_adapters_is_loaded_in_bfloat16_on_an_accelerator(monkeypatch):
    def dtype(*models, **given):
        options = {"use_cpu": True, **given}
        _, model = stage_options(SFTConfig, *models or (None, None), "x", "d.jsonl", options)
        return model.dtype

    assert dtype(use_peft=True) == "float32"
    monkeypatch.setattr(options, "rounds_frozen", lambda config: True)
    assert dtype(use_peft=True) == "bfloat16"
    assert dtype() == dtype(use_peft=True, merge_adapter=True) == "float32"
    assert dtype(use_peft=True, dtype="float32") == "float32"
    assert dtype(None, ModelConfig(use_peft=True)) == "float32"  # TRL's own default, unseen
    flags = ["--use_peft", "true", "--use_cpu", "true", "--output_dir", "x"]
    for given, found in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        parsed = parse(SFTConfig, [*flags, *given])
        assert stage_options(SFTConfig, *parsed, None, "d.jsonl", {})[1].dtype == found


def test_frozen_dtype_goes_before_dtype(
    saved_policy, saved_reward_model, ppo_config, tokenizer, monkeypatch
):
    given = ppo_config, tokenizer, saved_policy, saved_reward_model
    lora = {"use_peft": True, "dtype": "bfloat16"}
    assert roles_of(*given, **lora).reward.model.dtype is torch.bfloat16
    own = roles_of(partial(ppo_config, frozen_dtype="float32"), *given[1:], **lora).reward.model
    assert own.dtype is torch.float32
    assert isinstance(own.score, nn.Linear)
    monkeypatch.setattr(roles, "rounds_frozen", lambda config: True)  # an accelerator
    assert roles_of(*given, **lora).reward.model.dtype is torch.float32


def test_a_run_with_frozen_models_in_bfloat16(make_trainer):
    """The reference computes as the policy does, so that the KL begins at 0."""
    trainer = make_trainer(bf16=True, frozen_dtype="bfloat16", max_steps=2, learning_rate=1e-2)
    assert trainer.ref_model.lm_head.weight.dtype is torch.bfloat16
    assert trainer.policy.lm_head.weight.dtype is torch.float32
    trainer.train()
    logs = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert logs[0] == 0 and logs[1] != 0
    plain = make_trainer(bf16=False, frozen_dtype="bfloat16", cast_lm_head_to_fp32=True)
    assert {w.dtype for w in plain.ref_model.parameters()} == {torch.float32}
    heads = plain.policy.lm_head, plain.ref_model.lm_head
    assert [type(head).__name__ for head in heads] == ["Float32Linear"] * 2


@torch.no_grad()
def test_a_rounded_model_has_its_cache_in_16_bit_and_leaves_the_other_alone():
    model = tiny_model(tie_word_embeddings=True)
    half = rounded(model)
    assert {w.dtype for w in half.parameters()} == {torch.bfloat16}
    assert half.lm_head.weight is half.model.embed_tokens.weight
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    assert {b.dtype for b in half.buffers()} == {b.dtype for b in model.buffers()}
    kept = {}
    with HALF:
        for name, one in (("whole", model), ("half", half)):
            kept[name] = one(IDS, use_cache=True).past_key_values.layers[0].keys.dtype
    assert kept == {"whole": torch.float32, "half": torch.bfloat16}


def on_a_gpu(trainer, sharded=False):
    """Tell the sampler that the trainer's device is one."""
    own = trainer.accelerator
    kind = DistributedType.FSDP if sharded else own.distributed_type
    there = {"device": SimpleNamespace(type="cuda"), "distributed_type": kind}
    there |= {"mixed_precision": own.mixed_precision, "autocast": own.autocast}
    trainer.sampler.accelerator = SimpleNamespace(**there)
    return trainer


def test_under_bf16_a_policy_samples_from_its_rounded_weights(make_trainer, monkeypatch):
    """Anew in each iteration; the update weighs each token by the sampler's log-probability."""
    trainer, heads, drawn = make_trainer(bf16=True, max_steps=2, learning_rate=1e-2), [], []
    real = sampling.generate

    def spy(policy, prompts, *given, **options):
        heads.append((policy.lm_head.weight, trainer.policy.lm_head.weight.clone()))
        drawn.append((policy, prompts, real(policy, prompts, *given, **options)))
        return drawn[-1][-1]

    monkeypatch.setattr(sampling, "generate", spy)
    on_a_gpu(trainer).train()
    for copied, own in heads:
        torch.testing.assert_close(copied, own.bfloat16(), rtol=0, atol=0)
    assert not torch.equal(heads[0][0], heads[1][0])
    assert trainer.sampler.rounded is None
    assert {w.dtype for w in trainer.policy.parameters()} == {torch.float32}
    policy, prompts, found = drawn[0]
    tokens = *sampling.pad_prompts(prompts, torch.device("cpu")), *found[:2]
    with HALF:
        again = completion_logprobs(policy, *tokens, temperature=1.0)
    mask = torch.arange(again.shape[1]) < found.completion_lengths.unsqueeze(1)
    torch.testing.assert_close(found.logprobs[mask], again[mask], rtol=0, atol=0.02)
    apart = [log["sampling/logprob_diff"] for log in trainer.state.log_history[:2]]
    assert all(0 < one < 0.05 for one in apart)


def test_what_samples_itself(make_trainer, make_policy):
    """A policy on a CPU; sharded; with an adapter, whose base is rounded already; without bf16."""
    adapted = get_peft_model(make_policy(), LoraConfig(target_modules="all-linear"))
    for there, sharded, given in (
        (False, False, {"bf16": True}),
        (True, True, {"bf16": True}),
        (True, False, {"bf16": True, "model": adapted}),
        (True, False, {"bf16": False}),
    ):
        trainer = make_trainer(**given)
        sampler = (on_a_gpu(trainer, sharded) if there else trainer).sampler
        sampler.follow()
        assert sampler.rounded is None
        drawn = sampler.draw([[5, 6]], sampling.Sampling(2))
        assert drawn.by_policy is not given["bf16"]
    whole = on_a_gpu(make_trainer(bf16=True))
    whole.sampler.follow()
    assert whole.sampler.rounded is not None


def test_frozen_models_wait_on_the_cpu(make_trainer, make_reward_model, tokenizer, monkeypatch):
    """Reference, reward and gold are on the device while they work, one after the other."""
    judges = [RewardModel(make_reward_model(seed=seed), tokenizer) for seed in (5, 6)]
    given = {"reward_model": judges[0], "gold": judges[1], "max_steps": 2, "bf16": False}
    moves, move = [], roles.place_on

    def spy(frozen, device, *rest):
        moves.append((frozen, "the device" if isinstance(device, torch.device) else device))
        return move(frozen, device, *rest)

    monkeypatch.setattr(roles, "place_on", spy)
    kept = make_trainer(**given)
    assert moves == [(judge, "the device") for judge in judges]
    kept.train()
    assert len(moves) == 2
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    moves.clear()
    trainer = make_trainer(offload_frozen=True, **given)
    assert moves == [(judge, "cpu") for judge in judges]
    moves.clear()
    trainer.train()
    frozen = (trainer.ref_model, *judges)
    assert moves == [(one, place) for one in frozen for place in ("the device", "cpu")] * 2
    for name, weight in kept.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=0, atol=0)


def test_which_frozen_models_wait(make_trainer, make_policy, tokenizer, monkeypatch):
    """Not those over the policy's base or of 8 bits, nor rewards without a model."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    policy = get_peft_model(make_policy(), LoraConfig(target_modules="all-linear"))
    over_base, packed, whole = (
        RewardModel(tiny_model(classifier=True, seed=seed), tokenizer) for seed in (1, 2, 3)
    )
    over_base.model.model = policy.get_base_model().model
    packed.model.is_loaded_in_8bit = True
    given = {"model": policy, "bf16": False, "offload_frozen": True}
    for judge in (over_base, packed, lambda prompts, completions: [0.0] * len(prompts)):
        with pytest.raises(InputError, match="no frozen model here can wait on the CPU"):
            make_trainer(reward_model=judge, **given)
    trainer = make_trainer(reward_model=over_base, gold=whole, **given)
    waiting, _ = trainer.in_use.args
    assert waiting == [whole]


def test_without_an_accelerator_nothing_can_be_offloaded(ppo_config):
    with pytest.raises(InputError, match="offload_frozen moves memory off a GPU; there is none"):
        ppo_config(offload_frozen=True)
