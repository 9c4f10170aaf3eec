"""The reward model on real rankings, beside "the longer answer wins" on the same held-out pairs.

python benchmarks/real_rankings.py [folder of the data, default ../shared/data]

Two sets, each in jsonl.gz files: AlpacaEval responses ranked by GPT-4 (English, K = 4 to 9) and
OASST1 (Chinese, ranked by people). For each, a small base model is trained on text of the language
and a reward model from it, with a fifth of the prompts held out. The results are written to
runs/bench/real_rankings.json.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from trl_instruct import load_rankings, pretrain, rm, split_by_prompt
from trl_instruct.data.sources import load_records

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench" / "real_rankings"
SETS = {
    "alpacaeval_gpt4judge_rankings_train": ("text_en", "alpaca_demos_5k"),
    "oasst_zh_human_rankings": ("alpaca_zh_demos_5k",),
}
BASE: dict[str, Any] = {
    "vocab_size": 3000,
    "max_length": 256,
    "architecture_kwargs": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "max_steps": 100,
}
REWARD: dict[str, Any] = {
    "max_length": 1024,
    "truncate_prompt": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
}
MEASURED = (
    *("held-out prompts / pairs", "accuracy (95 %)", "longer answer wins (95 %)"),
    *("above that (95 %)", "log-loss", "calibration error (a perfect model)", "score and length"),
)
HEADER = ("rankings", *MEASURED, "seconds")
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "overwrite_output_dir": True,
    "seed": 0,
}


def with_history(record: dict[str, Any]) -> dict[str, Any]:
    """The prompt with its previous turns, one per line."""
    turns = [turn for pair in record.get("history") or [] for turn in pair]
    return {"prompt": "\n".join([*turns, record["prompt"], ""])}


def texts(folder: Path, names: tuple[str, ...], rankings: Dataset) -> Dataset:
    """The base model's training text: the language's text and the training rankings."""
    parts = []
    for name in names:
        records = load_records(folder / f"{name}.jsonl.gz")
        if "text" not in records.column_names:
            records = records.map(lambda r: {"text": r["prompt"] + "\n" + r["completion"]})
        parts.append(records.select_columns("text"))
    ranked = [row["prompt"] + response for row in rankings for response in row["responses"]]
    return concatenate_datasets([*parts, Dataset.from_dict({"text": ranked})])


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Train and evaluate on one set; its metrics and seconds."""
    started = time.perf_counter()
    rankings = load_rankings(load_records(folder / f"{name}.jsonl.gz").map(with_history))
    train, test = split_by_prompt(rankings, 0.2)
    text = texts(folder, SETS[name], train)
    base = pretrain(text, RUNS / name / "base", **BASE, **COMMON)
    result = rm(base, train, RUNS / name / "rm", eval_dataset=test, **REWARD, **COMMON)
    return {**result.metrics, "set": name, "seconds": round(time.perf_counter() - started, 1)}


def cells_of(metrics: dict[str, Any]) -> list[str]:
    """What was measured of a reward model, as cells under `MEASURED`."""
    cells = [f"{metrics['eval_prompts']} / {metrics['eval_pairs']:,}"]
    for what in ("accuracy", "length_accuracy", "above_length"):
        mean, low, high = (metrics[f"{what}{end}"] for end in ("", "_low", "_high"))
        cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
    error, floor = metrics["calibration_error"], metrics["calibration_floor"]
    cells += [f"{metrics['log_loss']:.3f}", f"{error:.3f} ({floor:.3f})"]
    return [*cells, f"{metrics['length_correlation']:+.2f}"]


def row(metrics: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [metrics["set"], *cells_of(metrics), f"{metrics['seconds']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure both sets and print the table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    missing = [name for name in SETS if not (folder / f"{name}.jsonl.gz").is_file()]
    if missing:
        print(f"{folder} lacks {missing[0]}.jsonl.gz: not measured. Give the folder that holds it.")
        return
    shutil.rmtree(RUNS, ignore_errors=True)
    rows = [measure(folder, name) for name in SETS]
    path = RUNS.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    print("\n".join(map(row, rows)))


if __name__ == "__main__":
    main()
