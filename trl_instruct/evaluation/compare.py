"""What the stages achieved: base, SFT and PPO side by side on held-out prompts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig, PPOConfig
from trl_instruct.console import one_line, say, table
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import prompts_of
from trl_instruct.errors import InputError, located
from trl_instruct.evaluation.evaluate import measured_evaluation
from trl_instruct.evaluation.measurement import Subject
from trl_instruct.files import CONFIG_FILE, list_too, write_json
from trl_instruct.intervals import show_interval
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.option_checks import TABLES
from trl_instruct.recipes.chain import FinishedStage, check_format, read_chain
from trl_instruct.recipes.options import resolve
from trl_instruct.rewards.function import reward_name
from trl_instruct.rewards.load import is_address, is_python, load_reward

SHOWN_SAMPLES = 5


def compare(
    policy: str | os.PathLike,
    *,
    reward: Any = None,
    gold: Any = None,
    eval_dataset: Any = None,
    summary_file: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a PPO policy beside the models it came from; print the table and save it.

    The stages' configs name the SFT policy, its base model, the reward model and the rankings. They
    may come from elsewhere: code, addresses, and files outside their folders must be passed.

    Args:
        policy: output folder of `ppo`.
        reward, gold: as passed to `ppo`; default: the models that its config names.
        eval_dataset: held-out prompts, named as in `ppo`; default: those that its config names, on
            the Hub, of the tiny world, or in the folder of a stage.
        summary_file: where to save the summary; default: summary.json in the folder.
        trust_remote_code: whether models from the Hub may run their own code.

    Returns:
        The summary as saved: per model each score's mean and 95 % interval, KL, length, share
        ended; accuracy and ceiling of the reward model; seconds per stage; samples.

    Raises:
        InputError: the config does not say what to compare, or what it says must be passed.
    """
    chain = read_chain(policy)
    if "ppo" not in chain:
        raise InputError(f"{os.fspath(policy)!r} holds no policy trained by `ppo`.")
    passed = {"reward_model_path": reward, "gold": gold, "eval_dataset_name": eval_dataset}
    folder, config, sft = chain["ppo"].folder, *_options(chain, passed)
    base = chain["sft"].config.get("model_name_or_path") if "sft" in chain else None
    paths = {"base": base, "sft": sft, "ppo": folder}
    models: dict[str, Any] = {n: path for n, path in paths.items() if isinstance(path, str | Path)}
    trust: Any = {"trust_remote_code": trust_remote_code}
    together = {"combine": config.combine, "combine_beta": config.combine_beta, **trust}
    together["weights"] = config.reward_weights
    rewards = {"rm": load_reward(config.reward_model_path, **together)}
    if config.gold is not None:
        rewards["gold"] = load_reward(config.gold, **trust)
    tokenizer = load_tokenizer(folder, **trust)
    data = config.eval_dataset_name, config.dataset_test_split or "train", tokenizer
    same = ("response_length", "max_prompt_length", "stop_strings", "temperature", "seed")
    options = {name: getattr(config, name) for name in same} | trust
    size = config.local_rollout_forward_batch_size
    how = EvaluateConfig(reference="sft", per_device_eval_batch_size=size, **options)
    prompts = prompts_of(*data, config.opening_length, Reading.of(config, strict=False))
    check_format(prompts, tokenizer, policy=sft)
    tokenizers = dict.fromkeys(models, tokenizer)
    subject = Subject(how, ModelConfig(), models, tokenizers, prompts, one_seed=True)
    summary = _summary(chain, measured_evaluation(subject, rewards))
    if not PartialState().is_main_process:  # it had its share of the work
        return summary
    path = Path(summary_file or folder / "summary.json")
    write_json(path, summary)
    list_too(path)
    say(render(summary))
    say(f"\nSummary: {path}   policy: {folder}   reward model: {reward_name(rewards['rm'])}")
    return summary


def _options(chain: Mapping[str, FinishedStage], passed: dict[str, Any]) -> tuple[PPOConfig, str]:
    """The options of `ppo`, and the SFT policy: what was passed, else what its config may name."""
    folder, given = chain["ppo"].folder, chain["ppo"].config
    known = TABLES["compared"].split()
    with located(str(folder / CONFIG_FILE)):
        for name in ("model_name_or_path", "reward_model_path", "eval_dataset_name"):
            if given.get(name) is None and passed.get(name) is None:
                raise InputError(f"it names no {name}, which compare needs.")
        named = {n: given[n] for n in known if n in given and passed.get(n) is None}
        config, model_config = resolve(PPOConfig, None, None, named)
        for name in passed:
            source = named.get(name)
            for part in source if isinstance(source, list) else [source]:
                if danger := _danger(name, part, chain):
                    raise InputError(
                        f"{name} is {part!r}, {danger}. If you trust it, pass it to compare(..., "
                        f"{name.removesuffix('_model_path').removesuffix('_name')}=)."
                    )
    for name, value in passed.items():
        setattr(config, name, getattr(config, name) if value is None else value)
    return config, model_config.model_name_or_path


def _danger(name: str, source: str | None, chain: Mapping[str, FinishedStage]) -> str | None:
    """Why a config from elsewhere may not name that reward or data; None if it may."""
    if is_python(source):
        return "which is Python code to be run"
    if is_address(source):
        return "an address, to which prompts and completions would be sent"
    path = os.path.expanduser(source or "")
    if name != "eval_dataset_name" or not os.path.exists(path):
        return None
    inside, folders = Path(path).resolve(), {run.folder.resolve() for run in chain.values()}
    return None if folders & {inside, *inside.parents} else "which lies in no folder of its stages"


def _summary(chain: Mapping[str, FinishedStage], evaluation: dict[str, Any]) -> dict[str, Any]:
    models = evaluation["models"]
    summary: dict[str, Any] = {
        judge: {name: model["scores"][judge] for name, model in models.items()}
        for judge in evaluation["judges"]
    }
    # Only a reward model trained by `rm` has metrics.
    known = chain["rm"].metrics if "rm" in chain else {}
    summary["rm"] |= {what: known[what] for what in ("accuracy", "ceiling") if what in known}
    summary |= {"kl": models["ppo"]["kl"], "prompts": evaluation["prompts"]}
    for what in ("length", "ended"):
        summary[what] = {name: model[what] for name, model in models.items()}
    seconds = {name: run.metrics["seconds"] for name, run in chain.items()}
    if "pretrain" in seconds:
        seconds = {"base": seconds.pop("pretrain"), **seconds}
    summary["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    summary["seed"] = chain["ppo"].config.get("seed", 42)
    shown = evaluation["samples"][:SHOWN_SAMPLES]
    return {**summary, "samples": [{k: s[k] for k in ("prompt", "sft", "ppo")} for s in shown]}


def render(summary: dict[str, Any]) -> str:
    """The summary as a plain-text table with samples below."""
    scores = [s for s in ("gold", "rm") if s in summary]
    titles = {"gold": "gold score (95 %)", "rm": "RM score (95 %)"}
    rows = [["", *(titles[s] for s in scores), "KL to SFT", "tokens", "ended"]]
    for name in summary["length"]:
        means = [show_interval(summary[s][name]) for s in scores]
        kl = f"{summary['kl']:.2f}" if name == "ppo" else "-"
        label = {"base": "base", "sft": "SFT", "ppo": "PPO"}[name]
        tokens, ended = summary["length"][name], summary["ended"][name]
        rows.append([label, *means, kl, f"{tokens:.1f}", f"{ended:.0%}"])
    lines = [f"\n{summary['prompts']} test prompts, one completion each\n", *table(rows)]
    if "accuracy" in summary["rm"]:
        ceiling = summary["rm"].get("ceiling")
        beside = f" (noise ceiling {ceiling:.3f})" if ceiling is not None else ""
        lines.append(f"\nRM accuracy on held-out pairs {summary['rm']['accuracy']:.3f}{beside}")
    lines.append("seconds: " + ", ".join(f"{k} {v:g}" for k, v in summary["seconds"].items()))
    for sample in summary["samples"]:
        lines.append(f"\n> {one_line(sample['prompt'])}")
        for name, label in (("sft", "SFT"), ("ppo", "PPO")):
            given = "  ".join(f"{s} {sample[name][s]:.2f}" for s in scores)
            lines.append(f"  {label}  {one_line(sample[name]['completion'])}   [{given}]")
    return "\n".join(lines)
