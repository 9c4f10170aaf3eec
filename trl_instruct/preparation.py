"""What the three calls do before they train: options, starting model and tokenizer, lengths."""

import copy
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_instruct.configs import RewardConfig, SFTConfig, StageConfig
from trl_instruct.errors import InputError
from trl_instruct.models import (
    ModelSource,
    base_for_adapter,
    check_finished,
    context_length,
    model_name,
)
from trl_instruct.options import Config, resolve
from trl_instruct.sources import name_of
from trl_instruct.stage import Stage
from trl_instruct.tokenizers import check_tokenizer, install_chat_template, load_tokenizer


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
    """The stage's options from either form, checked for what every stage (that trains) needs."""
    if output_dir is not None and config is None:
        options = {**options, "output_dir": output_dir}
    config, model_config = resolve(config_class, config, model_config, options)
    if output_dir is not None:
        config.output_dir = os.fspath(output_dir)
    if dataset is None:
        raise InputError("No dataset was given: set dataset_name to a file, a folder or a Hub id.")
    config.dataset_name = name_of(dataset) or config.dataset_name
    if trains:
        _check_trainable(config, model_config)
    return config, model_config


def _check_trainable(config: StageConfig, model_config: ModelConfig) -> None:
    """InputError where nothing could be trained, or on one of several GPUs alone."""
    frozen = model_config.load_in_8bit or model_config.load_in_4bit
    if frozen and not model_config.use_peft:
        raise InputError(
            "load_in_8bit and load_in_4bit freeze the weights, so there would be nothing to train. "
            "Set use_peft as well to train a LoRA adapter."
        )
    if config.n_gpu > 1:
        raise InputError(
            f"{config.n_gpu} GPUs are there and one process, which trains on one of them. Start it "
            "with accelerate launch (make LAUNCH='accelerate launch') to use all, or set "
            "CUDA_VISIBLE_DEVICES to the one to use."
        )
    if model_config.attn_implementation == "flex_attention" and config.device.type == "cpu":
        raise InputError(
            "attn_implementation is flex_attention, which torch gives no backward pass on CPU, so "
            "that nothing could be trained. Leave it out there; on a GPU it trains."
        )


def named_source(given: Any, config: StageConfig, option: str = "eval_dataset_name") -> Any:
    """A dataset from the argument or, by name, from the config; the config then names it."""
    if given is None:
        return getattr(config, option)
    setattr(config, option, name_of(given))
    return given


def starting_point(
    run: Stage, model: ModelSource | None, processing_class: PreTrainedTokenizerBase | None
) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """What to load the trained model from, and its tokenizer; the run's config names the model."""
    if model is None:
        raise InputError("No model was given: set model_name_or_path to a Hub id or a folder.")
    model_config = run.model_config
    model_config.model_name_or_path = model_name(model)
    run.check_folder()
    if isinstance(model, str | os.PathLike):
        check_finished(Path(model))
    if processing_class is not None:
        tokenizer = check_tokenizer(copy.deepcopy(processing_class), model_name(model))
    else:
        tokenizer = load_tokenizer(
            model,
            revision=model_config.model_revision,
            trust_remote_code=run.config.trust_remote_code,
        )
    template = getattr(run.config, "chat_template_path", None)
    if template is not None:
        install_chat_template(tokenizer, template)
    return base_for_adapter(model, run.base_folder, tokenizer, model_config), tokenizer


def within_context(max_length: int | None, model: PreTrainedModel) -> int | None:
    """`max_length`, or the model's context where that is shorter."""
    context = context_length(model)
    if context is None or max_length is None:
        return max_length
    return min(max_length, context)


def check_chat_template(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig | RewardConfig
) -> None:
    """InputError for messages that there is no chat template for."""
    known = tokenizer.chat_template or config.chat_template_path
    if not known and not isinstance(dataset[0]["prompt"], str):
        raise InputError(
            "The records are messages, but the tokenizer has no chat template. Set "
            "chat_template_path to a Jinja file or to a model that has one."
        )


def check_demonstrations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> int:
    """Demonstrations that max_length will cut; InputError where nothing but prompt is left."""
    check_chat_template(dataset, tokenizer, config)
    is_text = isinstance(dataset[0]["prompt"], str)
    if config.max_length is None or not (is_text or tokenizer.chat_template):
        return 0  # the trainer takes the template over later, so lengths are not known yet
    cut = 0
    for row, record in enumerate(dataset):
        prompt, completion = record["prompt"], record["completion"]
        if is_text:
            opening = tokenizer(prompt)
            whole = tokenizer(prompt + completion.removesuffix(tokenizer.eos_token))
        else:
            opening = tokenizer.apply_chat_template(prompt, return_dict=True)
            whole = tokenizer.apply_chat_template(prompt + completion, return_dict=True)
        if len(opening["input_ids"]) >= config.max_length:
            raise InputError(
                f"Demonstration {row + 1}: the prompt alone is {len(opening['input_ids'])} tokens "
                f"and max_length is {config.max_length}, so no completion would be learnt from. "
                "Raise max_length (the model's context is its limit), or shorten the prompt."
            )
        cut += len(whole["input_ids"]) + is_text > config.max_length  # text gets an EOS
    return cut
