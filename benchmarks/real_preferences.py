"""Reward models of SmolLM2-135M on real preferences, beside "longer wins" and TRL's RewardTrainer.

python benchmarks/real_preferences.py ../shared/data [SET ...]  # about three hours of one CPU core

Three sets: long answers compared by people (K = 4, length helps nobody), instructions ranked by
GPT-4 (AlpacaEval, K = 4 to 9), dialogues with two replies compared by people (HH). A part of the
prompts is held out. Both trainers start from the same weights with the same LoRA, and see the same
pairs once; both are measured by `evaluate_reward`. The model comes from `make weights`.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import trl
from datasets import Dataset
from real_rankings import MEASURED, cells_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import ModelConfig, get_peft_config

from trl_instruct import load_pairs, load_rankings, rankings_to_pairs, rm, split_by_prompt
from trl_instruct.data.preferences import as_rankings
from trl_instruct.reward_trainer.evaluation import evaluate_reward
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer
from trl_instruct.rewards.reward_model import RewardModel

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench" / "real_preferences"
MODEL = ROOT / "runs" / "weights" / "smollm2-135m"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LORA: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}
# Of each set: its file, the most characters of a response and the most responses of a ranking that
# are kept, how a prompt is written, and how many rankings are read (what fits into two hours).
SETS: dict[str, dict[str, Any]] = {
    "people's answers": {
        "file": "qa_feedback_human_rankings_train",
        "characters": 1000,
        "responses": 4,
        "prompt": CHAT,
        "rankings": 400,
    },
    "AlpacaEval": {
        "file": "alpacaeval_gpt4judge_rankings_train",
        "characters": 400,
        "responses": 4,
        "prompt": CHAT,
        "rankings": 800,
    },
    "HH, helpful": {
        "file": "hh_helpful_pairs_train",
        "characters": 400,
        "responses": 2,
        "prompt": "{}",
        "rankings": 1600,
    },
}
TRAINING: dict[str, Any] = {
    "max_length": 512,
    "gradient_checkpointing": False,
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 10,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
# Comparisons of an optimizer step, nearly: rankings differ.
PAIRS_A_STEP = 32


def kept(folder: Path, given: dict[str, Any]) -> Dataset:
    """The set's rankings of short enough responses, at most so many of each."""
    path = folder / f"{given['file']}.jsonl.gz"
    data = as_rankings(load_pairs(path)) if given["responses"] == 2 else load_rankings(path)

    def shorten(record: dict[str, Any]) -> dict[str, Any]:
        rows = [
            row for row, text in enumerate(record["responses"]) if len(text) <= given["characters"]
        ]
        rows = rows[: given["responses"]]
        prompt = given["prompt"].format(record["prompt"])
        responses = [record["responses"][row] for row in rows]
        return {
            "prompt": prompt,
            "responses": responses,
            "ranks": [record["ranks"][row] for row in rows],
        }

    data = data.map(shorten).filter(lambda r: len(r["responses"]) > 1 and len(r["prompt"]) < 600)
    data = data.select(range(min(given["rankings"], len(data))))
    return load_rankings(data.select_columns(["prompt", "responses", "ranks"]))


@contextlib.contextmanager
def timed(trainer: Any) -> Iterator[list[float]]:
    """Holds the processor seconds of the trainer's `train` inside, loading left out."""
    seconds: list[float] = []
    train = trainer.train

    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        result = train(self, *args, **kwargs)
        seconds.append(time.process_time() - begun)
        return result

    with mock.patch.object(trainer, "train", measured):
        yield seconds


def ours(train: Dataset, test: Dataset, folder: Path, bf16: bool) -> dict[str, Any]:
    """Train with `rm`; what it measured, and the processor seconds of training alone."""
    pairs = len(rankings_to_pairs(train)) / len(train)
    size = max(1, round(PAIRS_A_STEP / pairs / 2))
    with timed(RankingRewardTrainer) as seconds:
        result = rm(
            str(MODEL),
            train,
            folder,
            eval_dataset=test,
            dtype="float32",
            use_peft=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=2,
            overwrite_output_dir=True,
            **LORA,
            **TRAINING,
            bf16=bf16,
        )
    return {**result.metrics, "seconds": seconds[0]}


def stock(train: Dataset, test: Dataset, folder: Path, bf16: bool) -> dict[str, Any]:
    """Train with TRL's RewardTrainer on the same pairs, and measure as `rm` does."""
    set_seed(TRAINING["seed"])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL, num_labels=1, dtype=torch.float32
    )
    lora = get_peft_config(ModelConfig(use_peft=True, lora_task_type="SEQ_CLS", **LORA))
    lora.modules_to_save = ["score"]
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            str(folder),
            per_device_train_batch_size=PAIRS_A_STEP // 8,
            gradient_accumulation_steps=8,
            **TRAINING,
            bf16=bf16,
        ),
        train_dataset=rankings_to_pairs(train),
        processing_class=tokenizer,
        peft_config=lora,
    )
    with timed(trl.RewardTrainer) as seconds:
        trainer.train()
    trainer.save_model(str(folder))
    reward = RewardModel(trainer.model, tokenizer)
    return {**evaluate_reward(reward, test, tokenizer).metrics, "seconds": seconds[0]}


def row(name: str, trainer: str, metrics: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [name, trainer, *cells_of(metrics), f"{metrics['seconds']:.0f}"]
    return "| " + " | ".join(cells) + " |"


HEADER = ("preferences", "trainer", *MEASURED, "processor seconds of training")


def main() -> None:
    """Measure the sets; print and save the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("sets", nargs="*", help=f"some of {', '.join(SETS)}; default: all")
    parser.add_argument("--trainers", nargs="+", default=["ours", "TRL"], choices=["ours", "TRL"])
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision, for both; pays on a processor with AMX or AVX512_BF16",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the heads, adapters and batches")
    given = parser.parse_args()
    TRAINING["seed"] = given.seed
    chosen = {name: SETS[name] for name in given.sets or SETS}
    for needed in (MODEL, *(given.data / f"{s['file']}.jsonl.gz" for s in chosen.values())):
        if not needed.exists():
            sys.exit(
                f"Missing {needed}: not measured. Run make weights, or give the data's folder."
            )
    rows = {}
    for name, options in chosen.items():
        train, test = split_by_prompt(kept(given.data, options), 0.2)
        for trainer in given.trainers:
            function = ours if trainer == "ours" else stock
            folder = RUNS / options["file"] / trainer.lower()
            rows[name, trainer] = function(train, test, folder, given.bf16)
            print(row(name, trainer, rows[name, trainer]), flush=True)
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    print("\n".join(row(*names, metrics) for names, metrics in rows.items()))
    saved = {" / ".join(names): metrics for names, metrics in rows.items()}
    RUNS.with_suffix(".json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
