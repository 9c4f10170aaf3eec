"""What `evaluate` measures of checkpoints: samples, log-probabilities, losses, scores."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from trl import ModelConfig

from trl_instruct.configs import EvaluateConfig
from trl_instruct.data.rendering import render
from trl_instruct.data.sources import iterate
from trl_instruct.errors import InputError, explained
from trl_instruct.generation.engines import begun
from trl_instruct.generation.logits import join, spread
from trl_instruct.generation.sampler import Sampler
from trl_instruct.generation.sampling import (
    Completion,
    Sampling,
    complete,
    pad_prompts,
    prompt_tokens,
    sample_several,
)
from trl_instruct.models.load import load_policy
from trl_instruct.models.precision import frozen_dtype
from trl_instruct.models.processes import seed_process, shared_out
from trl_instruct.models.properties import ModelSource, context_length, evaluating
from trl_instruct.padding import pad_rows, right_padded_mask, similar_lengths
from trl_instruct.ppo_trainer.token_statistics import token_statistics
from trl_instruct.rewards import function
from trl_instruct.rewards.function import RewardFunction, place_on
from trl_instruct.types import Model, Tokenizer

JUDGED_AT_ONCE = 512
Progress: TypeAlias = Callable[[int], Any]


class Subject(NamedTuple):
    """What to measure, and how: models and their tokenizers by name.

    several: samples of the reference per prompt for best of n; 0: none. one_seed: whether all
    models sample with the same seed; otherwise each has a different one.
    """

    config: EvaluateConfig
    model_config: ModelConfig
    models: dict[str, ModelSource]
    tokenizers: dict[str, Tokenizer]
    prompts: Dataset
    demonstrations: Dataset | None = None
    several: int = 0
    one_seed: bool = False

    @property
    def baseline(self) -> str:
        """Name of the model that win rates are against."""
        return self.config.baseline or next(iter(self.models))

    @property
    def reference(self) -> str:
        """Name of the model that the KL is measured against."""
        return self.config.reference or self.baseline

    def load(self, name: str) -> Sampler:
        """What samples from the model of that name, which is on its device."""
        trusted = self.config.trust_remote_code
        policy = load_policy(self.models[name], self.model_config, trust_remote_code=trusted)
        return begun(policy.to(PartialState().device), self.tokenizers[name], self.config)

    @property
    def sampling(self) -> Sampling:
        """How every model is sampled."""
        return Sampling.of(self.config, self.config.per_device_eval_batch_size)


class ModelMeasurement(NamedTuple):
    """One model's completions and their measurements.

    prompts: their tokens. sampled: a completion of each. kl: to the reference, nats per completion,
    B numbers; None if their vocabularies differ. scores: B numbers by judge. loss: on the
    demonstrations, nats per token.
    """

    prompts: list[list[int]]
    sampled: list[Completion]
    kl: list[float] | None
    scores: dict[str, list[float]]
    loss: float | None


def measure(
    subject: Subject, rewards: Mapping[str, RewardFunction], progress: Progress = int
) -> tuple[dict[str, ModelMeasurement], dict[str, Tensor]]:
    """Measurements by model; and by judge the scores for best of n, `(B, N)` float64.

    One model is in memory at a time. The reference comes last and is loaded only once. The judges
    wait on the CPU until all is sampled, and then take turns. Several processes share out the
    texts, and each gets all measurements. `progress` gets the number of texts of this process.
    """
    models, several = _sample_all(subject, progress)
    prompts, copies = subject.prompts, subject.several
    repeated = prompts.select([row for row in range(len(prompts)) for _ in range(copies)])
    table: dict[str, Tensor] = {}
    for judge, reward in rewards.items():
        place_on(reward, PartialState().device, frozen_dtype(subject.config))
        for model in models.values():
            model.scores[judge] = _judge(prompts, model.sampled, reward, progress)
        if several:
            flat = _judge(repeated, several, reward, progress)
            table[judge] = torch.tensor(flat, dtype=torch.float64).view(-1, copies)
        place_on(reward, "cpu")
    return models, table


def _sample_all(
    subject: Subject, progress: Progress
) -> tuple[dict[str, ModelMeasurement], list[Completion]]:
    """All but the scores; and the reference's best-of-n samples, prompt by prompt."""
    *others, last = sorted(subject.models, key=lambda name: name == subject.reference)
    found = {name: _measure(subject, name, subject.load(name), progress) for name in others}
    reference = subject.load(last)
    found[last] = _measure(subject, last, reference, progress)
    vocabulary = subject.tokenizers[subject.reference].get_vocab()
    for name in others:
        prompts, sampled, own, *_ = found[name]
        kl = None
        if subject.tokenizers[name].get_vocab() == vocabulary:
            ids = [completion.ids for completion in sampled]
            logprobs = sequence_logprobs(reference.policy, prompts, ids, subject.sampling)
            kl = (torch.tensor(own) - logprobs).tolist()
        found[name] = found[name]._replace(kl=kl)
    several: list[Completion] = []
    if subject.several:
        tokenizer, sampling = reference.tokenizer, subject.sampling
        token_lists, _ = prompt_tokens(subject.prompts[:], tokenizer, reference.policy, sampling)
        how = subject.several, sampling, progress
        drawn = shared_out(token_lists, lambda mine: [*sample_several(reference, mine, *how)])
        several = [one for row in drawn for one in row]
    return {name: found[name] for name in subject.models}, several


def _measure(subject: Subject, name: str, sampler: Sampler, progress: Progress) -> ModelMeasurement:
    """A model's completions and loss; `kl` still holds the model's own log-probabilities."""
    given = sampler.policy, sampler.tokenizer
    # With one seed, related models often sample the same tokens.
    seed = subject.config.seed + (0 if subject.one_seed else list(subject.models).index(name))
    how: Any = {"seed": seed, "progress": progress}
    prompts, sampled = sample(sampler, subject.prompts[:], subject.sampling, **how)
    own = [0.0] * len(sampled)
    if name != subject.reference:
        ids = [completion.ids for completion in sampled]
        own = sequence_logprobs(sampler.policy, prompts, ids, subject.sampling).tolist()
    loss = None
    if subject.demonstrations is not None:
        size = subject.sampling.batch_size
        loss = completion_loss(*given, subject.demonstrations, batch_size=size, progress=progress)
    return ModelMeasurement(prompts, sampled, own, {}, loss)


def sample(
    sampler: Sampler,
    columns: Mapping[str, Sequence[Any]],
    sampling: Sampling,
    *,
    seed: int,
    progress: Progress = int,
) -> tuple[list[list[int]], list[Completion]]:
    """The tokens of each prompt, and one sampled completion of it."""
    with explained(f"seed is {seed}"):
        seed_process(seed)
    token_lists, _ = prompt_tokens(columns, sampler.tokenizer, sampler.policy, sampling)
    how: Any = {"sampling": sampling, "progress": progress}
    return token_lists, shared_out(token_lists, partial(complete, sampler, **how))


@torch.no_grad()
@torch.no_grad()
def sequence_logprobs(
    model: Model,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    sampling: Sampling,
    progress: Progress = int,
) -> Tensor:
    """Log-probability of each of B completions, `(B,)` nats, float32 on CPU, at the temperature."""

    def summed(texts: list[tuple[list[int], list[int]]]) -> list[float]:
        found = torch.zeros(len(texts))
        lengths = [len(asked) + len(own) for asked, own in texts]
        for rows in similar_lengths(lengths, sampling.batch_size):
            asked, own = zip(*(texts[row] for row in rows), strict=True)
            counts = torch.tensor([len(ids) for ids in own], device=model.device)
            answers = pad_rows([*own], 0).to(model.device)
            mask = right_padded_mask(counts, answers.shape[1])
            given = join(*pad_prompts(asked, model.device), answers, counts), answers[mask]
            logprobs, _ = token_statistics(model, *given, temperature=sampling.temperature)
            found[rows] = spread(logprobs, mask).sum(dim=1).cpu()
            progress(len(rows))
        return found.tolist()

    with evaluating(model):
        return torch.tensor(shared_out(zip(prompts, completions, strict=True), summed))


def _judge(
    prompts: Dataset, completions: list[Completion], reward: RewardFunction, progress: Progress
) -> list[float]:
    """Scores of one completion per prompt, JUDGED_AT_ONCE at a time; other columns reach it."""

    def scores(rows: list[int]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), JUDGED_AT_ONCE):
            part = rows[start : start + JUDGED_AT_ONCE]
            columns, drawn = prompts[part], [completions[row] for row in part]
            asked = columns.pop("prompt")
            columns["completion_ids"] = [completion.ids for completion in drawn]
            texts = function.as_completions(asked, [completion.text for completion in drawn])
            found += function.call_reward(reward, asked, texts, columns)
            progress(len(part))
        return found

    judged = shared_out(range(len(completions)), scores)
    function.merge_states(reward)
    return judged


def shown_samples(
    prompts: Sequence[Any], models: Mapping[str, ModelMeasurement]
) -> list[dict[str, Any]]:
    """The first measured prompts, each with the completion and scores of every model."""
    shown = []
    for row, prompt in enumerate(prompts):
        sample = {"prompt": prompt}
        for name, model in models.items():
            scores = {judge: given[row] for judge, given in model.scores.items()}
            sample[name] = {"completion": model.sampled[row].text, **scores}
        shown.append(sample)
    return shown


def completion_loss(
    policy: Model,
    tokenizer: Tokenizer,
    demonstrations: Dataset,
    *,
    batch_size: int = 64,
    progress: Progress = int,
) -> float:
    """Mean -log p(token) over all completion tokens of the demonstrations, EOS included, nats.

    This is the loss of `sft`; exp(loss) is the perplexity. Texts longer than the model's context
    are cut from the right, as in training.
    """
    rows = demonstration_tokens(demonstrations, tokenizer, context_length(policy))
    prompts, completions = zip(*rows, strict=True)
    lengths = [len(ids) for ids in completions]
    sampling = Sampling(max(lengths), batch_size=batch_size)
    logprobs = sequence_logprobs(policy, prompts, completions, sampling, progress)
    return -logprobs.double().sum().item() / sum(lengths)


def demonstration_tokens(
    demonstrations: Dataset, tokenizer: Tokenizer, context: int | None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each demonstration as tokens, together at most `context`."""
    rows = []
    for number, record in enumerate(iterate(demonstrations), start=1):
        prompt, completion, _ = render(record["prompt"], record["completion"], tokenizer, record)
        room = None if context is None else max(0, context - len(prompt))
        if not completion[:room]:
            raise InputError(
                f"Demonstration {number}: the prompt is {len(prompt)} tokens long and the model's "
                f"context {context}, so no completion is left to measure. Shorten the prompt."
            )
        rows.append((prompt, completion[:room]))
    return rows
