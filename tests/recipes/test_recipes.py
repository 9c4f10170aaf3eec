import copy
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE
from datasets import Dataset, DatasetDict
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from trl import ModelConfig

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.models.load import load_policy
from trl_instruct.models.resuming import all_checkpoints
from trl_instruct.recipes import ppo as ppo_recipe
from trl_instruct.recipes import rm as rm_recipe
from trl_instruct.recipes import sft as sft_recipe
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.recipes.stage import StageResult
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.reward_model import RewardModel

pytestmark = pytest.mark.slow  # whole stages

QUICK = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
QUICK_PPO = {**QUICK, "num_mini_batches": 1, "response_length": 4, "max_steps": 1}
LORA = {"use_peft": True, "lora_r": 4}
DEMONSTRATIONS = [{"prompt": f"Q{i}: ", "completion": f"answer {i % 3}"} for i in range(8)]
RANKINGS = [
    {"prompt": f"Q{i}: ", "responses": ["bad", "good one", "fair"], "ranks": [3, 1, 2]}
    for i in range(8)
]
PAIRS = [{"prompt": f"Q{i}: ", "chosen": "good one", "rejected": "bad"} for i in range(8)]
PROMPTS = [{"prompt": f"Q{i}: "} for i in range(8)]


def messages(role, text):
    return [{"role": role, "content": text}]


def chat(record):
    """A text record as messages."""
    turned = {
        name: messages("assistant", value) if isinstance(value, str) else value
        for name, value in record.items()
    }
    if "responses" in record:
        turned["responses"] = [messages("assistant", text) for text in record["responses"]]
    return {**turned, "prompt": messages("user", record["prompt"])}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def vowels(prompts, completions):
    return [float(sum(text.count(v) for v in "aeiou")) for text in completions]


def same_outputs(one, two):
    ids = torch.tensor([[72, 105, 33, 256]])
    with torch.no_grad():
        outputs = [m.eval()(input_ids=ids).logits for m in (one, two)]
    torch.testing.assert_close(*outputs)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, saved_policy):
    """The three calls on jsonl files, each with the result of the call before."""
    folder = tmp_path_factory.mktemp("chain")
    demonstrations = write(folder / "demonstrations.jsonl", DEMONSTRATIONS)
    rankings = write(folder / "rankings.jsonl", RANKINGS)
    prompts = write(folder / "prompts.jsonl", PROMPTS)
    policy = sft(saved_policy, demonstrations, folder / "sft", **QUICK)
    reward = rm(policy, rankings, folder / "rm", eval_size=0.25, **QUICK)
    aligned = ppo(policy, reward, prompts, folder / "ppo", **QUICK_PPO)
    return {"sft": policy, "rm": reward, "ppo": aligned}


@pytest.fixture(scope="module")
def lora_chain(tmp_path_factory, saved_policy):
    """The same, each stage a LoRA adapter; with the outputs of the trained models."""
    folder, kept = tmp_path_factory.mktemp("lora"), {}

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            kept[Path(args.output_dir).name] = getattr(model, "policy", model)

    options = {**LORA, "callbacks": [Keep()]}
    policy = sft(
        saved_policy, Dataset.from_list(DEMONSTRATIONS), folder / "sft", **QUICK, **options
    )
    reward = rm(policy, Dataset.from_list(RANKINGS), folder / "rm", eval_size=0, **QUICK, **options)
    prompts = Dataset.from_list(PROMPTS)
    aligned = ppo(policy, reward, prompts, folder / "ppo", **QUICK_PPO, **options)
    return {"sft": policy, "rm": reward, "ppo": aligned}, kept


# ---- the chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_a_stage_leaves_a_folder_that_others_can_use(chain, name):
    result = chain[name]
    assert isinstance(result, StageResult)
    assert str(result) == os.fspath(result) == str(Path(result)) == str(result.path)
    left = {path.name for path in result.path.iterdir()}
    assert {
        "config.json",
        "config.yaml",
        "metrics.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    } <= left
    assert not [n for n in left if n.endswith((".bin", ".pt", ".pkl", ".tmp"))]
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["seconds"] > 0
    assert f"`{name}`" in (result.path / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(result).eos_token == "<eos>"


def test_the_measures_of_the_stages(chain):
    assert {"train_loss", "truncated"} <= chain["sft"].metrics.keys()
    reward = chain["rm"].metrics
    assert reward["pairs"] == 18  # 6 of 8 prompts, C(3,2) pairs each
    assert reward["eval_pairs"] == 6
    assert reward["accuracy_low"] <= reward["accuracy"] <= reward["accuracy_high"]
    assert {"log_loss", "calibration_error", "length_accuracy", "length_correlation"} <= set(reward)
    assert reward["by_k"]["3"]["pairs"] == 6
    assert reward["data"]["responses"] == 24
    assert (chain["rm"].path / "rm.png").read_bytes().startswith(b"\x89PNG")
    assert {"objective/scores", "objective/kl", "loss/policy"} <= chain["ppo"].metrics.keys()


def test_the_policy_generates_with_the_pipeline(chain):
    for name in ("sft", "ppo"):
        generator = pipeline("text-generation", model=str(chain[name]), device="cpu")
        said = generator("Q1: ", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert said.startswith("Q1: ")


def test_the_reward_model_scores_as_a_plain_classifier(chain):
    model = AutoModelForSequenceClassification.from_pretrained(chain["rm"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(chain["rm"])
    assert model.config.num_labels == 1
    texts = ["Q1: good one<eos>", "Q1: bad<eos>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        plain = model(**batch).logits.squeeze(-1).tolist()
    ours = RewardModel(model, tokenizer)(["Q1: ", "Q1: "], ["good one", "bad"])
    assert ours == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("name", ["sft", "rm", "ppo"])
def test_lora_folders_load_with_plain_peft(lora_chain, name):
    results, kept = lora_chain
    folder = results[name].path
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    if name == "rm":
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        merged = load_reward(folder).model
    else:
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        merged = load_policy(folder, ModelConfig())
    same_outputs(loaded, kept[name])
    same_outputs(merged, kept[name])


def test_a_lora_policy_loads_as_a_plain_model(lora_chain):
    results, kept = lora_chain
    same_outputs(AutoModelForCausalLM.from_pretrained(results["ppo"]), kept["ppo"])


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    ],
)
def test_adapters_on_embeddings_go_on(saved_policy, tmp_path, targets):
    base = AutoModelForCausalLM.from_pretrained(saved_policy)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
    adapted.peft_config["default"].base_model_name_or_path = str(saved_policy)
    adapted.save_pretrained(tmp_path / "given")
    AutoTokenizer.from_pretrained(saved_policy).save_pretrained(tmp_path / "given")
    data = Dataset.from_list(DEMONSTRATIONS)
    policy = sft(tmp_path / "given", data, tmp_path / "sft", use_peft=True, **QUICK)
    reward = rm(policy, Dataset.from_list(RANKINGS), tmp_path / "rm", eval_size=0, **LORA, **QUICK)
    ppo(policy, vowels, Dataset.from_list(PROMPTS), tmp_path / "ppo", **LORA, **QUICK_PPO)
    assert load_reward(reward)(["Q1: "], ["a"])


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_lora_in_one_stage_only(chain, saved_policy, tmp_path, stage):
    if stage == "sft":
        result = sft(
            saved_policy, Dataset.from_list(DEMONSTRATIONS), tmp_path / "x", **QUICK, **LORA
        )
    elif stage == "rm":
        result = rm(
            chain["sft"], Dataset.from_list(PAIRS), tmp_path / "x", eval_size=0, **QUICK, **LORA
        )
    else:
        prompts = Dataset.from_list(PROMPTS)
        result = ppo(chain["sft"], vowels, prompts, tmp_path / "x", **QUICK_PPO, **LORA)
    assert (result.path / "adapter_config.json").is_file()
    assert not (result.path / "base").exists()  # the adapter's base is where it was


def test_loaded_models_are_taken(policy, reward_model, tokenizer, tmp_path):
    given = {"processing_class": tokenizer}
    result = sft(policy, Dataset.from_list(DEMONSTRATIONS), tmp_path / "sft", **given, **QUICK)
    assert (result.path / "model.safetensors").is_file()
    pairs = Dataset.from_list(PAIRS)
    result = rm(policy, pairs, tmp_path / "rm", eval_size=0, **given, **QUICK)
    assert (result.path / "model.safetensors").is_file()
    prompts = Dataset.from_list(PROMPTS)
    result = ppo(policy, reward_model, prompts, tmp_path / "ppo", **given, **QUICK_PPO)
    assert (result.path / "model.safetensors").is_file()


def test_an_adapter_on_a_model_in_memory_brings_its_base(policy, tokenizer, tmp_path):
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    result = sft(
        policy,
        Dataset.from_list(DEMONSTRATIONS),
        tmp_path / "sft",
        processing_class=tokenizer,
        **QUICK,
        **LORA,
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(result)
    base = loaded.unload().state_dict()
    torch.testing.assert_close(base, before)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantised_sft(saved_policy, tmp_path, bits):
    data = Dataset.from_list(DEMONSTRATIONS)
    options = {**QUICK, **LORA, bits: True, "max_steps": 1}
    result = sft(saved_policy, data, tmp_path / "sft", **options)
    assert (result.path / "adapter_model.safetensors").is_file()
    AutoPeftModelForCausalLM.from_pretrained(result)


def test_conversational_data(saved_policy, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    data = Dataset.from_list([chat(row) for row in DEMONSTRATIONS])
    policy = sft(saved_policy, data, tmp_path / "sft", chat_template_path=str(template), **QUICK)
    assert AutoTokenizer.from_pretrained(policy).chat_template == CHAT_TEMPLATE
    rankings = Dataset.from_list([chat(row) for row in RANKINGS])
    reward = rm(policy, rankings, tmp_path / "rm", eval_size=0.25, **QUICK)
    assert 0 <= reward.metrics["accuracy"] <= 1
    prompts = Dataset.from_list([chat(row) for row in PROMPTS])
    aligned = ppo(policy, reward, prompts, tmp_path / "ppo", **QUICK_PPO)
    assert AutoTokenizer.from_pretrained(aligned).chat_template == CHAT_TEMPLATE


# ---- stage 1 -------------------------------------------------------------------------------------


def trainer_of(monkeypatch, name):
    """The trainer that a stage builds, once the stage has run."""
    built = []
    recipe = {"SFTTrainer": sft_recipe, "RankingRewardTrainer": rm_recipe}[name]
    original = getattr(recipe, name)

    class Kept(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    monkeypatch.setattr(recipe, name, Kept)
    return built


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_counts_the_completion_only(
    saved_policy, tokenizer, tmp_path, monkeypatch, packing
):
    built = trainer_of(monkeypatch, "SFTTrainer")
    data = Dataset.from_list(
        [{"prompt": "Q: ", "completion": "yes"}, {"prompt": "R", "completion": "n"}]
    )
    sft(saved_policy, data, tmp_path / "sft", packing=packing, packing_strategy="wrapped", **QUICK)
    trainer = built[0]
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    learnt = batch["labels"][batch["labels"] != -100]
    assert sorted(learnt.tolist()) == sorted(tokenizer("yes<eos>n<eos>")["input_ids"])


def test_every_reply_is_learnt_only_with_both_options(saved_policy, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    turns = [("user", "p"), ("assistant", "one"), ("user", "q"), ("assistant", "two")]
    talk = [{"role": role, "content": text} for role, text in turns]
    data = Dataset.from_list([{"messages": talk}] * 4)
    given = {"processing_class": tokenizer, "assistant_only_loss": True, **QUICK}
    with pytest.raises(InputError, match="Set completion_only_loss=False as well"):
        sft(saved_policy, data, tmp_path / "sft", **given)
    built = trainer_of(monkeypatch, "SFTTrainer")
    sft(saved_policy, data, tmp_path / "sft", completion_only_loss=False, **given)
    (labels,) = built[0].data_collator([dict(built[0].train_dataset[0])])["labels"]
    assert tokenizer.decode(labels[labels != -100]) == "one<eos>two<eos>"


def test_the_eos_token_that_is_named_ends_demonstrations_and_pairs(
    saved_policy, tokenizer, tmp_path, monkeypatch
):
    built = [trainer_of(monkeypatch, name) for name in ("SFTTrainer", "RankingRewardTrainer")]
    own = {**QUICK, "eos_token": "z"}
    policy = sft(saved_policy, Dataset.from_list(DEMONSTRATIONS), tmp_path / "sft", **own)
    rm(policy, Dataset.from_list(PAIRS), tmp_path / "rm", eval_size=0, **own)
    rows = [row for (one,) in built for row in one.train_dataset]
    ends = [row[name][-1] for row in rows for name in row if name.endswith("_ids")]
    assert len(ends) == 8 + 16 and set(ends) == set(tokenizer("z")["input_ids"])


def test_a_template_that_ends_turns_with_another_token_names_it(saved_policy, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<pad>'")
    data = Dataset.from_list([chat(row) for row in DEMONSTRATIONS])
    with pytest.raises(InputError, match="ends a reply with '<pad>'.*Set eos_token to '<pad>'"):
        sft(saved_policy, data, tmp_path / "sft", processing_class=tokenizer, **QUICK)
    assert not (tmp_path / "sft").exists()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "''")
    sft(saved_policy, data, tmp_path / "sft", processing_class=tokenizer, **QUICK)
    assert "the chat template ends a reply with no special token" in capsys.readouterr().out
    tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", "'<pad>.'")  # not at the end
    sft(saved_policy, data, tmp_path / "other", processing_class=tokenizer, **QUICK)
    assert "the chat template ends a reply with no special token" in capsys.readouterr().out


def test_sft_learns_and_measures_held_out_loss(saved_policy, tmp_path):
    data = Dataset.from_list(DEMONSTRATIONS)
    options = {**QUICK, "max_steps": 1, "learning_rate": 0.0}
    before = sft(saved_policy, data, tmp_path / "a", eval_dataset=data, **options)
    options = {**QUICK, "max_steps": 12}
    after = sft(saved_policy, data, tmp_path / "b", eval_dataset=data, **options)
    assert after.metrics["eval_loss"] < 0.7 * before.metrics["eval_loss"]


def test_sft_measures_on_the_split_that_is_named(saved_policy, tmp_path):
    held_out = [{"prompt": "Q: ", "completion": "quite another answer"}]
    splits = DatasetDict(
        {"train": Dataset.from_list(DEMONSTRATIONS), "test": Dataset.from_list(held_out)}
    )
    options = {**QUICK, "max_steps": 1, "eval_dataset": splits}
    losses = [
        sft(saved_policy, splits, tmp_path / split, dataset_test_split=split, **options).metrics
        for split in ("train", "test")
    ]
    options["eval_dataset"] = splits["test"]
    given = sft(saved_policy, splits, tmp_path / "given", **options).metrics
    assert losses[1]["base_loss"] == given["base_loss"] != losses[0]["base_loss"]


@pytest.mark.parametrize("packing_strategy", ["bfd", "wrapped"])
def test_packing(saved_policy, tmp_path, monkeypatch, packing_strategy):
    built = trainer_of(monkeypatch, "SFTTrainer")
    data = Dataset.from_list(DEMONSTRATIONS)
    options = {**QUICK, "packing": True, "packing_strategy": packing_strategy, "max_length": 64}
    sft(saved_policy, data, tmp_path / "sft", **options)
    assert len(built[0].train_dataset) < len(data)


def test_cut_demonstrations_are_counted(saved_policy, tmp_path):
    # "Q: " and the EOS leave room for exactly four bytes of the completion
    data = Dataset.from_dict({"prompt": ["Q: "] * 3, "completion": ["four", "fifth", "f"]})
    result = sft(saved_policy, data, tmp_path / "sft", max_length=8, **QUICK)
    assert result.metrics["truncated"] == 1


def test_the_tiny_base_is_made_beside_the_policy(saved_policy, tmp_path, monkeypatch):
    asked = []

    def fake(folder, seed):
        asked.append((folder, seed))
        return saved_policy

    monkeypatch.setattr(sft_recipe, "tiny_base", fake)
    data = Dataset.from_list(DEMONSTRATIONS)
    result = sft("tiny", data, tmp_path / "sft", seed=3, **QUICK)
    assert asked == [(tmp_path / "base", 3)]
    written = (result.path / "config.yaml").read_text()
    assert f"model_name_or_path: {saved_policy}\n" in written  # what `compare` goes by
    with pytest.raises(InputError, match="holds another run"):
        sft("tiny", data, tmp_path / "sft", **QUICK)
    assert len(asked) == 1


# ---- stage 2 -------------------------------------------------------------------------------------


def test_rm_learns_from_rankings(saved_policy, tmp_path):
    result = rm(
        saved_policy,
        Dataset.from_list(RANKINGS),
        tmp_path / "rm",
        eval_size=0.25,
        **{**QUICK, "max_steps": 12},
    )
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["train_loss"] < 0.6


REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)


@pytest.mark.parametrize("place", ["rankings", "pairs", "held out", "demonstrations"])
@pytest.mark.parametrize("eval_size", [0, 0.25])
def test_rm_renders_every_row_before_its_first_step(saved_policy, tmp_path, place, eval_size):
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    tokenizer.chat_template = REFUSING + CHAT_TEMPLATE
    good = [chat(row) for row in (PAIRS if place == "pairs" else RANKINGS)]
    shown = [chat(row) for row in DEMONSTRATIONS]
    bad = shown[0] if place == "demonstrations" else good[-1]
    bad = {**bad, "prompt": messages("system", "Be kind.") + bad["prompt"]}
    train = [*good[:-1], bad] if place in ("rankings", "pairs") else good
    more = {"held out": {"eval_dataset": Dataset.from_list([good[0], bad])}}
    more["demonstrations"] = {"demonstrations": Dataset.from_list([shown[1], bad, *shown])}
    more = {"eval_size": eval_size, **more.get(place, {})}
    row = 8 if place in ("rankings", "pairs") else 2
    # Without held-out rows, the trainer is the first to render rankings; it knows no file.
    named = f"the given Dataset, row {row}|Ranking {row}|Pair {row}"
    with pytest.raises(InputError, match=f"^({named}): .*roles system, user: no system turn"):
        rm(
            saved_policy,
            Dataset.from_list(train),
            tmp_path / "rm",
            processing_class=tokenizer,
            **{**QUICK, **more},
        )
    assert not (tmp_path / "rm").exists()


def test_rm_keeps_the_best_checkpoint_and_stops_early(saved_policy, tmp_path):
    """The labels are upside down in the held-out half: the more it learns, the worse it gets."""
    held_out = [{**row, "ranks": [1, 3, 2]} for row in RANKINGS[4:]]
    every = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    options = {**QUICK, **every, "max_steps": 20, "early_stopping_patience": 2}
    given = Dataset.from_list(RANKINGS), tmp_path / "rm"
    result = rm(saved_policy, *given, eval_dataset=Dataset.from_list(held_out), **options)
    state = json.loads((tmp_path / "rm" / "trainer_state.json").read_text())
    measured = {log["step"]: log for log in state["log_history"] if "eval_accuracy" in log}
    best = max(measured.values(), key=lambda log: log["eval_accuracy"])
    assert state["global_step"] == best["step"] + 2 < 20
    assert state["best_metric"] == best["eval_accuracy"] == result.metrics["accuracy"]
    assert {"eval_loss", "eval_margin"} <= set(best)
    best_weights = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm" / f"checkpoint-{best['step']}"
    )
    same_outputs(best_weights, AutoModelForSequenceClassification.from_pretrained(result.path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "steps", "eval_size": 0}, "'steps', but nothing is held out"),
        ({"metric_for_best_model": "eval_f1"}, "rm measures accuracy, loss, margin"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"early_stopping_patience": 2}, "the save and eval strategy to match"),
    ],
)
def test_how_rm_cannot_evaluate(saved_policy, tmp_path, options, message):
    given = Dataset.from_list(RANKINGS), tmp_path / "rm"
    options = {**QUICK, "save_strategy": "steps", "eval_size": 0.25, **options}
    with pytest.raises(InputError, match=message):
        rm(saved_policy, *given, **options)
    assert not (tmp_path / "rm").exists()


def test_rm_that_fails_to_measure_keeps_its_model(saved_policy, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no disk")

    monkeypatch.setattr(rm_recipe, "evaluate_reward", fails)
    with pytest.raises(RuntimeError, match="no disk"):
        rm(saved_policy, Dataset.from_list(RANKINGS), tmp_path / "rm", eval_size=0.25, **QUICK)
    assert (tmp_path / "rm" / "model.safetensors").is_file()


def test_rm_holds_out_prompts_of_pairs_too(saved_policy, tmp_path, monkeypatch):
    built = trainer_of(monkeypatch, "RankingRewardTrainer")
    result = rm(saved_policy, Dataset.from_list(PAIRS), tmp_path / "rm", eval_size=0.25, **QUICK)
    assert (result.metrics["pairs"], result.metrics["eval_pairs"]) == (6, 2)
    assert len(built[0].train_dataset) == 6


def test_rm_with_an_eval_dataset_trains_on_everything(saved_policy, tmp_path):
    held_out = Dataset.from_list([{**PAIRS[0], "prompt": "new: "}])
    result = rm(
        saved_policy, Dataset.from_list(PAIRS), tmp_path / "rm", eval_dataset=held_out, **QUICK
    )
    assert (result.metrics["pairs"], result.metrics["eval_pairs"]) == (8, 1)


def test_the_ceiling_is_what_the_labelers_own_gold_scores_reach(saved_policy, tmp_path):
    rows = [
        {"prompt": f"Q{i}", "responses": ["a", "b"], "scores": [1.0, 0.0], "gold_scores": gold}
        for i, gold in enumerate([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
    ]
    data = Dataset.from_list(rows)
    result = rm(saved_policy, data, tmp_path / "rm", eval_dataset=data, **QUICK)
    assert result.metrics["ceiling"] == 0.75


def test_rm_tells_what_it_measured(saved_policy, tmp_path, capsys):
    rankings = [
        {**row, "labeler": name, "weight": 2.0, "ranks": ranks}
        for row in RANKINGS
        for name, ranks in (("x", [3, 1, 2]), ("y", [2, 1, 3]))
    ]
    shown = Dataset.from_list(DEMONSTRATIONS)
    options = {**QUICK, **LORA, "eval_size": 0.25, "demonstrations": shown}
    result = rm(saved_policy, Dataset.from_list(rankings), tmp_path / "rm", **options)
    assert result.metrics["agreement"]["mean"] == pytest.approx(2 / 3)
    assert (result.metrics["eval_prompts"], result.metrics["eval_rankings"]) == (2, 4)
    told = capsys.readouterr().out
    for part in (
        "rm: 16 rankings of 48 responses: 48 strict pairs, 0 ties",
        f"2 held-out prompts, 12 comparisons; figure: {tmp_path / 'rm' / 'rm.png'}",
        "longer answer wins",
        "labelers agree      0.667",
        "x        8         0.667 [",
        f"shift                 {result.metrics['shift']:+.3f}",
    ):
        assert part in told
    again = rm(
        saved_policy,
        Dataset.from_list(rankings),
        tmp_path / "rm",
        **QUICK,
        eval_size=0,
        overwrite_output_dir=True,
    )
    assert not {"shift", "accuracy"} & set(again.metrics)
    left = {path.name for path in again.path.iterdir()}
    assert not {"rm.png", "reward_config.json", "adapter_config.json"} & left


def test_prompts_are_cut_only_where_asked_for(saved_policy, tmp_path, capsys):
    data = Dataset.from_list([*PAIRS, {"prompt": "long " * 40, "chosen": "a", "rejected": "b"}])
    options = {**QUICK, "eval_size": 0}
    whole = rm(saved_policy, data, tmp_path / "whole", **options)
    assert (whole.metrics["overlong"], whole.metrics["truncated"]) == (1, 0)
    cut = rm(saved_policy, data, tmp_path / "cut", truncate_prompt=True, **options)
    assert (cut.metrics["overlong"], cut.metrics["truncated"]) == (0, 1)
    assert "1 prompts lose their beginning" in capsys.readouterr().out


def test_overlong_pairs_are_counted(saved_policy, tmp_path, capsys):
    data = Dataset.from_list([*PAIRS, {"prompt": "Q", "chosen": "long " * 40, "rejected": "x"}])
    result = rm(saved_policy, data, tmp_path / "rm", eval_size=0, **QUICK)
    assert result.metrics["overlong"] == 1
    assert "1 pairs exceed max_length" in capsys.readouterr().out


# ---- stage 3 -------------------------------------------------------------------------------------


def value_at_start(monkeypatch):
    """The weights of the value model when PPO begins."""
    seen = {}
    original = ppo_recipe.PPOTrainer

    class Kept(original):
        def __init__(self, *args, value_model, **kwargs):
            seen.update({k: v.clone() for k, v in value_model.state_dict().items()})
            super().__init__(*args, value_model=value_model, **kwargs)

    monkeypatch.setattr(ppo_recipe, "PPOTrainer", Kept)
    return seen


def test_the_value_model_starts_as_the_reward_model(
    saved_policy, saved_reward_model, tmp_path, monkeypatch
):
    seen = value_at_start(monkeypatch)
    ppo(saved_policy, saved_reward_model, Dataset.from_list(PROMPTS), tmp_path / "x", **QUICK_PPO)
    reward = AutoModelForSequenceClassification.from_pretrained(saved_reward_model)
    torch.testing.assert_close(seen, dict(reward.state_dict()))


@pytest.mark.parametrize("asked_for", [False, True])
def test_the_value_model_starts_as_the_policy_with_a_head_of_zeros(
    saved_policy, saved_reward_model, tmp_path, monkeypatch, asked_for
):
    seen = value_at_start(monkeypatch)
    reward = saved_reward_model if asked_for else vowels
    options = {**QUICK_PPO, "value_model_path": "policy"} if asked_for else QUICK_PPO
    ppo(saved_policy, reward, Dataset.from_list(PROMPTS), tmp_path / "x", **options)
    assert not seen.pop("score.weight").any()
    policy = AutoModelForCausalLM.from_pretrained(saved_policy).state_dict()
    torch.testing.assert_close(seen, {k: policy[k] for k in seen})


def test_a_value_model_of_its_own(saved_policy, make_reward_model, tmp_path, monkeypatch):
    seen = value_at_start(monkeypatch)
    value = make_reward_model(seed=7)
    value.save_pretrained(tmp_path / "value")
    expected = {k: v.clone() for k, v in value.state_dict().items()}
    prompts = Dataset.from_list(PROMPTS)
    ppo(saved_policy, vowels, prompts, tmp_path / "x", value_model=value, **QUICK_PPO)
    torch.testing.assert_close(seen, expected)
    options = {**QUICK_PPO, "value_model_path": tmp_path / "value", "save_strategy": "steps"}
    seen.clear()
    ppo(saved_policy, vowels, prompts, tmp_path / "y", **options)
    torch.testing.assert_close(seen, expected)
    # An earlier run's: its last checkpoint holds it.
    (earlier,) = (tmp_path / "y").glob("checkpoint-*/value_model")
    learnt = load_file(earlier / "model.safetensors")
    assert any(not torch.equal(learnt[name], expected[name]) for name in learnt)
    seen.clear()
    options["value_model_path"] = str(earlier)
    ppo(saved_policy, vowels, prompts, tmp_path / "z", **options)
    torch.testing.assert_close(seen, learnt)


def test_every_kind_of_reward_gives_the_same_scores(chain):
    given = (["Q1: ", "Q2: "], ["good one", "bad"])
    model = AutoModelForSequenceClassification.from_pretrained(chain["rm"])
    rewards = [chain["rm"], str(chain["rm"]), chain["rm"].path, model]
    scores = [load_reward(reward)(*given) for reward in rewards]
    assert scores == [scores[0]] * 4
    assert load_reward(vowels) is vowels


def test_several_rewards_from_python_and_yaml(saved_policy, saved_reward_model, tmp_path):
    """The same run, the same config.yaml."""
    file = tmp_path / "rules.py"
    file.write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    rewards = [str(saved_reward_model), f"{file}:short"]
    data = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {**QUICK_PPO, "reward_weights": [1.0, 0.5]}
    given = ppo(saved_policy, [saved_reward_model, rewards[1]], data, tmp_path / "a", **options)
    config = yaml.safe_load((given.path / "config.yaml").read_text())
    assert (config["reward_model_path"], config["reward_weights"]) == (rewards, [1.0, 0.5])
    config |= {"output_dir": str(tmp_path / "b"), "model_name_or_path": str(saved_policy)}
    config["dataset_name"] = str(data)
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config))
    cli.main(["ppo", "--config", str(tmp_path / "ppo.yaml")])
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert metrics["objective/scores"] == given.metrics["objective/scores"]


def test_a_reward_model_with_another_tokenizer_and_template(
    saved_policy, make_reward_model, chat_tokenizer, tmp_path, capsys
):
    """Its vocabulary is in another order and its template another; long texts are counted."""
    own = copy.deepcopy(chat_tokenizer)
    own.add_tokens(["good", "Q1"])
    own.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    model = make_reward_model(vocab_size=len(own), max_position_embeddings=24)
    policy_tokenizer = copy.deepcopy(chat_tokenizer)
    seen = []
    reward = RewardModel(model, own)
    original = reward.__call__

    def kept(prompts, completions):
        seen.extend(zip(prompts, completions, original(prompts, completions), strict=True))
        return [score for *_, score in seen[-len(prompts) :]]

    rows = [chat({"prompt": f"Q1: {'long ' * (3 * (i % 2))}"}) for i in range(8)]
    ppo(
        saved_policy,
        [kept, reward],
        Dataset.from_list(rows),
        tmp_path / "x",
        processing_class=policy_tokenizer,
        **QUICK_PPO,
    )
    for prompt, completion, score in seen:
        text = f"<{prompt[0]['content']}><{completion[0]['content']}>"
        ids = torch.tensor([own(text)["input_ids"][-24:]])
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert reward.truncated > 0
    assert "texts for the reward were truncated" in capsys.readouterr().out


def test_further_columns_reach_the_reward(saved_policy, tmp_path):
    seen = []

    def reward(prompts, completions, country):
        seen.extend(country)
        return [0.0] * len(prompts)

    prompts = Dataset.from_dict({"prompt": ["a", "b"] * 2, "country": ["x", "y"] * 2})
    ppo(saved_policy, reward, prompts, tmp_path / "x", **QUICK_PPO)
    assert set(seen) == {"x", "y"}


def test_the_stages_repeat_themselves(saved_policy, saved_reward_model, tmp_path):
    prompts = Dataset.from_list(PROMPTS)
    first, second = (
        ppo(saved_policy, saved_reward_model, prompts, tmp_path / name, **QUICK_PPO).metrics
        for name in "ab"
    )
    for name in ("eps", "seconds"):
        first.pop(name), second.pop(name)
    assert first == second


# ---- resuming ------------------------------------------------------------------------------------


def history(folder):
    """The logs of a run, without what depends on the clock."""
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "second")
    return [{k: v for k, v in log.items() if not any(c in k for c in clock)} for log in logs]


@pytest.mark.parametrize("call, rows", [(sft, DEMONSTRATIONS), (rm, PAIRS)], ids=["sft", "rm"])
def test_resuming_gives_what_the_whole_run_gives(saved_policy, tmp_path, call, rows):
    """Weights, logs (the second begins before the checkpoint and ends after it) and figures.

    After the last step, which is within a pass, there is no further one.
    """
    data = Dataset.from_list(rows)
    options = {**QUICK, "per_device_train_batch_size": 1, "max_steps": 6, "logging_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    options |= {"eval_size": 0} if call is rm else {}
    whole = call(saved_policy, data, tmp_path / "whole", **options)
    assert len(history(whole.path)) == 3

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        call(saved_policy, data, cut, callbacks=[Interrupt()], **options)
    assert not (cut / "metrics.json").exists()
    assert (cut / "config.yaml").is_file()
    kind = AutoModelForCausalLM if call is sft else AutoModelForSequenceClassification
    for step in (4, 6):
        assert [path.name for path in all_checkpoints(cut)][-1] == f"checkpoint-{step}"
        resumed = call(saved_policy, data, cut, resume_from_checkpoint=True, **options)
        assert history(cut)[:3] == history(whole.path)
        assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]
        assert resumed.metrics["seconds"] > whole.metrics["seconds"] / 2
        first, second = (kind.from_pretrained(run).state_dict() for run in (whole, resumed))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


# ---- bad input -----------------------------------------------------------------------------------


GOOD = {"sft": DEMONSTRATIONS, "rm": RANKINGS, "ppo": PROMPTS}


def run_stage(stage, rows, folder, model, **options):
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    if stage == "ppo":
        reward = options.pop("reward", vowels)
        return ppo(model, reward, data, folder, **{**QUICK_PPO, **options})
    return {"sft": sft, "rm": rm}[stage](model, data, folder, **{**QUICK, **options})


RECORDS = [
    ("sft", [{"query": "a", "answer": "b"}], r"`prompt` and `completion` missing.*rename"),
    ("sft", [{"prompt": " ", "completion": "b"}], r"row 1: `prompt` is empty"),
    ("sft", [{"prompt": "a", "completion": ""}], r"row 1: `completion` is empty"),
    ("sft", Dataset.from_dict({"prompt": [], "completion": []}), "holds no records"),
    ("sft", [chat(DEMONSTRATIONS[0])], "no chat template. Set chat_template_path"),
    (
        "sft",
        [*DEMONSTRATIONS, {"prompt": "p" * 128, "completion": "b"}],
        "row 9: the prompt alone",
    ),
    ("rm", [{"prompt": "a", "replies": ["b", "c"]}], "needs rankings .* or pairs .*: prompt, repl"),
    ("rm", [{"prompt": "a", "responses": ["b"]}], r"row 1: .*at least (2|two)"),
    ("rm", [{"prompt": "", "responses": ["b", "c"]}], r"row 1: `prompt` is empty"),
    ("rm", [{"prompt": "a", "chosen": "b", "rejected": ""}], r"row 1: `rejected` is empty"),
    ("rm", [{**row, "ranks": [1, 1, 1]} for row in RANKINGS], "has a pair with a winner: all are"),
    ("rm", RANKINGS[:1], r"eval_size holds out prompts.*set eval_size to 0"),
    (
        "rm",
        [{**PAIRS[i], "chosen": "x" * 200} for i in range(8)],
        r"All pairs of responses are longer than",
    ),
    ("rm", [chat(row) for row in RANKINGS], "no chat template. Set chat_template_path"),
    ("ppo", [{"question": "a"}], "`prompt` missing. Columns found: question.*rename"),
    ("ppo", [{"prompt": ""}], r"row 1: `prompt` is empty"),
    ("ppo", [*PROMPTS, {"prompt": "p" * 125}], "Prompt 9 is 125 tokens long.*max_prompt_length"),
    ("ppo", [chat(PROMPTS[0])], "no chat template"),
]


@pytest.mark.parametrize(("stage", "rows", "message"), RECORDS)
def test_bad_records(saved_policy, tmp_path, stage, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        run_stage(stage, rows, tmp_path / "x", saved_policy)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_file_and_line_of_a_bad_ranking_are_named(saved_policy, tmp_path):
    bad = write(
        tmp_path / "r.jsonl", [*RANKINGS, {"prompt": "a", "responses": ["b"], "ranks": [1]}]
    )
    with pytest.raises(InputError, match=r"r\.jsonl, line 9"):
        rm(saved_policy, bad, tmp_path / "x", **QUICK)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_bad_models_and_options(saved_policy, tmp_path, stage):
    no_eos = tmp_path / "no_eos"
    load_policy(saved_policy, ModelConfig()).save_pretrained(no_eos)
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(no_eos)
    for model, options, message in (
        (no_eos, {}, "has no EOS token"),
        (None, {}, "No model was given"),
        (tmp_path / "nowhere", {}, "could be loaded from"),
        (saved_policy, {"learning_rat": 1}, "Unknown option 'learning_rat'"),
        (saved_policy, {"load_in_4bit": True}, "Set use_peft as well"),
        (saved_policy, {"attn_implementation": "flex_attention"}, "no backward pass on CPU"),
        (saved_policy, {"output_dir": None}, f"{stage} needs output_dir"),
    ):
        folder = None if "output_dir" in options else tmp_path / "x"
        options = {k: v for k, v in options.items() if k != "output_dir"}
        with pytest.raises(InputError, match=message):
            run_stage(stage, GOOD[stage], folder, model, **options)
        assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="No dataset was given"):
        run_stage(stage, None, tmp_path / "x", saved_policy)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_several_gpus_and_one_process(saved_policy, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match="one of 2 GPUs.*accelerate launch"):
        run_stage(stage, GOOD[stage], tmp_path / "x", saved_policy)
    assert not (tmp_path / "x").exists()


def test_models_in_the_wrong_place(saved_policy, saved_reward_model, tmp_path):
    for stage in ("sft", "ppo"):
        with pytest.raises(InputError, match="lacks weights .*reward model where a policy"):
            run_stage(stage, GOOD[stage], tmp_path / "x", saved_reward_model)
    for reward, message in (
        (saved_policy, "lacks weights .*score.weight"),
        (tmp_path / "nowhere", "No model could be loaded"),
        (None, "No reward was given"),
    ):
        with pytest.raises(InputError, match=message):
            run_stage("ppo", PROMPTS, tmp_path / "x", saved_policy, reward=reward)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "returned 1 scores for 4 completions"),
        ([1.0, 2.0, float("nan"), 3.0], "gave the score nan; .*prompt [1-8] of the dataset"),
        ([None] * 4, "gave the score None; .*prompt [1-8] of the dataset"),
        (1.0, "returned float for 4 completions"),
    ],
)
def test_bad_rewards(saved_policy, tmp_path, scores, message):
    def mine(prompts, completions):
        return scores

    with pytest.raises(InputError, match=f"'mine' {message}"):
        run_stage("ppo", PROMPTS, tmp_path / "x", saved_policy, reward=mine)
    assert not (tmp_path / "x").exists()
