"""Warnings of the libraries that are known to be harmless here. Anything else still shows."""

import logging
import os
import re
import warnings

# Tokenizers warn about forks of data workers, and fall back to one thread by themselves.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

HARMLESS = (
    # TRL's own option names, deprecated by newer transformers, renamed alike in every TRL release.
    r".*gradient_checkpointing.* is deprecated",
    # bitsandbytes, on import: an optional kernel package for CPU.
    r"Failed to load CPU gemm_4bit_forward",
    # CPU machines: pinned memory is an option for accelerators.
    r".*pin_memory.* argument is set as true but no accelerator is found",
    # Trainer aligning pad / EOS ids of a model's config with the tokenizer's: what we want.
    r".*The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",
    # TRL's packing "wrapped" attends across documents on purpose, as GPT does.
    r".*[Pp]adding-free.*|.*packing.*flash_attention.*",
    r".*torchvision \(not installed\)",
    r".*You are sending unauthenticated requests to the HF Hub",
)
_PATTERN = re.compile("|".join(f"(?:{text})" for text in HARMLESS), re.DOTALL)


class _Harmless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _PATTERN.match(record.getMessage())


def silence_harmless_warnings() -> None:
    """Hide the known ones, from the warnings module and from the libraries' loggers."""
    for text in HARMLESS:
        warnings.filterwarnings("ignore", message=text)
    for name in ("transformers", "trl", "bitsandbytes", "accelerate", "peft", "datasets"):
        logger = logging.getLogger(name)
        for handler in [*logger.handlers, *logging.getLogger().handlers]:
            handler.addFilter(_Harmless())
        if not logger.handlers:
            logger.addFilter(_Harmless())
