"""The files of a run: which are ours, one run in a folder at a time, results that appear whole."""

import contextlib
import os
import shutil
from collections.abc import Container, Iterable
from fnmatch import fnmatch
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from trl_instruct import files
from trl_instruct.errors import InputError
from trl_instruct.files import CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, PARTIAL, listed_files
from trl_instruct.models.adapters import FINGERPRINT
from trl_instruct.models.resuming import all_checkpoints, is_finished
from trl_instruct.scalar_head import SHIFT_FILE

BASE = "base"  # subfolder of a LoRA stage, for a base model that has no other folder
HIDDEN = ".trl-instruct"  # in the folder of a run: its lock, and new files until they are complete

NAMES = yaml.safe_load(Path(__file__).with_name("files.yaml").read_text(encoding="utf-8"))
TAKEN = [CONFIG_FILE, METRICS_FILE, FINGERPRINT, SHIFT_FILE, *NAMES["taken"].split()]
IN_CHECKPOINTS = [MANIFEST_FILE, *NAMES["in_checkpoints"].split()]


class RunFiles:
    """The files of one run in its folder, listed in the folder's manifest. Links are not followed.

    What is listed and unchanged is ours: that, and checkpoints, may be removed or replaced.
    """

    def __init__(self, folder: Path):
        self.folder, self.new = folder, folder / HIDDEN / "new"
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.held = self.holds_run()  # when it was locked; until then, now
        self.lock_file = FileLock(folder / HIDDEN / "lock", timeout=0)

    def content(self) -> list[str]:
        """Names in the folder; what a killed run was writing, and its lock, do not count."""
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in there if not fits(path.name, (HIDDEN, PARTIAL)))

    def holds_run(self) -> bool:
        """Whether the folder has a run's manifest."""
        return not {CONFIG_FILE, f"{BASE}/config.json"}.isdisjoint(listed_files(self.folder))

    def lock(self) -> None:
        """Keep other runs out until `unlock`, or until this process ends."""
        if self.lock_file.is_locked:
            return
        hidden = self.folder / HIDDEN
        try:
            hidden.mkdir(parents=True, exist_ok=True)
            if hidden.is_symlink():
                raise NotADirectoryError(f"{HIDDEN} is a link")
            self.lock_file.acquire()
        except OSError as error:
            busy = "another run is in progress there. Wait for its end, or choose another folder."
            told = busy if isinstance(error, Timeout) else f"{error}. Choose another."
            raise InputError(f"output_dir {str(self.folder)!r}: {told}") from None
        self.held = self.holds_run()

    def unlock(self) -> None:
        """Let other runs in; leaves nothing of the lock, nor folders that were made for nothing."""
        empty = self.made
        if self.lock_file.is_locked:
            (self.folder / HIDDEN / "lock").unlink(missing_ok=True)
            self.lock_file.release()
            empty = [self.new, self.folder / HIDDEN, *self.made]
        _remove_empty(empty)

    def check_writable(self) -> None:
        """InputError if the folder cannot be made or written to."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            what = "a file" if self.folder.exists() else "a link to nothing"
            raise InputError(f"output_dir {str(self.folder)!r} is {what}; choose a folder.")
        ancestors = [self.folder, *self.folder.absolute().parents]
        nearest = next(path for path in ancestors if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            fault = "is not a folder" if not nearest.is_dir() else "is not writable"
            raise InputError(
                f"output_dir {str(self.folder)!r}: {str(nearest)!r} {fault}. Choose another."
            )

    def check_content(self, *, replace: bool, resume: bool) -> None:
        """InputError unless what the folder holds may be replaced, or a run there resumed."""
        content, told = self.content(), f"output_dir {str(self.folder)!r} holds"
        if content and not self.holds_run():
            held, do = f"{content[0]!r} and no run", "Choose a new or empty folder"
            if CONFIG_FILE in content:
                held = f"{CONFIG_FILE!r} and no {MANIFEST_FILE!r} that lists the files of a run"
                do += ", or empty this one yourself"
            raise InputError(f"{told} {held}. {do}.")
        if self.held and not (replace or resume):
            held = "another run" if METRICS_FILE in content else "a run that was cut short"
            raise InputError(
                f"{told} {held}. Choose a new folder, or set --overwrite_output_dir to replace it."
            )
        if found := self.in_the_way(resume=resume):
            raise InputError(f"{told} {found}. Move it away, or choose a new folder.")

    def in_the_way(self, *, resume: bool) -> str | None:
        """The first file that a run would overwrite or remove, and that is not ours; or None."""
        marks = listed_files(self.folder)
        for name, mark in marks.items():
            if os.path.lexists(self.folder / name) and self._mark(name) != mark:
                return f"{name!r}, which has changed since a run wrote it"
        for name in self.content():
            if name not in marks and fits(name, TAKEN):
                return f"{name!r}, which no run wrote"
        for folder in self._replaced(resume):
            listed = {name.partition("/")[0] for name in listed_files(folder)}
            known = [*listed, MANIFEST_FILE] if listed else [*TAKEN, *IN_CHECKPOINTS]
            known.append(PARTIAL)
            for path in () if folder.is_symlink() else sorted(folder.iterdir()):
                if not fits(path.name, known):
                    return f"'{folder.name}/{path.name}', which no run wrote"
        return None

    def clear(self, *, resume: bool, keep_base: bool) -> None:
        """Make room for a run: what an earlier one left goes, but for its config."""
        kept = {CONFIG_FILE, BASE} if keep_base else {CONFIG_FILE}
        self.remove(listed_files(self.folder).keys() - {METRICS_FILE} if resume else kept)
        for path in [*self._replaced(resume), *self.folder.glob(PARTIAL), self.new]:
            _remove(path)
        self.new.mkdir(parents=True)

    def remove(self, unless: Container[str] = ()) -> None:
        """Remove our files, metrics first, except these, and those in these folders."""
        marks = listed_files(self.folder)
        for name in sorted(marks, key=lambda name: name != METRICS_FILE):
            stays = name in unless or name.partition("/")[0] in unless
            if not stays and self._mark(name) == marks[name]:
                (self.folder / name).unlink()
                _remove_empty(self.folder / parent for parent in Path(name).parents[:-1])

    def incoming(self) -> set[str]:
        """Names of the new files, by their place in the folder."""
        files = (path for path in self.new.rglob("*") if path.is_file())
        return {path.relative_to(self.new).as_posix() for path in files}

    def put_in_place(self) -> None:
        """Move the new files to their places, metrics last; ours, wherever a kill comes."""
        marks = listed_files(self.folder)
        new = {name: files.mark_of(self.new / name) for name in self.incoming()}
        there = {name for name in new if os.path.lexists(self.folder / name)}
        for name in there:
            if self._mark(name) != marks.get(name, {}):
                raise InputError(
                    f"output_dir {str(self.folder)!r} holds {name!r}, which this run did not "
                    f"write. It is kept; what would replace it lies in {str(self.new)!r}."
                )
        for name in there:
            # A config that stays the same is never away: --config may name it.
            (self.new if new[name] == marks[name] else self.folder).joinpath(name).unlink()
        present = {name: mark for name, mark in marks.items() if (self.folder / name).exists()}
        files.write_json(self.folder / MANIFEST_FILE, {**present, **new})
        for name in sorted(self.incoming(), key=lambda name: name == METRICS_FILE):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.new / name, self.folder / name)
        _remove(self.new)
        self.new.mkdir()

    def _replaced(self, resume: bool) -> list[Path]:
        """The checkpoints that go when a run begins: all, or those cut short if it resumes."""
        found = all_checkpoints(self.folder)
        return [path for path in found if not is_finished(path)] if resume else found

    def _mark(self, name: str) -> files.Mark | None:
        """The mark of a file in the folder; None for links, and what is no file."""
        path = self.folder / name
        here = path.resolve() == self.folder.resolve() / name and path.is_file()
        return files.mark_of(path) if here else None


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is like one of the patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder; a folder that is a mount point stays, empty."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
