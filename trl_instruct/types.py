"""Short names for the two types that most signatures have."""

from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Model", "Tokenizer"]
