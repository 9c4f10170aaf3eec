"""Answers of checkpoints side by side. (For a conversation there is `transformers chat`.)"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from trl_instruct.console import one_line, printable
from trl_instruct.errors import explained
from trl_instruct.generation.sampling import Sampling, prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource
from trl_instruct.models.tokenizers import load_tokenizer


class AnswerOptions(NamedTuple):
    """Sampling options as in `generate`, completions per prompt, and dtype of the weights."""

    response_length: int = 128
    temperature: float = 1.0
    stop_strings: Sequence[str] | None = None
    num_completions: int = 1
    seed: int = 0
    dtype: str = "float32"


def answer_prompts(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: AnswerOptions,
    **how: Any,
) -> Iterator[str]:
    """Lines to print: each model's answers to each prompt; `how` as in `answers_of`."""
    answers = answers_of(models, prompts, sampling, **how)
    for row, prompt in enumerate(prompts):
        yield f"\n> {one_line(prompt)}"
        yield from shown({name: given[row] for name, given in answers.items()})


def answers_of(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: AnswerOptions,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    typed: bool = False,
    suffix: str = "",
    chat: bool = True,
) -> dict[str, list[list[str]]]:
    """Each model's completions of each prompt; one model is loaded at a time.

    Args:
        models: checkpoints by name; an adapter's folder, too.
        prompts: texts or lists of messages as in records, or typed texts.
        columns: the other columns of the records, which the chat template may read.
        typed: the prompts are typed texts, which become messages if there is a chat template.
        suffix: appended to a typed text that is not sent as a message.
        chat: if False, a typed text is continued even if there is a chat template.

    Raises:
        InputError: a source has no language model or no tokenizer; a prompt does not fit into the
            context.
    """
    answers = {}
    for name, source in models.items():
        tokenizer = load_tokenizer(source)
        asked = list(prompts)
        if typed and chat and tokenizer.chat_template is not None:
            asked = [[{"role": "user", "content": text}] for text in prompts]
        elif typed:
            asked = [text + suffix for text in prompts]
        with explained(f"seed is {sampling.seed}"):
            set_seed(sampling.seed)
        answers[name] = _complete(source, tokenizer, asked, sampling, columns)
    return answers


def _complete(
    source: ModelSource,
    tokenizer: Any,
    prompts: Sequence[Any],
    sampling: AnswerOptions,
    columns: Mapping[str, Sequence[Any]] | None,
) -> list[list[str]]:
    """Completions of each prompt."""
    policy = load_policy(source, ModelConfig(dtype=sampling.dtype)).to(PartialState().device)
    lengths = sampling.response_length, None
    options = Sampling(*lengths, sampling.stop_strings, sampling.temperature)
    given = {**(columns or {}), "prompt": prompts}
    token_lists, _ = prompt_tokens(given, tokenizer, policy, options)
    several = sample_several(policy, tokenizer, token_lists, sampling.num_completions, options)
    return [[completion.text for completion in given] for given in several]


def shown(answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Completions one below the other, later lines indented; untrusted text, so escaped.

    >>> print(*shown({"sft": ["A rose\\nand a lily."], "ppo": ["A\\x1b[2J"]}), sep="\\n")
      sft  A rose
           and a lily.
      ppo  A\\x1b[2J
    """
    width = max(map(len, answers))
    for name, texts in answers.items():
        for text in texts:
            indented = printable(text.strip()).replace("\n", "\n" + " " * (width + 4))
            yield f"  {name:<{width}}  {indented}".rstrip()
