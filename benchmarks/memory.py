"""Memory and time of a PPO iteration: four models of full size, and one base in four roles.

make bench-memory

Each configuration runs `ppo(...)` in its own process, with the same prompts and batch, on the same
GPT-2 of 110 million parameters and a vocabulary of 32,000, with random weights.

- four_models: policy, reference, reward and value, each a full model; two of them train.
- lora_policy: the policy is an adapter, its base the reference; reward and value are full models,
  as in TRL 1.12's PPOTrainer.
- one_base_*: adapters over one base in all four roles, with the base in float32, 8 or 4 bit, and on
  a GPU in bfloat16.

The second of two iterations is measured, when the optimizer has its state. `memory_mb`: on CPU
(Linux) the peak of the resident set, less its size with only the libraries loaded; on a GPU the
peak that torch allocated. `seconds`: its time. `one_base_ratio`: the least memory with one base /
that of four models; `lora_policy_ratio`: / that of lora_policy. `estimate_mb`: what the run's table
said before its first step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from ppo import EOS, LIBC, M_MMAP_THRESHOLD, VOCABULARY, prompts, resident, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    TrainerCallback,
)

from trl_instruct import ppo
from trl_instruct.recipes import ppo as ppo_stage
from trl_instruct.recipes.memory import estimate

RESULT = Path(__file__).parents[1] / "runs" / "bench" / "memory.json"
WIDTH, LAYERS, HEADS = 768, 12, 12
PROMPT, COMPLETION, EPISODES = 64, 16, 4
LORA = {"use_peft": True, "lora_r": 16}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "four_models": {},
    "lora_policy": {**LORA, "share_base": False},
    "one_base_float32": {**LORA, "share_base": True},
    "one_base_8bit": {**LORA, "share_base": True, "load_in_8bit": True},
    "one_base_4bit": {**LORA, "share_base": True, "load_in_4bit": True},
}
if torch.cuda.is_available():  # a CPU without bfloat16 instructions takes ten times as long
    CONFIGURATIONS["one_base_bfloat16"] = {**LORA, "share_base": True, "dtype": "bfloat16"}


def save_models(folder: Path) -> int:
    """Save a policy, a reward model and a LoRA one over the policy; the policy's parameters."""
    tokenizer = word_tokenizer()
    config = GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        **{"n_positions": PROMPT + COMPLETION, "num_labels": 1},
        **{"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": tokenizer.pad_token_id},
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    policy.save_pretrained(folder / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    reward.save_pretrained(folder / "rm")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    targets = {"target_modules": "all-linear", "modules_to_save": ["score"]}
    lora = LoraConfig(task_type="SEQ_CLS", r=LORA["lora_r"], **targets)
    get_peft_model(reward, lora).save_pretrained(folder / "rm_adapter")
    for name in ("policy", "rm", "rm_adapter"):
        tokenizer.save_pretrained(folder / name)
    return policy.num_parameters()


class Weigh(TrainerCallback):
    """Peak memory and time of the last iteration."""

    def __init__(self) -> None:
        self.baseline = resident("VmRSS")
        self.measured: dict[str, float] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        LIBC.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        peak = resident("VmHWM") - self.baseline
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        self.measured = {"memory_mb": peak, "seconds": time.perf_counter() - self.started}


def run_configuration(name: str, folder: Path) -> None:
    """One process: two iterations; prints the measurement of the second as a line of JSON."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what the libraries print out of the report
    # Blocks of this size or more are returned to the system as soon as they are freed.
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)
    weigh, told = Weigh(), []
    real = ppo_stage.memory_table

    def spy(*given: Any) -> str:
        told.append(sum(estimate(*given)) / 2**20)
        return real(*given)

    ppo_stage.memory_table = spy
    ppo(
        folder / "policy",
        folder / ("rm_adapter" if name.startswith("one_base") else "rm"),
        prompts(2 * EPISODES),
        folder / name,
        callbacks=[weigh],
        max_prompt_length=PROMPT,
        response_length=COMPLETION,
        per_device_train_batch_size=EPISODES,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        local_rollout_forward_batch_size=EPISODES,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **CONFIGURATIONS[name],
    )
    print(json.dumps({**weigh.measured, "estimate_mb": told[0]}), file=report, flush=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """The measurements as Markdown."""
    most = rows["four_models"]["memory_mb"]
    titles = "| configuration | peak MB | estimate | of four models | s an iteration |"
    lines = [titles, "|---|---|---|---|---|"]
    for name, row in rows.items():
        size, told = row["memory_mb"], row["estimate_mb"]
        off = f"{told:,.0f} ({told / size - 1:+.0%})"
        lines.append(f"| {name} | {size:,.0f} | {off} | {size / most:.2f} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    if arguments.configuration:
        run_configuration(arguments.configuration, arguments.folder)
        return
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_models(Path(folder))
        print(f"{parameters / 1e6:.0f}M parameters, {torch.get_num_threads()} thread(s)\n")
        for name in CONFIGURATIONS:
            command = [sys.executable, __file__, "--configuration", name, "--folder", folder]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(ran.stdout)
            print(name, rows[name], flush=True)
    best = min(row["memory_mb"] for name, row in rows.items() if name.startswith("one_base"))
    result = {
        "one_base_ratio": best / rows["four_models"]["memory_mb"],
        "lora_policy_ratio": best / rows["lora_policy"]["memory_mb"],
        "configurations": rows,
        **{"parameters": parameters, "vocabulary": VOCABULARY, "prompt": PROMPT},
        **{"completion": COMPLETION, "episodes": EPISODES, "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"\none_base_ratio {result['one_base_ratio']:.2f}")


if __name__ == "__main__":
    main()
