"""The whole pipeline, tiny, on the real data that may lie beside the checkout."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from trl_instruct import load_rankings, ppo, pretrain, rm, sft, split_by_prompt

DATA = Path(__file__).parents[2] / "shared" / "data"
LANGUAGES = {
    "en": {
        "demonstrations": "alpaca_demos_5k",
        "rankings": "alpacaeval_gpt4judge_rankings_train",
        "prompts": "ppo_prompts_en_2k",
    },
    "zh": {
        "demonstrations": "alpaca_zh_demos_5k",
        "rankings": "oasst_zh_human_rankings",
        "prompts": "ppo_prompts_zh_1k",
    },
}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
QUICK = {
    "use_cpu": True,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "learning_rate": 5e-3,
    "num_train_epochs": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "logging_steps": 5,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}"),
]


def short(name, rows, characters=300):
    """The first rows whose prompt is short, the prompt ending its line."""
    path = str(DATA / f"{name}.jsonl.gz")
    data = load_dataset("json", data_files=path, split="train")
    data = data.filter(lambda row: len(row["prompt"]) < characters).select(range(rows))
    return data.map(lambda row: {"prompt": row["prompt"] + "\n"})


def losses(result):
    state = json.loads((result.path / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.fixture(scope="module", params=LANGUAGES)
def run(request, tmp_path_factory):
    """The results of base, SFT, RM and PPO in one language."""
    files = LANGUAGES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    demonstrations = short(files["demonstrations"], 160)
    if request.param == "en":
        path = DATA / "text_en.jsonl.gz"
        base = {"dataset": path, "dataset_train_split": "train[:80]"}
    else:
        text = demonstrations.map(lambda row: {"text": row["prompt"] + row["completion"]})
        base = {"dataset": text}
    base |= {"vocab_size": 1000, "max_length": 128, "architecture_kwargs": LLAMA}
    base = pretrain(**base, output_dir=folder / "base", per_device_train_batch_size=8, **QUICK)
    policy = sft(
        base,
        demonstrations,
        folder / "sft",
        per_device_train_batch_size=8,
        **{**QUICK, "num_train_epochs": 4},
    )
    rankings = load_rankings(short(files["rankings"], 60))
    train, test = split_by_prompt(rankings, 0.2)
    reward = rm(
        policy,
        train,
        folder / "rm",
        eval_dataset=test,
        per_device_train_batch_size=16,
        **{**QUICK, "max_steps": 20},
    )
    aligned = ppo(
        policy,
        reward,
        short(files["prompts"], 64),
        folder / "ppo",
        per_device_train_batch_size=8,
        num_mini_batches=2,
        response_length=16,
        **{**QUICK, "max_steps": 2, "learning_rate": 1e-4, "logging_steps": 1},
    )
    return {"base": base, "sft": policy, "rm": reward, "ppo": aligned}


def test_it_runs_through_and_loads(run):
    for name in ("base", "sft"):
        curve = losses(run[name])
        assert sum(curve[-3:]) / 3 < 0.95 * curve[0], (name, curve)
    measured = run["rm"].metrics
    assert measured["overlong"] < measured["pairs"]
    assert measured["accuracy_low"] <= measured["accuracy"] <= measured["accuracy_high"]
    assert run["ppo"].metrics["objective/length"] > 0
    for name in ("base", "sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(run[name])
    assert AutoModelForSequenceClassification.from_pretrained(run["rm"]).config.num_labels == 1
    generator = pipeline("text-generation", model=str(run["ppo"]), device="cpu")
    assert generator("Name a city.\n", max_new_tokens=4)[0]["generated_text"]
