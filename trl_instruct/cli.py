"""The command line: TrlParser turns YAML and flags into the calls that Python users make."""

import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig

import trl_instruct
from trl_instruct import configs
from trl_instruct.console import say
from trl_instruct.data.exports import FORMATS, export
from trl_instruct.data.preferences import load_either
from trl_instruct.data.reading import Reading
from trl_instruct.diagnosis.page import read_evaluation, report, summary_lines
from trl_instruct.errors import InputError, harmless, needs_extra, refusal
from trl_instruct.evaluation.compare import compare
from trl_instruct.evaluation.evaluate import evaluate
from trl_instruct.models.load import merge
from trl_instruct.option_checks import TABLES
from trl_instruct.recipes.candidates import candidates
from trl_instruct.recipes.chain import read_chain
from trl_instruct.recipes.flags import OptionParser, parse
from trl_instruct.recipes.init import init, recipe_names
from trl_instruct.recipes.members import average
from trl_instruct.recipes.options import named_sources
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.pretrain import pretrain
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.recipes.stage import StageResult
from trl_instruct.rewards.function import place_on, reward_name
from trl_instruct.rewards.http import LOOPBACK, MOST_REQUEST_BYTES, TOKEN_VARIABLE
from trl_instruct.rewards.load import load_reward


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command named first; a mistake ends in one line and exit 2, Ctrl-C in exit 130."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    name = "trl-instruct"
    try:
        name = _named_command(arguments)
        COMMANDS[name](arguments[1:])
    except (InputError, FloatingPointError) as error:
        say(f"{name}: error: {harmless(' '.join(str(error).split()), 1000)}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        say(f"\n{name}: {'; '.join(['interrupted', *interrupt.args])}", sys.stderr)
        sys.exit(130)
    except Exception as error:
        if refused := refusal(error):
            say(f"{name}: error: {harmless(refused, 400)}", sys.stderr)
            sys.exit(2)
        say(harmless(traceback.format_exc()), sys.stderr)
        sys.exit(1)


def _named_command(arguments: list[str]) -> str:
    """The command that the first argument names. It parses its own options."""
    completing = arguments[0].startswith("--print-completion")
    parser = OptionParser(prog="trl-instruct", description=trl_instruct.__doc__)
    parser.epilog = "trl-instruct COMMAND --help lists the options of a command."
    version = trl_instruct.__version__ if "--version" in arguments else ""  # a clone needs none
    parser.add_argument("--version", action="version", version=version)
    if completing:
        import shtab

        shtab.add_argument_to(parser)
    else:
        parser.add_argument("--print-completion", metavar="SHELL", help="Of bash, zsh or tcsh.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        whole = {"parents": [parser_of(name, whole=True)], "add_help": False} if completing else {}
        commands.add_parser(name, help=_about(name)["description"], **whole)
    return parser.parse_args(arguments if completing else arguments[:1]).command


def _about(name: str) -> dict[str, str]:
    """How help describes a command: by its docstring, and an example behind the options."""
    example = f"example:\n{TABLES['examples'][name]}" if name in TABLES["examples"] else ""
    return {"description": str(COMMANDS[name].__doc__), "epilog": example}


def parser_of(name: str, **how: Any) -> OptionParser:
    """The parser of a command; `how` as for an OptionParser."""
    options: Any = OPTIONS.get(name, partial(_add_listed, name=name))
    about: dict[str, Any] = {"prog": f"trl-instruct {name}", **_about(name), **how}
    if isinstance(options, type):
        return OptionParser(options, **about)
    parser = OptionParser(**about)
    options(parser)
    return parser


def _add_listed(parser: ArgumentParser, name: str) -> None:
    """Add the arguments that options.yaml lists for a command."""
    words = {"LOOPBACK": LOOPBACK, "MOST_BYTES": MOST_REQUEST_BYTES, "TOKEN": TOKEN_VARIABLE}
    words |= {"FORMATS": " ".join(FORMATS), "RECIPES": ", ".join(recipe_names())}
    kinds = {"int": int, "float": float, "Path": Path}
    parser.set_defaults(**TABLES["defaults"].get(name, {}))
    for argument, listed in TABLES["commands"][name].items():
        given = {k: v.format(**words) if isinstance(v, str) else v for k, v in listed.items()}
        kind, choices = kinds.get(str(given.get("type"))), given.get("choices", "").split()
        found = {"type": kind, "choices": choices}
        parser.add_argument(argument, **given | {k: v for k, v in found.items() if v})


def _parse(name: str, arguments: list[str], stage: str = "") -> Any:
    """The options of a command; of one that has a config, that and TRL's ModelConfig."""
    options = OPTIONS.get(stage or name)
    if not isinstance(options, type):
        return parser_of(name).parse_args(arguments)
    return parse(options, arguments, prog=f"trl-instruct {name} {stage}", **_about(stage or name))


def init_command(arguments: list[str]) -> None:
    """Write a recipe of your own to start from, with comments."""
    for path in init(**vars(_parse("init", arguments))):
        say(str(path))


def pretrain_command(arguments: list[str]) -> None:
    """Stage 0: a tokenizer and a small base model from scratch."""
    config, _ = _parse("pretrain", arguments)
    _tell(f"base model: {pretrain(config.dataset_name, config=config)}")


def sft_command(arguments: list[str]) -> None:
    """Stage 1: fine-tune a model on demonstrations."""
    _tell_diagnosis("sft", _run("sft", *_parse("sft", arguments)))


def _run(name: str, config: Any, model_config: ModelConfig) -> StageResult:
    """Run sft, rm or ppo on the model, the reward and the data that the options name."""
    sources = [model_config.model_name_or_path, config.dataset_name]
    if isinstance(config, configs.PPOConfig):
        if config.reward_model_path is None:
            raise InputError("ppo needs reward_model_path: a reward model's folder or Hub id.")
        sources.insert(1, config.reward_model_path)
    result = STAGES[name](*sources, config=config, model_config=model_config)
    if config.faults is None:
        made = " ".join(result.metrics.get("members") or [str(result)])
        _tell(f"{'reward model' if name == 'rm' else 'policy'}: {made}")
    return result


def candidates_command(arguments: list[str]) -> None:
    """Between 1 and 2: sample completions for a labeler to rank."""
    candidates(*_parse("candidates", arguments))


def _tell(message: str) -> None:
    """Print a line for the user, from the main process."""
    if PartialState().is_main_process:
        say(message)


def serve_reward_command(arguments: list[str]) -> None:
    """Serve a reward over HTTP until interrupted."""
    options = _parse("serve-reward", arguments)
    from trl_instruct.rewards.server import RewardServer

    named = options.reward_model_path
    reward = load_reward(
        named if len(named) > 1 else named[0],
        weights=options.reward_weights,
        combine=options.combine,
        combine_beta=options.combine_beta,
        model_config=ModelConfig(dtype=options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    place_on(reward, PartialState().device)
    where = {"host": options.host, "port": options.port, "max_bytes": options.max_bytes}
    with RewardServer(reward, token=os.environ.get(TOKEN_VARIABLE), **where) as server:
        _tell(f"scores of {reward_name(reward)}: {server.url}")
        server.serve_forever()


def export_command(arguments: list[str]) -> None:
    """Write rankings as records, pairs, or for labelling tools."""
    options = _parse("export", arguments)
    given = options.dataset_name, options.dataset_train_split, Reading.of(options)
    _tell(export(load_either(*given), options.output_file, options.to))


def report_command(arguments: list[str]) -> None:
    """Write one page on finished stages: what is at fault?"""
    options = _parse("report", arguments)
    path = report(**vars(options))
    for line in summary_lines(read_chain(options.folder), read_evaluation(options.evaluation)):
        say(line)
    say(f"report: {path}")


def _tell_diagnosis(name: str, folder: StageResult | Path) -> None:
    """Print the stage's diagnosis, and write the report on all stages so far."""
    if PartialState().is_main_process:
        for line in summary_lines({name: read_chain(folder)[name]}):
            say(line)
        say(f"report: {report(folder)}")


def rm_command(arguments: list[str]) -> None:
    """Stage 2: train a reward model from rankings or pairs."""
    result = _run("rm", *_parse("rm", arguments))
    for folder in map(Path, result.metrics.get("members", [result])):
        _tell_diagnosis("rm", folder)


def ppo_command(arguments: list[str]) -> None:
    """Stage 3: optimise a policy against a reward with PPO."""
    config, model_config = _parse("ppo", arguments)
    result = _run("ppo", config, model_config)
    if (config.eval_dataset_name or config.dataset_test_split) and PartialState().is_main_process:
        compare(
            result,
            reward=config.reward_model_path,
            gold=config.gold,
            eval_dataset=config.eval_dataset_name or config.dataset_name,
            summary_file=config.summary_file,
            trust_remote_code=config.trust_remote_code,
        )
    _tell_diagnosis("ppo", result)


def check_command(arguments: list[str]) -> None:
    """Dry run of sft, rm or ppo: list every fault, train nothing."""
    stage = _parse("check", arguments[:1]).stage
    config, model_config = _parse("check", arguments[1:], stage)
    config.faults = []
    try:
        _run(stage, config, model_config)
    except InputError as fault:
        config.faults.append(str(fault))
    for number, text in enumerate(config.faults, start=1):
        _tell(f"fault {number}: {' '.join(text.split())}")
    _tell(f"check: {len(config.faults) or 'no'} fault{'' if len(config.faults) == 1 else 's'}")
    if config.faults:
        sys.exit(2)


def _add_check_options(parser: ArgumentParser) -> None:
    stages = parser.add_subparsers(dest="stage", metavar="stage", required=True)
    for stage in STAGES:
        own = parser_of(stage, whole=True)
        stages.add_parser(stage, help=own.description, parents=[own], add_help=False)


def evaluate_command(arguments: list[str]) -> None:
    """Measure checkpoints side by side on held-out prompts."""
    config, model_config = _parse("evaluate", arguments)
    models = named_sources(config.models or [], "models")
    judges = named_sources(config.judges or [], "judges")
    evaluate(models, config.dataset_name, judges=judges, config=config, model_config=model_config)


def merge_command(arguments: list[str]) -> None:
    """Merge a LoRA adapter into its base."""
    _tell(f"merged: {merge(**vars(_parse('merge', arguments)))}")


def average_command(arguments: list[str]) -> None:
    """Average the weights of reward models into one (WARM)."""
    _tell(f"reward model: {average(**vars(_parse('average', arguments)))}")


def label_command(arguments: list[str]) -> None:
    """Open a page on which people rank or compare answers."""
    options = _parse("label", arguments)
    with needs_extra("label"):
        from trl_instruct.labels.command import label
    label(options)


STAGES: dict[str, Callable[..., StageResult]] = {"sft": sft, "rm": rm, "ppo": ppo}
COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    command.__name__.removesuffix("_command").replace("_", "-"): command
    for command in (
        *(init_command, pretrain_command, sft_command, candidates_command, label_command),
        *(rm_command, ppo_command, check_command, evaluate_command, report_command),
        *(export_command, merge_command, average_command, serve_reward_command),
    )
}
# What a command reads: a config with TRL's ModelConfig, or what a function adds to its parser; of
# the others, `commands` in options.yaml tells it.
OPTIONS: dict[str, Any] = {
    "pretrain": configs.PretrainConfig,
    "candidates": configs.CandidatesConfig,
    "sft": configs.SFTConfig,
    "rm": configs.RewardConfig,
    "ppo": configs.PPOConfig,
    "check": _add_check_options,
    "evaluate": configs.EvaluateConfig,
}
