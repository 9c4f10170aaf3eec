"""A reward model as a reward function."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from trl_instruct.models.processes import shared_out
from trl_instruct.models.properties import context_length, model_name
from trl_instruct.models.tokenizers import check_tokenizer
from trl_instruct.rewards.score_position import batched_logits
from trl_instruct.rewards.tokens import reward_rows, same_tokenizer
from trl_instruct.scalar_head import compute_in_float32, keep_shift, shift_of
from trl_instruct.types import Model, Tokenizer


class RewardModel:
    """A scalar sequence classifier as a reward function, with its own tokenizer.

    Prompt + completion is tokenised as in training by TRL's RewardTrainer: texts joined with EOS at
    the end, messages in the chat template. If the policy has the same tokenizer and chat template
    (`ids_are_of`), the model reads the sampled tokens, as in the paper. Texts longer than its
    context are cut from the left and counted in `truncated`. The shift in its config is subtracted:
    demonstrations score 0 on average. Where the score is read: `rewards/score_position.py`. It
    is called `name` in messages; by default as its model, an adapter as its base. With `shared`,
    all processes call it with the same texts, and each scores a part of them.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 64,
        name: str | None = None,
        shared: bool = False,
    ):
        self.model = model.eval().requires_grad_(False)
        compute_in_float32(getattr(model, "score", None))
        self.tokenizer = check_tokenizer(tokenizer, model_name(model))
        self.batch_size, self.__name__ = batch_size, name or model_name(model)
        self.reads_ids, self.truncated, self.shared = False, 0, shared

    def to(self, device: torch.device) -> None:
        """Move the model to the device."""
        self.model.to(device)

    def ids_are_of(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer of `completion_ids`: they are read if the model's own is the same."""
        self.reads_ids = same_tokenizer(tokenizer, self.tokenizer)

    @property
    def shift(self) -> float:
        """What is subtracted from the output of the model's head; 0 if none was measured."""
        return shift_of(self.model)

    def measure_shift(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> tuple[float, float]:
        """Set the shift at which these demonstrations score 0 on average (InstructGPT 3.5).

        Returns the mean and standard deviation of the model's scores without a shift.
        """
        scores = [score + self.shift for score in self(prompts, completions, **columns)]
        mean, std = statistics.fmean(scores), statistics.pstdev(scores)
        keep_shift(self.model, mean, std)
        return mean, std

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores of the completions, one float each."""
        known = completion_ids if self.reads_ids else None
        rows = reward_rows(prompts, completions, self.tokenizer, known, columns)
        context = context_length(self.model)
        if context is not None:
            self.truncated += sum(len(row) > context for row in rows)
            rows = [row[-context:] for row in rows]
        filler = self.tokenizer.pad_token_id

        def scores(rows: list[list[int]]) -> list[float]:
            return batched_logits(self.model, rows, filler, self.batch_size).squeeze(-1).tolist()

        found = shared_out(rows, scores) if self.shared else scores(rows)
        return [score - self.shift for score in found]
