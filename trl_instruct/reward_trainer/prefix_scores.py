"""Scores of K responses after one copy of their prompt, and whether a model can do that."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from trl_instruct.reward_trainer import prefix
from trl_instruct.reward_trainer.prefix import SharedRows
from trl_instruct.rewards.score_position import on_head

# Attention limited to the last tokens: columns of a shared row are further apart.
WINDOWS = ("sliding_window", "attention_chunk_size")
SPLIT = "shared_prefix"
MASKED = (None, "eager", "sdpa", "flex_attention", SPLIT)  # None: no attention, or its own kind
# Tokens of a shared row from which two calls for each ranking are faster than one with a mask.
SPLIT_FROM = 256


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA; `split_attention` if the mask is its lengths, integers `(1, 1, B, 1 + K)`."""
    attend = partial(AttentionInterface()["sdpa"], module, **options)
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return attend(query, key, value, attention_mask)
    lengths = [[first, *filter(None, own)] for first, *own in attention_mask[0, 0].tolist()]
    tensors = query, key, value
    return prefix.split_attention(lambda *given: attend(*given)[0], tensors, lengths), None


AttentionInterface.register(SPLIT, _attention)
AttentionMaskInterface.register(SPLIT, AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def token_scores(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Each forward pass inside adds its tokens' hidden states `(R, T, H)` and scores `(R, T)`."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(head: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        seen.append((inputs[0], logits.squeeze(-1)))

    with on_head(model, keep):
        yield seen


def shared_scores(
    model: Any, bare: Any, shared: SharedRows, columns: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Any]:
    """Scores `(R,)` of responses in shared rows, and the model's output (ignore its logits).

    `columns` `(R,)` tell where the score is read in the separate rows; `dtype` is that of compute.
    """
    with token_scores(bare) as seen:
        outputs, places = _forward_shared(model, bare, shared, dtype, SPLIT_FROM)
    (_, scores), *_ = seen
    where = shared.columns.gather(1, columns.unsqueeze(1)).squeeze(1)
    return scores.flatten()[places[shared.rows, where]], outputs


def skips_hidden(model: Any, width: int) -> bool:
    """Whether attention skips what is hidden in rows of so many tokens, or computes it first."""
    attention = model.config.get_text_config()._attn_implementation
    return attention == "flex_attention" or (attention == SPLIT and width >= SPLIT_FROM)


def _forward_shared(
    model: Any, bare: Any, shared: SharedRows, dtype: torch.dtype, split_from: int
) -> tuple[Any, Tensor]:
    """The model's output, and the place `(B, S)` of each token in it."""
    ids, positions, segments = shared.input_ids, shared.position_ids, shared.segments
    attention, given = bare.config.get_text_config()._attn_implementation, segments > -2
    if attention == SPLIT and segments.shape[1] >= split_from:
        given = segments >= 0
        ids, positions = ids[given].unsqueeze(0), positions[given].unsqueeze(0)
        # Four dimensions, as a finished mask has: models hand it on as it is.
        mask: Any = nn.functional.one_hot(segments + 1).sum(dim=1)[None, None, :, 1:].cpu()
    else:
        flex = attention == "flex_attention"
        mask = prefix.prefix_blocks(segments) if flex else prefix.prefix_mask(segments, dtype)
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return outputs, (given.flatten().cumsum(0) - 1).view_as(segments)


@torch.no_grad()
def sharing_fault(
    model: Any, bare: Any, input_ids: Tensor, lengths: Tensor, dtype: torch.dtype
) -> str | None:
    """Why the model cannot share a prefix, found by trying; None if it can, then without a mask.

    Compares the response tokens' last hidden states: a head that is still zero hides differences.
    `input_ids` `(K, T)` and `lengths` `(K,)` are the longest ranking's rows, padded on the right.
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
    shared = prefix.share_prefix(input_ids, lengths, lengths.new_tensor([len(lengths)]))
    real = torch.arange(input_ids.shape[1], device=lengths.device) < lengths.unsqueeze(1)
    place = shared.rows.unsqueeze(1), shared.columns * real
    own = real & (shared.segments[place] > 0)
    for name in (SPLIT, "sdpa") if attention == "sdpa" else ():
        for module in bare.modules():  # layers too: `disable_dropout` gives them their own config
            if isinstance(each := vars(module).get("config"), PretrainedConfig):
                each._attn_implementation = name
        if name == SPLIT and sharing_fault(model, bare, input_ids, lengths, dtype) is None:
            return None
    try:
        with token_scores(bare) as seen:
            model(input_ids=input_ids, attention_mask=real.long(), use_cache=False)
            _, places = _forward_shared(model, bare, shared, dtype, 0)
        (separate, _), (together, _) = seen
        expected = separate[own].float()
        difference = float((together.flatten(0, 1)[places[place][own]] - expected).norm())
    except Exception as error:  # whatever an architecture does with an unknown mask
        return f"{type(error).__name__}: {error}".splitlines()[0]
    spread = float((expected - expected.mean(dim=0)).norm() + 0.001 * expected.norm())
    # Rounding: 1e-6 (float32), 0.06 % (TF32), 2 % (bfloat16, 24 layers); wrong mask: 6 % and more.
    if not difference <= max(0.002, 0.5 * torch.finfo(dtype).eps ** 0.5) * spread:
        return f"its hidden states differ by {difference / spread:.1%} from those of separate rows"
    return None
