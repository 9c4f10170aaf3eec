"""benchmarks/mutations.py: its list keeps to the code; `make mutate` runs it."""

import importlib.util
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_mutation_is_of_one_line_that_exists_and_names_tests_that_do():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks/mutations.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for file, tests, changes in script.MUTATIONS:
        source = (ROOT / "trl_instruct" / file).read_text(encoding="utf-8")
        assert all(script.mutated(source, old, new, file) != source for old, new in changes)
        named = [word.partition("::")[0] for word in shlex.split(tests) if ".py" in word]
        assert named and all((ROOT / "tests" / name).is_file() for name in named), tests
