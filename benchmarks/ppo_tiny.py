"""Our PPO and TRL 1.12's own on the tiny world: gold score on test prompts, and seconds.

make bench-ppo-tiny     # or, in an environment with TRL 1.12: python benchmarks/ppo_tiny.py

Both engines start from the policy and reward model of `make sft rm`, with the options of
recipes/configs/tiny/ppo.yaml and the same number of episodes, for several seeds. Per iteration,
TRL's engine takes one optimizer step for any number of minibatches, ours four; in a third row TRL's
makes four passes over each batch, and so as many steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
import yaml
from datasets import disable_progress_bars
from trl import ModelConfig

from trl_instruct import load_prompts, load_reward, ppo
from trl_instruct.configs import EvaluateConfig
from trl_instruct.evaluation.measurement import Subject
from trl_instruct.evaluation.measurement import measure as measure_models
from trl_instruct.intervals import mean_interval
from trl_instruct.models.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "tiny"
RESULT = ROOT / "runs" / "bench" / "ppo_tiny.json"
ELSEWHERE = {"model_name_or_path", "reward_model_path", "dataset_name", "output_dir", "seed"}
ELSEWHERE |= {"eval_dataset_name", "summary_file", "gold"}
ENGINES: dict[str, dict[str, Any]] = {
    "trl_instruct": {},
    "trl": {"engine": "trl"},
    "trl, 4 passes": {"engine": "trl", "num_ppo_epochs": 4},
}


def measure(policy: Path, reference: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Gold and reward-model scores of a policy on the test prompts, and its KL."""
    tokenizer = load_tokenizer(reference)
    config = EvaluateConfig(
        seed=0,
        reference="sft",
        response_length=options["response_length"],
        per_device_eval_batch_size=options["local_rollout_forward_batch_size"],
    )
    models = {"ppo": policy, "sft": reference}
    tokenizers = dict.fromkeys(models, tokenizer)
    prompts = load_prompts("tiny:test")
    subject = Subject(config, ModelConfig(), models, tokenizers, prompts, one_seed=True)
    judges = {"gold": load_reward("tiny"), "rm": load_reward(RUN / "rm")}
    measured = measure_models(subject, judges)[0]["ppo"]
    scores = {name: mean_interval(s)._asdict() for name, s in measured.scores.items()}
    return {**scores, "kl": statistics.fmean(measured.kl)}


def run(engine: dict[str, Any], seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One PPO run: its results and training seconds."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        given = {**options, **engine, "seed": seed, "disable_tqdm": True, "report_to": "none"}
        result = ppo(RUN / "sft", RUN / "rm", "tiny:prompts", Path(folder) / "ppo", **given)
        seconds = time.perf_counter() - started
        return {**measure(result.path, RUN / "sft", options), "seconds": seconds}


def row(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table: gold for every seed, mean KL and seconds."""
    golds = " ".join(f"{one['gold']['mean']:.3f}" for one in runs)
    means = [statistics.fmean(one[what] for one in runs) for what in ("kl", "seconds")]
    return f"| {name} | {golds} | {means[0]:.2f} | {means[1]:.0f} |"


def main() -> None:
    """Run all engines in turn, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1])
    seeds = parser.parse_args().seeds
    if not (RUN / "rm" / "metrics.json").is_file():
        raise SystemExit("The tiny default's policy and reward model are missing: make sft rm")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    file = ROOT / "recipes" / "configs" / "tiny" / "ppo.yaml"
    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    options = {name: value for name, value in options.items() if name not in ELSEWHERE}
    start = measure(RUN / "sft", RUN / "sft", options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    for seed in seeds:
        for name, engine in ENGINES.items():
            runs[name].append(run(engine, seed, options))
            print(f"seed {seed}, {row(name, runs[name][-1:])}", flush=True)
    print(f"\nSFT: gold {start['gold']['mean']:.3f} [{start['gold']['low']:.3f}, ", end="")
    print(f"{start['gold']['high']:.3f}]\n")
    told = ", ".join(map(str, seeds))
    print(f"| engine | gold, seeds {told} | KL | seconds |\n|---|---|---|---|")
    for name, of_engine in runs.items():
        print(row(name, of_engine))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"sft": start, "engines": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
