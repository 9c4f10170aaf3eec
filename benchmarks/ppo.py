"""Our PPO and TRL 1.12's own: alternating iterations of the same call with the same settings.

make bench-ppo          # or, in an environment with TRL 1.12: python benchmarks/ppo.py

Each engine runs `ppo(..., engine=...)` in its own process, which waits while the other works.
Policy, reference, reward model and value model are four GPT-2s of 23 million parameters and a
vocabulary of 32,000, with random weights, but EOS about every 32 tokens. TRL's engine gets its
reward from our RewardModule, which reads rows without padding; TRL's own reading takes longer.

Batch sizes and gradient checkpointing are the defaults that both share.

- speed_ratio: episodes per second of ours / of TRL's. `speed_ratio_cpu`: the same in processor
  seconds; `flops_ratio`: in matrix products, counted in a round that is not timed.
- memory_ratio: peak of the resident set of ours / of TRL's, less its size with only the
  libraries loaded; in an untimed round, up to which freed memory is returned at once. Linux.
- generation, scoring (log-probabilities, values, rewards) and updates: seconds per iteration, peak
  MB and flops of each. `tokens`: mean length of the completions.
"""

import argparse
import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TextIO

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import trl_instruct.ppo_trainer.trainer as ours
from trl_instruct import ppo

RESULT = Path(__file__).parents[1] / "runs" / "bench" / "ppo.json"
ENGINES = ("trl", "trl_instruct")
PHASES = ("generation", "scoring", "updates")
VOCABULARY, WIDTH, LAYERS = 32_000, 384, 6
EOS = VOCABULARY - 2
PROMPT, COMPLETION = (32, 256), 64
EPISODES = 32
ROUNDS = 3  # timed ones
LIBC, M_MMAP_THRESHOLD = ctypes.CDLL(None), -3
OWN = 2**20
"""Blocks of this size or more are returned to the system as soon as they are freed."""


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A token a word: w0, w1, ..., then <eos> and <pad>."""
    words = [*(f"w{i}" for i in range(vocabulary - 2)), "<eos>", "<pad>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(words[-2:])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def prompts(count: int) -> Dataset:
    """Random words; their numbers are uniform over PROMPT."""
    draw = Random(0)
    texts = [
        " ".join(f"w{draw.randrange(EOS)}" for _ in range(draw.randint(*PROMPT))) + " "
        for _ in range(count)
    ]
    return Dataset.from_dict({"prompt": texts})


def save_models(folder: Path) -> int:
    """Save a policy and a reward model with random weights; the policy's parameters."""
    tokenizer = word_tokenizer()
    config = GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 6},
        **{"n_positions": PROMPT[1] + COMPLETION, "num_labels": 1},
        **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    end_sometimes(policy, tokenizer.eos_token_id)
    policy.save_pretrained(folder / "policy")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "rm")
    for name in ("policy", "rm"):
        tokenizer.save_pretrained(folder / name)
    return policy.num_parameters()


def end_sometimes(policy: Any, eos: int) -> None:
    """Give EOS a probability of about 1/32 everywhere, by a direction common to all states.

    The other 32,000 logits are around 0: their exponentials sum to about e ** 10.5.
    """
    direction = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    policy.transformer.ln_f.bias.data = 14.0 * direction
    policy.transformer.wte.weight.data[eos] = 0.5 * direction


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


class Turns(TrainerCallback):
    """Waits for this engine's turn before each iteration, and reports it afterwards."""

    def __init__(self, engine: str, report: TextIO):
        self.engine, self.report = engine, report
        self.baseline = resident("VmRSS")
        self.rounds = 0
        self.counter: FlopCounterMode | None = None
        self.row: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()

    def wait(self) -> None:
        """Start an iteration on demand: one to count flops, one for memory, then timed ones."""
        sys.stdin.readline()
        self.row, self.cpu = {}, time.process_time()
        if self.rounds == 0:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()
        LIBC.mallopt(M_MMAP_THRESHOLD, OWN if self.rounds <= 1 else 32 * 2**20)
        self.rounds += 1
        self.begin_phase()

    def begin_phase(self) -> None:
        LIBC.malloc_trim(0)  # leave out memory freed before
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        self.flops = self.counter.get_total_flops() if self.counter else 0
        self.started = time.perf_counter()

    def end_phase(self, name: str) -> None:
        self.row[name] = time.perf_counter() - self.started
        self.row[f"{name}_mb"] = resident("VmHWM") - self.baseline
        if self.counter:
            self.row[f"{name}_flops"] = self.counter.get_total_flops() - self.flops
        self.begin_phase()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end_phase("updates")
        self.row["seconds_cpu"] = time.process_time() - self.cpu
        if self.counter:
            self.counter.__exit__(None, None, None)
            self.counter = None
        print(json.dumps(self.row), file=self.report, flush=True)
        self.wait()

    def install(self) -> None:
        """Record where generation and scoring end: both engines call a function there."""
        if self.engine == "trl":
            module: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
            self.watch(module, "batch_generation", lambda output: output[0][:, -COMPLETION:])
            self.watch(module, "masked_whiten")
        else:
            self.watch(ours, "draw_in_all", lambda output: output[0])
            self.watch(ours.PPOTrainer, "advantages")

    def watch(self, owner: Any, name: str, completions: Callable[..., Any] | None = None) -> None:
        """End scoring before the function, or generation after it if `completions` is given."""
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if completions is None:
                self.end_phase("scoring")
                return function(*args, **kwargs)
            output = function(*args, **kwargs)
            self.end_phase("generation")
            going_on = (completions(output) != EOS).int().cumprod(dim=1)
            lengths = (going_on.sum(dim=1) + 1).clamp(max=COMPLETION)
            self.row["tokens"] = float(lengths.float().mean())
            return output

        setattr(owner, name, watched)


def run_engine(engine: str, folder: Path) -> None:
    """One engine's process: iterations on demand, a line of JSON for each."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what the libraries print out of the report
    LIBC.mallopt(M_MMAP_THRESHOLD, OWN)  # before the models' weights
    turns = Turns(engine, report)
    turns.install()
    ppo(
        folder / "policy",
        folder / "rm",
        prompts(EPISODES * (ROUNDS + 3)),  # TRL's last batch of an epoch takes more steps
        folder / engine,
        engine=engine,
        callbacks=[turns],
        gradient_accumulation_steps=EPISODES // 8,
        num_mini_batches=1,
        response_length=COMPLETION,
        max_steps=ROUNDS + 2,
        max_grad_norm=0.0,
        warmup_steps=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def race(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Alternate iterations of both engines."""
    command = [sys.executable, __file__, "--folder", str(folder), "--engine"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {engine: subprocess.Popen([*command, engine], **pipes) for engine in ENGINES}
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(ROUNDS + 2):
        for engine, worker in workers.items():
            print(file=worker.stdin, flush=True)
            rounds[engine].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.communicate("\n")
    return rounds


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """An engine's mean iteration, with flops and peaks from the two untimed rounds."""
    counted, weighed, *timed = rows
    result = {}
    for name in (*PHASES, "seconds_cpu", "tokens"):
        result[name] = statistics.fmean(row[name] for row in timed)
    for phase in PHASES:
        result[f"{phase}_mb"] = weighed[f"{phase}_mb"]
        result[f"{phase}_flops"] = counted[f"{phase}_flops"]
    return {
        **result,
        "seconds": sum(result[phase] for phase in PHASES),
        "episodes_per_second": EPISODES / sum(result[phase] for phase in PHASES),
        "memory_mb": max(result[f"{phase}_mb"] for phase in PHASES),
        "flops": sum(result[f"{phase}_flops"] for phase in PHASES),
    }


def compare(trls: dict[str, float], mine: dict[str, float]) -> dict[str, float]:
    """The ratios: higher is better for speed, lower for memory."""
    return {
        "speed_ratio": trls["seconds"] / mine["seconds"],
        "speed_ratio_cpu": trls["seconds_cpu"] / mine["seconds_cpu"],
        "flops_ratio": trls["flops"] / mine["flops"],
        "memory_ratio": mine["memory_mb"] / trls["memory_mb"],
    }


def table(engines: dict[str, dict[str, float]]) -> str:
    """The measurements as Markdown: seconds, MB and teraflops."""
    heads = [f"{phase} s / MB / Tflop" for phase in PHASES]
    lines = [f"| engine | {' | '.join(heads)} | all s / MB | episodes/s | tokens |"]
    lines.append("|---" * 7 + "|")
    for name, row in engines.items():
        cells = [
            f"{row[phase]:.1f} / {row[f'{phase}_mb']:,.0f} / {row[f'{phase}_flops'] / 1e12:.2f}"
            for phase in PHASES
        ]
        cells += [f"{row['seconds']:.1f} / {row['memory_mb']:,.0f}"]
        cells += [f"{row['episodes_per_second']:.2f}", f"{row['tokens']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    if arguments.engine:
        run_engine(arguments.engine, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_models(Path(folder))
        print(f"{parameters / 1e6:.1f}M parameters, {torch.get_num_threads()} thread(s)\n")
        engines = {name: summarise(rows) for name, rows in race(Path(folder)).items()}
    ratios = compare(*engines.values())
    settings = {
        **{"parameters": parameters, "vocabulary": VOCABULARY, "prompt": PROMPT},
        **{"completion": COMPLETION, "episodes": EPISODES, "rounds": ROUNDS},
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**ratios, "engines": engines, **settings}, indent=2)
    RESULT.write_text(text + "\n", encoding="utf-8")
    print(table(engines))
    print("\n" + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
