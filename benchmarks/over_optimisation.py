"""Is the reward exploited? Gold and KL of PPO against six rewards: the table in
docs/over_optimisation.md.

python benchmarks/over_optimisation.py                   # all that is missing: two to five hours
python benchmarks/over_optimisation.py --only mean-0.02-2-   # of the runs, those that match
python benchmarks/over_optimisation.py --table           # what there is so far, as markdown
python benchmarks/over_optimisation.py --rule            # the rule that stops, on the same runs

A run is called REWARD-KL_COEF-PASSES-SEED and adds one line to runs/over_optimisation/runs.jsonl;
what is there, or at work in another process, is skipped: start two to use two cores. Base, SFT
policy, rankings and reward models of a seed are made when they are first needed. `--runs FILE` is
another file of runs: over_optimisation.jsonl beside this script has those of the table in docs.

No run is stopped. Each keeps the policy of every iteration and notes what gold and a member that
is no part of the reward (member 4) say in it, so that the rule can be asked afterwards where it
would have ended the run, and the policy there is measured too.
"""

import argparse
import json
import os
import re
import statistics
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from datasets import disable_progress_bars
from filelock import FileLock, Timeout
from tiny_seeds import CONFIGS, ROOT, run_stage
from transformers import TrainerCallback, set_seed
from trl import ModelConfig

from trl_instruct import Bounded, load_prompts, load_reward, ppo
from trl_instruct.generation.engines import begun
from trl_instruct.generation.sampling import Sampling, prompt_tokens, sample_several
from trl_instruct.intervals import mean_interval
from trl_instruct.models.load import load_policy
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.ppo_trainer.exploitation import Judged, turned_from
from trl_instruct.recipes.members import average
from trl_instruct.tiny import gold_score

RUNS = ROOT / "runs" / "over_optimisation"
RESULTS = RUNS / "runs.jsonl"
REWARDS = ("single", "mean", "min", "pessimistic", "WARM", "Bounded")
KL_COEFS, PASSES, SEEDS = (0.0, 0.02, 0.05, 0.15), (1, 2), (0, 1, 2)
JUDGES = ("gold", "member")
SERIES = ("gold", "gold_se", "member", "member_se", "scores", "kl", "disagreement")
FALL = 0.05  # of gold, from its best mean of three iterations to its last: an exploited run
OPTIONS = yaml.safe_load((CONFIGS / "ppo.yaml").read_text(encoding="utf-8"))
for _name in ("model_name_or_path", "reward_model_path", "dataset_name", "eval_dataset_name"):
    del OPTIONS[_name]
del OPTIONS["summary_file"]
OPTIONS |= {"overwrite_output_dir": True, "disable_tqdm": True, "report_to": "none"}
OPTIONS |= {"num_sample_generations": 0}


def models_of(seed: int) -> Path:
    """The folder of a seed's base, SFT policy, rankings and reward models, made if missing."""
    run = RUNS / f"seed-{seed}"
    policy, data = {"model_name_or_path": run / "sft"}, run / "candidates"
    rankings = {"dataset_name": data / "train.jsonl", "eval_dataset_name": data / "test.jsonl"}
    stages: dict[str, tuple[str, dict[str, Any]]] = {
        "base": ("pretrain", {}),
        "sft": ("sft", {"model_name_or_path": run / "base"}),
        "candidates": ("candidates", policy),
        "rm": ("rm", {**policy, **rankings}),
        **{f"members/member-{n}": ("rm", {**policy, **rankings, "member": n}) for n in range(1, 5)},
    }
    with FileLock(RUNS / f"seed-{seed}.lock"):
        for folder, (stage, options) in stages.items():
            if not (run / folder / "metrics.json").is_file():
                in_package = ROOT / "trl_instruct" / "tiny" / "pretrain.yaml"
                config = in_package if stage == "pretrain" else CONFIGS / f"{stage}.yaml"
                run_stage(stage, config, seed, {**options, "output_dir": run / folder})
        if not (run / "warm").is_dir():
            average([run / "members" / f"member-{n}" for n in (1, 2, 3)], run / "warm")
    return run


class Kept(TrainerCallback):
    """The policy's weights at the start of each iteration, those that it samples with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Copy them."""
        held = model.policy.state_dict()
        self.weights.append({name: weight.clone() for name, weight in held.items()})


@cache
def member_of(folder: str) -> Any:
    """The judge that is no part of the reward, loaded once."""
    return load_reward(folder)


def judge(prompts: list, completions: list, log_metric: Any = None, **columns: Any) -> list[float]:
    """Gold's scores: the `gold` of all runs. Logs what the member says, and its standard error."""
    scores = member_of(os.environ["MEMBER"])(prompts, completions)
    log_metric("member", statistics.fmean(scores))
    log_metric("member_se", statistics.stdev(scores) / len(scores) ** 0.5)
    return gold_score(prompts, completions, **columns)


def reward_of(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The reward of a run, and its options."""
    if name in ("mean", "min", "pessimistic"):
        members = [str(folder / "members" / f"member-{n}") for n in (1, 2, 3)]
        return members, {"combine": name}
    if name == "Bounded":
        return Bounded(load_reward(str(folder / "rm"))), {}
    return str(folder / ("warm" if name == "WARM" else "rm")), {}


def gold_on_test(policy: Any, tokenizer: Any) -> dict[str, float]:
    """Gold of one completion of each of the 500 test prompts, with its 95 % interval."""
    columns = load_prompts("tiny:test")[:]
    sampling = Sampling(OPTIONS["response_length"], batch_size=256)
    ids, _ = prompt_tokens(columns, tokenizer, policy, sampling)
    set_seed(0)
    texts = [one.text for (one,) in sample_several(begun(policy, tokenizer), ids, 1, sampling)]
    return mean_interval(gold_score(columns["prompt"], texts, task=columns["task"]))._asdict()


def run(reward: str, kl_coef: float, passes: int, seed: int) -> dict[str, Any]:
    """One PPO run: gold on the test prompts at its end, and where the rule would end it."""
    folder = models_of(seed)
    given, own = reward_of(reward, folder)
    os.environ["MEMBER"] = str(folder / "members" / "member-4")
    options = {**OPTIONS, **own, "seed": seed, "kl_coef": kl_coef, "num_ppo_epochs": passes}
    options |= {"gold": f"{Path(__file__).resolve()}:judge", "output_dir": RUNS / str(os.getpid())}
    kept, source = Kept(), str(folder / "sft")
    result = ppo(source, given, "tiny:prompts", callbacks=[kept], **options)
    logs = json.loads((result.path / "trainer_state.json").read_text(encoding="utf-8"))
    logs = [log for log in logs["log_history"] if "objective/gold" in log]
    series = {name: [rounded(log.get(f"objective/{name}")) for log in logs] for name in SERIES}
    policy, tokenizer = load_policy(str(result), ModelConfig()), load_tokenizer(source)
    found: dict[str, Any] = {"series": series, "test": {"end": gold_on_test(policy, tokenizer)}}
    for name in JUDGES:
        if (stopped := stop_of(series, name)) is not None:
            policy.load_state_dict(kept.weights[stopped.peak])
            found["test"][name] = gold_on_test(policy, tokenizer)
    seconds = result.metrics["seconds"]
    return {"reward": reward, "kl_coef": kl_coef, "passes": passes, "seed": seed, **found} | {
        "seconds": seconds
    }


def rounded(value: float | None) -> float | None:
    """A value to four digits, a tenth of what 256 completions tell."""
    return None if value is None else float(f"{value:.4g}")


class Stop(NamedTuple):
    """The iteration in which the rule ends a run, and that of the peak to which it returns."""

    step: int
    peak: int


def stop_of(series: dict[str, list], name: str) -> Stop | None:
    """Where the rule ends a run by a judge's series; None: nowhere."""
    parts = (series[name], series[f"{name}_se"], series["scores"])
    judged = [Judged(*one) for one in zip(*parts, strict=True)]
    for step in range(len(judged)):
        if (peak := turned_from(judged[: step + 1])) is not None:
            return Stop(step, peak)
    return None


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that are finished."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def key_of(one: dict[str, Any]) -> tuple:
    """What tells a run from others."""
    return one["reward"], one["kl_coef"], one["passes"], one["seed"]


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Gold on the test prompts of all seeds, and the KL, without the stop and with it."""
    head = "| reward | kl_coef | passes | seeds | gold | KL | gold, stop by gold | KL |"
    lines = [f"{head} gold, stop by member | KL |", "|---" * 10 + "|"]
    for reward, passes, kl_coef in product(REWARDS, PASSES, KL_COEFS):
        cell = [r for r in runs if key_of(r)[:3] == (reward, kl_coef, passes)]
        if not cell:
            continue
        parts = [reward, f"{kl_coef:g}", str(passes), ", ".join(str(r["seed"]) for r in cell)]
        for end in ("end", *JUDGES):
            gold, kl = [], []
            for one in cell:
                stopped = None if end == "end" else stop_of(one["series"], end)
                at = len(one["series"]["kl"]) - 1 if stopped is None else stopped.peak
                key = "end" if stopped is None else end
                if key in one["test"]:
                    gold.append(f"{one['test'][key]['mean']:.3f}")
                else:  # measured before the rule became what it is
                    gold.append(f"~{trailing(one['series']['gold'])[at]:.2f}")
                kl.append(one["series"]["kl"][at])
            parts += [", ".join(gold), f"{statistics.fmean(kl):.1f}"]
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def rule(runs: list[dict[str, Any]]) -> list[str]:
    """How often the rule ends runs whose gold ends near its best, and when it ends the others."""
    lines = ["| judge | healthy: ended | exploited: ended | within 4 | iterations after the peak |"]
    lines.append("|---" * 5 + "|")
    for name in JUDGES:
        healthy, ended, late = [], 0, []
        for one in runs:
            gold = one["series"]["gold"]
            peak = best_of(gold)
            stopped = stop_of(one["series"], name)
            if statistics.fmean(gold[-3:]) > trailing(gold)[peak] - FALL:
                healthy.append(stopped is not None)
            else:
                ended += 1
                late += [] if stopped is None else [stopped.step - peak]
        soon = sum(delay <= 4 for delay in late)
        parts = [name, f"{sum(healthy)} of {len(healthy)}", f"{len(late)} of {ended}", str(soon)]
        lines.append(f"| {' | '.join(parts)} | {', '.join(map(str, sorted(late)))} |")
    return lines


def trailing(values: list[float]) -> list[float]:
    """Means of three iterations, the last of which each stands for."""
    return [statistics.fmean(values[max(0, end - 2) : end + 1]) for end in range(len(values))]


def best_of(gold: list[float]) -> int:
    """The iteration of the best mean of three."""
    smooth = trailing(gold)
    return max(range(len(smooth)), key=smooth.__getitem__)


def main() -> None:
    """Run what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="A pattern of the runs' names.")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="The file of finished runs.")
    parser.add_argument("--table", action="store_true", help="Print the table.")
    parser.add_argument("--rule", action="store_true", help="Print how the rule fares.")
    options = parser.parse_args()
    if options.table or options.rule:
        print("\n".join((table if options.table else rule)(read(options.runs))))
        return
    disable_progress_bars()
    RUNS.mkdir(parents=True, exist_ok=True)
    for reward, kl_coef, passes, seed in product(REWARDS, KL_COEFS, PASSES, SEEDS):
        name = f"{reward}-{kl_coef:g}-{passes}-{seed}"
        if not re.search(options.only, name):
            continue
        try:
            with FileLock(RUNS / f"{name}.lock", timeout=0):
                if (reward, kl_coef, passes, seed) in map(key_of, read(options.runs)):
                    continue
                found = run(reward, kl_coef, passes, seed)
                with options.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                ends = {end: round(gold["mean"], 3) for end, gold in found["test"].items()}
                print(f"{name}: {ends}", flush=True)
        except Timeout:
            print(f"{name}: at work in another process", flush=True)


if __name__ == "__main__":
    main()
