"""The recipes for models of the Hub, three steps a stage: small random models of the same
architecture, and rows in the data sets' published shapes. No option, column or template is wrong.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import byte_tokenizer, tiny_model
from datasets import Dataset

from trl_instruct import cli
from trl_instruct.data import sources

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUICK = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
}
SAMPLING = {"num_mini_batches": 1, "local_rollout_forward_batch_size": 4, "response_length": 4}


def talk(question, reply):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def rows_of(make):
    return [make(f"Question {row}?", f"Answer {row}.", f"No {row}.") for row in range(12)]


def post(question):
    return f"SUBREDDIT: r/own\n\nTITLE: {question}\n\nPOST: It\nrained.\n\nTL;DR:"


TLDR = rows_of(lambda q, good, _: {"prompt": post(q), "completion": f" {good}"})
TLDR_PAIRS = rows_of(
    lambda q, good, bad: {"prompt": post(q), "chosen": f" {good}", "rejected": f" {bad}"}
)
NO_ROBOTS = rows_of(
    lambda q, good, _: {
        "prompt": q,
        "prompt_id": q,
        "messages": [{"role": "system", "content": "Be kind."}, *talk(q, good)],
        "category": "Open QA",
    }
)
HELPFUL = rows_of(
    lambda q, good, bad: {
        "prompt": talk(q, good)[:1],
        "chosen": talk(q, good)[1:],
        "rejected": talk(q, bad)[1:],
    }
)
DOLLY = rows_of(
    lambda q, good, _: {
        "instruction": q,
        "context": "",
        "response": good,
        "category": "open_qa",
    }
)
ULTRAFEEDBACK = rows_of(
    lambda q, good, bad: {
        "source": "own",
        "instruction": q,
        "models": ["a", "b", "c", "d"],
        "completions": [
            {"response": f"{text} {k}", "overall_score": score, "fine-grained_score": 1.0}
            for k, (text, score) in enumerate([(good, 8.0), (bad, 2.5), (good, 8.0), (bad, 5.0)])
        ],
    }
)
ALPACA = rows_of(lambda q, good, _: {"instruction": q, "input": "", "output": good})
HUB = {
    ("yahma/alpaca-cleaned", "train"): ALPACA,
    ("trl-lib/tldr", "train validation test"): TLDR,
    ("trl-lib/tldr-preference", "train validation"): TLDR_PAIRS,
    ("HuggingFaceH4/no_robots", "train test"): NO_ROBOTS,
    ("trl-lib/hh-rlhf-helpful-base", "train test"): HELPFUL,
    ("databricks/databricks-dolly-15k", "train"): DOLLY,
    ("openbmb/UltraFeedback", "train"): ULTRAFEEDBACK,
}


def load_dataset(path, split, streaming, name=None, **files):
    """What the Hub would give."""
    (found,) = (
        rows
        for (known, splits), rows in HUB.items()
        if known == path and split.partition("[")[0] in splits.split()
    )
    return Dataset.from_list(found)


def pretrained(kind, folder, chat):
    """A small random model of an architecture that reads as much as the real one."""
    tokenizer = byte_tokenizer(chat_template=CHATML if chat else None)
    if chat:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tiny_model(kind, max_position_embeddings=2048, **tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def brevity(prompts, completions, output, **columns):
    """The judge of smollm2-hub, without its model: it reads the reference answers."""
    assert all(answer.startswith("Answer") for answer in output)
    return [-len(completion) for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [
        ("pythia-tldr", "gpt_neox"),
        ("qwen3-hh", "qwen3"),
        ("smollm2-ultrafeedback", "llama"),
        ("smollm2-hub", "llama"),
    ],
)
def test_three_steps_of_each_stage(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    base = tmp_path / "base"
    pretrained(kind, base, chat=name == "qwen3-hh")
    given = {
        "sft": {"model_name_or_path": base},
        "rm": {"model_name_or_path": tmp_path / "sft"},
        "ppo": {
            "model_name_or_path": tmp_path / "sft",
            "reward_model_path": tmp_path / "rm",
            **SAMPLING,
        },
    }
    if name.startswith("smollm2"):
        given["rm"]["eval_size"] = 0.2  # of 12 prompts instead of 64 thousand
    if name == "smollm2-hub":
        given["ppo"]["gold"] = f"{__file__}:brevity"
        given["ppo"]["summary_file"] = tmp_path / "ppo" / "summary.json"
    for stage, options in given.items():
        options = {**QUICK, **options, "output_dir": tmp_path / stage}
        flags = [f"--{option}={value}" for option, value in options.items()]
        cli.main([stage, "--config", str(CONFIGS / name / f"{stage}.yaml"), *flags])
        state = json.loads((tmp_path / stage / "trainer_state.json").read_text())
        assert state["global_step"] == 3
    assert set(json.loads((tmp_path / "ppo" / "summary.json").read_text())["rm"]) >= {"sft", "ppo"}


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("*/*.yaml")), ids="{0.parent.name}-{0.stem}".format
)
def test_what_a_recipe_says(file):
    """Its head has hardware and command; its result lies where `make` looks for it."""
    head = file.read_text(encoding="utf-8").partition("\nmodel")[0]
    assert re.search("Command: (make|trl-instruct) ", head) and "Hardware: " in head
    output_dir = yaml.safe_load(file.read_text(encoding="utf-8"))["output_dir"]
    assert output_dir.startswith(f"runs/{file.parent.name}/")


def test_one_recipe_with_and_without_the_hub():
    """smollm2 and smollm2-hub differ in the names of models and data, and what follows from it."""
    names = re.compile("model_name_or_path|dataset_name|split|output_dir|path|file|max_length")
    for stage in ("sft", "rm", "ppo"):
        here, hub = (
            yaml.safe_load((CONFIGS / name / f"{stage}.yaml").read_text(encoding="utf-8"))
            for name in ("smollm2", "smollm2-hub")
        )
        assert here.keys() == hub.keys()
        assert all(names.search(key) for key in here if here[key] != hub[key])
