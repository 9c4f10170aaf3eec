"""docs/instructgpt.md says where the paper stands in the code, docs/names.md what other libraries'
names are called in it: the names and numbers are compared.

Three notations, in backquotes: `file.py: name` for a class, function or constant in trl_instruct/,
`Config.option = default` for a dataclass of configs.py, `file.yaml: option = value` for a file in
recipes/configs/.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from trl_instruct import configs, option_checks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "instructgpt.md"
TEXT = PAGE.read_text(encoding="utf-8")
REFERENCES = [quoted for quoted in re.findall(r"`([^`\n]+)`", TEXT) if re.search(r"[.:=]", quoted)]
NAME = re.compile(r"([\w/]+\.py): ([\w.]+)")
OPTION = re.compile(r"(\w+Config)\.(\w+) = (.+)")
VALUE = re.compile(r"([\w/]+\.yaml): (\w+) = (.+)")
# A section or appendix of the paper, in an option's help.
PLACE = re.compile(r"\b(?:C\.\d|E\.\d+|3\.\d)\b(?!e)")


def defined_in(body: list[ast.stmt]) -> set[str]:
    """What a module or class itself defines; what stands in a class with its name in front."""
    names = set()
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        if isinstance(statement, ast.ClassDef):
            names |= {f"{statement.name}.{name}" for name in defined_in(statement.body)}
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        names |= {node.id for t in targets for node in ast.walk(t) if isinstance(node, ast.Name)}
    return names


def fault(reference: str) -> str | None:
    """Why a reference is wrong; None where the code is as it says, and for an existing file."""
    if any((folder / reference).is_file() for folder in (ROOT, ROOT / "trl_instruct")):
        return None
    if match := NAME.fullmatch(reference):
        path = ROOT / "trl_instruct" / match[1]
        if not path.is_file():
            return f"there is no {path}"
        known = defined_in(ast.parse(path.read_text(encoding="utf-8")).body)
        return None if match[2] in known else f"{match[1]} defines no {match[2]}"
    if match := OPTION.fullmatch(reference):
        config = getattr(configs, match[1], None)
        options = {f.name: f.default for f in dataclasses.fields(config)} if config else {}
        if match[2] not in options:
            return f"{match[1]} has no {match[2]}"
        return differs(ast.literal_eval(match[3]), options[match[2]])
    if match := VALUE.fullmatch(reference):
        path = ROOT / "recipes" / "configs" / match[1]
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if match[2] not in values:
            return f"{match[1]} sets no {match[2]}"
        return differs(yaml.safe_load(match[3]), values[match[2]])
    return "this is none of the three notations"


def differs(said: object, found: object) -> str | None:
    same = said == found and isinstance(said, bool) == isinstance(found, bool)
    return None if same else f"it is {found!r} in the code"


@pytest.mark.parametrize("reference", sorted(set(REFERENCES)))
def test_the_code_is_as_the_page_says(reference):
    assert fault(reference) is None


@pytest.mark.parametrize("notation", [NAME, OPTION, VALUE])
def test_references_are_found(notation):
    assert any(notation.fullmatch(reference) for reference in REFERENCES)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("loses.py: pair_loss", "there is no"),
        ("reward_trainer/losses.py: pair_los", "losses.py defines no pair_los"),
        ("ppo_trainer/losses.py: Tensor", "losses.py defines no Tensor"),  # imported there
        ("ppo_trainer/trainer.py: step", "trainer.py defines no step"),
        ("ppo_trainer/trainer.py: PPOTrainer.stop", "defines no PPOTrainer.stop"),
        ("PPOConfg.kl_coef = 0.02", "this is none"),
        ("PPOConfig.kl_coef", "this is none"),  # without its default
        ("NoConfig.kl_coef = 0.02", "NoConfig has no kl_coef"),
        ("PPOConfig.kl_coeff = 0.02", "PPOConfig has no kl_coeff"),
        ("PPOConfig.kl_coef = 0.2", "it is 0.02 in the code"),
        ("PPOConfig.ptx_coef = False", "it is 0.0 in the code"),
        ("tiny/ppo.yml: kl_coef = 0.15", "this is none"),
        ("tiny/pppo.yaml: kl_coef = 0.15", "tiny/pppo.yaml sets no kl_coef"),
        ("tiny/ppo.yaml: kl_coef = 0.02", "it is 0.15 in the code"),
    ],
)
def test_a_wrong_reference_is_found(reference, message):
    assert message in str(fault(reference))


# docs/names.md: what is quoted in the column "here", metrics too; in the column behind it, where
# other libraries' names stand as well, what has one of the three notations.
NAMES = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
CELLS = [line.split(" | ") for line in NAMES.splitlines() if line.startswith("| `")]
OURS = [q for _, here, _ in CELLS for q in re.findall(r"`([^`]+)`", here)]
OURS += [
    q for *_, differs in CELLS for q in re.findall(r"`([^`]+)`", differs) if re.search(r"[:=] ", q)
]
METRIC = re.compile(r"(?:objective|policy|loss|val)/\w+")
CODE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl_instruct").rglob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_our_name_for_anothers_is_in_the_code(name):
    if METRIC.fullmatch(name):
        assert f'"{name}"' in CODE
    else:
        assert fault(name) is None


def test_the_names_that_people_look_for_are_on_the_page():
    assert len(CELLS) > 50 and len(OURS) > len(CELLS)
    sought = "Agent RewardModel create_reference_model RLHFTrainer.compute_loss PPOTrainer.step"
    sought += " AutoModelForCausalLMWithValueHead init_kl_coef ppo_epochs LengthSampler"
    left = " ".join(there for there, *_ in CELLS)
    assert [name for name in sought.split() if f"`{name}" not in left] == []


def test_every_name_that_is_refused_with_the_page_stands_on_it():
    """And none of them is an option of any stage."""
    refused = option_checks.refused_by("ppo")
    names = {name for name, reason in refused.items() if "docs/names.md" in reason}
    quoted = {word for q in re.findall(r"`([^`]+)`", NAMES) for word in re.findall(r"\w+", q)}
    kinds = [kind for kind in vars(configs).values() if dataclasses.is_dataclass(kind)]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(names) > 60
    assert names - quoted == set() == names & fields


def test_every_option_that_cites_the_paper_stands_on_the_page():
    stages = [configs.SFTConfig, configs.RewardConfig, configs.PPOConfig]
    cited = {
        f"{stage.__name__}.{field.name}"
        for stage in stages
        for field in dataclasses.fields(stage)
        if PLACE.search(str(field.metadata.get("help"))) and field.name in vars(stage)
    }
    assert len(cited) > 20
    assert cited <= {reference.partition(" = ")[0] for reference in REFERENCES}


PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]


def slugs(text: str) -> set[str]:
    """Names of a page's headings, as the site and the forges make them, and of its API entries."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain} | set(
        re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = []
    for link in links:
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (heading and heading not in slugs(target.read_text("utf-8"))):
            broken.append(link)
    assert broken == []


def test_the_readme_lists_the_package():
    """Folders and files below trl_instruct/, in at most 30 lines."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")
    (tree,) = (block for block in blocks if "\ntrl_instruct/\n" in block)
    inside = tree.partition("\ntrl_instruct/\n")[2].partition("\ntests/")[0]
    listed = re.findall(r"^  ([\w.]+/?) ", inside, re.MULTILINE)
    package = ROOT / "trl_instruct"
    there = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    there += [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    assert sorted(listed) == sorted(there)
    assert len(tree.splitlines()) <= 30
    stages = ("pretrain", "sft", "candidates", "rm", "ppo")
    assert "  ".join(stages) in inside
    assert all((package / "recipes" / f"{stage}.py").is_file() for stage in stages)
