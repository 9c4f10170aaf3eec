"""The simulated labeler: ranks by the gold score as noisily as people rank."""

import random
from collections.abc import Sequence

DEFAULT_NOISE = 0.29
"""Standard deviation of the noise. Two labelers then agree on 73 % of the pairs of four
candidates; InstructGPT's agreed on 72.6 % (section 3.4 of arXiv:2203.02155)."""


class SimulatedLabeler:
    """Replaces the human who ranks candidates: the gold score plus gaussian noise.

    The noise, of that standard deviation in units of the gold score, depends on the seed (which
    labeler it is) and on everything labeled before. ValueError if it is negative.
    """

    def __init__(self, noise: float = DEFAULT_NOISE, seed: int = 0):
        if noise < 0:
            raise ValueError(f"noise is a standard deviation and must be >= 0, not {noise}")
        self.noise = noise
        self._rng = random.Random(f"labeler, {seed}")

    def label(self, gold_scores: Sequence[float]) -> list[float]:
        """The labeler's scores of one prompt's candidates: higher is better."""
        return [gold + self._rng.gauss(0.0, self.noise) for gold in gold_scores]
