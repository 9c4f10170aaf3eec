"""What `make docs` adds to docs/: the README as first page, tables of options, all other pages."""

import ast
import re
from pathlib import Path

import griffe
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "trl_instruct" / "configs.py"


def on_config(config: MkDocsConfig) -> None:
    """Pages that the nav does not name come at the end of its last section."""
    assert config.nav is not None
    named = re.findall(r"[\w/]+\.md", str(config.nav))
    (last,) = config.nav[-1].values()
    pages = {page.name for page in Path(config.docs_dir).glob("*.md")}
    last += sorted(pages.difference(named))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """The README is the first page; its links lead out of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """`{options PPOConfig}` becomes the table of that class's own options; the README is Home."""
    if page.file.src_uri.endswith(".md"):
        markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"^\{options (\w+)\}$", lambda match: options(match[1]), markdown, flags=re.M)


def options(name: str) -> str:
    """The table of a dataclass of configs.py: option, default, help (from configs.yaml)."""
    body = ast.parse(CONFIGS.read_text(encoding="utf-8")).body
    told = yaml.safe_load(CONFIGS.with_suffix(".yaml").read_text(encoding="utf-8"))[name]
    (config,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for field in config.body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) in told:
            option, default = map(ast.unparse, (field.target, field.value))
            text = told[option].replace("|", r"\|").replace("<", "&lt;")
            lines.append(f"| `{option}` | `{default}` | {text} |")
    return "\n".join(lines)


class Doctests(griffe.Extension):
    """Doctests in a docstring's text are code."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        block = re.compile(r"(?:^>>> .*\n?(?:^(?!>>>)\S.*\n?)*)+", re.MULTILINE)
        if (docstring := obj.docstring) is not None:
            docstring.value = block.sub(
                lambda found: f"```python\n{found[0].rstrip()}\n```\n", docstring.value
            )
