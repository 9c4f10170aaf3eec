"""An exponential moving average of the policy (InstructGPT C.4: decay 0.992)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, for the trainable weights of a model.

    It starts at the model's weights. Decay 0 keeps nothing of the past; 1 never changes it. It is
    float32 whatever the weights are: bfloat16 would round most of its steps away.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self.average = {name: w.detach().float().clone() for name, w in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight.float(), 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        trained = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def save(self, path: Path) -> None:
        """Save the average as a safetensors file."""
        save_file({name: w.contiguous() for name, w in self.average.items()}, path)

    def load(self, path: Path) -> None:
        """Load what `save` wrote."""
        device = next(iter(self.average.values())).device
        self.average = load_file(path, device=str(device))
