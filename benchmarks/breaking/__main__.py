"""What can go wrong, tried: `make break`, or python benchmarks/breaking [PARTS ...]

kills        SIGKILL in each stage and variant, then resumed: equal to the bit to an undisturbed run
malformed    data, options, models, folders, reward files: one clear line, and nothing left behind
servers      rewards over HTTP that are slow, huge, broken or hostile
disks        files that cannot grow, full file systems; with space again, the run goes on
permissions  folders and files that may not be read or written (needs root, to be somebody else)
two          a second run into the folder of one that is in progress

Seeds are fixed. The tables are printed; each case with what it printed is in the output file.
"""

import argparse
import collections
import gc
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": tempfile.mkdtemp(prefix="break-")}

import forks
import kills
import malformed
import surroundings
import world as w

PARTS = ("kills", "malformed", "servers", "disks", "permissions", "two")
VERDICTS = ("clear", "accepted", "swallowed", "unclear", "traceback", "hang", "killed")
KILLED = ("runs", "kills", "time", "before a file", "in a file", "equal", "metrics", "other flags")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="Default: all.")
    parser.add_argument("--minutes", type=float, default=60, help="No new case after these.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="Of the malformed that are drawn.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Only cases whose kind or name matches this.")
    parser.add_argument("--output_file", type=Path, default=Path("runs/break.json"))
    options = parser.parse_args()
    if unknown := set(options.parts) - {*PARTS}:
        parser.error(f"no part {sorted(unknown)}; there are {', '.join(PARTS)}")
    base = Path(os.environ["HF_DATASETS_CACHE"])
    try:
        finished = prepare(base)
        gc.freeze()  # a collection in a fork would copy all pages
        end = time.monotonic() + 60 * options.minutes
        results = {}
        for part in options.parts or PARTS:
            results[part] = done = []
            for run in runs_of(part, base, finished, options):
                done.append(run)
                if not run["good"]:
                    print(f"{part}: {json.dumps(run)[:600]}", flush=True)
                if time.monotonic() > end:
                    print(f"{part}: stopped after {options.minutes:g} minutes", flush=True)
                    break
            print("\n".join(kill_table(done) if part == "kills" else table(done)), flush=True)
        options.output_file.parent.mkdir(parents=True, exist_ok=True)
        options.output_file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    finally:
        forks.remove(base)


def prepare(base: Path) -> Path:
    """Build the world, run each stage once so that all it imports is imported; PPO's folder."""
    world, finished = base / "world", base / "finished"
    built = forks.fork(lambda: w.build(world), base / "build", limit=300)
    assert built.code == 0, built.err
    for stage in ("pretrain", "sft", "rm", "candidates", "evaluate", "ppo"):
        (finished / stage).mkdir(parents=True)
        config = w.write_options(finished / stage / "case.yaml", w.options(stage, world))
        forks.warm(forks.command(stage, "--config", config), finished / stage)
    return finished / "ppo" / "out"


def runs_of(
    part: str, base: Path, finished: Path, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The runs of a part, one after the other."""
    world, seed = base / "world", options.seed
    if part == "kills":
        yield from kills.runs(world, base / part, options.kills, seed, options.only)
    elif part == "malformed":
        for case in malformed.cases(world, finished, seed, options.scale):
            if re.search(options.only, f"{case.kind}: {case.name}"):
                yield malformed.run_case(case, base / "case")
    elif part == "servers":
        yield from surroundings.servers(world, base / part)
    elif part == "permissions":
        yield from surroundings.permissions(world, base / part)
    elif part == "disks":
        yield from surroundings.full_disks(world, base / part, seed)
    else:
        yield from surroundings.two_runs(world, base / part, seed)


def kill_table(done: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Runs that were killed, a line a variant."""
    rows: dict[str, Any] = collections.defaultdict(collections.Counter)
    for run in done:
        counts = collections.Counter(run["kills"])
        counts.update(runs=1, kills=len(run["kills"]), equal=run["weights"])
        counts.update({"metrics": run["metrics"], "other flags": bool(run["other_flags"])})
        rows[run["variant"]] += counts
    yield from lines_of(rows, "variant", KILLED)


def table(done: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Other cases by their verdicts, a line a kind."""
    rows: dict[str, Any] = collections.defaultdict(collections.Counter)
    for run in done:
        rows[run["kind"]].update(
            {
                "cases": 1,
                run["verdict"]: 1,
                "left behind": int(bool(run.get("left"))),
                "good": run["good"],
            }
        )
    yield from lines_of(rows, "kind", ("cases", *VERDICTS, "left behind", "good"))


def lines_of(rows: dict[str, Any], title: str, columns: Iterable[str]) -> Iterator[str]:
    columns = list(columns)
    yield f"| {title} | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name, counts in {**rows, "all": sum(rows.values(), collections.Counter())}.items():
        yield f"| {name} | {' | '.join(str(counts[column]) for column in columns)} |"


if __name__ == "__main__":
    main()
