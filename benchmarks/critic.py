"""Is the critic worth it? PPO, each of its critic's options, and TRL's RLOO and GRPO, side by side.

make sft rm                                        # the tiny world's policy and reward model
python benchmarks/critic.py ../shared/data         # a run takes one to three minutes of a CPU core
python benchmarks/critic.py ../shared/data --worlds reviews --runs ppo value_lam=1 --seeds 0 1
python benchmarks/critic.py ../shared/data --runs kl_coef=0.05 "rloo beta=0.4"
python benchmarks/critic.py ../shared/data --table

Two worlds: `tiny` (completions of at most 24 tokens, judged by the gold scorer) and `reviews`
(benchmarks/imdb_scratch.py with 64 tokens, judged by a classifier of other reviews). All runs of a
world start from the same policy, see the same prompts, reward and number of completions, and take
as many optimizer steps at the same rate. RLOO and GRPO are TRL's own trainers over our rewards,
with four completions a prompt. RLOO has PPO's KL penalty in its reward; GRPO's is in its loss,
weighed 0.04 as in its paper. Each run is a process of its own and leaves a line in critic.jsonl;
what has a line is not run again. `judge` and `KL` are measured on held-out prompts, seconds are of
the processor in training alone, MB the growth of the resident set (Linux).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import imdb_scratch
import trl
import yaml
from datasets import Dataset
from ppo import resident

from trl_instruct import evaluate, load_reward, ppo, pretrain
from trl_instruct.data.records import load_texts, openings
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.ppo_trainer.trainer import PPOTrainer
from trl_instruct.tiny.splits import split

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench" / "critic"
LINES = RUNS.with_suffix(".jsonl")
METHODS = ("ppo", "rloo", "grpo")
FIXES = (
    *("value_warmup_iterations=4", "value_lam=1", "lam_alpha=0.05", "lam=1"),
    *("cliprange_high=0.28", "dual_clip=3", "warm start"),
)
GENERATIONS = 4
QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


class World(NamedTuple):
    """What all runs of a world share; `options` are those of `ppo`."""

    name: str
    policy: str
    reward: Callable[[], Any]
    judge: Callable[[], Any]
    prompts: Any
    test: Any
    options: dict[str, Any]


def tiny() -> World:
    """The tiny default after `make sft rm`."""
    runs = ROOT / "runs" / "tiny"
    for stage in ("sft", "rm"):
        if not (runs / stage / "metrics.json").exists():
            sys.exit(f"Missing {runs / stage}: run make sft rm first.")
    config = ROOT / "recipes" / "configs" / "tiny" / "ppo.yaml"
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    sizes = "per_device_train_batch_size num_mini_batches total_episodes learning_rate warmup_steps"
    sizes += " local_rollout_forward_batch_size gradient_accumulation_steps kl_coef vf_coef"
    sizes += " response_length gradient_checkpointing lr_scheduler_type"
    kept = {name: options[name] for name in sizes.split()}
    rewards = [lambda n=name: load_reward(n) for name in (str(runs / "rm"), "tiny")]
    return World("tiny", str(runs / "sft"), *rewards, split("prompts"), split("test"), kept)


def reviews(data: Path) -> World:
    """Reviews continued over 64 tokens; policy and classifiers are trained once."""
    path = data / imdb_scratch.FILE
    if not path.is_file():
        sys.exit(f"Missing {path}: not measured. The reviews are not part of the project.")
    parts, folder = imdb_scratch.split(load_texts(path)), RUNS / "reviews"
    if not (folder / "done").exists():
        read = Dataset.from_dict({"text": [text for part in parts[:3] for text in part["text"]]})
        pretrain(read, folder / "base", **imdb_scratch.BASE, **imdb_scratch.COMMON)
        imdb_scratch.train_classifier(parts.judge, folder / "reward", vocab_size=3000, seed=0)
        imdb_scratch.train_classifier(parts.second, folder / "judge", vocab_size=2500, seed=1)
        (folder / "done").touch()
    tokenizer = load_tokenizer(folder / "base")
    sizes = {"response_length": 64, "total_episodes": 20 * 256, "lr_scheduler_type": "linear"}
    options = {**imdb_scratch.PPO, **sizes}
    opening = options.pop("opening_length")
    rewards = [
        lambda n=name: imdb_scratch.positive(str(folder / n)) for name in ("reward", "judge")
    ]
    prompts, test = (openings(part, tokenizer, opening) for part in (parts.prompts, parts.test))
    return World("reviews", str(folder / "base"), *rewards, prompts, test, options)


def train_ppo(world: World, run: str, seed: int, folder: Path) -> None:
    """One run of `ppo`, with the option that the run is named for."""
    options: dict[str, Any] = {}
    if run == "warm start":  # the value function of a run with another seed
        (earlier,) = (RUNS / "value" / world.name).glob("checkpoint-*/value_model")
        options["value_model_path"] = str(earlier)
    elif run == "to warm start from":
        options |= {"save_strategy": "steps", "save_steps": 1000}
    elif run != "ppo":
        name, _, value = run.partition("=")
        options[name] = yaml.safe_load(value)
    given = {**world.options, "save_strategy": "no", **options, **QUIET, "seed": seed}
    ppo(world.policy, world.reward(), world.prompts, folder, overwrite_output_dir=True, **given)


def train_trl(world: World, run: str, seed: int, folder: Path) -> None:
    """One run of TRL's trainer: as many completions and optimizer steps as PPO."""
    options, (kind, _, beta) = world.options, run.partition(" beta=")
    default = options["kl_coef"] if kind == "rloo" else 0.04
    steps, size = options["num_mini_batches"], options["per_device_train_batch_size"]
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=world.policy,
        reward_funcs=world.reward(),
        args=getattr(trl, f"{kind.upper()}Config")(
            str(folder),
            max_steps=options["total_episodes"] // size,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1,
            steps_per_generation=steps,
            num_generations=GENERATIONS,
            max_completion_length=options["response_length"],
            learning_rate=options["learning_rate"],
            lr_scheduler_type=options["lr_scheduler_type"],
            warmup_steps=options["warmup_steps"] * steps,
            beta=float(beta or default),
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            seed=seed,
            **QUIET,
        ),
        train_dataset=world.prompts,
        processing_class=load_tokenizer(world.policy),
    )
    trainer.train()
    trainer.save_model()


def measured(world: World, run: str, seed: int) -> dict[str, Any]:
    """Train, and measure the result on the held-out prompts."""
    trains = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer}.get(run[:4], PPOTrainer)
    train, spent, before = trains.train, [], resident("VmRSS")

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        result = train(self, *args, **kwargs)
        spent.extend([time.process_time() - begun, resident("VmHWM") - before])
        return result

    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(trains, "train", timed):
        kept = RUNS / "value" / world.name
        folder = kept if run == "to warm start from" else Path(scratch) / "run"
        (train_trl if run[:4] in ("rloo", "grpo") else train_ppo)(world, run, seed, folder)
        found = evaluate(
            {"before": world.policy, "after": str(folder)},
            world.test,
            Path(scratch) / "evaluation",
            judges={"reward": world.reward(), "judge": world.judge()},
            best_of_n=1,
            response_length=world.options["response_length"],
            per_device_eval_batch_size=256,
            **QUIET,
        ).metrics["models"]["after"]
    scores = {judge: found["scores"][judge]["mean"] for judge in ("reward", "judge")}
    rest = {name: found[name] for name in ("kl", "length", "ended")}
    return {**scores, **rest, "seconds": spent[0], "MB": spent[1]}


def lines() -> list[dict[str, Any]]:
    """What has been run."""
    if not LINES.exists():
        return []
    return [json.loads(line) for line in LINES.read_text(encoding="utf-8").splitlines()]


def spread(values: list[float], sign: str = "") -> str:
    """Mean, smallest and largest; nothing without values."""
    if not values:
        return ""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def table() -> str:
    """Means over the seeds, with the smallest and the largest; the gain over PPO by seed."""
    names = ("world", "run", "seeds", "judge", "over PPO", "reward", "KL", "seconds", "MB")
    rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in lines():
        found.setdefault((line["world"], line["run"]), {})[line["seed"]] = line
    for (world, run), seeds in found.items():
        plain = found.get((world, "ppo"), {})
        gains = [
            one["judge"] - plain[seed]["judge"] for seed, one in seeds.items() if seed in plain
        ]
        cells = [world, run, str(len(seeds))]
        for name, values in [
            ("judge", [one["judge"] for one in seeds.values()]),
            ("over PPO", gains if run != "ppo" else []),
            *((name, [one[name] for one in seeds.values()]) for name in ("reward", "kl")),
        ]:
            cells.append(spread(values, "+" if name == "over PPO" else ""))
        cells += [
            f"{statistics.fmean(one[name] for one in seeds.values()):.0f}"
            for name in ("seconds", "MB")
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, each in a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("--worlds", nargs="+", default=["tiny", "reviews"])
    parser.add_argument("--runs", nargs="+", default=[*METHODS, *FIXES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    parser.add_argument("--one", action="store_true", help="run the first of each, in this process")
    given = parser.parse_args()
    if given.one:
        world = tiny() if given.worlds[0] == "tiny" else reviews(given.data)
        key = {"world": given.worlds[0], "run": given.runs[0], "seed": given.seeds[0]}
        line = json.dumps({**key, **measured(world, key["run"], key["seed"])})
        with LINES.open("a", encoding="utf-8") as file:
            print(line, file=file)
        return
    if not given.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        wanted = [(w, r, s) for s in given.seeds for w in given.worlds for r in given.runs]
        for world, run, seed in wanted:
            done = {(line["world"], line["run"], line["seed"]) for line in lines()}
            needed = [("to warm start from", 100)] if run == "warm start" else []
            for name, number in [*needed, (run, seed)]:
                if (world, name, number) not in done:
                    words = ["--one", "--worlds", world, "--runs", name, "--seeds", str(number)]
                    command = [sys.executable, __file__, str(given.data), *words]
                    subprocess.run(command, check=True)
    print(table())


if __name__ == "__main__":
    main()
