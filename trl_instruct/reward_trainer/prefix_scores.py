"""Scores of K responses after one copy of their prompt, and whether a model can do that."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trl_instruct.reward_trainer.prefix import SharedRows, prefix_blocks, prefix_mask, share_prefix
from trl_instruct.rewards.score_position import on_head

# Attention limited to the last tokens: columns of a shared row are further apart.
WINDOWS = ("sliding_window", "attention_chunk_size")
MASKED = (None, "eager", "sdpa", "flex_attention")  # None: no attention, or its own kind


@contextlib.contextmanager
def token_scores(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Each forward pass inside adds its tokens' hidden states `(R, T, H)` and scores `(R, T)`.

    The model is a sequence classifier, not wrapped for training.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        seen.append((inputs[0], logits.squeeze(-1)))

    with on_head(model, keep):
        yield seen


def shared_scores(
    model: Any, bare: Any, shared: SharedRows, columns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """Scores `(R,)` of responses in shared rows, and the model's output (ignore its logits).

    The model is as in `separate_scores`, the rows are from `share_prefix`. `columns` `(R,)` tell
    where the score is read in the separate rows; `dtype` is the model's compute dtype.
    """
    with token_scores(bare) as seen:
        outputs = _forward_shared(model, bare, shared, dtype)
    (_, scores), *_ = seen
    where = shared.columns.gather(1, columns.unsqueeze(1)).squeeze(1)
    return scores[shared.rows, where], outputs


def skips_hidden(model: Any) -> bool:
    """Whether the model's attention skips what a mask hides instead of computing it first."""
    return model.config.get_text_config()._attn_implementation == "flex_attention"


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
    """Why the model cannot share a prefix, found by trying; None if it can.

    Compares the response tokens' last hidden states: a head that is still zero hides differences.
    The model is as in `shared_scores`, in eval mode; `input_ids` `(K, T)` and `lengths` `(K,)` are
    the rows of the longest ranking, padded on the right.
    """
    if not isinstance(getattr(bare, "score", None), nn.Module):
        return "it has no head `score` on every token"
    config, longest = bare.config.get_text_config(), int(lengths.max())
    if (attention := config._attn_implementation) not in MASKED:
        # Not tried: flash kernels would read such a mask as positions, beyond the end of the keys.
        return f"{attention} does not support the mask of a shared prompt, as sdpa does"
    for window in (getattr(config, name, None) for name in WINDOWS):
        # In half precision the comparison below could miss a token or two.
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
    except Exception as error:  # whatever an architecture does with an unknown mask
        return f"{type(error).__name__}: {error}".splitlines()[0]
    spread = float((expected - expected.mean(dim=0)).norm())
    # Rounding: 1e-6 (float32), 0.06 % (TF32), 2 % (bfloat16, 24 layers); wrong mask: 6 % and more.
    if not difference <= max(0.002, 0.5 * torch.finfo(dtype).eps ** 0.5) * spread:
        return f"its hidden states differ by {difference / spread:.1%} from those of separate rows"
    return None
