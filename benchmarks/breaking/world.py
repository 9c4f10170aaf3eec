"""A world of a few thousand parameters: models, an adapter, data files, options of each stage."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

QUICK: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_steps": 1,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
PPO = {"num_mini_batches": 1, "response_length": 4}
DEMONSTRATIONS = [{"prompt": f"Q{i}: ", "completion": f"answer {i % 3}"} for i in range(12)]
RANKINGS = [
    {"prompt": f"Q{i}: ", "responses": ["bad", "good one", "fair"], "ranks": [3, 1, 2]}
    for i in range(12)
]
PAIRS = [{"prompt": f"Q{i}: ", "chosen": "good", "rejected": f"bad {i}"} for i in range(12)]
PROMPTS = [{"prompt": f"{'long ' * (i % 3)}Q{i}: "} for i in range(12)]
TEXTS = [{"text": f"a text of a few words, number {i}. " * 3} for i in range(12)]


def messages(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


TALKS = [
    {"prompt": messages(row["prompt"]), "completion": messages(row["completion"], "assistant")}
    for row in DEMONSTRATIONS
]


def build(folder: Path) -> None:
    """Write the world. To be called in a fork: it computes."""
    import torch
    from conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    tokenizers = {"": byte_tokenizer(), "chat_": byte_tokenizer(chat_template=CHAT_TEMPLATE)}
    for prefix, tokenizer in tokenizers.items():
        for name, seed in (("policy", 0), ("reward", 1)):
            path = folder / f"{prefix}{name}"
            tiny_model(classifier=name == "reward", seed=seed).save_pretrained(path)
            tokenizer.save_pretrained(path)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "policy")
    adapted.save_pretrained(folder / "adapter")
    tokenizers[""].save_pretrained(folder / "adapter")
    data = {
        "demonstrations": DEMONSTRATIONS,
        "rankings": RANKINGS,
        "pairs": PAIRS,
        "prompts": PROMPTS,
        "texts": TEXTS,
        "talks": TALKS,
        "talk_prompts": [{"prompt": row["prompt"]} for row in TALKS],
    }
    for name, rows in data.items():
        write_lines(folder / f"{name}.jsonl", rows)
    (folder / "rewards.py").write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [sum(c.count(v) for v in 'aeiou') / 4 for c in completions]\n"
    )


def write_lines(path: Path, rows: list[Any]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def options(stage: str, world: Path, **changed: Any) -> dict[str, Any]:
    """Options of one quick step of a stage; None takes one out."""
    common = {"model_name_or_path": world / "policy", **QUICK, "output_dir": "out"}
    given: dict[str, dict[str, Any]] = {
        "pretrain": {
            **QUICK,
            "dataset_name": world / "texts.jsonl",
            "vocab_size": 300,
            "max_length": 16,
            "architecture_kwargs": {
                **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
                **{"num_attention_heads": 2, "num_key_value_heads": 2},
            },
        },
        "sft": {**common, "dataset_name": world / "demonstrations.jsonl"},
        "rm": {**common, "dataset_name": world / "rankings.jsonl", "eval_size": 0},
        "ppo": {
            **common,
            **PPO,
            "dataset_name": world / "prompts.jsonl",
            "reward_model_path": [world / "reward"],
        },
        "candidates": {
            "model_name_or_path": world / "policy",
            "dataset_name": world / "prompts.jsonl",
            "num_candidates": 3,
            "response_length": 4,
            "use_cpu": True,
        },
        "evaluate": {
            "models": [world / "policy"],
            "dataset_name": world / "prompts.jsonl",
            "response_length": 4,
            "use_cpu": True,
        },
    }
    chosen = {**given[stage], "output_dir": "out", **changed}
    return {name: _plain(value) for name, value in chosen.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.fspath(value) if isinstance(value, Path) else value


def write_options(path: Path, given: dict[str, Any]) -> Path:
    """A stage's options as the YAML file of --config."""
    path.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    return path
