"""Answers of checkpoints to the same prompts, for people to compare."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from trl_instruct.data.reading import Reading
from trl_instruct.errors import explained
from trl_instruct.generation.sampling import Sampling, prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer


class AnswerOptions(NamedTuple):
    """Sampling options as in `generation.sampling.generate`, and the seed."""

    response_length: int = 128
    temperature: float = 1.0
    stop_strings: Sequence[str] | None = None
    seed: int = 0


def answers_of(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: AnswerOptions,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    typed: Reading | None = None,
) -> dict[str, list[str]]:
    """Each model's completion of each prompt; one model is loaded at a time.

    Args:
        models: checkpoints by name; an adapter's folder, too.
        prompts: texts or lists of messages as in records, or typed texts.
        columns: the other columns of the records, which the chat template may read.
        typed: how typed prompts are written; None: they are records. If it leaves them as they are,
            they become messages where there is a chat template.

    Raises:
        InputError: a source has no language model or no tokenizer; a prompt does not fit into the
            context.
    """
    answers = {}
    lengths = sampling.response_length, None
    options = Sampling(*lengths, sampling.stop_strings, sampling.temperature)
    for name, source in models.items():
        tokenizer = load_tokenizer(source)
        asked = list(prompts)
        if typed is not None and typed.writes_prompts():
            asked = [typed.prompt_of({"prompt": text}) for text in prompts]
        elif typed is not None and tokenizer.chat_template is not None:
            asked = [[{"role": "user", "content": text}] for text in prompts]
        with explained(f"seed is {sampling.seed}"):
            set_seed(sampling.seed)
        policy = load_policy(source, ModelConfig(dtype="float32")).to(PartialState().device)
        given = {**(columns or {}), "prompt": asked}
        token_lists, _ = prompt_tokens(given, tokenizer, policy, options)
        several = sample_several(policy, tokenizer, token_lists, 1, options)
        answers[name] = [completion.text for (completion,) in several]
    return answers
