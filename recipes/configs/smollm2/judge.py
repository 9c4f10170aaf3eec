"""A judge that nothing is trained on: how much an answer says what the reference answer says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

# From `make weights`; without it, from the Hub.
FOLDER = Path(__file__).parents[3] / "runs" / "weights" / "minilm"
MODEL = str(FOLDER) if FOLDER.is_dir() else "sentence-transformers/all-MiniLM-L6-v2"


class Likeness:
    """Cosine of two answers' sentence embeddings by all-MiniLM-L6-v2 (Reimers and Gurevych 2019).

    -1 to 1: 1 says the same, about 0 has nothing to do with it. The reference is the prompts'
    column `completion`, or `output` as in Alpaca's files; prompts without one are not judged.
    """

    model: Any = None

    def embed(self, texts: list[str]) -> torch.Tensor:
        """Mean of the last hidden states of each text's tokens, of length 1: `(len(texts), H)`."""
        rows = self.tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = self.model(**rows).last_hidden_state
        mask = rows["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(means, dim=1)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion: Sequence[str] | None = None,
        output: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        references = completion or output
        if references is None:
            return [None for _ in completions]
        if self.model is None:
            self.model = AutoModel.from_pretrained(MODEL).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        given, wanted = self.embed(list(completions)), self.embed(list(references))
        return (given * wanted).sum(dim=1).tolist()


likeness = Likeness()
