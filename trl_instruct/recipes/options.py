"""A user's options: checked against the stage's dataclass, resolved, saved."""

import contextlib
import copy
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import ModelConfig
from trl.scripts.utils import DatasetConfig

from trl_instruct.configs import SFTConfig, StageConfig
from trl_instruct.data.conversion import mixture_of
from trl_instruct.data.sources import name_of
from trl_instruct.errors import REDACTED, InputError, kind_of, redact
from trl_instruct.models.adapters import DECIDED
from trl_instruct.models.precision import rounds_frozen
from trl_instruct.option_checks import TABLES, check_finite, check_refused

Config = TypeVar("Config", bound=StageConfig)

# Options of ModelConfig that have no effect without another.
NEEDED_FOR = {
    "use_peft": [*DECIDED, "lora_modules_to_save"],
    "load_in_4bit": ["bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"],
}


def resolve(
    config_class: type[Config],
    config: Config | None,
    model_config: ModelConfig | None,
    options: dict[str, Any],
) -> tuple[Config, ModelConfig]:
    """The stage's config and TRL's ModelConfig: copies of ready ones, or made of options."""
    if config is not None:
        if options:
            raise InputError(f"config= and options {sorted(options)} were given; use one.")
        check_redacted(vars(config))
        return copy.copy(config), copy.copy(model_config) if model_config else ModelConfig()
    options = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    check_redacted(options)
    check_names(options, config_class)
    check_types(options, config_class)
    stage_fields = field_types(config_class)
    model_options = {k: v for k, v in options.items() if k not in stage_fields}
    if model_config is not None and model_options:
        raise InputError(f"model_config= and options {sorted(model_options)} were given; use one.")
    with option_errors():
        config = config_class(**{k: v for k, v in options.items() if k in stage_fields})
        # TRL's default of dtype would hide whether it was given: see `stage_options`.
        unset = {} if "dtype" in config_class.REFUSED else {"dtype": None}
        made = ModelConfig(**{**unset, **model_options})
        return config, copy.copy(model_config) if model_config else made


def check_redacted(options: Mapping[str, Any]) -> None:
    """InputError for a secret that is redacted, as saved configs have it."""
    for name, value in options.items():
        text = str(value)
        if REDACTED in text and redact(text.replace(REDACTED, "x" * 8)) == text:
            raise InputError(
                f"{name} is {value!r}: no secret is saved in a config. Give {name} again with its "
                "password, token or key."
            )


def field_types(config_class: type) -> dict[str, Any]:
    """The options that a dataclass takes, with their types."""
    types = get_type_hints(config_class)
    return {f.name: types[f.name] for f in dataclasses.fields(config_class) if f.init}


def check_names(names: Iterable[str], config_class: type[StageConfig], where: str = "") -> None:
    """InputError for an unknown option, with the nearest, or a refused one; `where` is the file."""
    known = {**field_types(ModelConfig), **field_types(config_class)}
    for name in names:
        if name not in known:
            if reason := config_class.REFUSED.get(name):
                raise InputError(f"{where}{name} is not an option here: {reason}")
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}Unknown option {name!r} for {config_class.__name__}.{hint}")


def check_types(options: dict[str, Any], config_class: type, where: str = "") -> None:
    """InputError for a value that does not have its option's type; `where` as in `check_names`."""
    known = {**field_types(ModelConfig), **field_types(config_class)}
    known["resume_from_checkpoint"] = str | bool | None  # as Trainer.train takes it
    for name, value in options.items():
        if not _fits(value, known[name]):
            kind = getattr(known[name], "__name__", str(known[name]).replace("typing.", ""))
            raise InputError(f"{where}{name} is {kind_of(value)}; {kind} is needed.")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, as far as option types go."""
    origin = get_origin(kind)
    if kind is Any or kind is None:
        return kind is Any or value is None
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is list:
        items = [value] if isinstance(value, str) else value  # a single item is taken as a list
        of = get_args(kind) or (Any,)
        return isinstance(items, list | tuple) and all(_fits(item, of[0]) for item in items)
    if kind in (int, float):
        number = Integral if kind is int else Real
        if kind is float and isinstance(value, int) and abs(value) > 1e300:
            return False
        return isinstance(value, number) and not isinstance(value, bool)
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
        return value in [member.value for member in kind]
    return isinstance(value, origin or kind)


def named_sources(sources: Iterable[str], what: str) -> dict[str, str]:
    """Models or rewards by name, from texts `name=source` or a source, named by its last part.

    InputError if two have the same name.
    """
    found: dict[str, str] = {}
    for text in sources:
        match = re.fullmatch(r"([^/=:]+)=(.+)", text)
        source = match[2] if match else text
        last = source.rstrip("/").rpartition("/")[2]
        name = redact(match[1] if match else last.rpartition(".py:")[2])
        if name in found:
            raise InputError(
                f"Two of the {what} are called {name!r}: {found[name]} and {source}. Name one of "
                f"them, as in {name}_2={source}."
            )
        found[name] = source
    return found


@contextlib.contextmanager
def option_errors() -> Iterator[None]:
    """Turn the libraries' errors about their own options into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{error.doc!r} is not a JSON object; one is needed: {error}.") from error
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "install" not in str(error):  # as of a tracker
            raise
        raise InputError(" ".join(str(error).split())) from error
    except Exception as error:  # of the Hub's client, if push_to_hub finds no network or token
        if not type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise
        told = f"The Hub did not answer: {error}"
        raise InputError(f"{' '.join(told.split())}. Leave push_to_hub out, or log in.") from error


def config_text(config: StageConfig, model_config: ModelConfig) -> str:
    """The resolved options as YAML that `--config` reads back to an equal config.

    All options of the stage are in it; of those of transformers and ModelConfig only what differs
    from the library's default, here or in TRL's own dataclass. Secrets are redacted.
    """
    values = redact({**dataclasses.asdict(model_config), **config.to_dict()})
    # to_dict hides tokens; these two are not secrets.
    values |= {k: getattr(config, k) for k in ("eos_token", "pad_token") if hasattr(config, k)}
    library, own = (
        {f.name: f.default for kind in kinds for f in dataclasses.fields(kind)}
        for kinds in ((TrainingArguments, ModelConfig), (ModelConfig, type(config)))
    )
    resolved = {
        name: value
        for name, value in values.items()
        if name not in TABLES["not_saved"].split()
        and value != []
        and (
            value != own[name]
            or (value is not None and own[name] != library.get(name, dataclasses.MISSING))
        )
    }
    return yaml.safe_dump(resolved, sort_keys=True, allow_unicode=True)


def stage_options(
    config_class: type[Config],
    config: Config | None,
    model_config: ModelConfig | None,
    output_dir: str | os.PathLike | None,
    dataset: Any,
    options: dict[str, Any],
    *,
    trains: bool = True,
) -> tuple[Config, ModelConfig]:
    """The stage's options from either form, checked for what a stage (that trains) needs."""
    if output_dir is not None and config is None:
        options = {**options, "output_dir": output_dir}
    config, model_config = resolve(config_class, config, model_config, options)
    check_finite(model_config)
    check_refused(config_class.REFUSED, model_config)
    if model_config.dtype is None:
        half = model_config.use_peft and rounds_frozen(config) and not config.merge_adapter
        model_config.dtype = "bfloat16" if half else "float32"  # merged, it would stay rounded
    if output_dir is not None:
        config.output_dir = os.fspath(output_dir)
    if isinstance(dataset, list):
        config.datasets = [dataclasses.asdict(entry) for entry in mixture_of(dataset)]
    if (dataset is None or dataset == "") and not config.datasets:
        raise InputError("No dataset was given: set dataset_name to a file, a folder or a Hub id.")
    config.dataset_name = name_of(dataset) or config.dataset_name
    if config.dataset_streaming and not isinstance(config, SFTConfig):
        raise InputError(
            "dataset_streaming: sft alone reads while it trains; this stage counts and draws from "
            "its records. Leave it out."
        )
    if not trains:
        return config, model_config
    frozen = model_config.load_in_8bit or model_config.load_in_4bit
    if frozen and not model_config.use_peft:
        raise InputError("load_in_8bit and load_in_4bit freeze all weights. Set use_peft as well.")
    for switch, names in NEEDED_FOR.items():
        if not getattr(model_config, switch):
            check_refused(dict.fromkeys(names, f"{switch} is not set."), model_config)
    if config.n_gpu > 1:
        raise InputError(
            f"One process trains on one of {config.n_gpu} GPUs. To use all, start accelerate "
            "launch (make LAUNCH='accelerate launch'); to use one, set CUDA_VISIBLE_DEVICES."
        )
    if model_config.attn_implementation == "flex_attention" and config.device.type == "cpu":
        raise InputError("flex_attention has no backward pass on CPU: omit attn_implementation.")
    return config, model_config


def data_of(dataset: Any, config: StageConfig) -> Any:
    """What a stage reads: the dataset given, its subset, or the mixture that the config lists."""
    if config.datasets:
        return config.datasets
    if config.dataset_config is None:
        return dataset
    if not isinstance(dataset, str):
        raise InputError("dataset_config names a subset of a dataset on the Hub; give its id.")
    return DatasetConfig(dataset, name=config.dataset_config)


def held_out_of(dataset: Any, given: Any, config: StageConfig) -> tuple[Any, str] | None:
    """Held-out data with its split: what was given, what the config names, or the test split."""
    given = named_source(given, config)
    if given is not None:
        return given, config.dataset_test_split or "train"
    if config.dataset_test_split is None:
        return None
    if config.datasets:
        raise InputError("dataset_test_split: of which of the datasets? Name an eval_dataset_name.")
    return data_of(dataset, config), config.dataset_test_split


def named_source(given: Any, config: StageConfig, option: str = "eval_dataset_name") -> Any:
    """The dataset given, which the config then names, or else the one that the config names."""
    if given is None:
        return getattr(config, option)
    setattr(config, option, name_of(given))
    return given
