"""Prints how many threads the tiny default should use: 1 or 2.

A second thread makes a training step 1.5 times faster if the other core is idle, and half as fast
if it is busy, because each of hundreds of small operations then waits. The number changes the order
of sums, so it is measured once, at installation: the same machine gives the same results.
"""

import os
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, ROUNDS, LEAST_GAIN = 5, 3, 1.2


def seconds(threads: int, model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Time of forward and backward passes with this many threads."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - started


def main() -> None:
    """Measure batches of stage 0 in turn, so that a busy moment affects both."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=900, num_attention_heads=4, **sizes))
    ids = torch.arange(16 * 48).view(16, 48) % 900
    seconds(2, model, ids)
    rounds = [(seconds(1, model, ids), seconds(2, model, ids)) for _ in range(ROUNDS)]
    gains = [one / two for one, two in rounds]
    print(2 if (os.cpu_count() or 1) > 1 and min(gains) > LEAST_GAIN else 1)


if __name__ == "__main__":
    main()
