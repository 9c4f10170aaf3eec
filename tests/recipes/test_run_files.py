"""What a run may remove and replace: its own files, as it left them, and nothing else."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from test_stage import new_stage
from trl import ModelConfig

from trl_instruct.configs import SFTConfig
from trl_instruct.errors import InputError
from trl_instruct.files import MANIFEST_FILE, list_too, listed_files, write_json, write_manifest
from trl_instruct.recipes import run_files, stage
from trl_instruct.recipes.run_files import RunFiles

PROJECT = (
    *("README.md", "config.json", "config.yaml", "metrics.json", "summary.json", "vocab.txt"),
    *("base/thesis.tex", "checkpoint-notes/1.md", "checkpoint-3/optimizer.pt", "tokenizer.py"),
)
WHOLE = ("model.safetensors", "rng_state.pth", "run.json", "trainer_state.json")  # a checkpoint
RESULT = ("README.md", "additional_chat_templates/tool.jinja", "config.json", "model.safetensors")


@pytest.fixture(autouse=True)
def without_garbage_collection(monkeypatch):
    """It takes most of the time of a stage that trains nothing."""
    monkeypatch.setattr(stage, "clear_device_cache", lambda **_: None)


def fill(folder, names, text="mine"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def finish(folder, *, checkpoints=(), **options):
    """A run that writes what a stage writes."""
    with new_stage(folder, **options) as run:
        run.begin()
        for step in checkpoints:
            fill(folder / f"checkpoint-{step}", WHOLE, '{"run": {}}')
            write_manifest(folder / f"checkpoint-{step}")
        fill(run.new, RESULT, "ours")
        run.write_metrics({})


def killed(folder, *, checkpoint=()):
    """A run that ends without a chance to clear up."""
    files = RunFiles(folder)
    files.clear(resume=True, keep_base=False)
    fill(files.new, ["config.yaml"], "seed: 0")
    files.put_in_place()
    if checkpoint:
        fill(folder / "checkpoint-3", checkpoint, "half")
    return files


def elsewhere(tmp_path):
    fill(tmp_path / "elsewhere" / "checkpoint-1", WHOLE, '{"run": {}}')
    write_manifest(tmp_path / "elsewhere" / "checkpoint-1")
    return str(tmp_path / "elsewhere" / "checkpoint-1")


# ---- files of others -----------------------------------------------------------------------------


def test_what_a_killed_run_was_writing_is_in_nobodys_way(tmp_path):
    partial = ".manifest.json.0a1b2c3d.tmp"
    killed(tmp_path / "run", checkpoint=["model.safetensors", partial])
    fill(tmp_path / "run", [partial])
    assert RunFiles(tmp_path / "run").in_the_way(resume=True) is None
    fill(tmp_path / "new", [partial])  # killed before its first file was there
    for name, options in (("run", {"overwrite_output_dir": True}), ("new", {})):
        with new_stage(tmp_path / name, **options) as run:
            run.begin()
            left = {"config.yaml", MANIFEST_FILE, ".trl-instruct/lock"}
            assert content(tmp_path / name).keys() == left


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"manifest_version": 3}', "{}"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_project_with_a_config_of_its_own_is_no_run(tmp_path, resumed, manifest):
    folder = tmp_path / "project"
    fill(folder, PROJECT)
    if manifest:
        fill(folder, [MANIFEST_FILE], manifest)
    before = content(folder)
    options = {"resume_from_checkpoint": elsewhere(tmp_path)} if resumed else {}
    with (
        pytest.raises(InputError, match=r"holds 'config.yaml' and no .*Choose a new or empty"),
        new_stage(folder, overwrite_output_dir=True, **options) as run,
    ):
        run.begin()
    assert content(folder) == before


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path):
    fill(tmp_path, ["thesis.tex", "run/config.yaml"])
    write_manifest(tmp_path, ["thesis.tex", "run/config.yaml"])
    listed = listed_files(tmp_path)
    for outside in ("../thesis.tex", str(tmp_path / "thesis.tex")):
        names = {"config.yaml": listed["run/config.yaml"], outside: listed["thesis.tex"]}
        write_json(tmp_path / "run" / MANIFEST_FILE, names)
        assert listed_files(tmp_path / "run") == {}


def test_exactly_what_a_run_wrote_is_replaced(tmp_path):
    folder = tmp_path / "run"
    finish(folder, checkpoints=[1, 2])
    theirs = {"notes.txt", "base/thesis.tex", "checkpoint-notes/1.md", "runs/events", ".gitkeep"}
    fill(folder, theirs)
    with new_stage(folder, overwrite_output_dir=True) as run:
        run.begin()
        left = content(folder)
    assert left.keys() == {*theirs, "config.yaml", MANIFEST_FILE, ".trl-instruct/lock"}
    assert {left[name] for name in theirs} == {"mine"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("README.md", "holds 'README.md', which has changed since a run wrote it"),
        ("config.yaml", "holds 'config.yaml', which has changed"),
        ("additional_chat_templates/tool.jinja", "tool.jinja', which has changed"),
        ("tokenizer.json", "holds 'tokenizer.json', which no run wrote"),
        ("checkpoint-3/thesis.tex", "holds 'checkpoint-3/thesis.tex', which no run wrote"),
    ],
)
def test_what_a_person_wrote_stops_a_run(tmp_path, changed, told):
    folder = tmp_path / "run"
    finish(folder, checkpoints=[3])
    fill(folder, [changed])
    before = content(folder)
    with pytest.raises(InputError, match=told), new_stage(folder, overwrite_output_dir=True):
        pass
    assert content(folder) == before


def test_what_comes_while_a_run_loads_or_trains_is_kept(tmp_path):
    folder = tmp_path / "run"
    finish(folder)
    with (
        pytest.raises(InputError, match="'README.md', which has changed"),
        new_stage(folder, overwrite_output_dir=True) as run,
    ):
        fill(folder, ["README.md"])
        run.begin()
    assert content(folder)["model.safetensors"] == "ours"
    with (
        pytest.raises(InputError, match="'config.json', which this run did not write.* lies in"),
        new_stage(tmp_path / "new") as run,
    ):
        run.begin()
        fill(tmp_path / "new", ["config.json"])
        fill(run.new, RESULT, "ours")
        run.write_metrics({})
    assert (tmp_path / "new" / "config.json").read_text() == "mine"
    assert (run.new / "config.json").read_text() == "ours"


@pytest.mark.parametrize("source", ["", "checkpoint-3"])
def test_a_model_in_the_folder_is_not_lost(tmp_path, source):
    finish(tmp_path, checkpoints=[3])
    config = SFTConfig(output_dir=str(tmp_path), overwrite_output_dir=True)
    model_config = ModelConfig(model_name_or_path=str(tmp_path / source))
    told = "is the folder of the model to start from, .*, which would be lost"
    with pytest.raises(InputError, match=told), stage.run_stage("sft", config, model_config):
        pass


# ---- runs that ended before their time -----------------------------------------------------------


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_in_the_middle_of_a_move_leaves_files_that_are_ours(tmp_path, monkeypatch, moves):
    """A manifest and five files, over those of an earlier run, twice, each time cut short."""
    replace, left = os.replace, []

    def until_killed(*paths):
        if len(left) == moves:
            raise KeyboardInterrupt
        left.append(replace(*paths))

    files = killed(tmp_path)
    fill(files.new, RESULT, "first")
    files.put_in_place()
    monkeypatch.setattr(run_files.os, "replace", until_killed)
    for text in ("second", "third"):
        left.clear()
        files = RunFiles(tmp_path)
        files.clear(resume=True, keep_base=False)
        fill(files.new, [*RESULT, "metrics.json"], text)
        with pytest.raises(KeyboardInterrupt) if moves < 6 else nullcontext():
            files.put_in_place()
        assert ("metrics.json" in content(tmp_path)) == (moves > 5)  # the last file
        assert RunFiles(tmp_path).in_the_way(resume=False) is None
    monkeypatch.undo()
    with new_stage(tmp_path, overwrite_output_dir=True) as run:
        run.begin()
        assert content(tmp_path).keys() == {"config.yaml", MANIFEST_FILE, ".trl-instruct/lock"}


def test_a_half_written_checkpoint_is_removed_unless_others_lie_there(tmp_path):
    killed(tmp_path, checkpoint=["model.safetensors", "optimizer.pt"])
    with new_stage(tmp_path, overwrite_output_dir=True) as run:
        run.begin()
        assert not (tmp_path / "checkpoint-3").exists()
        fill(tmp_path, ["checkpoint-3/optimizer.pt", "checkpoint-3/thesis.tex"])
    for options in (
        {"overwrite_output_dir": True},
        {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")},
    ):
        fill(tmp_path / "checkpoint-1", WHOLE, '{"run": {}}')
        write_manifest(tmp_path / "checkpoint-1")
        with pytest.raises(InputError, match="thesis.tex'"), new_stage(tmp_path, **options):
            pass
    assert (tmp_path / "checkpoint-3" / "thesis.tex").is_file()


def test_a_checkpoint_elsewhere_replaces_a_run_only_on_demand(tmp_path):
    folder = tmp_path / "run"
    finish(folder, checkpoints=[3])
    options = {"resume_from_checkpoint": elsewhere(tmp_path)}
    with pytest.raises(InputError, match="holds another run"), new_stage(folder, **options):
        pass
    with new_stage(folder, overwrite_output_dir=True, **options) as run:
        run.begin()
        assert not (folder / "checkpoint-3").exists()


def test_a_resumed_run_keeps_its_base(tmp_path, make_policy, tokenizer):
    with new_stage(tmp_path) as run:
        run.save_base(make_policy(), tokenizer)
        run.begin()
        fill(tmp_path / "checkpoint-1", WHOLE, '{"run": {}}')
        write_manifest(tmp_path / "checkpoint-1")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    again = partial(new_stage, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with again() as run:
        assert run.save_base(make_policy(), tokenizer) == tmp_path / "base"
        run.begin()
    with pytest.raises(InputError, match="The model is not the one in .*base'"), again() as run:
        run.save_base(make_policy(seed=1), tokenizer)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / ".trl-instruct").exists()


# ---- a run that fails before it begins -----------------------------------------------------------


def test_an_empty_folder_stays_the_folder_that_it_was(tmp_path):
    (tmp_path / "empty").mkdir(mode=0o750)
    before = (tmp_path / "empty").stat()
    for begins in (False, True):
        with pytest.raises(KeyboardInterrupt), new_stage(tmp_path / "empty") as run:
            if begins:
                run.begin()
            raise KeyboardInterrupt
        after = (tmp_path / "empty").stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert not content(tmp_path / "empty")


def test_folders_that_were_made_for_nothing_go(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_stage(tmp_path / "new" / "deep") as run:
        run.begin()
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_the_config_of_an_earlier_run_outlives_one_that_fails(tmp_path):
    """It may be the one that --config names."""
    finish(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_stage(tmp_path, overwrite_output_dir=True) as run:
        run.begin()
        raise KeyboardInterrupt
    assert content(tmp_path).keys() == {"config.yaml", MANIFEST_FILE}


# ---- two runs ------------------------------------------------------------------------------------


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with new_stage(folder) as first, new_stage(folder) as second:
        first.begin()
        before = content(folder)
        with pytest.raises(InputError, match="another run is in progress there"):
            second.begin()
        again = new_stage(folder, overwrite_output_dir=True)
        with pytest.raises(InputError, match="another run is in progress there"), again:
            pass
        assert content(folder) == before
    late = new_stage(tmp_path / "late")
    with pytest.raises(InputError, match="holds another run"), late as second:
        finish(tmp_path / "late")  # began later and ended sooner
        second.begin()
    assert "metrics.json" in content(tmp_path / "late")


def test_the_lock_of_a_killed_process_goes_with_it(tmp_path):
    (tmp_path / ".trl-instruct").mkdir()
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / ".trl-instruct" / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="in progress"), new_stage(tmp_path) as run:
            run.begin()
        holder.send_signal(signal.SIGKILL)
    finish(tmp_path)  # the folder counts as empty
    assert not (tmp_path / ".trl-instruct").exists()


# ---- links and mount points ----------------------------------------------------------------------


def test_a_folder_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "disk")
    finish(link, checkpoints=[1])
    finish(link, overwrite_output_dir=True)
    assert "metrics.json" in content(tmp_path / "disk") and link.is_symlink()
    (tmp_path / ".trl-instruct").symlink_to(tmp_path / "disk")
    with pytest.raises(InputError, match=".trl-instruct is a link"):
        RunFiles(tmp_path).lock()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a link to nothing"), new_stage(tmp_path / "broken"):
        pass


def refusing(rmdir, name):
    def refuse(path, **options):
        if Path(path).name == name:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        return rmdir(path, **options)

    return refuse


def test_what_a_link_points_to_is_never_removed(tmp_path, monkeypatch):
    fill(tmp_path / "disk", ["optimizer.pt", "config.json"])
    folder = tmp_path / "run"
    finish(folder, checkpoints=[1])
    (folder / "checkpoint-2").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(os, "rmdir", refusing(os.rmdir, "checkpoint-1"))  # as of a mount point
    with new_stage(folder, overwrite_output_dir=True) as run:
        run.begin()
        assert not (folder / "checkpoint-2").is_symlink()
        assert not list((folder / "checkpoint-1").iterdir())  # it could not be removed
        fill(run.new, RESULT, "ours")
        run.write_metrics({})
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "disk" / "config.json")
    again = new_stage(folder, overwrite_output_dir=True)
    with pytest.raises(InputError, match="'config.json', which has changed"), again:
        pass
    assert content(tmp_path / "disk") == {"optimizer.pt": "mine", "config.json": "mine"}


def test_a_file_behind_a_link_is_not_written(tmp_path):
    fill(tmp_path, ["thesis.tex"])
    for name in (".metrics.json.tmp", "metrics.json"):
        (tmp_path / name).symlink_to(tmp_path / "thesis.tex")
    write_json(tmp_path / "metrics.json", {})
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text()) == {}


# ---- files that come later -----------------------------------------------------------------------


def test_a_later_file_is_listed_and_then_replaced(tmp_path):
    finish(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path):
        fill(folder, ["report.html"])
        list_too(folder / "report.html")
    assert not (tmp_path / MANIFEST_FILE).exists()
    finish(tmp_path / "run", overwrite_output_dir=True)
    assert "report.html" not in content(tmp_path / "run")
