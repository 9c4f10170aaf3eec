"""Merge an adapter into its base: a full model that needs neither peft nor the base."""

import os
from pathlib import Path

from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import CONFIG, WEIGHTS, Adapter, is_adapter
from trl_instruct.models.load import check_finished, merged
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.scalar_head import SHIFT_FILE


def merge(
    adapter: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "float32"
) -> Path:
    """Merge an adapter into its base in full precision; save the model and its tokenizer.

    Args:
        adapter: the adapter folder of a policy or of a reward model (whose shift is kept).
        output_dir: a new or empty folder.

    Returns:
        The folder, which plain transformers loads.

    Raises:
        InputError: no adapter there, an unfinished stage, or an output_dir that is not empty.
    """
    folder = Path(output_dir)
    if not is_adapter(adapter):
        raise InputError(
            f"{os.fspath(adapter)!r} is not an adapter's folder: there is no {CONFIG}. Give a "
            "folder that a stage with use_peft wrote."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {str(folder)!r} is not empty. Choose a new or empty folder.")
    check_finished(Path(adapter))
    tokenizer = load_tokenizer(adapter)
    model = merged(Adapter.read(adapter), ModelConfig(dtype=dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def merge_in_place(folder: Path, model_config: ModelConfig) -> None:
    """Replace the adapter in a finishing stage's folder by the full model, never quantised."""
    merged(Adapter.read(folder), model_config).save_pretrained(folder)
    for name in (CONFIG, WEIGHTS, SHIFT_FILE):
        (folder / name).unlink(missing_ok=True)
