"""Rankings against pairs: whole training steps of our trainer and TRL's on the same rankings.

python benchmarks/rm.py                      # gpt2 and llama, 6 layers x 384, about seven minutes
python benchmarks/rm.py llama

TRL's RewardTrainer gets the C(K,2) pairs of every prompt in one batch, ours the rankings; both do a
forward pass, a backward pass and a step of AdamW, without gradient checkpointing, in turn in one
process. Both start from the same weights, and their first losses are checked to be equal.

- ratio: seconds of TRL's step / seconds of ours, the fastest of each. rm.json also has `ratio_cpu`,
  in processor seconds, unaffected by other load on the machine.
- limit: the same in tokens: K (K - 1) (P + C) / (P + K C).
- MB: growth of the resident set in the first step (activations, gradients, optimizer), Linux.
"""

import argparse
import ctypes
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from trl_instruct.configs import RewardConfig
from trl_instruct.data.pairs import rankings_to_pairs
from trl_instruct.recipes.pretrain import train_tokenizer
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer

RESULT = Path(__file__).parents[1] / "runs" / "bench" / "rm.json"
PROMPTS = (64, 256)
RESPONSE = 64
PROMPTS_PER_STEP = {2: 4, 4: 2, 9: 1}
# Timed rounds: at least two, then more up to this many rounds or seconds.
STEPS, SECONDS = 6, 10.0
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 1024},
    "llama": {
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        **{"intermediate_size": 1024, "max_position_embeddings": 1024},
    },
}


def rankings(k: int, prompt: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rankings of K random responses of RESPONSE tokens: one per letter, and EOS."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    records = [
        {
            "prompt": text(prompt),
            "responses": [text(RESPONSE - 1) for _ in range(k)],
            "ranks": draw.sample(range(1, k + 1), k),
        }
        for _ in range(PROMPTS_PER_STEP[k])
    ]
    assert len(tokenizer(records[0]["prompt"])["input_ids"]) == prompt
    return Dataset.from_list(records)


def stepper(trainer: trl.RewardTrainer) -> Callable[[], float]:
    """A function that takes a training step on the trainer's only batch and returns the loss."""
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = trainer.create_optimizer()
    model = trainer.model.train()

    def step() -> float:
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_steppers(kind: str, k: int, prompt: int, folder: str) -> dict[str, Callable[[], float]]:
    """Steps of TRL's trainer on pairs and of ours on rankings, from the same weights."""
    tokenizer = train_tokenizer(["a"], 258, 1024)
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": len(tokenizer), "num_labels": 1, **ARCHITECTURES[kind]},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    data = rankings(k, prompt, tokenizer)
    options: dict[str, Any] = {
        **{"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"gradient_checkpointing": False, "learning_rate": 1e-5},
    }
    steps = {}
    for name in ("trl", "ours"):
        torch.manual_seed(0)
        ours = name == "ours"
        trainer_class, config_class = (
            (RankingRewardTrainer, RewardConfig) if ours else (trl.RewardTrainer, trl.RewardConfig)
        )
        prompts = PROMPTS_PER_STEP[k]
        size = prompts if ours else prompts * comb(k, 2)
        trainer = trainer_class(
            model=AutoModelForSequenceClassification.from_config(config),
            args=config_class(per_device_train_batch_size=size, **options),
            train_dataset=data if ours else rankings_to_pairs(data),
            processing_class=tokenizer,
        )
        steps[name] = stepper(trainer)
    return steps


def growth(step: Callable[[], float]) -> tuple[float, float | None]:
    """The loss of a step, and the largest growth of the resident set in it, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return step(), None

    def read(name: str) -> int:
        lines = status.read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # leave out memory freed before
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = read("VmRSS")
    return step(), (read("VmHWM") - before) / 1024


def race(steps: dict[str, Callable[[], float]]) -> list[dict[str, tuple[float, float]]]:
    """Rounds of steps in turn: wall and processor seconds of each, over all threads."""
    rounds: list[dict[str, tuple[float, float]]] = []
    start = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < STEPS and time.perf_counter() - start < SECONDS):
        taken = {}
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name] = time.perf_counter() - wall, time.process_time() - cpu
        rounds.append(taken)
    return rounds


def measure(kind: str, k: int, prompt: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steppers(kind, k, prompt, folder)
    first = {name: growth(step) for name, step in steps.items()}
    losses = [loss for loss, _ in first.values()]
    assert abs(losses[0] - losses[1]) < 1e-4, losses
    rounds = race(steps)
    wall, cpu = ({name: min(r[name][i] for r in rounds) for name in steps} for i in (0, 1))
    comparisons = PROMPTS_PER_STEP[k] * comb(k, 2)
    pair_tokens, shared_tokens = k * (k - 1) * (prompt + RESPONSE), prompt + k * RESPONSE
    return {
        **{"model": kind, "K": k, "prompt": prompt, "response": RESPONSE},
        "prompts_per_step": PROMPTS_PER_STEP[k],
        "ratio": wall["trl"] / wall["ours"],
        "ratio_cpu": cpu["trl"] / cpu["ours"],
        "limit": pair_tokens / shared_tokens,
        "comparisons_per_second": comparisons / wall["ours"],
        "comparisons_per_second_trl": comparisons / wall["trl"],
        "memory_mb": first["ours"][1],
        "memory_mb_trl": first["trl"][1],
        "steps": len(rounds),
        **{"threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__},
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["model"], row["K"], row["prompt"], f"{row['ratio']:.1f}x", f"{row['limit']:.1f}x"]
    cells += [f"{row[f'comparisons_per_second{side}']:.1f}" for side in ("_trl", "")]
    memory = (row[f"memory_mb{side}"] for side in ("_trl", ""))
    cells += ["" if mb is None else f"{mb:,.0f}" for mb in memory]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Measure, print each row of the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(ARCHITECTURES), metavar="gpt2 | llama")
    models = parser.parse_args().models
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    print(f"{torch.get_num_threads()} thread(s), response {RESPONSE} tokens\n")
    print("| model | K | prompt | ratio | limit | pairs/s TRL | pairs/s ours | MB TRL | MB ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for kind, k, prompt in itertools.product(models, PROMPTS_PER_STEP, PROMPTS):
        rows.append(measure(kind, k, prompt))
        print(line(rows[-1]), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
