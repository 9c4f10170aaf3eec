"""LoRA adapters: create one, continue from one, start a reward model from a policy's."""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from trl_instruct.errors import NOT_AS_EXPECTED, InputError, explained, summary
from trl_instruct.models.properties import check_finished, model_name
from trl_instruct.scalar_head import compute_in_float32, read_beside_adapter, score_head
from trl_instruct.types import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT = "base_fingerprint.txt"  # which base an adapter was trained over
SAMPLES, SIZE = 16, 4096  # hashing a whole large model would take a minute

POLICY, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"
EVERY_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's

# Options of TRL's ModelConfig that an existing adapter fixes; in its config without "lora_", but
# for lora_alpha and lora_dropout.
DECIDED = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("use_rslora", "use_dora"),
)


def is_adapter(source: Any) -> bool:
    """Whether the source is a folder that holds a PEFT adapter instead of full weights."""
    return not isinstance(source, nn.Module) and (Path(source) / CONFIG).is_file()


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: its folder, its config (read once) and the base model that it names."""

    folder: str
    config: peft.PeftConfig
    base: str

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Adapter":
        """The adapter in a folder; InputError if unfinished, broken, or without base or weights."""
        path = os.fspath(folder)
        check_finished(Path(path))
        broken = f"{os.path.join(path, CONFIG)!r} is not an adapter's config as peft writes it"
        with explained(broken):
            config = peft.PeftConfig.from_pretrained(path)
        base = config.base_model_name_or_path
        if not (isinstance(base, str) and base):
            raise InputError(
                f"The adapter in {path!r} names no base model: base_model_name_or_path is missing "
                f"in {CONFIG}. Name the base there."
            )
        if not any(Path(path).glob("adapter_model.*")):
            raise InputError(f"The adapter in {path!r} has no weights: there is no {WEIGHTS}.")
        return cls(path, config, base)

    def check_task(self, needed: str) -> None:
        """InputError if the adapter is for another kind of model."""
        if self.config.task_type not in (needed, None):
            raise InputError(
                f"{self.folder!r} holds an adapter for {self.config.task_type}; one for {needed} "
                f"is needed (a policy is {POLICY}, a reward model {CLASSIFIER})."
            )

    def check_base(self) -> None:
        """InputError if its base is known to have other weights than when it was saved."""
        kept, now = Path(self.folder) / FINGERPRINT, fingerprint(self.base)
        if now and kept.is_file() and kept.read_text(encoding="utf-8").strip() != now:
            raise InputError(
                f"The adapter in {self.folder!r} was trained over other weights than "
                f"{self.base!r} has now: that model has been trained or replaced since. Train the "
                f"adapter again (or remove {FINGERPRINT} to skip this check)."
            )

    def keep_fingerprint(self) -> None:
        """Save the fingerprint of its base beside the adapter, if that base is in a folder."""
        if digest := fingerprint(self.base):
            (Path(self.folder) / FINGERPRINT).write_text(f"{digest}\n", encoding="utf-8")

    def check_options(self, model_config: ModelConfig) -> None:
        """InputError for LoRA options that were set and differ from the adapter's."""
        defaults = ModelConfig()
        for option in DECIDED:
            name = option if hasattr(self.config, option) else option.removeprefix("lora_")
            asked, has = getattr(model_config, option), getattr(self.config, name, None)
            if asked in (getattr(defaults, option), EVERY_LINEAR) or _same(asked, has):
                continue
            raise InputError(
                f"{option} is {_listed(asked)}, but the adapter in {self.folder!r}, which this "
                f"stage continues, has {_listed(has)}. Leave {option} out; or, for a new adapter, "
                "merge first (trl-instruct merge ADAPTER OUTPUT_DIR) and start from the result."
            )

    def on(self, model: Model, *, trainable: bool = True) -> peft.PeftModel:
        """Its base, which never trains, with the adapter in float32, and a reward model's shift."""
        with self._fitting(model):
            adapted = peft.PeftModel.from_pretrained(model, self.folder, is_trainable=trainable)
            saved = peft.load_peft_weights(self.folder, device="cpu")
            _check_names(saved, peft.get_peft_model_state_dict(adapted))
        read_beside_adapter(adapted, Path(self.folder))
        return float32_head(adapted)

    def on_classifier(self, model: Model) -> peft.PeftModel:
        """A scalar classifier over its base, with its LoRA weights; InputError as in `on`."""
        config, heads = copy.deepcopy(self.config), {"lm_head", "score"}
        config.task_type, config.inference_mode = CLASSIFIER, False
        kept = [name for name in config.modules_to_save or () if name not in heads]
        config.modules_to_save = [*kept, "score"]
        weights = peft.load_peft_weights(self.folder, device="cpu")
        weights = {name: w for name, w in weights.items() if not heads & set(name.split("."))}
        with self._fitting(model):
            adapted = peft.get_peft_model(model, config)
            own = peft.get_peft_model_state_dict(adapted)
            _check_names(weights, own)
            peft.set_peft_model_state_dict(adapted, {**own, **weights})
        return float32_head(adapted)

    @contextlib.contextmanager
    def _fitting(self, model: Model) -> Iterator[None]:
        """Turn peft's errors about an adapter that does not fit into an InputError."""
        try:
            yield
        except (RuntimeError, OSError, SafetensorError, *NOT_AS_EXPECTED) as error:
            told = summary(error)
            advice = "Was it trained on another model, or has the model in that folder changed?"
            if "embed" in told or isinstance(error, IndexError):
                advice = (
                    "If tokens were added to its base, the base in that folder must have them too: "
                    "resize_token_embeddings, then save_pretrained."
                )
            raise InputError(
                f"The adapter in {self.folder!r} does not fit the {type(model).__name__} from "
                f"{model_name(model)!r}: {told}. {advice}"
            ) from error


def _check_names(weights: Iterable[str], own: Iterable[str]) -> None:
    """ValueError for weights that the model has no place for: peft would ignore them."""
    if strange := sorted(name for name in set(weights) - set(own) if "lora_" in name):
        raise ValueError(f"it has no {strange[0]}")


def fingerprint(folder: str | os.PathLike) -> str | None:
    """A digest of the weights in a folder; None if it has none (a Hub id).

    Covers each safetensors file's name, length, header (weight names and shapes) and 16 evenly
    spaced chunks. Training changes nearly every weight, so another model differs in each chunk.
    """
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as content:
            for sample in range(SAMPLES + 1):
                content.seek(max(0, length - SIZE) * sample // SAMPLES)
                digest.update(content.read(SIZE))
    return digest.hexdigest()


def peft_config_of(model_config: ModelConfig, task_type: str = POLICY) -> peft.PeftConfig | None:
    """TRL's PEFT config, which by default targets all linear layers."""
    config = get_peft_config(model_config)
    if config is None:
        return None
    config.task_type = task_type
    if not config.target_parameters:
        config.target_modules = config.target_modules or EVERY_LINEAR
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        # ModelConfig turns a list of one name into text, which peft reads as a pattern of paths.
        config.target_modules = {config.target_modules}
    if task_type == CLASSIFIER:
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
    return config


def new_adapter_config(
    model: Model, model_config: ModelConfig, task_type: str = POLICY
) -> peft.PeftConfig | None:
    """The config of a model's new adapter; None if it needs none."""
    config = peft_config_of(model_config, task_type)
    if config is None or isinstance(model, peft.PeftModel):
        return None
    wanted = config.target_modules
    if not wanted or wanted == EVERY_LINEAR:
        return config
    if not any(check_target_module_exists(config, name) for name, _ in model.named_modules()):
        known = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
        raise InputError(
            f"lora_target_modules is {_listed(wanted)}, and {type(model).__name__} has no such "
            f"module. It has {_listed(known)}; leave the option out for all linear layers."
        )
    return config


def with_lora(model: Model, model_config: ModelConfig, task_type: str = POLICY) -> Model:
    """The model, with a LoRA adapter if `model_config` asks for one (see `new_adapter_config`)."""
    config = new_adapter_config(model, model_config, task_type)
    return float32_head(peft.get_peft_model(model, config)) if config else model


def float32_head(model: Model) -> Model:
    """Make an adapter classifier's head float32, as peft makes LoRA's: bfloat16 loses updates."""
    if isinstance(getattr(model, "score", None), ModulesToSaveWrapper):
        compute_in_float32(score_head(model).to(torch.float32))
    return model


def keep_float32(model: Model, before: dict[nn.Parameter, Tensor]) -> None:
    """Restore the float32 weights of what trains over a frozen base: those of `before`.

    Over a quantised base, TRL's trainers round them to bfloat16: at a learning rate of 1e-5 most
    updates would be lost. Weights added since, a new adapter's, become float32.
    """
    if is_quantized(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = before.get(parameter, parameter.data.to(torch.float32))
    float32_head(model)


def check_trains_in_float32(model: nn.Module) -> None:
    """InputError for 16-bit weights that train: most steps are smaller than their rounding."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"{name} would train in {str(weight.dtype).removeprefix('torch.')}, which rounds "
                "most steps away: at a learning rate of 3e-6, 2.8 % of such weights move in 32 "
                "steps. Leave dtype out (float32 weights, bfloat16 computation with bf16: true; "
                "of a loaded model, model.float()), or train an adapter over them: use_peft."
            )


def is_quantized(model: nn.Module) -> bool:
    """Whether a model, or the base under its adapter, has 8- or 4-bit weights."""
    return any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))


def _same(asked: Any, has: Any) -> bool:
    """Whether an option equals the adapter's value, which may name each module by its path."""
    if isinstance(has, list | tuple | set):
        asked = {asked} if isinstance(asked, str) else set(asked or ())
        return asked in (set(has), _last_names(has))
    return asked == has


def _last_names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _listed(value: Any) -> str:
    return ", ".join(sorted(_last_names(value))) if isinstance(value, list | set) else str(value)
