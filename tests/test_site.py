"""What `make docs` builds: pages that exist, and a reference of all public names and options."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from test_docs import slugs

import trl_instruct
from trl_instruct import configs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}
STATED = re.findall(r"^::: trl_instruct\.([\w.]+)\.(\w+)$", "\n".join(API.values()), re.M)


def test_the_nav_names_pages_that_exist():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"[\w/]+\.md", str(nav))
    assert len(named) == len(set(named)) > 20
    assert [name for name in named if not (DOCS / name).exists()] == ["index.md"]  # the README


def test_the_reference_has_every_public_name_once():
    exports = {(module, name) for name, module in trl_instruct._EXPORTS.items()}
    assert sorted(STATED) == sorted(exports)


@pytest.mark.parametrize("name", trl_instruct.__all__)
def test_no_public_name_lacks_a_docstring(name):
    item = getattr(trl_instruct, name)
    assert item.__module__.startswith("trl_instruct")
    own = vars(item).items() if inspect.isclass(item) else ()
    methods = [value for key, value in own if inspect.isfunction(value) and key[0] != "_"]
    assert vars(item).get("__doc__") or item.__doc__
    assert [method.__name__ for method in methods if not inspect.getdoc(method)] == []


def test_a_table_has_the_options_of_each_stage():
    tables = re.findall(r"^\{options (\w+)\}$", API["options"], re.M)
    own = [
        name
        for name, value in vars(configs).items()
        if inspect.isclass(value) and value.__module__ == configs.__name__
    ]
    assert sorted(tables) == sorted(own)


def test_headings_as_the_site_names_them():
    assert slugs("## The `rm` call, 8 and 4 bit\n\n### It's K > 2\n::: a.b.C\n") == {
        "the-rm-call-8-and-4-bit",
        "its-k-2",
        "a.b.C",
    }
