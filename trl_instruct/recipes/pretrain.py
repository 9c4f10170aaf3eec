"""Stage 0: a small base model from scratch, if no pretrained one is available."""

import json
import os
from pathlib import Path
from typing import Any

import transformers
import yaml
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from trl import ModelConfig

from trl_instruct.configs import PretrainConfig
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import load_texts
from trl_instruct.errors import InputError, kind_of
from trl_instruct.files import METRICS_FILE
from trl_instruct.models.properties import context_length
from trl_instruct.models.resuming import ResumableTrainer
from trl_instruct.padding import length_batches
from trl_instruct.recipes.options import data_of, option_errors, stage_options
from trl_instruct.recipes.publishing import without_secrets
from trl_instruct.recipes.stage import StageResult, run_stage

EOS, PAD = "<|endoftext|>", "<|pad|>"
TINY_OPTIONS = Path(__file__).parents[1] / "tiny" / "pretrain.yaml"


def pretrain(
    dataset: Any,
    output_dir: str | os.PathLike | None = None,
    *,
    config: PretrainConfig | None = None,
    **options: Any,
) -> StageResult:
    """Train a byte-level BPE tokenizer and a language model on plain text.

    Args:
        dataset: records with a `text` column, named as in `sft`.
        config, options: `PretrainConfig` or its fields (architecture, vocab_size, ...).

    Raises:
        InputError: bad records, an unknown architecture or option, an output_dir that is taken.
    """
    config, _ = stage_options(
        PretrainConfig, config, None, output_dir, dataset, options, trains=False
    )
    reading = Reading.of(config)
    texts = load_texts(data_of(dataset, config), config.dataset_train_split, reading=reading)
    with run_stage("pretrain", config, ModelConfig()) as run:
        tokenizer = train_tokenizer(texts["text"][:], config.vocab_size, config.max_length)
        model = model_from_scratch(config, tokenizer)
        rows = tokenize_texts(texts, tokenizer, config)
        with option_errors():
            trainer = ResumableTrainer(
                model=model,
                args=without_secrets(config),
                train_dataset=rows,
                processing_class=tokenizer,
                data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
            )
        output = run.train(trainer, {"loss": "loss"})
        parameters = sum(p.numel() for p in model.parameters())
        return run.finish(trainer, {"train_loss": output.training_loss, "parameters": parameters})
    return run.earlier()


def train_tokenizer(
    texts: list[str], vocab_size: int, max_length: int
) -> transformers.PreTrainedTokenizerBase:
    """Byte-level BPE (like GPT-2's) with EOS and pad tokens, which count in `vocab_size`."""
    tokenizer = ByteLevelBPETokenizer()
    # A text may hold several documents; no merges are learnt from the EOS between them.
    documents = (document for text in texts for document in text.split(EOS))
    given: Any = {"special_tokens": [EOS, PAD], "min_frequency": 0, "show_progress": False}
    tokenizer.train_from_iterator(documents, vocab_size, **given)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def tokenize_texts(
    texts: Dataset, tokenizer: transformers.PreTrainedTokenizerBase, config: PretrainConfig
) -> Dataset:
    """Token rows with an EOS after each text: packed into full blocks, or one text per row."""

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        rows = tokenizer([text + tokenizer.eos_token for text in batch["text"]])["input_ids"]
        if config.packing:
            stream, size = [token for row in rows for token in row], config.max_length
            starts = range(0, len(stream), size)
            return {"input_ids": [stream[start : start + size] for start in starts]}
        longest = max(rows, key=len)
        if len(longest) > config.max_length:
            raise InputError(
                f"A text is {len(longest)} tokens long and max_length is {config.max_length}: "
                f"{tokenizer.decode(longest)[:60]!r}... Raise max_length, or set packing."
            )
        return {"input_ids": rows}

    columns = texts.column_names
    rows = texts.map(tokenize, batched=True, remove_columns=columns, desc="tokenizing texts")
    if config.packing:
        return rows
    lengths = [len(row) for row in rows["input_ids"]]
    config.train_sampling_strategy = "sequential"  # the order is set here
    return rows.select(length_batches(lengths, config.train_batch_size, seed=config.seed))


def model_from_scratch(
    config: PretrainConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedModel:
    """A randomly initialised causal language model of the configured architecture."""
    kwargs = config.architecture_kwargs or {}
    with option_errors():
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    if not isinstance(kwargs, dict):
        raise InputError(f"architecture_kwargs is {kind_of(kwargs)}; {{field: value}} is needed.")
    defaults = _architecture(config)
    unknown = [name for name in kwargs if not hasattr(defaults, name)]
    if unknown:
        raise InputError(f"architecture_kwargs: {config.architecture} has no field {unknown[0]!r}.")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": None}
    whole = _architecture(config, **sizes, **special, **kwargs)
    model = transformers.AutoModelForCausalLM.from_config(whole)
    context = context_length(model)
    if context is not None and context < config.max_length:
        raise InputError(
            f"max_length is {config.max_length}, but the architecture's context is {context} "
            "tokens; lower max_length, or raise max_position_embeddings in architecture_kwargs."
        )
    return model


def _architecture(config: PretrainConfig, **fields: Any) -> transformers.PretrainedConfig:
    """The architecture's config with these fields, else its defaults."""
    try:
        return transformers.AutoConfig.for_model(config.architecture, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        if not fields:
            raise InputError(
                f"architecture {config.architecture!r} is not a model type of transformers; use "
                "llama, gpt2, gpt_neox, qwen3, opt, ..."
            ) from error
        raise InputError(f"architecture_kwargs: {' '.join(str(error).split())}") from error


def tiny_base(folder: Path, **options: Any) -> StageResult:
    """The embedded tiny default's base model: trained if it is missing, else reused."""
    if (folder / METRICS_FILE).is_file():
        return StageResult(folder)
    defaults = yaml.safe_load(TINY_OPTIONS.read_text(encoding="utf-8"))
    replaced = {"output_dir": str(folder), "overwrite_output_dir": True}  # if it was cut short
    return pretrain(defaults.pop("dataset_name"), **{**defaults, **options, **replaced})
