"""A penalty on following length, in training or after it: its table is in docs/reward_model.md.

python benchmarks/length_penalty.py ../shared/data   # 12 minutes of a core, after make bench-real

Trains a reward model of SmolLM2-135M on the AlpacaEval rankings of real_preferences.py, its loss
increased by |correlation of score and length| (ODIN, Chen et al. 2024, with weight 1): of a batch's
scores and token counts, each less its ranking's mean. Beside it stands the model that was trained
without, its scores less so much for each token. A model that is there is not trained again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from real_preferences import MODEL, RUNS, SETS, kept, ours
from torch import Tensor

from trl_instruct import load_reward, split_by_prompt
from trl_instruct.files import METRICS_FILE
from trl_instruct.intervals import show_interval
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.reward_trainer import evaluation, trainer

SET = SETS["AlpacaEval"]
PLAIN = RUNS / SET["file"] / "ours"
PENALISED = RUNS / SET["file"] / "length_penalty"
# What a token costs, in units of the plain model's score.
PRICES = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.0125, 0.015, 0.02)


def centred(values: Tensor, there: Tensor) -> Tensor:
    """Values `(B, K)` less the mean of their ranking; 0 where there is no response."""
    values = torch.where(there, values, 0.0)
    means = values.sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True)
    return torch.where(there, values - means, 0.0)


def with_penalty(real: Any) -> Any:
    """`RankingRewardTrainer._rankings_loss`, with |correlation of score and length| in the loss."""
    pair_loss = trainer.pair_loss

    def loss(self: Any, model: Any, inputs: dict[str, Tensor]) -> Any:
        there = inputs["ranks"] > 0
        counts = torch.zeros(there.shape)
        counts[there] = inputs["attention_mask"].sum(dim=1).float()
        lengths = centred(counts, there)

        def penalised(chosen: Tensor, rejected: Tensor, weights: Tensor, **options: Any) -> Tensor:
            scores = centred(chosen.squeeze(2), there)
            size = (scores.square().sum() * lengths.square().sum()).sqrt().clamp(min=1e-8)
            correlation = (scores * lengths).sum() / size
            return pair_loss(chosen, rejected, weights, **options) + correlation.abs()

        with mock.patch.object(trainer, "pair_loss", penalised):
            return real(self, model, inputs)

    return loss


def main() -> None:
    """Train what is missing; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("--bf16", action="store_true", help="as in real_preferences.py")
    given = parser.parse_args()
    for needed in (MODEL, given.data / f"{SET['file']}.jsonl.gz"):
        if not needed.exists():
            sys.exit(f"Missing {needed}: not measured. make weights, or give the data's folder.")
    train, test = split_by_prompt(kept(given.data, SET), 0.2)
    if not (PLAIN / METRICS_FILE).is_file():
        ours(train, test, PLAIN, given.bf16)
    if not (PENALISED / METRICS_FILE).is_file():
        kind = trainer.RankingRewardTrainer
        with mock.patch.object(kind, "_rankings_loss", with_penalty(kind._rankings_loss)):
            ours(train, test, PENALISED, given.bf16)
    tokenizer, held_out = load_tokenizer(PLAIN), evaluation.numbered(test)
    print("| reward model | accuracy (95 %) | score and length |\n|---|---|---|")
    for folder, prices in ((PLAIN, PRICES), (PENALISED, (0.0,))):
        reward = load_reward(folder, tokenizer, batch_size=8)
        measured = evaluation.evaluate_reward(reward, test, tokenizer)
        for price in prices:
            rows = zip(measured.scores, measured.lengths, strict=True)
            scores = [score - price * length for score, length in rows]
            pairs = evaluation.comparisons(held_out.rankings, scores, measured.lengths)
            accuracy = show_interval(pairs.accuracy(pairs.margins)._asdict())
            groups = held_out.prompt_numbers
            correlation = evaluation.within_prompt_correlation(scores, measured.lengths, groups)
            less = f", less {price} a token" if price else ""
            print(f"| {folder.name}{less} | {accuracy} | {correlation:+.2f} |", flush=True)


if __name__ == "__main__":
    main()
