"""The token at which a sequence classifier's score is read, in training and in use.

transformers' classifiers apply their head `score` to every token and keep one number per row, that
of the last token that is not `config.pad_token_id`. With pad == eos this is the token before the
EOS. A model trained here with pad == eos therefore gets no pad token in its config: no token of a
row is padding, and the score is read at the EOS. Plain transformers then gives the same number for
a single row, and refuses a padded batch instead of reading another token. A model trained elsewhere
whose config has EOS as the pad token is read where it was trained, one token earlier.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trl_instruct.models.precision import autocast_of
from trl_instruct.models.properties import accepted, unwrapped
from trl_instruct.padding import pad_rows, right_padded_mask, similar_lengths
from trl_instruct.scalar_head import ScalarHead
from trl_instruct.types import Model


def score_positions(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None) -> Tensor:
    """Column at which each row's score is read, `(R,)`: its last token that is not padding.

    Ids and mask are `(R, T)`, padded on either side; the pad token is that of the model's config.
    """
    counts = attention_mask.bool()
    if pad_token_id is not None:
        counts = counts & (input_ids != pad_token_id)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * counts).amax(dim=1)


def scores_at(model: Any, columns: Tensor, width: int) -> contextlib.AbstractContextManager[None]:
    """Make the classifier's logits those of the given tokens, whatever it treats as padding.

    `columns` `(R,)` has the token of each row, `width` is T; a `score` on every token is needed.
    """

    def read(head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if logits.dim() != 3:
            return None
        # Counted from the right: prompt tuning adds virtual tokens in front.
        rows = torch.arange(len(columns), device=logits.device)
        scores = logits[rows, columns - width]
        # The same at every token: the classifier may read any of them.
        return scores.unsqueeze(1).expand_as(logits)

    return on_head(model, read)


@contextlib.contextmanager
def on_head(model: Any, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        yield
        return
    config = model.config.get_text_config()
    pad_token_id = config.pad_token_id
    if pad_token_id is None:
        config.pad_token_id = 0  # a batch needs one; the token that it selects is not used
    try:
        with head.register_forward_hook(hook):
            yield
    finally:
        config.pad_token_id = pad_token_id


def row_scores(model: Any, bare: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    """Scores `(R,)` of rows `(R, T)` in one pass, and the output; `bare`: the model, unwrapped."""
    tokens = {"input_ids": ids, "attention_mask": mask}
    with scores_at(bare, score_positions(ids, mask, pad_token_of(bare)), ids.shape[1]):
        outputs = model(**tokens, **accepted(unwrapped(bare), use_cache=False))
    return outputs.logits.squeeze(-1), outputs


def pad_token_of(model: Any) -> int | None:
    """The classifier's pad token, or None if it has none or reads the mask."""
    bare = unwrapped(model)
    return None if isinstance(bare, ScalarHead) else bare.config.get_text_config().pad_token_id


@torch.no_grad()
def batched_logits(model: Model, rows: list[list[int]], filler: int, batch_size: int) -> Tensor:
    """A classifier's logits for R lists of token ids, `(R, labels)` float32 on CPU."""
    logits = torch.zeros(len(rows), model.config.num_labels)
    for chosen in similar_lengths([len(row) for row in rows], batch_size):
        batch = [rows[row] for row in chosen]
        lengths = torch.tensor([len(row) for row in batch])
        ids = pad_rows(batch, filler).to(model.device)
        mask = right_padded_mask(lengths, ids.shape[1]).long().to(ids.device)
        with autocast_of(model):
            _, output = row_scores(model, model, ids, mask)
        logits[chosen] = output.logits.float().cpu()
    return logits
