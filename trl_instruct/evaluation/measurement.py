"""What `evaluate` measures of checkpoints: samples, log-probabilities, losses, scores."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig
from trl_instruct.data.sources import iterate
from trl_instruct.errors import InputError
from trl_instruct.evaluation.samples import Sampled, judged, sample, sequence_logprobs
from trl_instruct.generation.logits import completion_logprobs
from trl_instruct.generation.sampling import pad_prompts, prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource, context_length, evaluating
from trl_instruct.models.tokenizers import tokenize_prompts
from trl_instruct.padding import pad_rows, similar_lengths
from trl_instruct.rewards.function import RewardFunction, place_on
from trl_instruct.rewards.tokens import token_ids

JUDGED_AT_ONCE = 512


Progress: TypeAlias = Callable[[int], Any]


Scores: TypeAlias = dict[str, list[float]]


class Subject(NamedTuple):
    """What is measured, and how: models and their tokenizers by name.

    several: samples of the reference per prompt for best of n; 0: none.
    """

    config: EvaluateConfig
    model_config: ModelConfig
    models: dict[str, ModelSource]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    prompts: Dataset
    demonstrations: Dataset | None
    several: int

    @property
    def baseline(self) -> str:
        """Name of the model that win rates are against."""
        return self.config.baseline or next(iter(self.models))

    @property
    def reference(self) -> str:
        """Name of the model that the KL is to."""
        return self.config.reference or self.baseline

    def load(self, name: str) -> PreTrainedModel:
        """The model of that name, where it is to run."""
        trusted = self.config.trust_remote_code
        policy = load_policy(self.models[name], self.model_config, trust_remote_code=trusted)
        return policy.to(PartialState().device)

    def same_tokens(self, name: str) -> bool:
        """Whether the reference reads the model's tokens as its own."""
        one, two = (self.tokenizers[n].get_vocab() for n in (name, self.reference))
        return one == two


class ModelMeasurement(NamedTuple):
    """One model's completions, their log-probabilities `(B,)`, its loss on the demonstrations."""

    sampled: Sampled
    logprobs: Tensor
    loss: float | None


class Measurements(NamedTuple):
    """Of every model by name, its KL to the reference, and the reference's samples for best of n.

    kl: nats per completion, None where the two read other tokens; drawn: prompt by prompt.
    """

    models: dict[str, ModelMeasurement]
    kl: dict[str, float | None]
    drawn: list[str]


def measure(subject: Subject, progress: Progress) -> Measurements:
    """Sample every model and measure it against the reference.

    The reference comes last, so that it is loaded once and no other model is in memory then.

    Args:
        subject: what to measure.
        progress: told the number of texts that were sampled or read.
    """
    others = [name for name in subject.models if name != subject.reference]
    measured = {name: _measure(subject, name, subject.load(name), progress) for name in others}
    reference = subject.load(subject.reference)
    measured[subject.reference] = _measure(subject, subject.reference, reference, progress)
    kl: dict[str, float | None] = {subject.reference: 0.0}
    for name in others:
        kl[name] = _kl(measured[name], reference, subject) if subject.same_tokens(name) else None
    drawn = _draw_several(subject, reference, progress) if subject.several else []
    return Measurements({name: measured[name] for name in subject.models}, kl, drawn)


def judge_all(
    subject: Subject,
    measured: Measurements,
    rewards: dict[str, RewardFunction],
    progress: Progress,
) -> tuple[dict[str, Scores], dict[str, Tensor]]:
    """Scores of all completions by all judges.

    Args:
        subject: what was measured.
        measured: by `measure`.
        rewards: the judges by name.
        progress: told the number of texts that were judged.

    Returns:
        Of each model by judge the scores of its completions, and by judge `(B, N)` float64 those of
        the samples for best of n.
    """
    scores: dict[str, Scores] = {name: {} for name in measured.models}
    drawn: dict[str, Tensor] = {}
    prompts, several = subject.prompts, subject.several
    repeated = prompts.select([row for row in range(len(prompts)) for _ in range(several)])
    for judge, reward in rewards.items():
        place_on(reward, PartialState().device)
        for name, model in measured.models.items():
            scores[name][judge] = _judge(prompts, model.sampled.texts, reward, progress)
        if several:
            flat = _judge(repeated, measured.drawn, reward, progress)
            drawn[judge] = torch.tensor(flat, dtype=torch.float64).view(-1, several)
        place_on(reward, "cpu")
    return scores, drawn


def _measure(
    subject: Subject, name: str, policy: PreTrainedModel, progress: Progress
) -> ModelMeasurement:
    config, tokenizer = subject.config, subject.tokenizers[name]
    batch = {"batch_size": config.per_device_eval_batch_size}
    sampled = sample(
        policy,
        tokenizer,
        subject.prompts["prompt"][:],
        response_length=config.response_length,
        max_prompt_length=config.max_prompt_length,
        stop_strings=config.stop_strings,
        temperature=config.temperature,
        # Of its own: models that draw with the same random numbers say the same where they can.
        seed=config.seed + list(subject.models).index(name),
        progress=progress,
        **batch,
    )
    logprobs = sequence_logprobs(policy, sampled, temperature=config.temperature, **batch)
    loss = None
    if subject.demonstrations is not None:
        given = (policy, tokenizer, subject.demonstrations)
        loss = completion_loss(*given, progress=progress, **batch)
    return ModelMeasurement(sampled, logprobs, loss)


def _kl(measured: ModelMeasurement, reference: PreTrainedModel, subject: Subject) -> float:
    """Mean of log p(completion) - log p_reference(completion) over a model's own samples."""
    config = subject.config
    logprobs = sequence_logprobs(
        reference,
        measured.sampled,
        temperature=config.temperature,
        batch_size=config.per_device_eval_batch_size,
    )
    return (measured.logprobs - logprobs).mean().item()


def _draw_several(subject: Subject, policy: PreTrainedModel, progress: Progress) -> list[str]:
    """N samples of the reference for each prompt, prompt by prompt."""
    config, tokenizer = subject.config, subject.tokenizers[subject.reference]
    token_lists, _ = prompt_tokens(
        subject.prompts["prompt"][:],
        tokenizer,
        policy,
        max_prompt_length=config.max_prompt_length,
        response_length=config.response_length,
    )
    rows = sample_several(
        policy,
        tokenizer,
        token_lists,
        subject.several,
        max_new_tokens=config.response_length,
        stop_strings=config.stop_strings,
        temperature=config.temperature,
        batch_size=config.per_device_eval_batch_size,
        progress=progress,
    )
    return [text for texts in rows for text in texts]


def _judge(
    prompts: Dataset, texts: list[str], reward: RewardFunction, progress: Progress
) -> list[float]:
    """Scores of one completion per prompt, some hundreds in a call."""
    scores: list[float] = []
    for start in range(0, len(texts), JUDGED_AT_ONCE):
        rows = range(start, min(start + JUDGED_AT_ONCE, len(texts)))
        given = [texts[row] for row in rows]
        scores += judged(prompts.select(rows), given, {"": reward})[""]
        progress(len(given))
    return scores


@torch.no_grad()
def completion_loss(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Dataset,
    *,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> float:
    """Mean -log p(token) over all completion tokens of the demonstrations, EOS included, nats.

    The loss of `sft` on them; exp(loss) is the perplexity. What exceeds the model's context is cut
    from the right, as in training.

    Args:
        policy: the model to measure.
        tokenizer: its tokenizer.
        demonstrations: `prompt`, `completion`; text or messages.
        batch_size: most demonstrations per forward pass.
        progress: told the number of demonstrations of each batch that is done.

    Raises:
        InputError: a prompt that fills the context; messages, and there is no chat template.
    """
    context = context_length(policy)
    rows = demonstration_tokens(demonstrations, tokenizer, context)
    batches = similar_lengths([len(prompt) + len(ids) for prompt, ids in rows], batch_size)
    total, tokens = 0.0, 0
    with evaluating(policy):
        for chosen in batches:
            prompts, completions = zip(*(rows[row] for row in chosen), strict=True)
            lengths = torch.tensor([len(ids) for ids in completions], device=policy.device)
            ids = pad_rows(list(completions), 0).to(policy.device)
            given = (*pad_prompts(prompts, policy.device), ids, lengths)
            total -= completion_logprobs(policy, *given, temperature=1.0).double().sum().item()
            tokens += int(lengths.sum())
            if progress is not None:
                progress(len(prompts))
    return total / tokens


def demonstration_tokens(
    demonstrations: Dataset, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each demonstration as tokens, as TRL's SFTTrainer makes them.

    The completion begins where the tokens of the prompt alone and of both together part.

    Args:
        demonstrations: `prompt`, `completion`.
        tokenizer: the model's.
        context: most tokens of both; None: no limit.
    """
    rows = []
    for number, record in enumerate(iterate(demonstrations), start=1):
        (opening,) = tokenize_prompts([record["prompt"]], tokenizer)
        whole = token_ids(record["prompt"], record["completion"], tokenizer)
        both = zip(opening, whole, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
        completion = whole[shared:context]
        if not shared or not completion:
            raise InputError(
                f"Demonstration {number}: the prompt is {len(opening)} tokens and the model's "
                f"context {context}, so no completion is left to measure. Shorten the prompt."
            )
        rows.append((whole[:shared], completion))
    return rows
