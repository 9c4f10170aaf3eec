"""A text classifier as a reward: how sure it is of a label (sentiment, toxicity, ...)."""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_instruct.errors import InputError
from trl_instruct.models.properties import context_length, model_name
from trl_instruct.rewards.function import Texts, as_text
from trl_instruct.rewards.score_position import batched_logits
from trl_instruct.types import Model, Tokenizer

MEASURES = ("probability", "logit", "log_odds")


class ClassifierReward:
    """Scores by the labels of a sequence classifier, with its own tokenizer.

    score = sum over the labels of weight * measure, where the measure of a label is its
    "probability" (softmax; sigmoid if the model's problem_type is multi_label_classification), its
    "logit", or its "log_odds", log(p / (1 - p)).

    The classifier reads prompt + completion (messages joined by newlines) with the special tokens
    it was trained with. Texts beyond its context are cut from the left and counted in `truncated`.

    Args:
        model: a Hub id, a folder, or a loaded classifier.
        labels: a label's name, or weights by name; names as in the model's `id2label`.
        tokenizer: the classifier's, if it is not in the model's folder.
        with_prompt: if False, the classifier reads only the completion.
        batch_size: texts per forward pass.

    Raises:
        InputError: an unknown label or measure.
    """

    def __init__(
        self,
        model: str | Model,
        labels: str | Mapping[str, float],
        *,
        measure: Literal["probability", "logit", "log_odds"] = "logit",
        tokenizer: Tokenizer | None = None,
        with_prompt: bool = True,
        batch_size: int = 64,
    ):
        if measure not in MEASURES:
            raise InputError(f"measure is {measure!r}; one of {', '.join(MEASURES)} is needed.")
        self.tokenizer = copy.copy(tokenizer or AutoTokenizer.from_pretrained(model_name(model)))
        self.tokenizer.truncation_side = "left"
        if not isinstance(model, torch.nn.Module):
            model = AutoModelForSequenceClassification.from_pretrained(model)
        self.model: Any = model.eval().requires_grad_(False)
        limits = (context_length(self.model), self.tokenizer.model_max_length)
        self.context = min(limit for limit in limits if limit is not None)
        self.weights = _weights({labels: 1.0} if isinstance(labels, str) else labels, model)
        self.measure, self.with_prompt, self.batch_size = measure, with_prompt, batch_size
        self.__name__ = f"{model_name(model)} {labels}"
        self.truncated = 0

    def to(self, device: torch.device) -> None:
        """Move the model to the device."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> list[float]:
        """Scores of the completions, one float each."""
        pairs = zip(prompts, completions, strict=True)
        rows = [self._ids(prompt, completion) for prompt, completion in pairs]
        filler = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        logits = batched_logits(self.model, rows, filler, self.batch_size).double()
        # A single label excludes no other: its probability is the sigmoid, too.
        one_of_many = self.model.config.problem_type != "multi_label_classification"
        together = one_of_many and logits.shape[1] > 1
        return (_measured(logits, self.measure, together) @ self.weights).tolist()

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        """Tokens of a text, cut from the left to the context."""
        text = as_text(completion)
        if self.with_prompt:
            join = "" if isinstance(prompt, str) else "\n"
            text = as_text(prompt) + join + text
        ids = self.tokenizer(text, truncation=False)["input_ids"]
        if len(ids) <= self.context:
            return ids
        self.truncated += 1
        return self.tokenizer(text, truncation=True, max_length=self.context)["input_ids"]


def _weights(labels: Mapping[str, float], model: Model) -> Tensor:
    """Weight of each of the model's labels, `(L,)` float64."""
    known = {str(name): int(index) for index, name in model.config.id2label.items()}
    unknown = [name for name in labels if name not in known]
    if unknown or not labels:
        raise InputError(
            f"The classifier {model_name(model)!r} has the labels {', '.join(known)}; given: "
            f"{', '.join(map(repr, unknown)) or 'none'}."
        )
    weights = torch.zeros(len(known), dtype=torch.float64)
    for name, weight in labels.items():
        weights[known[name]] = weight
    return weights


def _measured(logits: Tensor, measure: str, together: bool) -> Tensor:
    """The measure of each label, `(B, L)`; `together`: whether one label excludes the others."""
    if measure == "probability":
        return logits.softmax(dim=-1) if together else logits.sigmoid()
    if measure == "logit" or not together:
        return logits
    # log p - log(1 - p), where 1 - p comes from the other labels: exact even if p is near 1
    others = torch.eye(logits.shape[-1], dtype=torch.bool).unsqueeze(0)
    rest = logits.unsqueeze(1).masked_fill(others, -torch.inf).logsumexp(dim=-1)
    return logits - rest
