"""TRL's own PPOTrainer behind the same call. Its numbers beside ours: test_ppo_parity.py."""

import pytest
import torch
import trl
from test_ppo_parity import ASKED, EOS, PAD, QUICK, letters, prompt_data, theirs, with_trl_ppo
from transformers import AutoModelForCausalLM
from trl.experimental.utils import get_reward

from trl_instruct import InputError, RewardModel, RewardModule, ppo
from trl_instruct.configs import PPOConfig
from trl_instruct.data.rendering import render_prompts
from trl_instruct.ppo_trainer.upstream import upstream_trainer
from trl_instruct.recipes.pretrain import train_tokenizer
from trl_instruct.rewards.combined import Clipped, WeightedSum
from trl_instruct.scalar_head import keep_shift

# ---- where TRL has no PPOTrainer -----------------------------------------------------------------


@pytest.mark.skipif(theirs is not None, reason=f"TRL {trl.__version__} has a PPOTrainer")
def test_a_trl_without_ppo_says_which_has_it(saved_policy, tmp_path):
    message = rf"TRL <= 1\.12 has \(installed: {trl.__version__}\): pip install 'trl==1\.12\.0'"
    with pytest.raises(InputError, match=message):
        ppo(saved_policy, letters, prompt_data(), tmp_path / "x", engine="trl", **QUICK)
    assert not (tmp_path / "x").exists()


# ---- the adapter ---------------------------------------------------------------------------------


def batch(module, tokenizer, completions, **columns):
    """Rows as TRL's trainer makes them: (prompts + completions, width of the prompts)."""
    asked = ASKED[: len(completions)]
    ids = render_prompts(asked, tokenizer)
    names = ("prompt", "input_ids", *columns)
    values = zip(asked, ids, *columns.values(), strict=True)
    queries = module.collate([dict(zip(names, row, strict=True)) for row in values])["input_ids"]
    return torch.cat([queries, torch.tensor(completions)], dim=1), queries.shape[1]


# Ended early, ended at the last token, not ended.
TEXTS = ["ef", "egi", "eekm"]


@pytest.fixture
def completions(tokenizer):
    """TEXTS as TRL's trainer hands them on."""
    rows = [[*tokenizer(text)["input_ids"], EOS, PAD] for text in TEXTS]
    return [row[:4] for row in rows]


@pytest.mark.parametrize("kind", ["function", "model", "another tokenizer"])
def test_trl_reads_the_same_scores(kind, tokenizer, reward_model, completions):
    keep_shift(reward_model, 0.5, 1.0)
    other = tokenizer if kind == "model" else train_tokenizer(["prompt", "egikm"], 258, 64)
    reward = letters if kind == "function" else RewardModel(reward_model, other)
    module = RewardModule(reward, tokenizer)
    rows, width = batch(module, tokenizer, completions)
    _, scores, _ = get_reward(module, rows, PAD, width)
    torch.testing.assert_close(scores, torch.tensor(reward(ASKED[:3], TEXTS)))


def test_every_model_of_a_reward_moves_with_the_module(tokenizer, reward_model):
    reward = WeightedSum([Clipped(RewardModel(reward_model, tokenizer)), letters])
    RewardModule(reward, tokenizer).to("meta")
    assert reward_model.device.type == "meta"


def test_the_reward_gets_prompts_texts_and_columns_of_the_right_rows(tokenizer, completions):
    calls = []

    def judge(prompts, completions, number, **columns):
        calls.append((prompts, completions, number, columns))
        return [0.0] * len(completions)

    module = RewardModule(judge, tokenizer)
    rows, width = batch(module, tokenizer, completions, number=[4, 5, 6], source=["x", "y", "z"])
    following, following_width = batch(module, tokenizer, completions[:1], number=[7], source=["w"])
    for part, columns in ((rows[:2], width), (rows[2:], width), (following, following_width)):
        get_reward(module, part, PAD, columns)
    ids = [call[3].pop("completion_ids") for call in calls]
    assert calls == [
        (ASKED[:2], TEXTS[:2], [4, 5], {"source": ["x", "y"]}),
        (ASKED[2:3], TEXTS[2:], [6], {"source": ["z"]}),
        (ASKED[:1], TEXTS[:1], [7], {"source": ["w"]}),
    ]
    texts = [tokenizer.batch_decode(part, skip_special_tokens=True) for part in ids]
    assert texts == [TEXTS[:2], TEXTS[2:], TEXTS[:1]]
    assert ids[0][0][-1] == EOS


@pytest.mark.parametrize("given", ["unseen", "another batch"])
def test_rows_that_the_adapter_has_not_seen_made_are_an_error(given, tokenizer, completions):
    module = RewardModule(letters, tokenizer)
    rows, _ = batch(module, tokenizer, completions)
    if given == "unseen":
        module.pending.clear()
    with pytest.raises(InputError, match="data_collator=module.collate"):
        module(input_ids=rows.flip(0), attention_mask=rows != PAD)


def test_rows_without_prompts_are_an_error(tokenizer):
    with pytest.raises(InputError, match=r"columns \['input_ids'\]; a RewardModule needs `prompt`"):
        RewardModule(letters, tokenizer).collate([{"input_ids": [1, 2]}])


# ---- the call ------------------------------------------------------------------------------------


@with_trl_ppo
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_leaves_what_ours_leaves(lora, saved_policy, saved_reward_model, tmp_path):
    options = {**QUICK, "max_steps": 2, "learning_rate": 1e-3, "use_peft": lora}
    options |= {"save_strategy": "steps", "gradient_checkpointing": True}
    folders = {}
    for engine in ("trl_instruct", "trl"):
        result = ppo(
            saved_policy,
            saved_reward_model,
            prompt_data(),
            tmp_path / engine,
            engine=engine,
            **options,
        )
        folders[engine] = {file.name for file in result.path.iterdir()}
        assert {"objective/scores", "objective/kl", "loss/policy"} <= result.metrics.keys()
        assert result.metrics["episode"] == 16
        assert result.metrics["cut_prompts"] == 0
    assert folders["trl"] == folders["trl_instruct"]
    before = AutoModelForCausalLM.from_pretrained(saved_policy)
    for folder in (tmp_path / "trl", tmp_path / "trl" / "checkpoint-2"):
        after = AutoModelForCausalLM.from_pretrained(folder)
        assert not torch.equal(
            after(torch.tensor([[5]])).logits, before(torch.tensor([[5]])).logits
        )
        if not lora:
            assert after.generation_config.eos_token_id == before.generation_config.eos_token_id


@with_trl_ppo
def test_columns_reach_the_reward_of_a_run(saved_policy, tmp_path):
    """Two passes of two batches, each scored in two parts."""
    asked = []

    def judge(prompts, completions, number):
        assert prompts == [ASKED[n] for n in number]
        asked.extend(number)
        return [0.0] * len(completions)

    options = {**QUICK, "per_device_train_batch_size": 4, "local_rollout_forward_batch_size": 2}
    ppo(saved_policy, judge, prompt_data(), tmp_path / "x", engine="trl", **options)
    assert sorted(asked[:8]) == sorted(asked[8:]) == list(range(8))


@with_trl_ppo
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_seed": 3, "max_grad_norm": 0.5}, r"no data_seed \(3\), max_grad_norm \(0.5\)"),
        ({"num_mini_batches": 2}, r"8 prompts and a rollout batch has 16"),
    ],
)
def test_what_trl_cannot_do_is_an_error(options, message, saved_policy, tmp_path):
    with pytest.raises(InputError, match=message):
        ppo(
            saved_policy,
            letters,
            prompt_data(),
            tmp_path / "x",
            engine="trl",
            **{**QUICK, **options},
        )
    assert not (tmp_path / "x").exists()


@with_trl_ppo
def test_one_object_in_two_roles_is_an_error(policy, reward_model, tokenizer, tmp_path):
    config = PPOConfig(output_dir=str(tmp_path), engine="trl", use_cpu=True)
    with pytest.raises(InputError, match="value_model and reward_model are the same object"):
        upstream_trainer(config)(
            config, tokenizer, policy, None, reward_model, prompt_data(), reward_model
        )


@with_trl_ppo
def test_a_model_that_takes_no_positions_is_an_error(make_policy, tokenizer, tmp_path):
    make_policy("mamba").save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match="Mamba.* takes no position_ids"):
        ppo(tmp_path / "mamba", letters, prompt_data(), tmp_path / "x", engine="trl", **QUICK)


@with_trl_ppo
def test_where_trl_departs_from_the_options_is_told(
    saved_policy, eos_padded_tokenizer, tmp_path, recwarn
):
    given = {"processing_class": eos_padded_tokenizer, "engine": "trl"}
    options = {**QUICK, "per_device_train_batch_size": 4, "num_mini_batches": 2, "max_steps": 1}
    options["max_grad_norm"] = 1.0
    ppo(saved_policy, letters, prompt_data(), tmp_path / "x", **given, **options)
    (told,) = [str(w.message) for w in recwarn if "departs" in str(w.message)]
    for words in ("num_mini_batches = 2", "last batch", "max_grad_norm is 1.0", "no gradient for"):
        assert words in told
