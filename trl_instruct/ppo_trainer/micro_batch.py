"""What a micro-batch adds to PPO's objective (InstructGPT equation 2)."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trl_instruct.configs import PPOConfig
from trl_instruct.generation.logits import join
from trl_instruct.models.sharding import is_zero3, micro_batch
from trl_instruct.ppo_trainer.losses import importance_weights, policy_loss, value_loss
from trl_instruct.ppo_trainer.metrics import policy_metrics
from trl_instruct.ppo_trainer.rollouts import Rollout


def ppo_sums(
    model: nn.Module, rollout: Rollout, advantages: Tensor, returns: Tensor, *, args: PPOConfig
) -> dict[str, Tensor]:
    """The two losses and the logged statistics, summed over the real tokens of a micro-batch.

    The model is a `PolicyAndValue`, as `Accelerator.prepare` returned it; a rollout of B episodes
    has advantages and returns `(B, C)`.
    """
    mask = rollout.mask
    tokens = (rollout.prompt_ids, rollout.prompt_lengths, rollout.completion_ids)
    sequences = join(*tokens, rollout.counted_lengths)
    logprobs, entropies, values = model(sequences, rollout.completion_ids[mask], args.temperature)
    policy = (logprobs, rollout.logprobs[mask], advantages[mask])
    loss, clipped = policy_loss(
        *policy,
        cliprange=args.cliprange,
        cliprange_high=args.cliprange_high,
        dual_clip=args.dual_clip,
    )
    drawn = rollout.sampler_logprobs
    if drawn is not None and args.vllm_importance_sampling_correction:
        clip = args.vllm_importance_sampling_clip_max
        loss = loss * importance_weights(rollout.logprobs[mask], drawn[mask], clip_max=clip)
    value = (values, rollout.values[mask], returns[mask])
    squared, value_clipped = value_loss(*value, cliprange_value=args.cliprange_value)
    per_token = {
        "loss/policy": loss,
        "loss/value": squared,
        "policy/entropy": entropies,
        "policy/clipfrac": clipped.float(),
        "val/clipfrac": value_clipped.float(),
        **policy_metrics(*policy[:2]),
    }
    return {name: tensor.sum() for name, tensor in per_token.items()}


def ptx_loss(model: nn.Module, ids: Tensor, *, with_values: bool = False) -> Tensor:
    """-log policy(x) of pretraining text: the mean over all tokens except the first of each row.

    A scalar, nats per token. The paper leaves open whether its expectation is over texts or tokens;
    with a mean per token, gamma_ptx does not depend on the length of the rows. The model is as in
    `ppo_sums`, the ids `(B, T)` are full rows. `with_values` runs the value model too and ignores
    its values (ZeRO-3 needs that).
    """
    prompt, completion = ids[:, :1], ids[:, 1:]  # all tokens but the first are predicted
    one = torch.ones_like(ids[:, 0])
    rows = join(prompt, one, completion, one * completion.shape[1])
    logprobs, _, values = model(rows, completion.flatten(), with_values=with_values)
    loss = -logprobs.mean()
    return loss if values is None else loss + 0.0 * values.sum()


def add_ptx_gradient(
    accelerator: Accelerator, model: nn.Module, rows: Tensor, *, args: PPOConfig
) -> Tensor:
    """Add gamma_ptx times the pretraining gradient to the buffer that PPO's gradient is added to.

    The processes exchange gradients later, after PPO's. Returns this process's mean loss, nats per
    token, on its rows of token ids `(R, T)`; the model is as in `ppo_sums`.
    """
    total = torch.zeros((), device=accelerator.device)
    # If a step's first backward pass skips a weight, ZeRO-3 (DeepSpeed 0.19) adds that weight's
    # gradient of the previous step.
    with_values = is_zero3(accelerator)
    for ids in rows.to(accelerator.device).split(args.per_device_train_batch_size):
        with micro_batch(accelerator, model, last=False):
            loss = ptx_loss(model, ids, with_values=with_values) * len(ids) / len(rows)
            accelerator.backward(args.ptx_coef * loss)
        total += loss.detach()
    return total
