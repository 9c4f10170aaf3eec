"""The logits that a completion's tokens are drawn from, and the tokens' log-probabilities."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trl_instruct.models.properties import accepted, unwrapped
from trl_instruct.padding import position_ids, right_padded_mask, roll_rows
from trl_instruct.types import Model


class Sequences(NamedTuple):
    """Texts as a model reads them, padded on the right, all `(B, T)`.

    states: True at the token before each completion token: its logits predict that token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    states: Tensor


def completion_logits(model: Model, sequences: Sequences) -> Tensor:
    """Logits that the completions' tokens are drawn from, `(N, V)`, row by row.

    The unembedding runs at `states` only: over a prompt of 256 tokens, or the padding after short
    completions, it would take most of the memory of the pass.
    """
    bare = unwrapped(model)
    head = bare.get_output_embeddings() or nn.Identity()
    narrowed = []

    def narrow(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        narrowed.append(True)
        return at_states(inputs[0], sequences).unsqueeze(0), *inputs[1:]

    with head.register_forward_pre_hook(narrow):
        logits = model(**accepted(bare, **sequences._asdict(), use_cache=False)).logits
    return logits.squeeze(0) if narrowed else at_states(logits, sequences)


def at_states(values: Tensor, sequences: Sequences) -> Tensor:
    """`(B, T, ...)` -> `(N, ...)`, the values at `states`."""
    # Counted from the right: prompt tuning adds virtual tokens in front.
    return values[:, -sequences.states.shape[1] :][sequences.states]


def join(
    prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, completion_lengths: Tensor
) -> Sequences:
    """Each completion directly after its prompt, in rows as wide as the longest text.

    Padding after a text never matters to a causal model, even one without an attention mask.

    >>> one = join(*map(torch.tensor, ([[0, 5]], [1], [[6, 7, 9]], [2])))
    >>> one.input_ids.tolist(), one.states.int().tolist()
    ([[5, 6, 7]], [[1, 1, 0]])
    """
    lengths = prompt_lengths + completion_lengths
    width = int(lengths.max())
    both = torch.cat([prompt_ids, completion_ids], dim=1)
    ids = roll_rows(both, prompt_ids.shape[1] - prompt_lengths)[:, :width]
    mask = right_padded_mask(lengths, width)
    states = right_padded_mask(lengths - 1, width) & ~right_padded_mask(prompt_lengths - 1, width)
    return Sequences(ids, mask.long(), position_ids(mask), states)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values `(N,)` at the N places where the mask `(B, C)` is True, 0 elsewhere.

    >>> spread(torch.tensor([1.0, 2.0]), torch.tensor([[True, False], [True, False]])).tolist()
    [[1.0, 0.0], [2.0, 0.0]]
    """
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
