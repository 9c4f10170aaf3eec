"""TRL's RewardTrainer with the paper's batch element: all comparisons of one prompt together."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import RewardTrainer

from trl_instruct.losses import ranking_loss
from trl_instruct.masking import right_padded_mask
from trl_instruct.models import check_tokenizer
from trl_instruct.rewards import cut_prompt, pad_rows, token_ids


class RankingRewardTrainer(RewardTrainer):
    """Reward model from K-way rankings (InstructGPT 3.5): K forward passes for C(K,2) comparisons.

    The batch is counted in prompts. Rankings are records with `prompt`, `responses` and `ranks`, as
    `load_rankings` gives them; pairs (`prompt`, `chosen`, `rejected`) train as in TRL. All
    arguments are TRL's.

    A response longer than `max_length` is left out of its ranking and counted in `overlong`; a
    ranking with less than two responses left is left out. With `truncate_prompt` in the arguments
    the prompt loses its beginning first, in `truncated` rankings.
    """

    _signature_columns: list[str]

    def __init__(
        self,
        *args: Any,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        self.overlong = self.truncated = 0
        if "responses" in train_dataset.column_names:
            tokenizer = check_tokenizer(processing_class, "processing_class")
            kwargs.setdefault("data_collator", RankingCollator(tokenizer.pad_token_id))
        super().__init__(
            *args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: Any, name: str
    ) -> Dataset:
        if "responses" not in dataset.column_names:
            before = len(dataset)
            dataset = super()._prepare_dataset(dataset, processing_class, args, name)
            self.overlong += before - len(dataset)
            return dataset

        def tokenize(record: dict[str, Any]) -> dict[str, Any]:
            rows = [
                token_ids(record["prompt"], response, processing_class)
                for response in record["responses"]
            ]
            whole = len(rows[0])
            if args.max_length is not None and getattr(args, "truncate_prompt", False):
                rows = cut_prompt(
                    rows, record["prompt"], processing_class, max_length=args.max_length
                )
            fits = [args.max_length is None or len(row) <= args.max_length for row in rows]
            return {
                "response_ids": [row for row, fit in zip(rows, fits, strict=True) if fit],
                "ranks": [r for r, fit in zip(record["ranks"], fits, strict=True) if fit],
                "truncated": len(rows[0]) < whole,
            }

        total = sum(map(len, dataset["responses"]))
        dataset = dataset.map(tokenize, remove_columns=dataset.column_names, desc="tokenizing")
        self.overlong += total - sum(map(len, dataset["ranks"]))
        self.truncated += sum(dataset["truncated"])
        dataset = dataset.remove_columns("truncated")
        return dataset.filter(lambda record: len(set(record["ranks"])) > 1)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, "response_ids", "ranks"}]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if "ranks" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        ranks = inputs.pop("ranks")
        outputs = model(**inputs, use_cache=False)
        scores = torch.zeros(ranks.shape, device=ranks.device, dtype=torch.float32)
        scores[ranks > 0] = outputs.logits.squeeze(-1).float()
        loss = ranking_loss(scores, ranks)
        self._log_scores(scores.detach(), ranks)
        return (loss, outputs) if return_outputs else loss

    def _log_scores(self, scores: Tensor, ranks: Tensor) -> None:
        """The metrics of TRL's RewardTrainer, over all comparisons of the batch."""
        better = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & (ranks > 0).unsqueeze(2)
        margins = (scores.unsqueeze(2) - scores.unsqueeze(1))[better]
        given = scores[ranks > 0]
        measured = {
            "accuracy": (margins > 0).float().mean(),
            "margin": margins.mean(),
            "min_reward": given.min(),
            "mean_reward": given.mean(),
            "max_reward": given.max(),
        }
        mode = "train" if self.model.training else "eval"
        for name, value in measured.items():
            self._metrics[mode][name].append(self.accelerator.reduce(value, "mean").item())


@dataclass
class RankingCollator:
    """A batch of B rankings with R responses in all.

    input_ids, attention_mask `(R, T)`, padded on the right; ranks `(B, K)`, 0 where a ranking has
    fewer than K responses.
    """

    pad_token_id: int

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for record in records for row in record["response_ids"]]
        ids = pad_rows(rows, self.pad_token_id)
        mask = right_padded_mask(torch.tensor([len(row) for row in rows]), ids.shape[1])
        ranks = pad_rows([record["ranks"] for record in records], 0)
        return {"input_ids": ids, "attention_mask": mask.long(), "ranks": ranks}
