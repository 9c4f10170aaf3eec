"""A stage's options from a YAML file and flags, and the help that lists them."""

import functools
import inspect
import re
import textwrap
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from trl_instruct.configs import CandidatesConfig, EvaluateConfig, StageConfig
from trl_instruct.errors import InputError, kind_of
from trl_instruct.option_checks import TABLES, check_refused
from trl_instruct.recipes import options
from trl_instruct.recipes.options import Config, field_types

LIBRARIES = {
    ModelConfig: "Model, LoRA, 8 and 4 bit (TRL's ModelConfig)",
    TrainingArguments: "Training (transformers' TrainingArguments)",
}
COLUMN, WIDTH = 38, 60  # where an option's help begins, and how much of it is shown


class OptionParser(TrlParser):
    """A command's parser; a stage's has the options of its config and of TRL's ModelConfig.

    Its help has a line for each of those that runs set, grouped by where they come from, with
    their defaults; with `whole`, all of them in full. A mistake is an InputError.
    """

    def __init__(
        self, config_class: type[StageConfig] | None = None, *, whole: bool = False, **about: Any
    ):
        self.whole, self.headings = whole, _headings(config_class, whole)
        self.grouped: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self.types = field_types(ModelConfig) | field_types(config_class) if config_class else {}
        if config_class:
            about["usage"] = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
        formatter = functools.partial(RawDescriptionHelpFormatter, max_help_position=COLUMN)
        about |= {"formatter_class": formatter, "allow_abbrev": False}  # a misspelt option is none
        super().__init__((config_class, ModelConfig) if config_class else (), **about)
        if config_class:
            self.add_argument("--help-all", action="help", help="Show all options, in full.")
            self.add_argument("--config", default=SUPPRESS, metavar="FILE", help="Them, as YAML.")
        for heading in dict.fromkeys(filter(None, self.headings.values())):
            group = self.add_argument_group(heading)
            for name, given in self.grouped[heading]:
                group.add_argument(name, **given)

    def add_argument(self, *names: Any, **given: Any) -> Any:
        """As argparse's, with the default in the help; a stage's option goes into its group."""
        name = given.get("dest", names[0].lstrip("-"))
        choices = "".join(map(str, given.get("choices", "")))
        if self.types and len(choices) > 24 and not self.whole:
            given["metavar"] = "NAME"
        elif names[0].startswith("-") and not choices and "action" not in given:
            kind = re.search(r"\b(bool|int|float)\b", str(self.types.get(name, given.get("type"))))
            given.setdefault("metavar", kind[0].upper() if kind else "TEXT")
        most = WIDTH if self.types and not self.whole else None
        if name == "dtype" and self.headings.get(name):
            given["default"] = None  # as in `resolve`
        if "help" in given:
            given["help"] = _described(given["help"] or "", given.get("default"), most)
        if name not in self.headings:
            return super().add_argument(*names, **given)
        if "dest" in given or not self.headings[name]:  # --no_..., or not to be listed
            return super().add_argument(names[0], **{**given, "help": SUPPRESS})
        return self.grouped.setdefault(self.headings[name], []).append((names[0], given))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options.")


def _headings(config_class: type[StageConfig] | None, whole: bool) -> dict[str, str]:
    """The heading of each option in the help, its class first; "" if it is not listed."""
    if config_class is None:
        return {}
    trains = config_class not in (CandidatesConfig, EvaluateConfig)
    shown = TABLES["shown" if trains else "shown_without_training"].split()
    own = [kind for kind in config_class.__mro__[:-1] if kind not in LIBRARIES]
    headings: dict[str, str] = dict.fromkeys(config_class.REFUSED, "")
    for kind in (*own, *LIBRARIES):
        ours = kind.__module__ == StageConfig.__module__
        title = str(kind.__doc__).partition("\n")[0] if ours else f"TRL's {kind.__name__}"
        for name in inspect.get_annotations(kind):
            if ours or kind in LIBRARIES or name not in inspect.get_annotations(TrainingArguments):
                rare = name not in shown if kind in LIBRARIES else name in TABLES["rare"].split()
                hidden = rare and not whole
                headings.setdefault(name, "" if hidden else LIBRARIES.get(kind, title.rstrip(".")))
    return headings


def _described(text: str, default: Any, most: int | None) -> str:
    """The help of an option with its default behind it; at most so many characters, if it can."""
    text, end = " ".join(text.split()), ""
    if default not in (None, "", [], SUPPRESS):
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        text, end = text.rstrip("."), f" [{shown.replace('%', '%%')}]"
    if most is not None and len(text + end) > most:
        first = re.split(r"(?<!e\.g)(?<!i\.e)[.;]\s(?![^(]*\))", text, maxsplit=1)[0]
        text = textwrap.shorten(first, most - len(end), placeholder=" ...")
    return text + end


def parse(
    config_class: type[Config], arguments: list[str], **about: Any
) -> tuple[Config, ModelConfig]:
    """A stage's options from `--config FILE` and flags (flags win); unknown ones are an error."""
    arguments = [part for argument in arguments for part in _spelt(argument)]
    if "--config" in arguments:
        _check_file(arguments[arguments.index("--config") + 1 :], config_class)
    parser = OptionParser(config_class, whole="--help-all" in arguments, **about)
    try:
        with options.option_errors():
            config, model_config, unknown = parser.parse_args_and_config(
                arguments, return_remaining_strings=True
            )
    except InputError as error:
        raise InputError(_named(str(error), arguments)) from error
    names = [s.lstrip("-").split("=")[0] for s in unknown if s.startswith("--")]
    options.check_names(names, config_class)
    check_refused(config_class.REFUSED, model_config)
    if unknown:
        raise InputError(f"Arguments that belong to no option: {' '.join(unknown)}.")
    return config, model_config


def _spelt(argument: str) -> list[str]:
    """An argument with its option spelt as in YAML; --config=FILE in two parts."""
    match = re.fullmatch(r"--(?!help-all)(\w[\w-]*)(=.*)?", argument, re.DOTALL)
    if match is None:
        return [argument]
    name, value = f"--{match[1].replace('-', '_')}", match[2] or ""
    return [name, value[1:]] if name == "--config" and value else [name + value]


def _named(told: str, arguments: list[str]) -> str:
    """A message that names no option: with the one in front whose value it shows."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    flags = {value: flag[2:] for flag, value in pairwise(words) if flag.startswith("--")}
    about = [flag for value, flag in flags.items() if repr(value) in told]
    return f"{about[0]}: {told}" if about and not any(f in told for f in flags.values()) else told


def _check_file(following: list[str], config_class: type[StageConfig]) -> None:
    """Check the options of the YAML file that follows --config."""
    path = Path(following[0]) if following else None
    if path is None or not path.is_file():
        raise InputError(f"--config needs a YAML file; {str(path or 'nothing')!r} was given.")
    if "--config" in following:
        raise InputError("--config was given twice; give one file, and flags for the rest.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} holds {kind_of(given)}; lines of `option: value` are needed.")
    given.pop("env", None)  # environment variables, which TrlParser sets
    options.check_names(given, config_class, f"{path}: ")
    # The parser reads text, as from a flag: 1e-5 is text in YAML.
    typed = {name: value for name, value in given.items() if not isinstance(value, str)}
    options.check_types(typed, config_class, f"{path}: ")
