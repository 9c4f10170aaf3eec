"""The command line: TrlParser turns YAML and flags into the calls that Python users make.

`trl-instruct sft --config sft.yaml --learning_rate 1e-5`; recipes/*.py are the same commands in a
clone, for `accelerate launch`.
"""

import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate import PartialState
from trl import ModelConfig, TrlParser

from trl_instruct import configs
from trl_instruct.console import say
from trl_instruct.data.exports import FORMATS, export
from trl_instruct.data.preferences import load_either
from trl_instruct.data.reading import Reading
from trl_instruct.diagnosis.page import read_evaluation, report, summary_lines
from trl_instruct.errors import InputError, harmless, kind_of, needs_extra, refusal
from trl_instruct.evaluation.compare import compare
from trl_instruct.evaluation.evaluate import evaluate
from trl_instruct.models.load import merge
from trl_instruct.option_checks import check_refused
from trl_instruct.recipes.candidates import candidates
from trl_instruct.recipes.chain import read_chain
from trl_instruct.recipes.init import init, recipe_names
from trl_instruct.recipes.options import (
    Config,
    check_names,
    check_types,
    named_sources,
    option_errors,
)
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.pretrain import pretrain
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft
from trl_instruct.recipes.stage import StageResult
from trl_instruct.rewards.function import place_on, reward_name
from trl_instruct.rewards.http import TOKEN_VARIABLE
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.server import LOOPBACK, MOST_BYTES, RewardServer


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command named first; a mistake ends in one line and exit 2, Ctrl-C in exit 130."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    name = "trl-instruct"
    try:
        name = _named_command(arguments[:1])
        COMMANDS[name](arguments[1:])
    except (InputError, FloatingPointError) as error:
        say(f"{name}: error: {harmless(' '.join(str(error).split()), 1000)}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"\n{name}: interrupted", sys.stderr)
        sys.exit(130)
    except Exception as error:
        if refused := refusal(error):
            say(f"{name}: error: {harmless(refused, 400)}", sys.stderr)
            sys.exit(2)
        say(harmless(traceback.format_exc()), sys.stderr)
        sys.exit(1)


def _named_command(arguments: list[str]) -> str:
    """The command that the first argument names. It parses its own options."""
    parser = _Parser(prog="trl-instruct", description="InstructGPT in three stages: sft, rm, ppo.")
    parser.epilog = "trl-instruct COMMAND --help lists the options of a command."
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=str(command.__doc__).splitlines()[0])
    return parser.parse_args(arguments).command


class _Parser(TrlParser):
    """TrlParser that raises InputError instead of printing the usage of 150 options."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options.")


def parse(config_class: type[Config], arguments: list[str]) -> tuple[Config, ModelConfig]:
    """A stage's options from `--config FILE` and flags (flags win); unknown ones are an error."""
    split = (a.split("=", 1) if a.startswith("--config=") else [a] for a in arguments)
    arguments = [part for parts in split for part in parts]
    if "--config" in arguments:
        _check_file(arguments[arguments.index("--config") + 1 :], config_class)
    # Abbreviations would turn a misspelt option into another one.
    parser = _Parser((config_class, ModelConfig), allow_abbrev=False)
    try:
        with option_errors():
            config, model_config, unknown = parser.parse_args_and_config(
                arguments, return_remaining_strings=True
            )
    except InputError as error:
        raise InputError(_named(str(error), arguments)) from error
    names = [s.lstrip("-").split("=")[0].replace("-", "_") for s in unknown if s.startswith("--")]
    check_names(names, config_class)
    check_refused(config_class.REFUSED, model_config)
    if unknown:
        raise InputError(f"Arguments that belong to no option: {' '.join(unknown)}.")
    return config, model_config


def _named(told: str, arguments: list[str]) -> str:
    """A message that names no option: with the one in front whose value it shows."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    flags = {value: flag[2:] for flag, value in pairwise(words) if flag.startswith("--")}
    about = [flag for value, flag in flags.items() if repr(value) in told]
    return f"{about[0]}: {told}" if about and not any(f in told for f in flags.values()) else told


def _check_file(following: list[str], config_class: type[Config]) -> None:
    """Check the options of the YAML file that follows --config."""
    path = Path(following[0]) if following else None
    if path is None or not path.is_file():
        raise InputError(f"--config needs a YAML file; {str(path or 'nothing')!r} was given.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} holds {kind_of(options)}; lines of `option: value` are needed.")
    options.pop("env", None)  # environment variables, which TrlParser sets
    check_names(options, config_class, f"{path}: ")
    # The parser reads text, as from a flag: 1e-5 is text in YAML.
    typed = {name: value for name, value in options.items() if not isinstance(value, str)}
    check_types(typed, config_class, f"{path}: ")


def init_command(arguments: list[str]) -> None:
    """Write a recipe of your own to start from: recipes/configs/NAME, with comments."""
    parser = _Parser([], prog="trl-instruct init", allow_abbrev=False)
    parser.add_argument("name", help="Its name, and that of its folder.")
    copied = f"The recipe to copy: {', '.join(recipe_names())} (%(default)s)."
    parser.add_argument("--like", default="start", help=copied)
    for path in init(**vars(parser.parse_args(arguments))):
        say(str(path))


def pretrain_command(arguments: list[str]) -> None:
    """Stage 0: a tokenizer and a small base model from scratch, on any text."""
    config, _ = parse(configs.PretrainConfig, arguments)
    _tell(f"base model: {pretrain(config.dataset_name, config=config)}")


def sft_command(arguments: list[str]) -> None:
    """Stage 1: fine-tune a model on demonstrations."""
    _tell_diagnosis("sft", _run("sft", *parse(configs.SFTConfig, arguments)))


def _run(name: str, config: Any, model_config: ModelConfig) -> StageResult:
    """Run sft, rm or ppo on the model, the reward and the data that the options name."""
    sources = [model_config.model_name_or_path, config.dataset_name]
    if isinstance(config, configs.PPOConfig):
        if config.reward_model_path is None:
            raise InputError("ppo needs reward_model_path: a reward model's folder or Hub id.")
        sources.insert(1, config.reward_model_path)
    result = STAGES[name][0](*sources, config=config, model_config=model_config)
    if config.faults is None:
        _tell(f"{'reward model' if name == 'rm' else 'policy'}: {result}")
    return result


def candidates_command(arguments: list[str]) -> None:
    """Between 1 and 2: sample completions of each prompt, for a labeler to rank."""
    candidates(*parse(configs.CandidatesConfig, arguments))


def _tell(message: str) -> None:
    """Print a line for the user, from the main process."""
    if PartialState().is_main_process:
        say(message)


def serve_reward_command(arguments: list[str]) -> None:
    """Serve a reward over HTTP until interrupted."""
    parser = _Parser([], prog="trl-instruct serve-reward", allow_abbrev=False)
    parser.add_argument("--reward_model_path", nargs="+", required=True, help="As in `ppo`.")
    parser.add_argument("--reward_weights", nargs="+", type=float, help="As in `ppo`.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code from the Hub.")
    _add_dtype(parser)
    parser.add_argument("--host", default=LOOPBACK, help="Address (%(default)s).")
    parser.add_argument("--port", type=int, default=8000, help="Its port (%(default)s).")
    parser.add_argument(
        "--max_bytes", type=int, default=MOST_BYTES, help="Largest request (%(default)s)."
    )
    parser.epilog = f"With {TOKEN_VARIABLE} in the environment, requests must carry that token."
    options = parser.parse_args(arguments)
    named = options.reward_model_path
    reward = load_reward(
        named if len(named) > 1 else named[0],
        weights=options.reward_weights,
        model_config=ModelConfig(dtype=options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    place_on(reward, PartialState().device)
    where = {"host": options.host, "port": options.port, "max_bytes": options.max_bytes}
    with RewardServer(reward, token=os.environ.get(TOKEN_VARIABLE), **where) as server:
        _tell(f"scores of {reward_name(reward)}: {server.url}")
        server.serve_forever()


def _add_dtype(parser: ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", help="Weights' dtype (%(default)s).")


def export_command(arguments: list[str]) -> None:
    """Write rankings as records or pairs, or for Label Studio or Argilla."""
    parser = _Parser([], prog="trl-instruct export", allow_abbrev=False)
    parser.add_argument("dataset_name", help="Rankings or pairs, as `rm` reads them.")
    parser.add_argument("output_file", type=Path, help="A new file, .jsonl or for a tool .json.")
    parser.add_argument("--to", choices=FORMATS, required=True, help="What it holds.")
    parser.add_argument("--dataset_train_split", default="train", help="Its split (%(default)s).")
    parser.add_argument("--columns", nargs="+", help="As in `rm`.")
    parser.add_argument("--rating_order", nargs="+", help="As in `rm`.")
    unused = {"prompt_template": None, "prompt_suffix": None, "faults": None}
    parser.set_defaults(on_bad_record="error", remembered=False, **unused)
    options = parser.parse_args(arguments)
    given = options.dataset_name, options.dataset_train_split, Reading.of(options)
    _tell(export(load_either(*given, options.rating_order), options.output_file, options.to))


def report_command(arguments: list[str]) -> None:
    """Write one page on a finished stage and those it came from: what is at fault?"""
    parser = _Parser([], prog="trl-instruct report", allow_abbrev=False)
    parser.add_argument("folder", help="Result of sft, rm or ppo.")
    parser.add_argument("--evaluation", help="The JSON that evaluate saved.")
    parser.add_argument("--comparisons", help="The store that label --models filled.")
    parser.add_argument("--output_file", help="Default: report.html in the folder.")
    options = parser.parse_args(arguments)
    path = report(**vars(options))
    evaluation = read_evaluation(options.evaluation)
    for line in summary_lines(read_chain(options.folder), evaluation):
        say(line)
    say(f"report: {path}")


def _tell_diagnosis(name: str, folder: StageResult) -> None:
    """Print the stage's diagnosis, and write the report on all stages so far."""
    if PartialState().is_main_process:
        for line in summary_lines({name: read_chain(folder)[name]}):
            say(line)
        say(f"report: {report(folder)}")


def rm_command(arguments: list[str]) -> None:
    """Stage 2: train a reward model from rankings or pairs."""
    _tell_diagnosis("rm", _run("rm", *parse(configs.RewardConfig, arguments)))


def ppo_command(arguments: list[str]) -> None:
    """Stage 3: optimise a policy against a reward with PPO, and compare it with its start."""
    config, model_config = parse(configs.PPOConfig, arguments)
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
    """Dry run of sft, rm or ppo: read all that it would read, list every fault, train nothing."""
    if not arguments or arguments[0] not in STAGES:
        parser = _Parser([], prog="trl-instruct check", allow_abbrev=False)
        parser.add_argument("stage", choices=STAGES, help="Then its own options.")
        parser.epilog = "trl-instruct check sft --config sft.yaml --learning_rate 1e-5"
        parser.parse_args(arguments)
    config, model_config = parse(STAGES[arguments[0]][1], arguments[1:])
    config.faults = []
    try:
        _run(arguments[0], config, model_config)
    except InputError as fault:
        config.faults.append(str(fault))
    for number, text in enumerate(config.faults, start=1):
        _tell(f"fault {number}: {' '.join(text.split())}")
    _tell(f"check: {len(config.faults) or 'no'} fault{'' if len(config.faults) == 1 else 's'}")
    if config.faults:
        sys.exit(2)


def evaluate_command(arguments: list[str]) -> None:
    """Measure checkpoints side by side on held-out prompts."""
    config, model_config = parse(configs.EvaluateConfig, arguments)
    models = named_sources(config.models or [], "models")
    judges = named_sources(config.judges or [], "judges")
    evaluate(models, config.dataset_name, judges=judges, config=config, model_config=model_config)


def merge_command(arguments: list[str]) -> None:
    """Merge a LoRA adapter into its base."""
    parser = _Parser([], prog="trl-instruct merge", allow_abbrev=False)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("output_dir", help="A new folder for the merged model.")
    _add_dtype(parser)
    options = parser.parse_args(arguments)
    _tell(f"merged: {merge(options.adapter, options.output_dir, dtype=options.dtype)}")


def label_command(arguments: list[str]) -> None:
    """Open a page on which people rank candidates, or compare checkpoints blindly."""
    with needs_extra("label"):
        from trl_instruct.labels.command import add_options, label
    parser = _Parser([], prog="trl-instruct label", allow_abbrev=False)
    add_options(parser)
    label(parser.parse_args(arguments))


STAGES: dict[str, Any] = {
    "sft": (sft, configs.SFTConfig),
    "rm": (rm, configs.RewardConfig),
    "ppo": (ppo, configs.PPOConfig),
}
COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "init": init_command,
    "pretrain": pretrain_command,
    "sft": sft_command,
    "candidates": candidates_command,
    "label": label_command,
    "rm": rm_command,
    "ppo": ppo_command,
    "check": check_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "export": export_command,
    "merge": merge_command,
    "serve-reward": serve_reward_command,
}
