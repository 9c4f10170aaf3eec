"""The score of a response: where a sequence classifier reads it, in training and in use.

transformers' classifiers put their head `score` on every token and keep one number a row, that of
the last token which is not `config.pad_token_id`. With pad == eos this is not the EOS but the token
before it. Here a model that is trained with pad == eos gets no pad token in its config, which says
that no token of a row is padding: its score stands at the EOS. Plain transformers then gives the
same number for a row alone, and refuses a padded batch instead of reading it elsewhere. A model
from elsewhere whose config calls EOS the padding is read where it was trained, one token earlier.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_instruct.batching import pad_rows, similar_lengths
from trl_instruct.masking import right_padded_mask
from trl_instruct.models import accepted, unwrapped
from trl_instruct.prefix import SharedRows, prefix_blocks, prefix_mask, share_prefix
from trl_instruct.scalar_head import ScalarHead

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]

# Attention that looks back a number of tokens only: columns of a shared row are further apart.
WINDOWS = ("sliding_window", "attention_chunk_size")
MASKED = (None, "eager", "sdpa", "flex_attention")  # None: no attention, or one of its own


def score_positions(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int | None) -> Tensor:
    """Column at which each row's score is read: its last token that the model calls no padding.

    Args:
        input_ids, attention_mask: `(R, T)`, padded on either side.
        pad_token_id: of the model's config.

    Returns:
        `(R,)`.

    >>> ids, mask = torch.tensor([[5, 2, 2], [2, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    >>> score_positions(ids, mask, None).tolist(), score_positions(ids, mask, 2).tolist()
    ([1, 2], [0, 2])
    """
    counts = attention_mask.bool()
    if pad_token_id is not None:
        counts = counts & (input_ids != pad_token_id)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * counts).amax(dim=1)


@contextlib.contextmanager
def scores_at(model: Any, columns: Tensor, width: int) -> Iterator[None]:
    """Inside, the classifier's logits are those of the given tokens, whatever it calls padding.

    Args:
        model: a sequence classifier, not wrapped for training. One without a head `score` on every
            token reads its score by itself.
        columns: `(R,)` the token of each row.
        width: T, tokens in a row.
    """

    def read(head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if logits.dim() != 3:
            return None
        # From the right: prompt tuning puts tokens of its own in front.
        rows = torch.arange(len(columns), device=logits.device)
        scores = logits[rows, columns - width]
        # The same at every token, so that the classifier takes it wherever it looks.
        return scores.unsqueeze(1).expand_as(logits)

    with _on_head(model, read):
        yield


@contextlib.contextmanager
def token_scores(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, each forward pass adds hidden states `(R, T, H)` and scores `(R, T)` of its tokens.

    Args:
        model: a sequence classifier, not wrapped for training.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        seen.append((inputs[0], logits.squeeze(-1)))

    with _on_head(model, keep):
        yield seen


@contextlib.contextmanager
def _on_head(model: Any, hook: Hook) -> Iterator[None]:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        yield
        return
    config = model.config.get_text_config()
    pad_token_id = config.pad_token_id
    if pad_token_id is None:
        config.pad_token_id = 0  # it refuses a batch without one; what it then picks is not used
    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        config.pad_token_id = pad_token_id


def separate_scores(
    model: Any, bare: Any, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Any]:
    """Scores `(R,)` of rows, one forward pass for all, and the model's output.

    Args:
        model: the classifier as it trains, `bare` the same without what it is wrapped in.
        input_ids, attention_mask: `(R, T)`.
    """
    columns = score_positions(input_ids, attention_mask, pad_token_of(bare))
    with scores_at(bare, columns, input_ids.shape[1]):
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return outputs.logits.squeeze(-1), outputs


def shared_scores(
    model: Any, bare: Any, shared: SharedRows, columns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """Scores `(R,)` of responses in shared rows, and the model's output (its logits mean nothing).

    Args:
        model, bare: as `separate_scores`.
        shared: from `share_prefix`.
        columns: `(R,)` where the score is read in the separate rows.
        dtype: that the model computes in.
    """
    with token_scores(bare) as seen:
        outputs = _forward_shared(model, bare, shared, dtype)
    (_, scores), *_ = seen
    where = shared.columns.gather(1, columns.unsqueeze(1)).squeeze(1)
    return scores[shared.rows, where], outputs


def attention_of(model: Any) -> str | None:
    """Which attention the model runs with, by transformers' name."""
    return model.config.get_text_config()._attn_implementation


def skips_hidden(model: Any) -> bool:
    """Whether the model's attention leaves out what a mask hides, instead of computing it first."""
    return attention_of(model) == "flex_attention"


def _forward_shared(model: Any, bare: Any, shared: SharedRows, dtype: torch.dtype) -> Any:
    blocks, segments = skips_hidden(bare), shared.segments
    return model(
        input_ids=shared.input_ids,
        attention_mask=prefix_blocks(segments) if blocks else prefix_mask(segments, dtype),
        position_ids=shared.position_ids,
        use_cache=False,
    )


@torch.no_grad()
def sharing_fault(
    model: Any, bare: Any, input_ids: Tensor, lengths: Tensor, dtype: torch.dtype
) -> str | None:
    """Why the model cannot share a prefix, found by trying; None where it can.

    The last hidden states of the responses' tokens are compared: unlike the scores they tell apart
    what the head, that may still be zero, does not.

    Args:
        model, bare: as `separate_scores`, in eval mode.
        input_ids: `(K, T)` the rows of one ranking, padded on the right; the longest that occur.
        lengths: `(K,)`.
        dtype: that the model computes in.
    """
    if not isinstance(getattr(bare, "score", None), nn.Module):
        return "it has no head `score` on every token"
    config, longest = bare.config.get_text_config(), int(lengths.max())
    if (attention := attention_of(bare)) not in MASKED:
        # Not to be tried: flash kernels take such a mask for positions, beyond the end of the keys.
        return f"{attention} knows no mask like that of a shared prompt, as sdpa does"
    for window in (getattr(config, name, None) for name in WINDOWS):
        # In half precision the comparison below could overlook a token or two.
        if window is not None and window < longest:
            return f"it attends to {window} tokens and a response with its prompt has {longest}"
    shared = share_prefix(input_ids, lengths, lengths.new_tensor([len(lengths)]))
    real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    place = shared.rows.unsqueeze(1), shared.columns * real
    own = real & (shared.segments[place] > 0)
    try:
        with token_scores(bare) as seen:
            model(input_ids=input_ids, attention_mask=real.long(), use_cache=False)
            _forward_shared(model, bare, shared, dtype)
        (separate, _), (together, _) = seen
        expected = separate[own].float()
        difference = float((together[place][own] - expected).norm())
    except Exception as error:  # whatever an architecture makes of a mask that it does not know
        return f"{type(error).__name__}: {error}".splitlines()[0]
    spread = float((expected - expected.mean(dim=0)).norm())
    # Rounding alone makes 1e-6 in float32, 0.06 % in TF32, 2 % in bfloat16 (24 layers); a wrong
    # mask 6 % and more.
    if not difference <= max(0.002, 0.5 * torch.finfo(dtype).eps ** 0.5) * spread:
        return f"its hidden states differ by {difference / spread:.1%} from those of separate rows"
    return None


def pad_token_of(model: Any) -> int | None:
    """The token that the classifier takes for padding; None: none, or it goes by the mask."""
    bare = unwrapped(model)
    return None if isinstance(bare, ScalarHead) else bare.config.get_text_config().pad_token_id


@torch.no_grad()
def batched_logits(
    model: PreTrainedModel, rows: list[list[int]], filler: int, batch_size: int
) -> Tensor:
    """A classifier's logits for rows of unequal length, in batches of similar length.

    Args:
        model: a sequence classifier.
        rows: R lists of token ids.
        filler: token to pad with.
        batch_size: most rows per forward pass.

    Returns:
        `(R, labels)` float32 on CPU.
    """
    logits = torch.zeros(len(rows), model.config.num_labels)
    for chosen in similar_lengths([len(row) for row in rows], batch_size):
        batch = [rows[row] for row in chosen]
        lengths = torch.tensor([len(row) for row in batch])
        ids = pad_rows(batch, filler).to(model.device)
        mask = right_padded_mask(lengths, ids.shape[1]).long().to(ids.device)
        columns = score_positions(ids, mask, pad_token_of(model))
        with scores_at(model, columns, ids.shape[1]):
            arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            output = model(**accepted(model, **arguments))
        logits[chosen] = output.logits.float().cpu()
    return logits
