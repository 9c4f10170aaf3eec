"""The command line: YAML and flags through TrlParser into the same calls Python users make.

`trl-instruct sft --config sft.yaml --learning_rate 1e-5`; recipes/*.py are the same commands in a
clone, for `accelerate launch`.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl import ModelConfig, TrlParser

from trl_instruct.candidates import sample_candidates
from trl_instruct.configs import (
    CandidatesConfig,
    Config,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    check_known,
)
from trl_instruct.errors import InputError
from trl_instruct.pretraining import pretrain
from trl_instruct.quiet import silence_harmless_warnings
from trl_instruct.recipes import load_reward, ppo, rm, sft
from trl_instruct.stage import stage
from trl_instruct.summary import compare


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage that the first argument names; a user's mistake ends in one line, exit 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name not in COMMANDS:
        print(f"usage: trl-instruct {{{','.join(COMMANDS)}}} [--config FILE] [--option value ...]")
        print("       trl-instruct <stage> --help lists the options of a stage.")
        sys.exit(0 if name in ("-h", "--help") else 2)
    silence_harmless_warnings()
    try:
        COMMANDS[name](arguments)
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(config_class: type[Config], arguments: list[str]) -> tuple[Config, ModelConfig]:
    """A stage's options from `--config FILE` and flags, which win; an unknown one is an error."""
    if "--config" in arguments:
        index = arguments.index("--config") + 1
        if index >= len(arguments) or not Path(arguments[index]).is_file():
            given = arguments[index] if index < len(arguments) else "nothing"
            raise InputError(f"--config needs a YAML file; given was {given!r}.")
    # Abbreviations would turn a misspelt option into another one.
    parser = TrlParser((config_class, ModelConfig), allow_abbrev=False)
    config, model_config, *unknown = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = {
        field.name for kind in (config_class, ModelConfig) for field in dataclasses.fields(kind)
    }
    for strings in unknown:
        names = [s.lstrip("-").split("=")[0] for s in strings if s.startswith("--")]
        check_known([name.replace("-", "_") for name in names], known, config_class.__name__)
        if strings:
            raise InputError(f"Arguments that belong to no option: {' '.join(strings)}.")
    return config, model_config


def pretrain_command(arguments: list[str]) -> None:
    """Stage 0."""
    config, _ = parse(PretrainConfig, arguments)
    print(f"base model: {pretrain(config.dataset_name, config=config)}")


def sft_command(arguments: list[str]) -> None:
    """Stage 1."""
    config, model_config = parse(SFTConfig, arguments)
    model = model_config.model_name_or_path
    result = sft(model, config.dataset_name, config=config, model_config=model_config)
    print(f"policy: {result}")


def candidates_command(arguments: list[str]) -> None:
    """Between stages 1 and 2: train.jsonl, and test.jsonl where there is an eval dataset."""
    config, model_config = parse(CandidatesConfig, arguments)
    sources = {"train": config.dataset_name, "test": config.eval_dataset_name}
    with stage("candidates", config, model_config) as run:
        metrics = {
            name: sample_candidates(
                model_config.model_name_or_path,
                source,
                run.folder / f"{name}.jsonl",
                num_candidates=config.num_candidates,
                response_length=config.response_length,
                temperature=config.temperature,
                gold=load_reward(config.gold) if config.gold else None,
                seed=config.seed,
                batch_size=config.per_device_eval_batch_size,
            )
            for name, source in sources.items()
            if source
        }
        for name, counts in metrics.items():
            told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
            run.say(f"{run.folder / name}.jsonl: {told}")
        run.write_metrics(metrics)


def rm_command(arguments: list[str]) -> None:
    """Stage 2."""
    config, model_config = parse(RewardConfig, arguments)
    model = model_config.model_name_or_path
    result = rm(model, config.dataset_name, config=config, model_config=model_config)
    accuracy = result.metrics.get("accuracy")
    measured = f" (pair accuracy {accuracy:.3f} on held-out prompts)" if accuracy else ""
    print(f"reward model: {result}{measured}")


def ppo_command(arguments: list[str]) -> None:
    """Stage 3, and the comparison with what it started from."""
    config, model_config = parse(PPOConfig, arguments)
    model, reward = model_config.model_name_or_path, config.reward_model_path
    if reward is None:
        raise InputError("ppo needs reward_model_path: a reward model's folder or Hub id.")
    result = ppo(model, reward, config.dataset_name, config=config, model_config=model_config)
    print(f"policy: {result}")
    if config.eval_dataset_name:
        compare(result)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "pretrain": pretrain_command,
    "sft": sft_command,
    "candidates": candidates_command,
    "rm": rm_command,
    "ppo": ppo_command,
}
