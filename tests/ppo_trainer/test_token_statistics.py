"""TRL's kernel against whole logits, on CPU."""

import pytest
import torch
from conftest import tiny_model
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from test_rollouts import batch
from trl import __version__ as trl_version

from trl_instruct.generation.logits import completion_logits, join
from trl_instruct.models.precision import cast_lm_head_to_fp32
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer import token_statistics as module
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue, ValueModel

# TRL 1.15's kernel needs Triton.
pytestmark = pytest.mark.skipif(Version(trl_version) < Version("1.16"), reason="TRL has no kernel")
TOKENS = batch(width=3)
CHOSEN = TOKENS[2][right_padded_mask(TOKENS[3], 3)]
MODELS = {
    "llama": {},
    "gpt2": {"tie_word_embeddings": True},
    "phi": {},  # its head has a bias
}


@pytest.fixture
def kernel(monkeypatch):
    """On CPU too, in tiles smaller than the vocabulary; how many states it has read."""
    from trl.kernels import ChunkedLogProbFunction

    used, real = [], ChunkedLogProbFunction.apply
    monkeypatch.setattr(module, "KERNEL_ON", {"cpu"})
    monkeypatch.setattr(module, "TILE", 100)
    spy = staticmethod(lambda *given: used.append(len(given[0])) or real(*given))
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", spy)
    return used


def found(model, *, temperature=0.7):
    """Log-probabilities, entropies, and gradients of their mean and of the values' sum."""
    logprobs, entropies, values = model(join(*TOKENS), CHOSEN, temperature)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return logprobs, entropies, torch.autograd.grad(logprobs.mean() + values.sum(), trained)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_kernel_gives_what_whole_logits_give(kind, lora, kernel, monkeypatch):
    policy = tiny_model(kind, **MODELS[kind]).eval()  # no dropout
    if lora:
        policy = get_peft_model(policy, LoraConfig(target_modules="all-linear"))
    model = PolicyAndValue(policy, ValueModel(tiny_model(classifier=True)))
    tiled = found(model)
    assert kernel == [len(CHOSEN)]
    with torch.no_grad():
        read = module.token_statistics(policy, join(*TOKENS), CHOSEN, temperature=0.7)
    torch.testing.assert_close(read[0], tiled[0])
    monkeypatch.setattr(module, "KERNEL_ON", {"cuda"})
    whole = found(model)
    assert len(kernel) == 2 and not whole[1].requires_grad and not tiled[1].requires_grad
    torch.testing.assert_close(tiled[:2], whole[:2], rtol=0, atol=5e-6)
    for one, other in zip(tiled[2], whole[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1.3e-6, atol=1.5e-6 * float(other.abs().max()))


def test_under_autocast_with_a_head_in_float32(kernel):
    policy = tiny_model()
    cast_lm_head_to_fp32(policy)
    sequences = join(*TOKENS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = module.token_statistics(policy, sequences, CHOSEN, temperature=1.0)
        logits = completion_logits(policy, sequences)
    assert kernel and logits.dtype is torch.float32
    expected = logits.log_softmax(-1).gather(1, CHOSEN.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize(("kind", "options"), [("gemma2", {}), ("cohere", {"logit_scale": 0.5})])
def test_a_model_that_changes_its_heads_output_is_read_whole(kind, options, kernel):
    policy = tiny_model(kind, head_dim=8, **options)
    logprobs, _ = module.token_statistics(policy, join(*TOKENS), CHOSEN, temperature=1.0)
    logits = completion_logits(policy, join(*TOKENS))
    expected = logits.log_softmax(-1).gather(1, CHOSEN.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs, expected)
    assert not kernel and "forward" not in vars(policy.lm_head)
