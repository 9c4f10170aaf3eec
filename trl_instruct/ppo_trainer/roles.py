"""The four roles of PPO (policy, reference, reward, value): loaded, checked and placed."""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from trl import ModelConfig

from trl_instruct.configs import PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.models import precision
from trl_instruct.models.adapters import is_quantized, with_lora
from trl_instruct.models.load import load_policy, load_reward_model, reference_of
from trl_instruct.models.precision import cast_lm_head_to_fp32, rounds_frozen, store_in
from trl_instruct.models.properties import ModelSource, model_name
from trl_instruct.models.sharding import MIXED, cast_like_sharded, launched_sharded, load_unsharded
from trl_instruct.models.shared_base import SharedBase, classifier_around, view_of
from trl_instruct.models.tokenizers import check_same_tokens, load_tokenizer
from trl_instruct.ppo_trainer.rollouts import disable_dropout_and_rescaling
from trl_instruct.rewards import function
from trl_instruct.rewards.combined import Ensemble
from trl_instruct.rewards.function import RewardFunction, models_of, parts_of, place_on
from trl_instruct.rewards.load import is_python, load_reward, sole_reward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.scalar_head import score_head
from trl_instruct.types import Model, Tokenizer


def check_roles(
    model: nn.Module, ref_model: nn.Module | None, reward_model: Any, value_model: nn.Module
) -> None:
    """InputError if one object has two roles."""
    roles = [("model", model), ("ref_model", ref_model), ("value_model", value_model)]
    roles += [("reward_model", judge) for judge in models_of(reward_model)]
    for (name, one), (other, two) in combinations(roles, 2):
        if one is not None and one is two and name != other:
            raise InputError(
                f"{name} and {other} are the same object, and training one would change the other. "
                f"Load it twice, or pass copy.deepcopy({other}) as {other}."
            )


FROM_POLICY = "policy"  # the value model starts as a copy of the policy, with a head of zeros
VALUE_HEAD = "value_head"  # it is a head of zeros on the policy itself, which both losses train


class Roles(NamedTuple):
    """The four roles. `ref_policy` None: a copy of the policy, or a fresh adapter's base."""

    policy: Model
    ref_policy: Model | None
    reward: RewardFunction
    value: Model


def load_roles(
    model: ModelSource,
    reward: Any,
    value: ModelSource | None,
    tokenizer: Tokenizer,
    config: PPOConfig,
    model_config: ModelConfig,
) -> Roles:
    """Load the four roles: adapters over the policy's base share it, others load separately.

    The policy starts from `model`; the value function from `value`, `"policy"` or `"value_head"`
    (None: the reward model, or the first of an ensemble's, if it has the policy's tokenizer, else
    the policy). `share_base` None shares the base if possible, True requires it. A separate reward
    model takes precision and quantisation from `model_config`, as in TRL; a value model without an
    adapter is float32.
    """
    load_unsharded()
    reward = sole_reward(reward, config.reward_weights)
    trust, base = {"trust_remote_code": config.trust_remote_code}, None
    if _shares(model, config, model_config):
        base = SharedBase(model, model_config, **trust)
    policy = load_policy(model, model_config, **trust) if base is None else base.policy()
    # A policy that continues an adapter has that adapter, as loaded, as its reference.
    goes_on = base.adapter is not None if base else isinstance(policy, PeftModel)
    ref_policy = view_of(policy).requires_grad_(False) if goes_on else None
    separate: Any = {"use_peft": False, "model_revision": "main", "attn_implementation": None}
    rounds = config.frozen_dtype or rounds_frozen(config)
    if rounds and not (model_config.load_in_8bit or model_config.load_in_4bit):
        separate["dtype"] = "float32"  # `place_frozen` stores its linear layers in frozen_dtype
    judge: Any = load_reward(
        _over(base, reward, tokenizer, config),
        tokenizer,
        weights=config.reward_weights,
        combine=config.combine,
        combine_beta=config.combine_beta,
        batch_size=config.local_rollout_forward_batch_size,
        model_config=replace(model_config, **separate),
        **trust,
    )
    first = judge
    if isinstance(judge, Ensemble):
        first = judge.parts[0]
        reward = reward[0] if isinstance(reward, list | tuple) else first
    if value is None:
        own = first.tokenizer.get_vocab() if isinstance(first, RewardModel) else None
        value = reward if own == tokenizer.get_vocab() else FROM_POLICY
    if value is reward and (is_python(reward) or isinstance(reward, nn.Module)):
        value = first  # functions and loaded models cannot be loaded a second time
    if value == VALUE_HEAD:
        if model_config.use_peft or isinstance(policy, PeftModel) or config.engine == "trl":
            raise InputError(
                f"value_model_path is {VALUE_HEAD!r}, which needs full fine-tuning and the default "
                "engine. With LoRA leave it out: over a shared base the value model costs only an "
                "adapter."
            )
        start = classifier_around(policy)
    elif base is not None and value == FROM_POLICY:
        start = base.fresh_classifier()
    elif base is not None and (adapter := base.adapter_in(value)):
        start = base.classifier(adapter)
    else:
        start = _full_value_model(value, model, policy, **trust)
    roles = Roles(with_lora(policy, model_config), ref_policy, judge, start)
    if base is not None and config.share_base:
        _insist(base, roles)
    return roles


def _shares(model: ModelSource, config: PPOConfig, model_config: ModelConfig) -> bool:
    """Whether roles are adapters over one base; InputError if they must be but cannot."""
    faults = {
        "without use_peft the policy is not an adapter": not model_config.use_peft,
        "TRL's PPOTrainer trains a full-size value model": config.engine == "trl",
        "the policy is a loaded PeftModel; give its folder": isinstance(model, PeftModel),
        "the weights are sharded over processes": launched_sharded(),
    }
    fault = next((told for told, applies in faults.items() if applies), None)
    if config.share_base and fault:
        raise InputError(f"share_base is true, but {fault}. Leave share_base out.")
    return fault is None and config.share_base is not False


def _over(base: SharedBase | None, reward: Any, tokenizer: Tokenizer, config: PPOConfig) -> Any:
    """The reward; those of its models that are adapters over the base are loaded onto it."""
    if isinstance(reward, list | tuple):
        return [_over(base, part, tokenizer, config) for part in reward]
    adapter = base.adapter_in(reward) if base is not None else None
    if base is None or adapter is None:
        return reward
    own = load_tokenizer(reward, trust_remote_code=config.trust_remote_code)
    check_same_tokens(own, tokenizer, (f"The reward model {os.fspath(reward)!r}", "the policy"))
    size = config.local_rollout_forward_batch_size
    return RewardModel(base.classifier(adapter), own, batch_size=size)


def _full_value_model(source: Any, model: ModelSource, policy: Model, **trust: bool) -> Model:
    """A full-size value model: from a reward model, or from the policy with a head of zeros."""
    if source != FROM_POLICY:
        judge = source.model if isinstance(source, RewardModel) else None
        value = judge or load_reward_model(source, ModelConfig(), **trust)
        if is_quantized(value):
            raise InputError(
                "The reward model's weights have 8 or 4 bits, and a value model that starts from "
                "them could not train. Set value_model_path to `policy` or an unquantised reward "
                "model's folder, or give the folder of an adapter over the policy's base as the "
                "reward."
            )
        if judge is not None:
            return copy.deepcopy(judge).float().requires_grad_(True)
        return value if isinstance(source, nn.Module) else value.requires_grad_(True)
    plain = not isinstance(policy, PeftModel) and not is_quantized(policy)
    start = policy if plain else model
    value = load_reward_model(start, ModelConfig(), fresh_head=True, **trust)
    score_head(value).weight.data.zero_()
    return value


def _insist(base: SharedBase, roles: Roles) -> None:
    """InputError if the reward or value model is not over the base."""

    def weights(model: Any) -> nn.Parameter:
        return model.get_input_embeddings().weight

    judges = [p.model for p in parts_of(roles.reward) if isinstance(p, RewardModel)]
    for role, one in [("value model", roles.value), *(("reward model", j) for j in judges)]:
        if weights(one) is not weights(base.model):
            raise InputError(
                f"share_base is true, but the {role} from {model_name(one)!r} is not an adapter "
                f"over the policy's base, {base.name!r}. Train it with use_peft from the same "
                "model or from an adapter over it, or leave share_base out."
            )


def reference_for(policy: Model, ref_model: Model | None, config: PPOConfig) -> Model | None:
    """The reference given, or the policy's (`reference_of`); both get their heads' precision."""
    for model in (policy, ref_model):
        if config.cast_lm_head_to_fp32 and model is not None:
            cast_lm_head_to_fp32(model)
    return ref_model or reference_of(policy)


def place_frozen(
    accelerator: Accelerator,
    ref_model: Model | None,
    judges: Sequence[RewardFunction | None],
    tokenizer: Tokenizer,
    *,
    args: PPOConfig,
    trained: Sequence[nn.Module],
) -> Callable[[Any], AbstractContextManager[None]]:
    """Put frozen models in their place, stored in `frozen_dtype` except what they share with those
    that train; tell the rewards whose tokens they get. Returns `in_use` for these models.

    The reference is stored so only if the policy computes in that dtype: else it would differ. With
    `offload_frozen` models wait on the CPU, but for those over weights that train, and of 8 or 4
    bits. InputError if that leaves none.
    """
    shared, dtype = {w for m in trained for w in m.parameters()}, precision.frozen_dtype(args)
    waiting = [one for one in (ref_model, *judges) if args.offload_frozen and _moves(one, shared)]
    if args.offload_frozen and not waiting:
        raise InputError("offload_frozen: no frozen model here can wait on the CPU. Leave it out.")
    if ref_model is not None:
        disable_dropout_and_rescaling(ref_model)
        if dtype is MIXED.get(accelerator.mixed_precision):
            store_in(ref_model, dtype, shared)
        place = "cpu" if ref_model in waiting else accelerator.device
        ref_model.eval().requires_grad_(False).to(place)
        cast_like_sharded(accelerator, ref_model)
    for judge in judges:
        if judge is not None:
            place_on(judge, "cpu" if judge in waiting else accelerator.device, dtype, shared)
            function.tell_tokenizer(judge, tokenizer)
    return partial(in_use, waiting, args.device)


def _moves(frozen: Any, shared: set[nn.Parameter]) -> bool:
    """Whether it has models, all of 16 or 32 bits, none over weights that train."""
    held = models_of(frozen)
    return bool(held) and not any(is_quantized(m) or shared & {*m.parameters()} for m in held)


@contextmanager
def in_use(waiting: Sequence[Any], device: torch.device, frozen: Any) -> Iterator[None]:
    """Inside, a frozen model or reward is on the device, also one that waits on the CPU."""
    if frozen in waiting:
        place_on(frozen, device)
    yield
    if frozen in waiting:
        place_on(frozen, "cpu")
