"""Commands run in forks of one warm process: a second a run instead of ten.

The parent imports and never computes, so that no thread pool exists when it forks.
"""

import atexit
import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = 24 << 30  # bytes of address space: a runaway case fails alone


class Outcome(NamedTuple):
    """How a fork ended: exit code (None: killed, or by us after the limit) and what it printed."""

    code: int | None
    hung: bool
    out: str
    err: str
    seconds: float


def fork(
    call: Callable[[], Any], folder: Path, *, limit: float = 60, kill_after: float | None = None
) -> Outcome:
    """Run a call in a fork, in `folder`; what it prints goes to files there.

    Args:
        limit: seconds until the fork counts as hung and is killed.
        kill_after: SIGKILL after so many seconds.
    """
    pid = start(call, folder)
    return wait(pid, folder, limit=limit, kill_after=kill_after)


def start(call: Callable[[], Any], folder: Path) -> int:
    """Start a call in a fork; its process id, which leads a group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(call, folder)
    return pid


def wait(pid: int, folder: Path, *, limit: float = 60, kill_after: float | None = None) -> Outcome:
    """Wait for a fork; see `fork`."""
    began, hung, killed = time.monotonic(), False, False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - began
        if done:
            break
        if not killed and (seconds > limit or (kill_after is not None and seconds > kill_after)):
            hung, killed = seconds > limit, True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # what the fork started itself
        os.killpg(pid, signal.SIGKILL)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    out, err = (
        (log_folder(folder) / name).read_bytes().decode("utf-8", "replace")
        for name in ("out", "err")
    )
    return Outcome(code, hung, out, err, seconds)


def log_folder(folder: Path) -> Path:
    """Where a fork's output, caches and temporary files lie: beside its folder."""
    return folder.with_name(folder.name + ".log")


def _child(call: Callable[[], Any], folder: Path) -> None:
    code = 1
    try:
        os.setsid()
        logs = log_folder(folder)
        (logs / "tmp").mkdir(parents=True, exist_ok=True)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ["TMPDIR"] = str(logs / "tmp")
        import datasets

        datasets.config.HF_DATASETS_CACHE = logs / "cache"
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        call()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(*arguments: Any) -> Callable[[], None]:
    """The call of a command line, as `trl-instruct` makes it."""
    from trl_instruct import cli

    return lambda: cli.main([str(argument) for argument in arguments])


def warm(call: Callable[[], Any], folder: Path) -> None:
    """Import here what a call imports in a fork, so that later forks need not."""

    def told() -> None:
        call()
        (log_folder(folder) / "modules").write_text("\n".join(sys.modules), encoding="utf-8")

    outcome = fork(told, folder, limit=300)
    if outcome.code != 0:
        raise SystemExit(f"An undisturbed run fails:\n{outcome.err}{outcome.out}")
    for name in (log_folder(folder) / "modules").read_text(encoding="utf-8").splitlines():
        if name.partition(".")[0] in ("trl", "trl_instruct", "transformers", "peft", "datasets"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def remove(folder: Path) -> None:
    """Remove a fork's folder and its logs, whatever their permissions."""
    for path in (folder, log_folder(folder)):
        shutil.rmtree(path, ignore_errors=True)
