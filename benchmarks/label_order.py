"""Which prompts to label next: any, or those where the present reward model is least sure?

python benchmarks/label_order.py            # seeds 0 1 2 3; it needs runs/tiny/sft (make sft)
python benchmarks/label_order.py 4 5

The simulated labeler of the tiny world ranks 300 prompts of 1,200, four completions each, 75 at a
time. The first 75 are drawn; then the reward model, trained anew on all that is labelled, says of
which rankings it is least sure: the mean entropy of its sigmoid(r_a - r_b) over the pairs. The
other order draws all of them. Both end with a reward model from 300 rankings.

The columns are accuracies on 500 held-out prompts, by the order of the gold scores.
"""

import argparse
import json
import random
import statistics
from itertools import combinations
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars

from trl_instruct import load_reward, rm
from trl_instruct.data.sources import load_records
from trl_instruct.intervals import mean_interval
from trl_instruct.recipes.candidates import sample_candidates
from trl_instruct.recipes.stage import StageResult
from trl_instruct.tiny import SimulatedLabeler

ROOT = Path(__file__).parents[1]
POLICY, RUNS = ROOT / "runs" / "tiny" / "sft", ROOT / "runs" / "bench" / "label_order"
POOL, ROUND, LABELLED = 1200, 75, 300
# As recipes/configs/tiny/rm.yaml, but for the passes: 300 rankings are 38 steps, and with seed 0
# two passes over them reach 0.881, one 0.868.
TRAINING = {
    **{"max_length": 128, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    **{"learning_rate": 3e-4, "gradient_checkpointing": False, "save_strategy": "no"},
    **{"use_cpu": True, "report_to": "none", "overwrite_output_dir": True},
    **{"num_train_epochs": 2, "disable_tqdm": True},
}


def candidates(split: str, count: int) -> list[dict]:
    """Completions with gold scores of the first prompts of a split, sampled once."""
    path = RUNS / f"{split}.jsonl"
    if not path.exists():
        prompts = load_records(f"tiny:{split}").select(range(count))
        options = {"response_length": 24, "per_device_eval_batch_size": 512, "seed": 0}
        sample_candidates(POLICY, prompts, path, gold="tiny", **options)
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def train(rankings: list[dict], seed: int, held_out: Dataset | None = None) -> StageResult:
    """A reward model from these rankings, measured if there are others."""
    held = {"eval_size": 0.0} if held_out is None else {"eval_dataset": held_out}
    folder = RUNS / f"rm-{seed}"
    return rm(str(POLICY), Dataset.from_list(rankings), folder, seed=seed, **held, **TRAINING)


def least_sure(folder: str, pool: list[dict], count: int) -> list[dict]:
    """The rankings of whose pairs the reward model is least sure."""
    reward = load_reward(folder)
    prompts = [row["prompt"] for row in pool for _ in row["responses"]]
    scores = iter(reward(prompts, [text for row in pool for text in row["responses"]]))

    def entropy(row: dict) -> float:
        pairs = combinations([next(scores) for _ in row["responses"]], 2)
        chances = torch.sigmoid(torch.tensor([a - b for a, b in pairs], dtype=torch.float64))
        return torch.special.entr(torch.stack([chances, 1 - chances])).sum(0).mean().item()

    unsure = [entropy(row) for row in pool]
    order = sorted(range(len(pool)), key=unsure.__getitem__)
    return [pool[place] for place in order[-count:]]


def compare(seed: int, pool: list[dict], held_out: Dataset) -> tuple[float, float]:
    """Accuracy after 300 prompts in a drawn and in a chosen order, which begin alike."""
    drawn = random.Random(seed).sample(pool, len(pool))
    labeler = SimulatedLabeler(seed=seed)
    labels = ranked([{**row, "scores": labeler.label(row["gold_scores"])} for row in drawn])
    chosen, left = labels[:ROUND], labels[ROUND:]
    while len(chosen) < LABELLED:
        new = least_sure(train(chosen, seed).path, left, ROUND)
        chosen, left = chosen + new, [row for row in left if row not in new]
    first, second = (train(rows, seed, held_out) for rows in (labels[:LABELLED], chosen))
    return first.metrics["accuracy"], second.metrics["accuracy"]


def ranked(rows: list[dict]) -> list[dict]:
    """Only what a reward model reads."""
    return [{name: row[name] for name in ("prompt", "responses", "scores")} for row in rows]


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2, 3])
    seeds = parser.parse_args().seeds
    disable_progress_bars()
    pool = candidates("rankings", POOL)
    test = candidates("test", 500)
    held_out = Dataset.from_list(ranked([{**row, "scores": row["gold_scores"]} for row in test]))
    lines = ["| seed | 300 drawn | 300 chosen | chosen - drawn |", "|---|---|---|---|"]
    gains = []
    for seed in seeds:
        drawn, chosen = compare(seed, pool, held_out)
        gains.append(chosen - drawn)
        lines.append(f"| {seed} | {drawn:.3f} | {chosen:.3f} | {gains[-1]:+.3f} |")
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    if len(gains) > 1:
        _, low, high = mean_interval(gains)
        print(f"\nmean gain {statistics.fmean(gains):+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
