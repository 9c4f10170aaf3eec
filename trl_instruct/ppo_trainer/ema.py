"""An exponential moving average of the policy (InstructGPT C.4: decay 0.992)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, for the trainable weights of a model.

    It starts at the model's weights. Decay 0 keeps nothing of the past; 1 never changes it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.average = {name: w.detach().clone() for name, w in self._weights()}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, w) for name, w in self.model.named_parameters() if w.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        for name, weight in self._weights():
            self.average[name].lerp_(weight, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
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
        """Save the average as a safetensors file."""
        save_file({name: w.contiguous() for name, w in self.average.items()}, path)

    def load(self, path: Path) -> None:
        """Load what `save` wrote."""
        device = next(iter(self.average.values())).device
        self.average = load_file(path, device=str(device))
