"""Disks that are full, folders without permission, two runs in one folder, hostile servers.

A run must end in one line, or with its result; it must never leave what looks like a result.
"""

import contextlib
import os
import random
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import kills
import malformed
import world as w

NOBODY = 65534
STAGES = ("pretrain", "sft", "rm", "ppo", "candidates")


def row(kind: str, name: str, outcome: forks.Outcome, fault: str = "") -> dict[str, Any]:
    """A run's line in the table; `fault` is what is wrong besides how it ended."""
    case = malformed.Case(kind, name, lambda folder: [], harmless=True)
    judged = malformed.judge(case, outcome, [])
    return {**judged, "good": judged["good"] and not fault, "fault": fault}


def _stages(world: Path, folder: Path) -> Iterator[tuple[kills.Variant, kills.Undisturbed]]:
    """The plain variant of each stage, and what it gives undisturbed."""
    for stage in STAGES:
        variant = next(v for v in kills.VARIANTS if v.name == stage)
        yield variant, kills.undisturbed(variant, world, folder / "whole")


# ---- full disks ----------------------------------------------------------------------------------


def full_disks(world: Path, folder: Path, seed: int, each: int = 4) -> Iterator[dict[str, Any]]:
    """Files that cannot grow, a file system that is full; then there is space, and it goes on."""
    rng = random.Random(seed)
    for variant, whole in _stages(world, folder):
        for _ in range(each):
            yield _full(variant, world, folder / "run", whole, rng.randrange(100, 30_000), False)
        for _ in range(each):
            size = rng.randrange(4, 160) << 10
            with contextlib.suppress(subprocess.CalledProcessError):  # mounting is not allowed
                yield _full(variant, world, folder / "run", whole, size, True)


def _full(
    variant: kills.Variant,
    world: Path,
    folder: Path,
    whole: kills.Undisturbed,
    size: int,
    mounted: bool,
) -> dict[str, Any]:
    forks.remove(folder)
    call, out = kills.call_of(variant, world, folder)
    if mounted:
        out.mkdir()
        _mount(out, size)
    try:

        def limited() -> None:
            if not mounted:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            call()

        outcome = forks.fork(limited, folder, limit=120)
        fault = ""
        if outcome.code != 0 and (out / "metrics.json").exists():
            fault = "there is a metrics.json"
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        if outcome.code != 0 and not fault:
            again, out = kills.call_of(variant, world, folder, "--resume_from_checkpoint", "auto")
            resumed = forks.fork(again, folder, limit=120)
            if resumed.code != 0:
                fault = f"it does not go on: {resumed.err[-300:]}"
            elif kills.result_of(out)["weights"] != whole.result["weights"]:
                fault = "it goes on to another result"
    finally:
        if mounted:
            subprocess.run(["umount", str(out)], check=False)
    kind = "full file system" if mounted else "largest file"
    return row(kind, f"{variant.name}: {size:,} bytes", outcome, fault)


def _mount(folder: Path, size: int) -> None:
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(line, check=True, capture_output=True)


# ---- permissions ---------------------------------------------------------------------------------


def permissions(world: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """As a user who may not read or write; root may anything."""
    if os.getuid() != 0:
        return

    def closed(path: Path, mode: int) -> None:
        os.chmod(path, mode)

    for stage in ("sft", "rm", "ppo", "candidates"):
        data = w.options(stage, world)["dataset_name"]
        cases: dict[str, Callable[[Path], dict[str, Any]]] = {
            "the folder around output_dir": lambda f: (closed(f, 0o555), {})[1],
            "output_dir, to write": lambda f: (
                (f / "out").mkdir(),
                closed(f / "out", 0o555),
                {},
            )[-1],
            "output_dir, to read": lambda f: ((f / "out").mkdir(), closed(f / "out", 0), {})[-1],
            "data, to read": lambda f, d=data: {"dataset_name": _hidden(Path(d), f / "d.jsonl")},
            "model, to read": lambda f: {
                "model_name_or_path": _hidden(world / "policy", f / "model", "model.safetensors")
            },
            "config.json, to read": lambda f: {
                "model_name_or_path": _hidden(world / "policy", f / "model", "config.json")
            },
            "model's folder": lambda f: {
                "model_name_or_path": _hidden(world / "policy", f / "model")
            },
            "cache of datasets": lambda f: {"cache": True},
        }
        for name, prepare in cases.items():
            forks.remove(folder)
            folder.mkdir(parents=True)
            (forks.log_folder(folder) / "tmp").mkdir(parents=True)
            for path in (folder, forks.log_folder(folder), forks.log_folder(folder) / "tmp"):
                os.chown(path, NOBODY, NOBODY)
            given = prepare(folder)
            no_cache = given.pop("cache", False)
            config = w.write_options(
                forks.log_folder(folder) / "case.yaml", w.options(stage, world, **given)
            )
            config.chmod(0o644)

            def as_nobody(s: str = stage, c: Path = config, sealed: bool = no_cache) -> None:
                if sealed:
                    import datasets

                    datasets.config.HF_DATASETS_CACHE = Path("/proc/nothing")
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                forks.command(s, "--config", c)()

            outcome = forks.fork(as_nobody, folder)
            closed(folder, 0o755)
            yield row("no permission", f"{stage}: {name}", outcome)


def _hidden(source: Path, target: Path, inside: str = "") -> Path:
    """A copy of a file or folder of which one file, or the whole, cannot be read."""
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (target / inside).chmod(0)
    return target


# ---- two runs ------------------------------------------------------------------------------------


def two_runs(world: Path, folder: Path, seed: int, each: int = 4) -> Iterator[dict[str, Any]]:
    """A second run into the folder of one that is in progress: one of them ends with its result."""
    rng = random.Random(seed)
    for variant, whole in _stages(world, folder):
        for number in range(each):
            flags = (("--overwrite_output_dir", "true"), ("--resume_from_checkpoint", "auto"), ())
            forks.remove(folder / "run")
            forks.remove(folder / "second")
            first, out = kills.call_of(variant, world, folder / "run")
            second, _ = kills.call_of(variant, world, folder / "run", *flags[number % 3])
            one = forks.start(first, folder / "run")
            time.sleep(rng.uniform(0, 0.8 * whole.seconds))

            def beside(call: Any = second, place: Path = folder / "run") -> None:
                os.chdir(place)
                call()

            two = forks.start(beside, folder / "second")
            ends = [
                forks.wait(one, folder / "run", limit=120),
                forks.wait(two, folder / "second", limit=120),
            ]
            codes = sorted(end.code if end.code is not None else -1 for end in ends)
            in_turn = codes == [0, 0] and bool(flags[number % 3])  # the second replaced the first
            fault = "" if codes == [0, 2] or in_turn else f"they ended with {codes}"
            if not fault and kills.result_of(out)["weights"] != whole.result["weights"]:
                fault = "the result is another"
            shown = max(ends, key=lambda end: end.code or 0)
            yield row("two runs", f"{variant.name}, {number}", shown, fault)


# ---- servers -------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


def _body(content: bytes, head: bytes = OK) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "garbage": bytes(range(256)) * 8,
    "no JSON": _body(b"<html>hello</html>"),
    "a list": _body(b"[1, 2]"),
    "null": _body(b"null"),
    "too few scores": _body(b'{"scores": [1.0]}'),
    "text for scores": _body(b'{"scores": ["a", "b", "c", "d"]}'),
    "an object for scores": _body(b'{"scores": {"a": 1}}'),
    "NaN": _body(b'{"scores": [NaN, NaN]}'),
    "an int of 400 digits": _body(b'{"scores": [1' + b"0" * 400 + b", 1]}"),
    "an int of 5000 digits": _body(b'{"scores": [1' + b"0" * 5000 + b", 1]}"),
    "deep": _body(b'{"scores": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "escapes": _body(b'{"error": "\\u001b[2J"}', b"HTTP/1.1 400 \x1b[2J\x1b]0;own\x07\r\n"),
    "a long reason": b"HTTP/1.1 400 " + b"x" * 60_000 + b"\r\n\r\n",
    "a long error": _body(b'{"error": "' + b"y" * 900_000 + b'"}', b"HTTP/1.1 400 Bad\r\n"),
    "not UTF-8": _body(b'{"scores": "\xff\xfe"}'),
    "500": _body(b"{}", b"HTTP/1.1 500 Down\r\n"),
    "401": _body(b"{}", b"HTTP/1.1 401 No\r\n"),
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
    "a redirect to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "no status": b"scores: 1 2\r\n\r\n",
    "a cut body": OK + b"Content-Length: 900\r\n\r\n{",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n{}",
    "broken chunks": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "a thousand headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n{}",
    "a long header": b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n{}",
}
WAYS = ("resets", "is silent", "drips its body", "drips its headers", "never ends", "is not there")


def servers(world: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """`ppo` against servers that are slow, huge, broken or hostile."""
    for way in (*ANSWERS, *WAYS):
        forks.remove(folder)
        folder.mkdir(parents=True)
        with listening(way) as port:
            code = (
                "from trl_instruct.rewards.http import HTTPReward\n"
                f"f = HTTPReward('http://127.0.0.1:{port}/score', timeout=2, retries=1)\n"
            )
            (folder / "mine.py").write_text(code, encoding="utf-8")
            line = malformed.arguments(world, folder, "ppo", reward_model_path=["mine.py:f"])
            outcome = forks.fork(forks.command(*line), folder, limit=45)
        fault = "it ended with 0" if outcome.code == 0 else ""
        yield row("server", way, outcome, fault)


@contextlib.contextmanager
def listening(way: str) -> Iterator[int]:
    """A server on a port of this machine, in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if way == "is not there":
            server.close()
            yield port
            return
        pid = os.fork()
        if pid == 0:
            while True:
                link, _ = server.accept()
                threading.Thread(target=_answer, args=(way, link), daemon=True).start()
        try:
            yield port
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _answer(way: str, link: socket.socket) -> None:
    with contextlib.suppress(OSError), link:
        if way == "resets":
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        link.settimeout(0.3)
        with contextlib.suppress(OSError):
            while link.recv(1 << 16):
                pass
        link.settimeout(None)
        if way == "is silent":
            time.sleep(600)
        head = OK + b"Content-Length: 1000000\r\n\r\n"
        if way == "drips its headers":
            head = b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000
        if way.startswith("drips"):
            for byte in head + b" " * 1_000_000:
                link.sendall(bytes([byte]))
                time.sleep(0 if way == "drips its body" and byte != 32 else 0.2)
        if way == "never ends":
            link.sendall(OK + b"\r\n")
            while True:
                link.sendall(b" " * 65_536)
        link.sendall(ANSWERS[way])
