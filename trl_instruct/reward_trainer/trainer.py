"""TRL's RewardTrainer with the paper's batch element: all comparisons of one prompt together."""

from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from trl import RewardTrainer

from trl_instruct.console import get_logger
from trl_instruct.data.ties import wins
from trl_instruct.errors import InputError
from trl_instruct.models.properties import disable_dropout, evaluating
from trl_instruct.models.resuming import ResumableTrainer
from trl_instruct.models.tokenizers import check_tokenizer
from trl_instruct.padding import LengthBatchSampler, pad_rows
from trl_instruct.reward_trainer.batches import RankingCollator, tokenize_pair, tokenize_ranking
from trl_instruct.reward_trainer.losses import pair_loss, pair_weights
from trl_instruct.reward_trainer.prefix import share_prefix, sharing_pays
from trl_instruct.reward_trainer.prefix_scores import shared_scores, sharing_fault, skips_hidden
from trl_instruct.rewards.score_position import pad_token_of, row_scores, score_positions, scores_at
from trl_instruct.types import Tokenizer

logger = get_logger(__name__)

FORWARDS = ("shared_prefix", "grouped", "pairs")
NO_RESPONSE = -100  # in predictions, as transformers pads them
# Rankings of a stream that are read ahead to find a long one for the check at the start.
READ_AHEAD = 64


class RankingRewardTrainer(ResumableTrainer, RewardTrainer):
    """Reward model from K-way rankings (InstructGPT 3.5): K completions for C(K,2) comparisons.

    The batch size counts prompts. Rankings are records with `prompt`, `responses`, `ranks` and
    optionally `weight`, from `load_rankings`; pairs (`prompt`, `chosen`, `rejected`) train as in
    TRL. All arguments are TRL's. Our `RewardConfig` adds the options for rankings; with TRL's
    config as `args` they have the same defaults:

    - `forward`, also an argument: "shared_prefix" computes a prompt once for all its responses,
      "grouped" once per response, "pairs" computes both responses of every comparison, as TRL does.
      All give the same loss. Before the first step, shared and separate rows are compared; a model
      that cannot share a prefix gets "grouped", as does a batch for which that is less work.
    - `average_over`, `ties`, `batch_by_length`.

    Predictions, also for `compute_metrics`, have one row of K scores per ranking, in the order of
    its responses, padded with -100.

    A response that exceeds `max_length` with its prompt is left out of its ranking and counted in
    `overlong`; a ranking without comparisons is left out. With `truncate_prompt` the prompt first
    loses its beginning; `truncated` counts these rankings. Weights are scaled to mean 1 over the
    dataset. (In a stream nothing is counted in advance, and weights are not scaled.)
    """

    _signature_columns: list[str]

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Tokenizer | None = None,
        *,
        forward: str | None = None,
        **kwargs: Any,
    ):
        self.forward = str(forward or getattr(args, "forward", FORWARDS[0]))
        if self.forward not in FORWARDS:
            raise InputError(f"forward={self.forward!r}; one of {', '.join(FORWARDS)} is needed.")
        self.average_over: str = getattr(args, "average_over", "prompts")
        self.ties: str = getattr(args, "ties", "drop")
        self.overlong = self.truncated = 0
        self._probe: list[list[int]] = []
        self._checked = False
        config = None if isinstance(model, str) else model.config.get_text_config()
        self._own_pad_token = config and config.pad_token_id
        data = data_collator, train_dataset, eval_dataset
        super().__init__(model, args, *data, processing_class, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)  # TRL's misses rates outside nn.Dropout (OPT)
        if data_collator is None:
            pad = self.processing_class.pad_token_id
            self.data_collator = RankingCollator(pad, self.args.pad_to_multiple_of)
        self._drop_pad_token()

    def _drop_pad_token(self) -> None:
        """If pad == eos, the model's config gets no pad token, so the score is read at the EOS.

        TRL and transformers set it when the trainer is built and when it starts. An adapter is
        saved without a config, so it trains with the pad token that its base has.
        """
        if self.processing_class.pad_token_id == self.processing_class.eos_token_id:
            own = self._own_pad_token if isinstance(self.model, PeftModel) else None
            self.model.config.get_text_config().pad_token_id = own

    def restore(self) -> None:
        """As in `ResumableTrainer`, when the training starts."""
        super().restore()
        self._drop_pad_token()

    def _prepare_dataset(
        self, dataset: Any, processing_class: Tokenizer, args: Any, name: str
    ) -> Any:
        columns = dataset.column_names or list(next(iter(dataset)))
        if "longest" in columns:  # prepared before
            return dataset
        if "responses" not in columns:
            return self._prepare_pairs(dataset, processing_class, args, name)
        tokenize = partial(
            tokenize_ranking,
            tokenizer=check_tokenizer(processing_class, "processing_class"),
            max_length=args.max_length,
            truncate_prompt=getattr(args, "truncate_prompt", False),
            ties=self.ties,
        )
        options = {"with_indices": True, "remove_columns": columns}
        if isinstance(dataset, IterableDataset):
            return self._prepare_stream(dataset.map(tokenize, **options))
        options |= {"num_proc": args.dataset_num_proc, "desc": f"Tokenizing {name} dataset"}
        with PartialState().main_process_first():
            dataset = dataset.map(tokenize, **options)
        if name == "train":
            self.overlong += sum(dataset["overlong"])
            self.truncated += sum(dataset["truncated"])
        kept = [row for row, count in enumerate(dataset["comparisons"]) if count]
        dataset = dataset if len(kept) == len(dataset) else dataset.select(kept)
        if len(dataset):
            longest = dataset["longest"][:]
            self._probe_with([dataset[longest.index(max(longest))]])
        return self._scale_weights(dataset)

    def _prepare_pairs(self, dataset: Any, *given: Any) -> Any:
        """TRL's own preparation; it leaves overlong pairs out."""
        if {"prompt", "chosen", "rejected"} <= set(dataset.column_names or ()):
            tokenize = partial(tokenize_pair, tokenizer=given[0])
            columns = ["prompt", "chosen", "rejected"]
            dataset = dataset.map(tokenize, with_indices=True, remove_columns=columns)
        prepared = super()._prepare_dataset(dataset, *given)
        if not isinstance(dataset, IterableDataset):
            self.overlong += len(dataset) - len(prepared)
        return prepared

    def _prepare_stream(self, dataset: IterableDataset) -> IterableDataset:
        """Filter tokenized rankings of a stream, which cannot be counted in advance."""
        if self.average_over == "pairs":
            raise InputError(
                "average_over='pairs' needs the number of all pairs, which is unknown in a stream. "
                "Load the rankings with streaming=False, or average over prompts."
            )
        dataset = dataset.filter(lambda record: record["comparisons"] > 0)
        self._probe_with(list(dataset.take(READ_AHEAD)))
        return dataset

    def _probe_with(self, records: list[dict[str, Any]]) -> None:
        """Choose the longest ranking so far for the check of the model."""
        for record in records:
            if record["longest"] > max(map(len, self._probe), default=0):
                self._probe, self._checked = record["response_ids"], False

    def _scale_weights(self, dataset: Any) -> Any:
        """Scale weights to average over prompts or pairs; no column if all are equal."""
        weights = torch.tensor(dataset["weight"][:], dtype=torch.float64)
        if self.average_over == "pairs":
            weights = weights * torch.tensor(dataset["comparisons"][:])
        dataset = dataset.remove_columns("weight")
        if len(weights.unique()) < 2:
            return dataset
        return dataset.add_column("weight", (weights / weights.mean()).tolist())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [c for c in ("response_ids", "ranks", "weight") if c not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *ours]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args, dataset = self.args, self.train_dataset
        if (
            "longest" not in (dataset.column_names or ())
            or args.train_sampling_strategy != "random"
            or not getattr(args, "batch_by_length", True)
        ):
            return super()._get_train_sampler(train_dataset)
        return LengthBatchSampler(
            dataset["length" if self.forward == "shared_prefix" else "longest"][:],
            args.train_batch_size * args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ranked = self._rankings_loss if "ranks" in inputs else self._trl_loss
        loss, outputs = ranked(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def _trl_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """TRL's loss on pairs, with scores read at the same position as in use."""
        bare = self.accelerator.unwrap_model(model)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with scores_at(bare, score_positions(ids, mask, pad_token_of(bare)), ids.shape[1]):
            loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
            self._metrics[self._mode][name].pop()  # TRL's, the mean of this batch
        table = outputs["logits"].detach().squeeze(-1).float().view(2, -1).T
        self._log_scores(table, torch.tensor([[1, 2]], device=ids.device).expand_as(table))
        return loss, outputs

    def _rankings_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        ranks, ids, mask = inputs["ranks"], inputs["input_ids"], inputs["attention_mask"]
        weights = pair_weights(ranks, inputs.get("weight"), ties=self.ties)
        center = self.args.center_rewards_coefficient or 0.0
        bare = self.accelerator.unwrap_model(model)
        table = torch.zeros(ranks.shape, device=ids.device)
        if self.forward == "pairs":
            rows, pairs = _pair_rows(ranks, weights), weights > 0
            scores, outputs = row_scores(model, bare, ids[rows], mask[rows])
            chosen, rejected = scores.float().chunk(2)
            loss = pair_loss(chosen, rejected, weights[pairs], center=center)
            responses = scores.new_zeros(len(ids)).index_put((rows,), scores.detach())
            table[ranks > 0] = responses.float()
        else:
            scores, outputs = self._response_scores(model, bare, inputs)
            table[ranks > 0] = scores.float()
            loss = pair_loss(table.unsqueeze(2), table.unsqueeze(1), weights, center=center)
        self._log_scores(table.detach(), ranks)
        if self._mode == "train":
            self._total_train_tokens += int(self.accelerator.reduce(mask.sum()))
        self._metrics[self._mode]["num_tokens"] = [self._total_train_tokens]
        # One row per ranking: evaluation counts the rows.
        outputs["logits"] = torch.where(ranks > 0, table, float(NO_RESPONSE))
        return loss, outputs

    def _response_scores(self, model: Any, bare: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Scores `(R,)` of all responses of the batch, and the model's output."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.forward == "shared_prefix" and not self._checked:
            self._check_sharing(model, bare)
        if self.forward == "shared_prefix":
            shared = share_prefix(ids, mask.sum(dim=1), (inputs["ranks"] > 0).sum(dim=1))
            shape, hidden = shared.segments.shape, bare.config.get_text_config().hidden_size
            if skips_hidden(bare, shape[1]) or sharing_pays(shape, ids.shape, hidden):
                columns = score_positions(ids, mask, pad_token_of(bare))
                return shared_scores(model, bare, shared, columns, self._dtype(bare))
        return row_scores(model, bare, ids, mask)

    def _check_sharing(self, model: Any, bare: Any) -> None:
        """Check with the longest ranking; "grouped" if the model cannot share a prefix."""
        self._checked = True
        device = self.accelerator.device
        ids = pad_rows(self._probe, self.processing_class.pad_token_id).to(device)
        lengths = torch.tensor([len(row) for row in self._probe], device=device)
        with evaluating(model):
            fault = sharing_fault(model, bare, ids, lengths, self._dtype(bare))
        found = self.accelerator.gather(torch.tensor([int(fault is not None)], device=device))
        if found.any():  # all processes do the same
            self.forward = "grouped"
            if self.accelerator.is_main_process:
                logger.warning(
                    "forward='shared_prefix' is not possible with this "
                    f"{type(bare).__name__}: {fault or 'another process found a difference'}. Each "
                    "response gets its own copy of the prompt (forward='grouped')."
                )

    def _dtype(self, bare: Any) -> torch.dtype:
        """The dtype in which the model computes attention."""
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else bare.dtype

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_scores(self, scores: Tensor, ranks: Tensor) -> None:
        """The metrics of TRL's RewardTrainer, whatever the size of the batches.

        TRL logs the mean of a list: it gets a value per comparison or response, not per batch. Rows
        that processes repeat to fill the last batch count once.
        """
        rows = self.accelerator.pad_across_processes(torch.stack([scores, ranks], dim=2), dim=1)
        scores, ranks = self.accelerator.gather_for_metrics(rows).unbind(dim=2)
        better, given = pair_weights(ranks) > 0, scores[ranks > 0]
        margins = (scores.unsqueeze(2) - scores.unsqueeze(1))[better]
        metrics = self._metrics[self._mode]
        metrics["mean_reward"] += given.tolist()
        metrics["min_reward"] = [min(metrics["min_reward"] + [given.min().item()])]
        metrics["max_reward"] = [max(metrics["max_reward"] + [given.max().item()])]
        if len(margins):
            metrics["accuracy"] += wins(0, margins, ties="half").tolist()
            metrics["margin"] += margins.tolist()


def _pair_rows(ranks: Tensor, weights: Tensor) -> Tensor:
    """The responses of N comparisons as rows of the batch, `(2 N,)`: better ones, then worse."""
    row = torch.zeros_like(ranks)
    row[ranks > 0] = torch.arange(int((ranks > 0).sum()), device=ranks.device)
    both = row.unsqueeze(2).expand_as(weights), row.unsqueeze(1).expand_as(weights)
    return torch.cat([rows[weights > 0] for rows in both])
