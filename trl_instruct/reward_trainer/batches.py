"""Rankings as token rows, one per response, and batches of them."""

from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_instruct.data.rendering import render_all
from trl_instruct.data.sources import Record
from trl_instruct.errors import located
from trl_instruct.padding import pad_rows, right_padded_mask
from trl_instruct.rewards.tokens import cut_prompt
from trl_instruct.types import Tokenizer


def tokenize_ranking(
    record: Record,
    row: int,
    *,
    tokenizer: Tokenizer,
    max_length: int | None,
    truncate_prompt: bool = False,
    ties: str = "drop",
) -> dict[str, Any]:
    """A ranking, number `row` of all, as a reward model takes it: a row of ids per response.

    Columns: response_ids; ranks; weight; comparisons, their number; overlong, responses left out;
    truncated, whether the prompt was cut; longest and length, tokens of longest and shared row.
    """
    with located(f"Ranking {row + 1}"):
        rendered = render_all(record["prompt"], record["responses"], tokenizer, record)
    texts = [one.ids for one in rendered]
    whole = len(texts[0])
    if max_length is not None and truncate_prompt:
        texts = cut_prompt(texts, rendered[0].prompt, max_length=max_length)
    fits = [max_length is None or len(ids) <= max_length for ids in texts]
    kept = [ids for ids, fit in zip(texts, fits, strict=True) if fit]
    order = [rank for rank, fit in zip(record["ranks"], fits, strict=True) if fit]
    alike = takewhile(lambda tokens: len({*tokens}) == 1, zip(*kept, strict=False))
    weight = record.get("weight")
    return {
        "response_ids": kept,
        "ranks": order,
        "weight": 1.0 if weight is None else float(weight),
        "comparisons": sum(a != b or ties == "half" for a, b in combinations(order, 2)),
        "overlong": len(texts) - len(kept),
        "truncated": len(texts[0]) < whole,
        "longest": max(map(len, kept), default=0),
        "length": sum(map(len, kept)) - (len(kept) - 1) * len([*alike]),
    }


def tokenize_pair(record: Record, row: int, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """A pair as the ids that TRL's RewardTrainer takes."""
    pair = [record["chosen"], record["rejected"]]
    with located(f"Pair {row + 1}"):
        chosen, rejected = render_all(record["prompt"], pair, tokenizer, record)
    return {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}


@dataclass
class RankingCollator:
    """A batch of B rankings with R responses in all; pairs are collated by TRL.

    input_ids, attention_mask `(R, T)`, padded on the right; ranks `(B, K)`, 0 after a ranking's
    last response; weight `(B,)` if the rankings have one.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        if "response_ids" not in records[0]:
            return DataCollatorForPreference(self.pad_token_id, self.pad_to_multiple_of)(records)
        rows = [row for record in records for row in record["response_ids"]]
        ids = pad_rows(rows, self.pad_token_id)
        short = -ids.shape[1] % (self.pad_to_multiple_of or 1)
        ids = torch.nn.functional.pad(ids, (0, short), value=self.pad_token_id)
        mask = right_padded_mask(torch.tensor([len(row) for row in rows]), ids.shape[1])
        ranks = pad_rows([record["ranks"] for record in records], 0)
        batch = {"input_ids": ids, "attention_mask": mask.long(), "ranks": ranks}
        if "weight" in records[0]:
            batch["weight"] = torch.tensor([record["weight"] for record in records])
        return batch
