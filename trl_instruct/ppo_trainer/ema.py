"""An exponential moving average of the policy (InstructGPT C.4: decay 0.992)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, for the weights that train.

    Args:
        model: starts the average.
        decay: 0 keeps nothing of the past, 1 never changes.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average = {name: w.detach().clone() for name, w in self._weights()}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, w) for name, w in self.model.named_parameters() if w.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        for name, weight in self._weights():
            self.average[name].lerp_(weight, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights():
            kept = weight.detach().clone()
            weight.copy_(self.average[name])
            self.average[name] = kept

    def save(self, path: Path) -> None:
        """Into a safetensors file."""
        save_file({name: w.contiguous() for name, w in self.average.items()}, path)

    def load(self, path: Path) -> None:
        """What `save` wrote."""
        device = next(iter(self.average.values())).device
        self.average = load_file(path, device=str(device))
