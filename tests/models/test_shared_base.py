"""One base in four roles does what four separate models do."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from test_checkpoints import SAVING, logs
from test_load_models import adapter, logits, save
from test_ppo_trainer import SGD, trained, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import Adapter
from trl_instruct.models.load import load_policy, load_reward_model
from trl_instruct.models.shared_base import SharedBase, classifier_around, view_of
from trl_instruct.ppo_trainer.micro_batch import ppo_sums
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import SHIFT_FILE, score_head

pytestmark = pytest.mark.slow  # every test trains, or loads, four models

LORA = ModelConfig(use_peft=True, lora_r=4)
BITS = [{}, {"load_in_8bit": True}, {"load_in_4bit": True}]
KINDS = ["llama", "gpt2"]


@pytest.fixture(scope="module")
def make_folders(tmp_path_factory, tokenizer, make_policy):
    """make_folders(kind): a base, the adapter of a policy and of a reward model with a shift."""
    made = {}

    def make(kind="llama"):
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = {name: folder / name for name in ("base", "sft", "rm")}
        save(make_policy(kind), tokenizer, folder / "base")
        adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "sft")
        torch.manual_seed(2)
        classifier = load_reward_model(folder / "base", ModelConfig(), fresh_head=True)
        adapter(classifier, folder / "rm", "SEQ_CLS", modules_to_save=["score"])
        (folder / "rm" / SHIFT_FILE).write_text('{"reward_shift": 0.5, "reward_std": 1.0}')
        for name in ("sft", "rm"):
            tokenizer.save_pretrained(folder / name)
        return made[kind]

    return make


def one_base(folders, tokenizer, config=LORA):
    """The four roles over one base."""
    base = SharedBase(folders["sft"], config)
    policy = base.policy()
    judge = RewardModel(base.classifier(Adapter.read(folders["rm"])), tokenizer)
    ref = view_of(policy).requires_grad_(False)
    return {
        "model": policy,
        "ref_model": ref,
        "reward_model": judge,
        "value_model": base.classifier(Adapter.read(folders["rm"])),
    }


def four_models(folders, tokenizer):
    """The same roles, each a model of its own: plain peft over plain transformers."""

    def load(kind, name, **options):
        base = kind.from_pretrained(folders["base"], **options)
        return PeftModel.from_pretrained(base, folders[name], is_trainable=True)

    rewards = [
        load(AutoModelForSequenceClassification, "rm", num_labels=1) for _ in ("reward", "value")
    ]
    for model in rewards:
        model.config.reward_shift = 0.5
    return {
        "model": load(AutoModelForCausalLM, "sft"),
        "ref_model": load(AutoModelForCausalLM, "sft").requires_grad_(False),
        "reward_model": RewardModel(rewards[0], tokenizer),
        "value_model": rewards[1],
    }


def gradients(trainer):
    """Of one micro-batch, policy and value in one backward pass."""
    torch.manual_seed(0)
    rollout = trainer.score(trainer.sample([0, 1, 2, 3]), [0, 1, 2, 3])
    trainer.model.train()
    rewards, _ = trainer.rewards(rollout)
    # Away from the rollout's own numbers, where the ratio is 1 and no value is clipped.
    rollout = rollout._replace(logprobs=rollout.logprobs - 0.1 * rollout.mask)
    sums = ppo_sums(
        trainer.model, rollout, *trainer.advantages(rollout, rewards), args=trainer.args
    )
    (sums["loss/policy"] + sums["loss/value"]).backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}])
def test_gradients_are_those_of_four_models(
    make_folders, make_trainer, tokenizer, kind, checkpointing
):
    found = []
    for build in (one_base, four_models):
        trainer = make_trainer(kind, **build(make_folders(kind), tokenizer))
        if checkpointing is not None and build is one_base:
            trainer.model.gradient_checkpointing_enable(checkpointing)
        found.append(gradients(trainer))
    torch.testing.assert_close(*found)
    for part in ("policy", "value"):
        norms = [g.norm() for name, g in found[0].items() if name.startswith(part)]
        assert len(norms) > 8 and min(norms) > 0
    assert all("lora_" in name or "score" in name for name in found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_are_those_of_four_models(make_folders, make_trainer, tokenizer, kind):
    rows, found = [0, 1, 2, 3], []
    for build in (one_base, four_models):
        trainer = make_trainer(kind, **build(make_folders(kind), tokenizer))
        torch.manual_seed(0)
        found.append(trainer.score(trainer.sample(rows), rows))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0].logprobs, found[0].ref_logprobs)


@pytest.mark.parametrize("bits", BITS, ids=["float32", "8bit", "4bit"])
def test_the_weights_are_there_once(make_folders, tokenizer, bits):
    folders = make_folders()
    roles = one_base(folders, tokenizer, ModelConfig(use_peft=True, **bits))
    models = [roles["model"], roles["ref_model"], roles["reward_model"].model, roles["value_model"]]
    alone = load_policy(folders["base"], ModelConfig(**bits))
    every = {p for model in models for p in model.parameters()}
    ours = {p for model in models for n, p in model.named_parameters() if "lora_" in n}
    heads = {p for model in models[2:] for n, p in model.named_parameters() if ".score." in n}
    assert len({p.data_ptr() for p in every}) == len(every)
    assert sum(p.nbytes for p in every - ours - heads) == sum(p.nbytes for p in alone.parameters())
    assert sum(p.numel() for p in heads) <= 4 * 16  # each head, and peft's copy of it
    for model in models:
        assert model.get_input_embeddings().weight is models[0].get_input_embeddings().weight


@pytest.mark.parametrize("bits", BITS[1:], ids=["8bit", "4bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_roles_over_a_quantised_base(make_folders, make_trainer, tokenizer, kind, bits):
    """Each gives what it gives alone over the same quantised base, in whatever order."""
    folders = make_folders(kind)
    config = ModelConfig(use_peft=True, **bits)
    roles = one_base(folders, tokenizer, config)
    value = roles["value_model"]
    torch.testing.assert_close(logits(value), logits(load_reward_model(folders["rm"], config)))
    alone = logits(load_policy(folders["sft"], config))
    for name in ("model", "ref_model"):
        torch.testing.assert_close(logits(roles[name]), alone)
    before = [copy.deepcopy(weights(roles[name])) for name in ("ref_model", "value_model")]
    trainer = make_trainer(kind, max_steps=2, **roles)
    for parameter in trainer.model.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    trained(trainer)
    torch.testing.assert_close(weights(roles["ref_model"]), before[0], rtol=0, atol=0)
    after = weights(value)
    assert all(
        torch.equal(after[name], before[1][name]) != ("lora_" in name or "score.modules" in name)
        for name in after
        if "quant" not in name
    )


def test_only_policy_and_value_train(make_folders, make_trainer, tokenizer):
    roles = one_base(make_folders(), tokenizer)
    kept = {"ref": roles["ref_model"], "reward": roles["reward_model"].model}
    before = {name: weights(model) for name, model in kept.items()}
    trainer = make_trainer(max_steps=2, kl_coef=0.0, **roles)
    started = weights(trainer.model)
    after = trained(trainer)
    for name, weight in after.items():
        moved = "lora_" in name or "score.modules_to_save" in name
        assert torch.equal(weight, started[name]) != moved, name
    for name, model in kept.items():
        torch.testing.assert_close(weights(model), before[name], rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_update_is_that_of_four_models(make_folders, make_trainer, tokenizer, checkpointing):
    found = []
    for build in (one_base, four_models):
        roles = build(make_folders(), tokenizer)
        options = {**SGD, "gradient_checkpointing": checkpointing and build is one_base}
        torch.manual_seed(0)
        trainer = make_trainer(max_steps=2, **options, **roles)
        trainer.train()
        found.append({n: p for n, p in trainer.model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found)


def test_what_is_saved_loads_with_plain_peft(make_folders, make_trainer, tokenizer, tmp_path):
    """A checkpoint holds adapters, heads and their optimizer, and no base."""
    trainer = make_trainer(**one_base(make_folders(), tokenizer), **SAVING)
    trainer.train()
    folder = tmp_path / "ppo" / "checkpoint-1"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "ppo_state.json",
        "rng_state.pth",
        "scheduler.pt",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "run.json",
        "manifest.json",
        "value_model",
    }
    assert {path.name for path in (folder / "value_model").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    numbers = sum(p.numel() for p in trainer.policy.parameters() if p.requires_grad)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert 4 * numbers < size < 4 * numbers + 20_000  # and the names
    policy = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(policy), logits(trainer.policy))
    value = AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "value_model", num_labels=1
    )
    torch.testing.assert_close(logits(value), logits(trainer.value_model))


@pytest.mark.parametrize("at", [1, 3])
def test_resuming_is_bit_identical(make_folders, make_trainer, tokenizer, at):
    folders, options = make_folders(), {"max_steps": 4, "ema_decay": 0.9, "optim": "adamw_bnb_8bit"}
    whole = make_trainer(**one_base(folders, tokenizer), **options)
    whole.train()
    cut = make_trainer(**one_base(folders, tokenizer), **options, **SAVING)

    class Cut(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == at

    cut.add_callback(Cut())
    cut.train()
    torch.rand(3)
    resumed = make_trainer(**one_base(folders, tokenizer), **options)
    resumed.train(resume_from_checkpoint=True)
    for part in ("model", "optimizer", "lr_scheduler"):
        states = [getattr(trainer, part).state_dict() for trainer in (resumed, whole)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(resumed.average.average, whole.average.average, rtol=0, atol=0)
    assert logs(resumed) == logs(whole)


# ---- the pieces ----------------------------------------------------------------------------------


def test_a_view_shares_what_is_frozen_and_copies_what_trains(make_folders):
    policy = SharedBase(make_folders()["sft"], LORA).policy()
    view = view_of(policy)
    expected = logits(policy)
    torch.testing.assert_close(logits(view), expected)
    pairs = zip(policy.named_parameters(), view.parameters(), strict=True)
    assert all((one is two) != one.requires_grad for (_, one), two in pairs)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    torch.testing.assert_close(logits(view), expected)
    with policy.disable_adapter():
        torch.testing.assert_close(logits(view), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2", "opt", "rwkv", "mamba"])
def test_a_classifier_over_a_language_models_weights(kind, make_policy):
    policy = load_policy(make_policy(kind), ModelConfig()).requires_grad_(False)
    classifier = classifier_around(view_of(policy))
    expected = load_reward_model(policy, ModelConfig(), fresh_head=True)
    assert not logits(classifier).any()
    score_head(classifier).weight.data = score_head(expected).weight.data
    torch.testing.assert_close(logits(classifier), logits(expected))
    assert not any(p.is_meta for p in classifier.parameters())


def test_which_adapters_a_base_holds(make_folders, policy, tmp_path):
    folders = make_folders()
    base = SharedBase(folders["base"], LORA)
    assert base.adapter_in(folders["rm"]).config.task_type == "SEQ_CLS"
    assert base.adapter_in(str(folders["sft"])).config.task_type == "CAUSAL_LM"
    assert [base.adapter_in(source) for source in (folders["base"], policy, max)] == [None] * 3
    assert SharedBase(policy, LORA).adapter_in(folders["rm"]) is None


def test_a_policys_adapter_is_no_reward_model(make_folders):
    folders = make_folders()
    with pytest.raises(InputError, match="an adapter for CAUSAL_LM; one for SEQ_CLS is needed"):
        SharedBase(folders["base"], LORA).classifier(Adapter.read(folders["sft"]))
