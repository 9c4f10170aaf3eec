"""What `pip install` brings along: the wheel, built and listed."""

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_instruct"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_the_recipes(wheel):
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert len(expected) > 100
    for folder in ("configs", "accelerate"):
        found = [p for p in (ROOT / "recipes" / folder).rglob("*") if p.is_file()]
        assert found
        names = {path.relative_to(ROOT).as_posix() for path in found if path.suffix != ".pyc"}
        expected |= {f"trl_instruct/{name}" for name in names}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


@pytest.mark.slow
def test_the_index_shows_a_readme_whose_links_are_whole(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(wheel.read(name).decode("utf-8"))
    targets = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(targets) > 5
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert not re.search(r"!\[[^\]]*\]\([^)]*/blob/", metadata.get_payload())  # a page, no picture
    source = metadata.get_all("Project-URL")[0].split(", ")[1]
    for target in targets:
        if found := re.fullmatch(rf"{source}/(?:blob|raw)/main/([^#]+)(?:#.*)?", target):
            assert (ROOT / found[1]).exists(), found[1]
