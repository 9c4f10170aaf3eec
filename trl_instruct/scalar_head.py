"""A scalar head for language models without a sequence classifier in transformers: RWKV, Mamba.

The class made here is built like `LlamaForSequenceClassification`, with the same weight names
(`<backbone>.*`, `score.weight`). Registered with `AutoModelForSequenceClassification`, it loads and
saves like any other: as a safetensors checkpoint of the backbone's `model_type`, without code.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import logging

from trl_instruct.errors import InputError
from trl_instruct.files import read_json, write_json
from trl_instruct.padding import padding_before, roll_rows
from trl_instruct.types import Model

logger = logging.get_logger(__name__)


def register_scalar_head(config_class: type[PreTrainedConfig]) -> None:
    """Give `AutoModelForSequenceClassification` a classifier for this kind of model.

    Does nothing if it has one already, or if the model is not a language model.
    """
    known = config_class in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    writers, backbones = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING
    if known or config_class not in writers or config_class not in backbones:
        return
    backbone = backbones[config_class]
    name = backbone.__name__.removesuffix("Model") + "ForSequenceClassification"
    # The backbone's base class has the prefix of its weights, their initialisation, ...
    family = next(c for c in backbone.__mro__[1:] if issubclass(c, Model))
    # transformers reads a model's module to learn which attention and expert kernels it supports.
    classifier = type(name, (ScalarHead, family), {"__module__": backbone.__module__})
    # Without exist_ok, transformers ignores classes for its own configs.
    AutoModelForSequenceClassification.register(config_class, classifier, exist_ok=True)


class ScalarHead(Model):
    """Last token's hidden state -> linear head, over any backbone.

    The attention mask, never a token id, tells which token is last. Rows are first moved to the
    left edge, because recurrent backbones ignore masks: they would read padding before a sequence
    as text, but padding after it comes too late to matter.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        setattr(self, self.base_model_prefix, AutoModel.from_config(config))
        hidden = config.get_text_config().hidden_size
        self.score = nn.Linear(hidden, config.num_labels, bias=False)
        self.post_init()
        disable_rescaling(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of B sequences `(B, T)`: `logits` is `(B, num_labels)`.

        The mask `(B, T)` is 1 on a row's tokens, which must be adjacent; None: all. InputError for
        an argument that would affect the score; `use_cache` and `return_dict` have no effect.
        """
        given = [name for name, value in others.items() if not (value is None or value is False)]
        if given:
            raise InputError(
                f"{type(self).__name__} was given {', '.join(given)}; it reads input_ids and "
                "attention_mask only. Leave the rest out."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"{type(self).__name__} was given an attention_mask of shape "
                f"{tuple(attention_mask.shape)} for input_ids of shape {tuple(input_ids.shape)}; "
                "it reads one sequence per row, so the shapes must be equal."
            )
        before = padding_before(attention_mask)
        output = self.base_model(
            input_ids=roll_rows(input_ids, before),
            attention_mask=roll_rows(attention_mask, before),
            use_cache=False,
        )
        logits = self.score(roll_rows(output.last_hidden_state, -before))
        last = input_ids.shape[1] - 1 - padding_before(attention_mask.flip(1))
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutputWithPast(logits=logits[rows, last])

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in the backward pass, or warn: it is TRL's default."""
        if self.supports_gradient_checkpointing:
            super().gradient_checkpointing_enable(*args, **kwargs)
        else:
            logger.warning_once(
                f"{type(self).__name__} does not support gradient checkpointing; training runs "
                "without it. Set gradient_checkpointing=False to hide this message."
            )


def disable_rescaling(model: Model) -> None:
    """Switch off, and undo, RWKV's halving of weights in place on every change to eval mode.

    It keeps float16 from overflowing. But weights saved in eval mode are wrong once loaded (halved
    again), and so is a LoRA adapter, which is not halved. Does nothing to other models.
    """
    backbone = model.base_model
    if not hasattr(backbone.config, "rescale_every"):
        return
    if backbone.layers_are_rescaled:
        was_training = backbone.training
        backbone.train()
        with torch.no_grad():  # a forward pass in training mode scales them back
            backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        backbone.train(was_training)
    for part in (model, backbone):
        part.config.rescale_every = 0


# At import, so that AutoModelForSequenceClassification.from_pretrained finds them.
for _model_type in ("rwkv", "mamba", "mamba2", "falcon_mamba"):
    register_scalar_head(type(AutoConfig.for_model(_model_type)))

SHIFT, STD = "reward_shift", "reward_std"
# In an adapter's folder, where a config.json would make transformers look for full weights.
SHIFT_FILE = "reward_config.json"


def shift_of(model: Model) -> float:
    """The shift in the model's config; 0 if it has none."""
    return float(getattr(model.config, SHIFT, None) or 0.0)


def keep_shift(model: Model, shift: float, std: float) -> None:
    """Put the demonstrations' mean score and its standard deviation in the model's config."""
    model.config.update({SHIFT: shift, STD: std})


def forget_shift(model: Model) -> None:
    """Remove the shift of a head that was replaced."""
    for name in (SHIFT, STD):
        vars(model.config).pop(name, None)


def save_beside_adapter(model: Model, folder: Path) -> None:
    """Write the shift, if the model has one, into an adapter's folder."""
    values = {name: getattr(model.config, name, None) for name in (SHIFT, STD)}
    if values[SHIFT] is not None:
        write_json(folder / SHIFT_FILE, values)


def read_beside_adapter(model: Model, folder: Path) -> None:
    """Give a model with an adapter the shift in the adapter's folder, not its base's."""
    forget_shift(model)
    if values := read_json(folder / SHIFT_FILE):
        keep_shift(model, values[SHIFT], values[STD])


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, under autocast too, which would round to 16 bit."""

    def forward(self, hidden: Tensor) -> Tensor:
        """As `nn.Linear`'s."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def compute_in_float32(head: Any) -> None:
    """Make a linear head, whatever its weights' dtype, a `Float32Linear`."""
    if type(head) is nn.Linear:
        head.__class__ = Float32Linear


def score_head(model: Model) -> nn.Linear:
    """The scalar head of a sequence classifier; InputError if it has none."""
    head = getattr(model, "score", None)
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapter]
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise InputError(
            f"{type(model).__name__} has no scalar head `score`. A reward or value model is an "
            "AutoModelForSequenceClassification with num_labels=1, as `rm` trains it."
        )
    return head
