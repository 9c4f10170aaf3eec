"""Load and save the four roles: policy, ref_policy, reward model, value model.

A model is a Hub id, a local folder, what an earlier stage returned, or a loaded model. An adapter
folder is merged into its base on loading.
"""

import contextlib
import copy
import inspect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_instruct.errors import InputError
from trl_instruct.quiet import quiet_loading, silence_model_file_bars
from trl_instruct.scalar_head import keep_weights, register_scalar_head
from trl_instruct.shift import forget_shift, read_beside_adapter, shift_of

silence_model_file_bars()

ModelSource: TypeAlias = str | os.PathLike | PreTrainedModel

# Written when a stage starts and when it has ended: a folder with the first and without the second
# holds a run that was cut short.
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"


def load_tokenizer(
    source: ModelSource, *, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the EOS and pad tokens that all stages rely on.

    Args:
        source: a model as above; a loaded model is asked where it came from.

    Returns:
        The tokenizer, padding on the left. Where it has no pad token, EOS serves: masks come from
        lengths, so pad == eos does no harm.

    Raises:
        InputError: no tokenizer there, or one without an EOS token.
    """
    path = model_name(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, padding_side="left", revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"No tokenizer could be loaded from {path!r}: {_why(path, error)} Give a Hub id or a "
            "folder that holds one, or pass processing_class=."
        ) from error
    return check_tokenizer(tokenizer, path)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token; InputError where it has no EOS token."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {name!r} has no EOS token, so a completion could not end. Set one "
            "(tokenizer.eos_token = ...; tokenizer.save_pretrained(...)) that stands in its "
            "vocabulary."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def install_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give the tokenizer the chat template in a Jinja file, as TRL's chat_template_path does."""
    file = Path(path)
    if file.suffix not in (".jinja", ".j2"):
        return  # a model whose template (and tokens) the trainer takes over
    if not file.is_file():
        raise InputError(f"chat_template_path {path!r}: there is no such file.")
    tokenizer.chat_template = file.read_text(encoding="utf-8")


def load_policy(
    source: ModelSource, model_config: ModelConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model; weights in float32 unless `model_config.dtype` says otherwise.

    Raises:
        InputError: nothing there, a checkpoint that is no language model, or an unfinished stage.
    """
    if isinstance(source, PreTrainedModel | PeftModel):
        if not source.can_generate():
            raise InputError(
                f"A {type(source).__name__} was given; a language model (AutoModelForCausalLM) is "
                "needed."
            )
        keep_weights(unwrapped(source))
        return source
    if is_adapter(source):
        return _merged_adapter(source, AutoModelForCausalLM, model_config, trust_remote_code)
    return _load(source, AutoModelForCausalLM, model_config, trust_remote_code)


def load_reward_model(
    source: ModelSource,
    model_config: ModelConfig,
    *,
    fresh_head: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A scalar `AutoModelForSequenceClassification` (`num_labels=1`).

    Where transformers has no such class for the architecture, it is the one of `scalar_head.py`.

    Args:
        source: a reward model; with `fresh_head`, any language model, whose unembedding is
            replaced by a scalar head drawn from N(0, 1 / sqrt(hidden + 1)), as in Stiennon et al.
            2020 (the class has no bias).

    Raises:
        InputError: nothing there, no scalar head (and none asked for), or an unfinished stage.
    """
    kind = AutoModelForSequenceClassification
    if fresh_head and is_adapter(source) and _adapter_task(source) != "SEQ_CLS":
        source = load_policy(source, model_config, trust_remote_code=trust_remote_code)
    if isinstance(source, PeftModel):
        source = copy.deepcopy(source).merge_and_unload()
    if isinstance(source, PreTrainedModel):
        bare = fresh_head and not hasattr(source, "score")
        model = _classifier_from_policy(source) if bare else source
        score_head(model)
    elif is_adapter(source):
        model = _merged_adapter(source, kind, model_config, trust_remote_code, num_labels=1)
    else:
        head = ("score.weight",) if fresh_head else ()
        model = _load(source, kind, model_config, trust_remote_code, may_lack=head, num_labels=1)
    if fresh_head:
        hidden = score_head(model).in_features
        nn.init.normal_(score_head(model).weight, std=1.0 / math.sqrt(hidden + 1))
        forget_shift(model)
    return model


def _classifier_from_policy(policy: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    register_scalar_head(type(config))
    keep_weights(policy)
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    classifier.base_model.load_state_dict(policy.base_model.state_dict())
    return classifier


def base_for_adapter(
    source: ModelSource, folder: Path, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> ModelSource:
    """A model that a new adapter, if one is asked for, can be trained on.

    A new adapter names its base by path. A source without a path of its own, that is an adapter
    (merged) or a model in memory, is saved in `folder` as that base, so that plain peft can load
    the result.
    """
    if not model_config.use_peft or not (is_adapter(source) or is_nameless(source)):
        return source
    load = load_policy
    if is_adapter(source) and _adapter_task(source) == "SEQ_CLS":
        load = load_reward_model
    model = load(source, ModelConfig(dtype=model_config.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_lora(model: PreTrainedModel, model_config: ModelConfig) -> PreTrainedModel:
    """The model with a fresh LoRA adapter, if `model_config` asks for one."""
    peft_config = peft_config_of(model_config)
    return get_peft_model(model, peft_config) if peft_config else model


def peft_config_of(model_config: ModelConfig, task_type: str = "CAUSAL_LM") -> PeftConfig | None:
    """TRL's PEFT config, with targets that work without thought: all linear layers."""
    config = get_peft_config(model_config)
    if config is None:
        return None
    config.task_type = task_type
    config.target_modules = config.target_modules or "all-linear"
    if task_type == "SEQ_CLS" and not config.modules_to_save:
        config.modules_to_save = ["score"]
    return config


def reference_of(policy: PreTrainedModel) -> PreTrainedModel | None:
    """A frozen copy of the policy; None for a LoRA policy, whose base is the reference."""
    if isinstance(policy, PeftModel):
        return None
    return copy.deepcopy(policy).eval().requires_grad_(False)


class ValueModel(nn.Module):
    """A scalar reward model read at every token: V(s_t) instead of one score at the end.

    The reward model's shift is taken off, as it is off the scores that V predicts.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Value after each token: `(B, T)`, float32. Arguments `(B, T)`."""
        backbone = self.model.base_model
        hidden = backbone(
            **accepted(
                backbone,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )
        ).last_hidden_state
        return score_head(self.model)(hidden).squeeze(-1).float() - shift_of(self.model)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The scalar head of a sequence classifier; InputError where it has another kind of head."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(
            f"{type(model).__name__} has no scalar head `score`. A reward or value model is an "
            "AutoModelForSequenceClassification with num_labels=1, as `rm` trains it."
        )
    return head


def accepted(module: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those arguments that the module's forward knows (some architectures take no positions)."""
    known = inspect.signature(module.forward).parameters
    return {name: value for name, value in arguments.items() if name in known}


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: in RL it would make the policy differ from the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # probabilities that forward hands to F.dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and back into the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a PEFT wrapper holds, its adapter in place; any other as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def context_length(model: PreTrainedModel) -> int | None:
    """Most tokens the model can attend to; None where its architecture has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def model_name(source: ModelSource) -> str:
    """What to call a model in messages and where to look for its tokenizer."""
    if isinstance(source, PreTrainedModel | PeftModel):
        return source.config._name_or_path or type(source).__name__
    return os.fspath(source)


def is_nameless(source: ModelSource) -> bool:
    """Whether the source is a model in memory that was not loaded from anywhere."""
    return isinstance(source, PreTrainedModel | PeftModel) and not source.config._name_or_path


def is_adapter(source: ModelSource) -> bool:
    """Whether the source is a folder that holds a PEFT adapter instead of full weights."""
    return not isinstance(source, nn.Module) and (Path(source) / "adapter_config.json").is_file()


def _adapter_task(folder: str | os.PathLike) -> str | None:
    return PeftConfig.from_pretrained(os.fspath(folder)).task_type


def _load(
    source: str | os.PathLike,
    kind: Any,
    model_config: ModelConfig,
    trust_remote_code: bool,
    may_lack: tuple[str, ...] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    path = os.fspath(source)
    check_finished(Path(path))
    quantization = get_quantization_config(model_config)
    hub = {"revision": model_config.model_revision, "trust_remote_code": trust_remote_code}
    with quiet_loading():
        try:
            if kind is AutoModelForSequenceClassification:
                register_scalar_head(type(AutoConfig.from_pretrained(path, **hub)))
            model, info = kind.from_pretrained(
                path,
                dtype=_dtype(model_config),
                attn_implementation=model_config.attn_implementation,
                quantization_config=quantization,
                output_loading_info=True,
                **hub,
                **kwargs,
            )
        except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"No model could be loaded from {path!r}: {_why(path, error)} Give a Hub id, a "
                "folder saved with save_pretrained, or the result of an earlier stage."
            ) from error
    missing = sorted(set(info["missing_keys"]) - set(may_lack))
    if missing:
        raise InputError(
            f"{path!r} lacks weights that a {type(model).__name__} needs: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}. Is it a model of another kind (a reward model "
            "where a policy is needed, or the reverse)?"
        )
    # With tied embeddings a language model lacks nothing in a reward model's weights.
    if kind is AutoModelForCausalLM and "score.weight" in info["unexpected_keys"]:
        raise InputError(
            f"{path!r} holds a reward model; a language model is needed. Give the policy's folder."
        )
    keep_weights(model)
    return model


def _merged_adapter(
    source: str | os.PathLike,
    kind: Any,
    model_config: ModelConfig,
    trust_remote_code: bool,
    **kwargs: Any,
) -> PreTrainedModel:
    path = os.fspath(source)
    check_finished(Path(path))
    needed = "SEQ_CLS" if kind is AutoModelForSequenceClassification else "CAUSAL_LM"
    if _adapter_task(path) not in (needed, None):
        raise InputError(
            f"{path!r} holds an adapter for {_adapter_task(path)}; one for {needed} is needed (a "
            "policy is CAUSAL_LM, a reward model SEQ_CLS)."
        )
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    head = ("score.weight",) if kind is AutoModelForSequenceClassification else ()
    model = _load(base, kind, model_config, trust_remote_code, may_lack=head, **kwargs)
    merged = PeftModel.from_pretrained(model, path).merge_and_unload()
    read_beside_adapter(merged, Path(path))
    return merged


def _dtype(model_config: ModelConfig) -> Any:
    name = model_config.dtype or "float32"
    dtype = name if name == "auto" else getattr(torch, name, None)
    if not isinstance(dtype, str | torch.dtype):
        raise InputError(f"dtype is {name!r}; auto, float32, bfloat16 or float16 is needed.")
    return dtype


def check_finished(folder: Path) -> None:
    """InputError where the folder holds a stage that was cut short."""
    if (folder / CONFIG_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        raise InputError(
            f"The stage that writes {str(folder)!r} has not finished: there is no {METRICS_FILE}. "
            "Run it to its end first."
        )


def _why(path: str, error: Exception) -> str:
    """What the libraries say in one line; where nothing is there of that name, that first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = " ".join(line.strip() for line in lines) if lines[0].endswith(":") else lines[0]
    if Path(path).exists():
        return told
    return f"there is no such folder (looked in {Path.cwd()}), and as a Hub id: {told}"


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float
) -> None:
    """Give some of an optimizer's parameters a learning rate of their own.

    Args:
        optimizer: not yet used, without a scheduler.
        parameters: those of them that it does not train are left out.
        learning_rate: at its peak.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in chosen]
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
