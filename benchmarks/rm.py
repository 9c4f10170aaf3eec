"""Rankings against pairs: whole training steps of our trainer and TRL's on the same rankings.

python benchmarks/rm.py                      # gpt2 and llama, 6 layers x 384, about twelve minutes
python benchmarks/rm.py llama

TRL's RewardTrainer gets the C(K,2) pairs of every prompt, ours the rankings, once with a row for
each response ("separate") and once with a shared prompt; all do a forward pass, a backward pass and
a step of AdamW, without gradient checkpointing, in turn in one process. They start from the same
weights, and their first losses are checked to be equal. Batches of pairs have up to 46,080 tokens;
only K = 9 with prompts of 1,024 exceeds that, and gets two batches before its step.

- pairs/s: comparisons per second, from the fastest step of each.
- x: seconds of pairs (of separate rows) / seconds of a shared prompt, and how much of the limit
  that is. rm.json also has `ratio_cpu`, in processor seconds, unaffected by other load.
- limit: the same in tokens: K (K - 1) (P + C) / (P + K C), and K (P + C) / (P + K C).
- MB: growth of the resident set in the first step (activations, gradients, optimizer), Linux.
"""

import argparse
import ctypes
import itertools
import json
import math
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
# K, prompts in a step, tokens of a prompt, of a response.
SIZES = [
    *((k, prompts, length, 64) for k, prompts in ((2, 4), (4, 2), (9, 1)) for length in (64, 256)),
    *((k, 1, 1024, 256) for k in (4, 9)),
]
PAIR_TOKENS = 46_080
# Timed rounds: at least one, then more up to this many rounds or seconds.
STEPS, SECONDS = 6, 15.0
CONTEXT = 2048
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": CONTEXT},
    "llama": {
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6},
        **{"intermediate_size": 1024, "max_position_embeddings": CONTEXT},
    },
}
WAYS = ("pairs", "separate", "shared")


def rankings(
    k: int, prompts: int, prompt: int, response: int, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Rankings of K random responses: a token per letter, and EOS."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    records = [
        {
            "prompt": text(prompt),
            "responses": [text(response - 1) for _ in range(k)],
            "ranks": draw.sample(range(1, k + 1), k),
        }
        for _ in range(prompts)
    ]
    assert len(tokenizer(records[0]["prompt"])["input_ids"]) == prompt
    return Dataset.from_list(records)


def stepper(trainer: trl.RewardTrainer) -> Callable[[], float]:
    """A function that takes a training step on all of the trainer's data and returns the loss."""
    batches = list(trainer.get_train_dataloader())
    optimizer = trainer.create_optimizer()
    model = trainer.model.train()

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(model, dict(batch)) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def make_steppers(
    kind: str, k: int, prompts: int, prompt: int, response: int, folder: str
) -> dict[str, Callable[[], float]]:
    """Steps of TRL's trainer on pairs and of ours on rankings, from the same weights."""
    tokenizer = train_tokenizer(["a"], 258, CONTEXT)
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": len(tokenizer), "num_labels": 1, **ARCHITECTURES[kind]},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    data = rankings(k, prompts, prompt, response, tokenizer)
    options: dict[str, Any] = {
        **{"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"gradient_checkpointing": False, "learning_rate": 1e-5, "max_length": CONTEXT},
    }
    tokens = prompts * k * (k - 1) * (prompt + response)
    steps = {}
    for way in WAYS:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        given: dict[str, Any] = {"model": model, "processing_class": tokenizer}
        if way == "pairs":
            size = prompts * comb(k, 2) // math.ceil(tokens / PAIR_TOKENS)
            args = trl.RewardConfig(per_device_train_batch_size=size, **options)
            pairs = rankings_to_pairs(data)
            trainer = trl.RewardTrainer(args=args, train_dataset=pairs, **given)
        else:
            forward = "grouped" if way == "separate" else "shared_prefix"
            args = RewardConfig(per_device_train_batch_size=prompts, forward=forward, **options)
            trainer = RankingRewardTrainer(args=args, train_dataset=data, **given)
        steps[way] = stepper(trainer)
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
    while not rounds or (len(rounds) < STEPS and time.perf_counter() - start < SECONDS):
        taken = {}
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name] = time.perf_counter() - wall, time.process_time() - cpu
        rounds.append(taken)
    return rounds


def measure(kind: str, k: int, prompts: int, prompt: int, response: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        steps = make_steppers(kind, k, prompts, prompt, response, folder)
    first = {way: growth(step) for way, step in steps.items()}
    losses = [loss for loss, _ in first.values()]
    assert max(losses) - min(losses) < 1e-4, losses
    rounds = race(steps)
    wall, cpu = ({way: min(r[way][i] for r in rounds) for way in WAYS} for i in (0, 1))
    separate, shared = k * (prompt + response), prompt + k * response
    limits = {"pairs": (k - 1) * separate / shared, "separate": separate / shared}
    return {
        **{"model": kind, "K": k, "prompt": prompt, "response": response},
        "prompts_per_step": prompts,
        "limit": limits,
        "ratio": {way: wall[way] / wall["shared"] for way in limits},
        "ratio_cpu": {way: cpu[way] / cpu["shared"] for way in limits},
        "comparisons_per_second": {way: prompts * comb(k, 2) / wall[way] for way in WAYS},
        "memory_mb": {way: grown for way, (_, grown) in first.items()},
        "steps": len(rounds),
        **{"threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__},
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["model"], row["K"], row["prompt"], row["response"]]
    cells += [f"{row['comparisons_per_second'][way]:.1f}" for way in WAYS]
    for way, limit in row["limit"].items():
        ratio = row["ratio"][way]
        cells.append(f"{ratio:.2f}x of {limit:.2f}x ({ratio / limit:.0%})")
    memory = [row["memory_mb"][way] for way in WAYS]
    cells += ["" if mb is None else f"{mb:,.0f}" for mb in memory]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Measure, print each row of the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(ARCHITECTURES), metavar="gpt2 | llama")
    models = parser.parse_args().models
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    print(f"{torch.get_num_threads()} thread(s)\n")
    names = ["model", "K", "prompt", "response", *(f"pairs/s {way}" for way in WAYS)]
    names += ["x pairs", "x separate", *(f"MB {way}" for way in WAYS)]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    rows = []
    for kind, size in itertools.product(models, SIZES):
        rows.append(measure(kind, *size))
        print(line(rows[-1]), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
