"""Answers of checkpoints to the same prompts, for people to compare."""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from trl import ModelConfig

from trl_instruct.data.reading import Reading
from trl_instruct.evaluation.measurement import sample
from trl_instruct.generation.engines import begun
from trl_instruct.generation.sampling import Sampling
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer


def answers_of(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    seed: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    typed: Reading | None = None,
) -> dict[str, list[str]]:
    """Each model's completion of each prompt; one model is loaded at a time, the seed set anew.

    Prompts are those of records, whose other columns the chat template may read; or typed texts.
    `typed` tells how these are written: where it leaves them as they are, they become messages if
    there is a chat template. InputError for a source without language model or tokenizer, and a
    prompt that does not fit into the context.
    """
    answers = {}
    for name, source in models.items():
        tokenizer = load_tokenizer(source)
        asked = list(prompts)
        if typed is not None and typed.writes_prompts():
            asked = [typed.prompt_of({"prompt": text}) for text in prompts]
        elif typed is not None and tokenizer.chat_template is not None:
            asked = [[{"role": "user", "content": text}] for text in prompts]
        policy = load_policy(source, ModelConfig(dtype="float32")).to(PartialState().device)
        given = {**(columns or {}), "prompt": asked}
        _, drawn = sample(begun(policy, tokenizer), given, sampling, seed=seed)
        answers[name] = [completion.text for completion in drawn]
    return answers
