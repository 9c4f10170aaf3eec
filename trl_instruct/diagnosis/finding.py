"""A finding about a stage. Its words are in findings.yaml, its check in `stages` or `ppo`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("findings.yaml").read_text(encoding="utf-8"))
# Thresholds of each stage by name.
LIMITS = {stage: SimpleNamespace(**limits) for stage, limits in WORDS.pop("limits").items()}


class Finding(NamedTuple):
    """One finding about a stage.

    told: the finding; figure: the evidence; advice: what to do; threshold: what the figure was
    compared with. level: "fault", "fine" (worth knowing), or "unknown" (it was not measured).
    """

    stage: str
    name: str
    told: str
    figure: str
    advice: str
    threshold: str = ""
    level: Literal["fault", "fine", "unknown"] = "fault"


def found(stage: str, name: str, **given: Any) -> Finding:
    """The finding of that name, its words filled with the thresholds and what was measured."""
    given |= vars(LIMITS[stage])
    return Finding(stage, name, **{k: v.format(**given) for k, v in WORDS[stage][name].items()})
