"""The tiny default from scratch for several seeds: the table in docs/tiny.md.

python benchmarks/tiny_seeds.py            # seeds 0 1 2, about four minutes each
python benchmarks/tiny_seeds.py 3 4
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "tiny"
RUNS = ROOT / "runs" / "seeds"


def run_stage(name: str, config: Path, seed: int, options: dict[str, Path]) -> None:
    """Run one recipe as make does, with its own folders."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--config", str(config)]
    for option, value in {**options, "seed": seed}.items():
        command += [f"--{option}", str(value)]
    subprocess.run([*command, "--overwrite_output_dir"], check=True, cwd=ROOT)


def run_chain(seed: int) -> dict:
    """Run all stages for one seed; the summary, with the total wall time."""
    run = RUNS / str(seed)
    started = time.perf_counter()
    policy = {"model_name_or_path": run / "sft"}
    data = run / "candidates"
    stages = {
        "pretrain": {"output_dir": run / "base"},
        "sft": {"model_name_or_path": run / "base", "output_dir": run / "sft"},
        "candidates": {**policy, "output_dir": data},
        "rm": {
            **policy,
            "dataset_name": data / "train.jsonl",
            "eval_dataset_name": data / "test.jsonl",
            "output_dir": run / "rm",
        },
        "ppo": {
            **policy,
            "reward_model_path": run / "rm",
            "output_dir": run / "ppo",
            "summary_file": run / "summary.json",
        },
    }
    for name, options in stages.items():
        in_package = ROOT / "trl_instruct" / "tiny" / "pretrain.yaml"
        config = in_package if name == "pretrain" else CONFIGS / f"{name}.yaml"
        run_stage(name, config, seed, options)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "wall": time.perf_counter() - started}


def row(summary: dict) -> str:
    """One line of the table."""
    gold, rm = summary["gold"], summary["rm"]
    scores = [
        f"{gold[m]['mean']:.3f} [{gold[m]['low']:.3f}, {gold[m]['high']:.3f}]"
        for m in ("base", "sft", "ppo")
    ]
    cells = [
        summary["seed"],
        *scores,
        f"{rm['accuracy']:.3f} / {rm['ceiling']:.3f}",
        f"{summary['kl']:.2f}",
        f"{summary['wall']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    rows = [row(run_chain(seed)) for seed in parser.parse_args().seeds]
    print("\n| seed | gold base | gold SFT | gold PPO | RM accuracy / ceiling | KL | seconds |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
