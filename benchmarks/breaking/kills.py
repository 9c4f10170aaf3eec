"""Runs that are killed and resumed until they finish, beside undisturbed ones: equal to the bit.

A kill comes at a random moment; or before a file of the run is written, renamed or removed; or in
the middle of one, which then lies there cut. A third of those hit the saving of the result.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forks
import world as w

STEPS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.1}


class Variant(NamedTuple):
    """A stage with some of its options; `data` names a file of the world."""

    name: str
    stage: str
    changed: dict[str, Any]
    data: str | None = None


VARIANTS = [
    Variant("pretrain", "pretrain", {}),
    Variant("sft", "sft", {}),
    Variant("sft, LoRA", "sft", LORA),
    Variant("sft, messages", "sft", {"chat": True}, "talks"),
    Variant("sft, 2 accumulated", "sft", {"gradient_accumulation_steps": 2}),
    Variant("sft, two passes", "sft", {"max_steps": None, "num_train_epochs": 2}),
    Variant("sft, a stream", "sft", {"dataset_streaming": True}),
    Variant("rm", "rm", {"eval_size": 0.1}),
    Variant("rm, LoRA", "rm", LORA),
    Variant("rm, pairs", "rm", {"forward": "pairs"}, "pairs"),
    Variant("rm, 2 accumulated", "rm", {"gradient_accumulation_steps": 2}),
    Variant(
        "rm, best kept",
        "rm",
        {"eval_size": 0.2, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 9},
    ),
    Variant("rm, demonstrations", "rm", {"demonstrations_name": "demonstrations"}),
    Variant("ppo", "ppo", {}),
    Variant("ppo, LoRA", "ppo", LORA),
    Variant("ppo, messages", "ppo", {"chat": True}, "talk_prompts"),
    Variant("ppo-ptx", "ppo", {"ptx_coef": 1.0, "ptx_dataset_name": "texts", "ptx_max_length": 16}),
    Variant(
        "ppo-ptx, a stream",
        "ppo",
        {"ptx_coef": 1.0, "ptx_dataset_name": "texts", "ptx_max_length": 16, "ptx_streaming": True},
    ),
    Variant("ppo, EMA", "ppo", {"ema_decay": 0.9}),
    Variant("ppo, adaptive KL", "ppo", {"adaptive_kl_target": 0.5, "adaptive_kl_horizon": 100}),
    Variant("ppo, 2 accumulated", "ppo", {"gradient_accumulation_steps": 2, "num_mini_batches": 2}),
    Variant("ppo, value head", "ppo", {"value_model_path": "value_head"}),
    Variant("ppo, target KL", "ppo", {"target_kl": 1e-4, "num_ppo_epochs": 3}),
    Variant("ppo, a function", "ppo", {"reward_model_path": ["rewards.py:vowels"]}),
    Variant("ppo, two kept", "ppo", {"save_total_limit": 2}),
    Variant("candidates", "candidates", {}),
]
FILES = ("demonstrations", "texts", "rewards.py:vowels")


class Kill(NamedTuple):
    """After seconds; or at an event, before it or in its middle."""

    seconds: float | None = None
    event: int | None = None
    middle: bool = False

    @property
    def kind(self) -> str:
        return "time" if self.event is None else "in a file" if self.middle else "before a file"


def options_of(variant: Variant, world: Path) -> dict[str, Any]:
    given = dict(variant.changed)
    chat = given.pop("chat", False)
    given = {name: _placed(value, world) for name, value in given.items()}
    if variant.data:
        given["dataset_name"] = world / f"{variant.data}.jsonl"
    if chat:
        given["model_name_or_path"] = world / "chat_policy"
        given |= {"reward_model_path": [world / "chat_reward"]} if variant.stage == "ppo" else {}
    steps = {} if variant.stage == "candidates" else STEPS
    return w.options(variant.stage, world, **{**steps, **given})


def _placed(value: Any, world: Path) -> Any:
    if isinstance(value, list):
        return [_placed(part, world) for part in value]
    if value not in FILES:
        return value
    return f"{world}/{value}" if ".py" in value else world / f"{value}.jsonl"


# ---- in the fork ---------------------------------------------------------------------------------


def watched(call: Callable[[], Any], out: Path, kill: Kill, told: Path | None) -> Callable[[], Any]:
    """The call, with each change below `out` counted, and the kill at its place.

    Args:
        told: file for the list of events: whether the result was being saved, and of which kind.
    """
    events: list[tuple[bool, str]] = []
    root, busy = str(out), [False]

    def count(kind: str, path: Any, middle: Callable[[], Any] | None = None) -> None:
        if busy[0] or not isinstance(path, str | os.PathLike):
            return
        if not os.path.abspath(os.fspath(path)).startswith(root):
            return
        events.append((saving_result(), kind))
        if kill.event == len(events) - 1:
            if kill.middle and middle:
                busy[0] = True
                middle()
            os.kill(os.getpid(), signal.SIGKILL)

    def saving_result() -> bool:
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "finish" and frame.f_code.co_filename.endswith("stage.py"):
                return True
            frame = frame.f_back
        return False

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR):
            count("open", given[0], lambda: open(given[0], "w").close())
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            count(event, given[0])

    def cut(write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def writing(*given: Any, **named: Any) -> Any:
            def half() -> None:
                write(*given, **named)
                os.truncate(given[position], os.path.getsize(given[position]) // 2)

            count("write", given[position], half)
            return write(*given, **named)

        return writing

    def run() -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(audit)
        safetensors.torch.serialize_file = cut(safetensors.torch.serialize_file, 1)
        torch.save = cut(torch.save, 1)
        call()
        if told is not None:
            busy[0] = True
            told.write_text(json.dumps(events), encoding="utf-8")

    return run


# ---- in the parent -------------------------------------------------------------------------------


class Undisturbed(NamedTuple):
    """The result of a run without a kill, its seconds and what it wrote in which order."""

    result: dict[str, Any]
    seconds: float
    events: list[tuple[bool, str]]


def result_of(out: Path) -> dict[str, Any]:
    """What must be equal to the bit: weights and candidates; and the metrics without times."""
    import hashlib

    files = [*out.glob("*.safetensors"), *out.glob("*.jsonl")]
    files += [path for path in (out / "reward_config.json",) if path.is_file()]
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    timed = ("seconds", "runtime", "per_second", "eps")
    kept = {k: v for k, v in metrics.items() if not any(part in k for part in timed)}
    return {"weights": weights, "metrics": kept}


def undisturbed(variant: Variant, world: Path, folder: Path) -> Undisturbed:
    forks.remove(folder)
    call, out = call_of(variant, world, folder)
    told = forks.log_folder(folder) / "events.json"
    outcome = forks.fork(watched(call, out, Kill(), told), folder, limit=300)
    if outcome.code != 0:
        raise SystemExit(f"{variant.name} fails without a kill:\n{outcome.err[-2000:]}")
    events = json.loads(told.read_text(encoding="utf-8"))
    return Undisturbed(result_of(out), outcome.seconds, events)


def call_of(variant: Variant, world: Path, folder: Path, *flags: str) -> tuple[Any, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    config = w.write_options(folder / "case.yaml", options_of(variant, world))
    return forks.command(variant.stage, "--config", config, *flags), folder / "out"


def draw_kill(whole: Undisturbed, rng: random.Random) -> Kill:
    """A kill: a third each at a moment, before a file, in the middle of one."""
    kind = rng.randrange(3)
    if kind == 0:
        return Kill(seconds=rng.uniform(0.1, whole.seconds))
    result = [i for i, (last, _) in enumerate(whole.events) if last]
    chosen = result if result and rng.random() < 1 / 3 else range(len(whole.events))
    if kind == 1:
        return Kill(event=rng.choice(chosen))
    files = [i for i in chosen if whole.events[i][1] in ("open", "write")]
    return Kill(event=rng.choice(files or list(range(len(whole.events)))), middle=True)


def disturbed(
    variant: Variant, world: Path, folder: Path, whole: Undisturbed, rng: random.Random
) -> dict[str, Any]:
    """A run with one to three kills, resumed until it ends; how it compares."""
    forks.remove(folder)
    kills: list[str] = []
    planned = rng.randint(1, 3)
    flags: tuple[str, ...] = ()
    began, fault, other_flags = time.monotonic(), "", 0
    while True:
        kill = draw_kill(whole, rng) if len(kills) < planned else Kill()
        call, out = call_of(variant, world, folder, *flags)
        hooked = watched(call, out, kill, None)
        outcome = forks.fork(hooked, folder, limit=300, kill_after=kill.seconds)
        if outcome.code is None and not outcome.hung:
            kills.append(kill.kind)
        elif outcome.code == 0:
            if kill == Kill() or kills or planned == 0:
                break
            shutil.rmtree(out)  # it was done before the kill came: once more
            flags = ()
            continue
        elif "holds a finished" in outcome.err or "another run" in outcome.err:
            break  # killed after its last file
        elif outcome.code == 2 and flags and flags[0] == "--resume_from_checkpoint":
            other_flags += 1
            flags = ("--overwrite_output_dir", "true") if flags[1] == "true" else (flags[0], "true")
            continue
        else:
            fault = (outcome.err or "hung")[-1500:]
            break
        flags = ("--resume_from_checkpoint", "auto")
    result = {} if fault else result_of(out)
    return {
        "variant": variant.name,
        "kills": kills,
        "weights": not fault and result["weights"] == whole.result["weights"],
        "good": not fault and result["weights"] == whole.result["weights"],
        "metrics": not fault and result["metrics"] == whole.result["metrics"],
        "other_flags": other_flags,
        "fault": fault,
        "differs": [] if fault else _differing(result["metrics"], whole.result["metrics"]),
        "seconds": round(time.monotonic() - began, 1),
    }


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def runs(world: Path, folder: Path, count: int, seed: int, only: str) -> Iterator[dict[str, Any]]:
    """Killed runs, each variant in turn, until there were `count` kills."""
    chosen = [variant for variant in VARIANTS if only in variant.name]
    whole = {v.name: undisturbed(v, world, folder / "whole") for v in chosen}
    rng, done = random.Random(seed), 0
    while done < count:
        for variant in chosen:
            run = disturbed(variant, world, folder / "run", whole[variant.name], rng)
            done += len(run["kills"])
            yield run
