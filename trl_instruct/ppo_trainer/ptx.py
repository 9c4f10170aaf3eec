"""PPO-ptx: pretraining text mixed into the updates, against the alignment tax (InstructGPT 3.5)."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.types import Tokenizer


class PretrainingRows:
    """Endless full rows, each of `length` tokens: the texts end to end, with an EOS after each.

    A `Dataset` of texts (column `text`) is reshuffled in every pass; a stream keeps its order.
    """

    def __init__(
        self, texts: Dataset | IterableDataset, tokenizer: Tokenizer, *, length: int, seed: int
    ):
        self.texts, self.tokenizer, self.length, self.seed = texts, tokenizer, length, seed
        self.passes = 0
        self.left: list[int] = []
        self.stream = self._stream()
        self.tokens = self._tokens()

    def _stream(self) -> IterableDataset:
        if isinstance(self.texts, IterableDataset):
            # A copy: a stream that was resumed would start every pass where it was resumed.
            return self.texts.skip(0)
        return self.texts.shuffle(seed=self.seed + self.passes).to_iterable_dataset()

    def _tokens(self) -> Iterator[list[int]]:
        """The tokens of one text after another."""
        while True:
            found = False
            for record in self.stream:
                found = True
                yield self.tokenizer(record["text"] + self.tokenizer.eos_token)["input_ids"]
            if not found and not self.left:
                raise InputError("The pretraining texts for PPO-ptx hold no text.")
            self.passes += 1
            self.stream = self._stream()

    def take(self, count: int) -> Tensor:
        """The next rows: `(count, length)` token ids."""
        while len(self.left) < count * self.length:
            self.left += next(self.tokens)
        taken, self.left = self.left[: count * self.length], self.left[count * self.length :]
        return torch.tensor(taken).view(count, self.length)

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON."""
        return {"passes": self.passes, "left": [*self.left], "stream": self.stream.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.passes, self.left = state["passes"], [*state["left"]]
        self.stream = self._stream()
        self.stream.load_state_dict(state["stream"])
        self.tokens = self._tokens()


def pretraining_rows(
    texts: Dataset | IterableDataset | None, tokenizer: Tokenizer, args: PPOConfig
) -> PretrainingRows:
    """The pretraining rows of a run with `ptx_coef`; InputError if it has no texts."""
    if texts is None:
        raise InputError(
            f"ptx_coef is {args.ptx_coef}, but there is no pretraining text: give ptx_dataset, or "
            "ptx_dataset_name, with a column `text`; or set ptx_coef to 0 for plain PPO."
        )
    return PretrainingRows(texts, tokenizer, length=args.ptx_max_length, seed=args.seed)
