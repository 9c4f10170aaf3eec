"""Manifests: a whole folder, and each way to damage it."""

import pytest

from trl_instruct.files import MANIFEST_FILE, damage, listed_files, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "base" / "config").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_sizes_and_hashes(folder):
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert listed_files(folder)["weights"] == {"size": 3, "sha256": sha256_of_abc}
    assert list(listed_files(folder)) == ["base/config", "weights"]
    assert damage(folder) is None


def test_what_is_not_listed_is_nobodys_damage(folder):
    (folder / "thesis.tex").write_text("mine")
    assert damage(folder) is None


def test_a_missing_file(folder):
    (folder / "base" / "config").unlink()
    assert damage(folder) == "base/config is missing"


def test_a_short_file(folder):
    (folder / "weights").write_bytes(b"ab")
    assert damage(folder) == "weights has 2 bytes of 3"


def test_a_flipped_bit(folder):
    (folder / "weights").write_bytes(b"abb")
    assert damage(folder) == "weights has changed since it was written"


def test_no_manifest(tmp_path):
    assert listed_files(tmp_path) == {} and damage(tmp_path) is None


def test_a_manifest_that_was_cut(folder):
    (folder / MANIFEST_FILE).write_text('{"weights": {')
    with pytest.raises(ValueError):
        damage(folder)
