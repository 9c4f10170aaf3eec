"""What checkpoints say, side by side: to given prompts, or in a conversation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from trl_instruct.console import one_line, printable
from trl_instruct.generation.sampling import prompt_tokens, sample_several
from trl_instruct.models.load import load_policy
from trl_instruct.models.properties import ModelSource, context_length
from trl_instruct.models.tokenizers import load_tokenizer


class AnswerOptions(NamedTuple):
    """How completions are drawn, as in `generate`; `num_completions` of each prompt, `dtype`: of
    the weights."""

    response_length: int = 128
    temperature: float = 1.0
    stop_strings: Sequence[str] | None = None
    num_completions: int = 1
    seed: int = 0
    dtype: str = "float32"


class Speaker:
    """A checkpoint that completes prompts and remembers a conversation.

    Args:
        source: a model as in `sft`, or a folder with an adapter.
        sampling: how it answers.
        suffix: what parts a typed text from its completion where there is no chat template.
        chat: False: a typed text is a text to go on with, whatever the tokenizer's template.

    Raises:
        InputError: no language model or no tokenizer there.
    """

    def __init__(
        self, source: ModelSource, sampling: AnswerOptions, *, suffix: str = "", chat: bool = True
    ):
        self.tokenizer = load_tokenizer(source)
        policy = load_policy(source, ModelConfig(dtype=sampling.dtype))
        self.policy = policy.to(PartialState().device)
        self.options = sampling
        self.suffix = suffix
        self.chat = chat and self.tokenizer.chat_template is not None
        self.messages: list[dict[str, str]] = []

    def asked(self, text: str) -> Any:
        """A typed text as a prompt: the user's message, or text that is to be gone on with."""
        return [{"role": "user", "content": text}] if self.chat else text + self.suffix

    def complete(
        self, prompts: Sequence[Any], *, max_prompt_length: int | None = None
    ) -> list[list[str]]:
        """Completions of each prompt.

        Args:
            prompts: texts, or lists of messages.
            max_prompt_length: longer prompts lose their beginning; None: they are an error.

        Raises:
            InputError: a prompt that does not fit into the context.
        """
        sampling = self.options
        token_lists, _ = prompt_tokens(
            prompts,
            self.tokenizer,
            self.policy,
            max_prompt_length=max_prompt_length,
            response_length=sampling.response_length,
        )
        several = sample_several(
            self.policy,
            self.tokenizer,
            token_lists,
            sampling.num_completions,
            max_new_tokens=sampling.response_length,
            temperature=sampling.temperature,
            stop_strings=sampling.stop_strings,
        )
        return [[completion.text for completion in given] for given in several]

    def reply(self, text: str) -> list[str]:
        """Answers to the user's next text; the first one stays in the conversation.

        Without a chat template each text is a prompt of its own. A conversation that fills the
        context loses its beginning.
        """
        asked = self.asked(text)
        prompt = [*self.messages, *asked] if self.chat else asked
        context = context_length(self.policy)
        room = None if context is None else max(1, context - self.options.response_length)
        (answers,) = self.complete([prompt], max_prompt_length=room)
        if self.chat:
            self.messages = [*prompt, {"role": "assistant", "content": answers[0]}]
        return answers


def answer_prompts(
    models: Mapping[str, ModelSource],
    prompts: Sequence[Any],
    sampling: AnswerOptions,
    *,
    typed: bool = False,
    suffix: str = "",
    chat: bool = True,
) -> Iterator[str]:
    """What every model says to every prompt, ready to be printed; one model is loaded at a time.

    Args:
        models: checkpoints by name.
        prompts: texts or lists of messages, as they stand in records; or typed texts.
        sampling: how they answer.
        typed: the prompts are typed texts: messages to a model with a chat template.
        suffix, chat: of `Speaker`, for typed texts.
    """
    answers = {}
    for name, source in models.items():
        answers[name] = _answers(
            Speaker(source, sampling, suffix=suffix, chat=chat), prompts, typed=typed
        )
    for row, prompt in enumerate(prompts):
        yield f"\n> {one_line(prompt)}"
        yield from shown({name: given[row] for name, given in answers.items()})


def _answers(speaker: Speaker, prompts: Sequence[Any], *, typed: bool) -> list[list[str]]:
    set_seed(speaker.options.seed)
    return speaker.complete([speaker.asked(text) if typed else text for text in prompts])


def converse(
    models: Mapping[str, ModelSource],
    lines: Iterator[str],
    sampling: AnswerOptions,
    *,
    suffix: str = "",
    chat: bool = True,
) -> Iterator[str]:
    """What every model replies to every line that a user types, ready to be printed.

    Args:
        models: checkpoints by name, all in memory; each has a conversation of its own.
        lines: the user's; empty ones are passed over.
        sampling, suffix, chat: of `Speaker`.
    """
    speakers = {
        name: Speaker(source, sampling, suffix=suffix, chat=chat) for name, source in models.items()
    }
    set_seed(sampling.seed)
    for line in lines:
        if line.strip():
            yield from shown({name: speaker.reply(line) for name, speaker in speakers.items()})


def shown(answers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Completions below each other, their further lines indented; untrusted text, so escaped.

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
