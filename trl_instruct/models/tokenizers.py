"""The tokenizer of a model, with what all stages rely on."""

import copy
from pathlib import Path

from transformers import AutoTokenizer

from trl_instruct.errors import InputError
from trl_instruct.models.properties import ModelSource, load_fault, model_name
from trl_instruct.types import Model, Tokenizer


def load_tokenizer(
    source: ModelSource,
    given: Tokenizer | None = None,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    special_tokens: dict[str, str] | None = None,
) -> Tokenizer:
    """A model's tokenizer, padding on the left, or a copy of the given one; with EOS and pad."""
    path = model_name(source)
    if given is not None:
        return check_tokenizer(copy.deepcopy(given), path, special_tokens)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, padding_side="left", revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever its files make the libraries raise
        raise InputError(
            f"No tokenizer could be loaded from {path!r}: {load_fault(path, error)} Give a Hub "
            "id or a folder that holds one, or pass processing_class=."
        ) from error
    return check_tokenizer(tokenizer, path, special_tokens)


def check_tokenizer(
    tokenizer: Tokenizer, name: str, special_tokens: dict[str, str] | None = None
) -> Tokenizer:
    """The tokenizer with pad and `special_tokens`; InputError for unknown ones, or without EOS."""
    for role, token in (special_tokens or {}).items():
        if token not in tokenizer.get_vocab():
            raise InputError(
                f"{role} is {token!r}, but the tokenizer of {name!r} has no such token. Give one "
                "of its vocabulary."
            )
        setattr(tokenizer, role, token)
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {name!r} has no EOS token, so no completion can end. Set one from "
            "its vocabulary (tokenizer.eos_token = ...; tokenizer.save_pretrained(...); in sft and "
            "rm also the option eos_token)."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def install_chat_template(tokenizer: Tokenizer, path: str) -> None:
    """Set the tokenizer's chat template from a Jinja file, as TRL's chat_template_path does."""
    file = Path(path)
    if file.suffix not in (".jinja", ".j2"):
        return  # a model: the trainer copies its template and tokens
    if not file.is_file():
        raise InputError(f"chat_template_path {path!r}: there is no such file.")
    tokenizer.chat_template = file.read_text(encoding="utf-8")


def check_vocabulary(tokenizer: Tokenizer, model: Model) -> None:
    """InputError if the tokenizer has ids that the model has no embedding for."""
    embedding = model.get_input_embeddings()
    # An adapter's wrapper has only the weight, which in turn is empty where ZeRO-3 shards it.
    rows = getattr(embedding, "num_embeddings", len(embedding.weight))
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= rows:
        raise InputError(
            f"The tokenizer's last token, {token!r}, has the id {last}, but the model from "
            f"{model_name(model)!r} has a vocabulary of {rows}. The tokenizer is another model's: "
            "give this model's own (processing_class)."
        )


def check_same_tokens(one: Tokenizer, other: Tokenizer, names: tuple[str, str]) -> None:
    """InputError if two tokenizers of one base, called `names`, give a token different ids."""
    known = other.get_vocab()
    for token, number in one.get_vocab().items():
        if known.get(token, number) != number:
            raise InputError(
                f"{names[0]} and {names[1]} are adapters over one base, but with different "
                f"tokenizers: the token {token!r} is {number} in the first and {known[token]} in "
                "the second, so one of them is not the base's. Give each the tokenizer that it was "
                "trained with."
            )
