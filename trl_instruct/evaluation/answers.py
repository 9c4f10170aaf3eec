"""Answers of checkpoints side by side, to given prompts or in a conversation."""

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
    """Sampling options as in `generate`, completions per prompt, and dtype of the weights."""

    response_length: int = 128
    temperature: float = 1.0
    stop_strings: Sequence[str] | None = None
    num_completions: int = 1
    seed: int = 0
    dtype: str = "float32"


class Speaker:
    """A checkpoint that completes prompts and remembers a conversation.

    Args:
        source: a model as in `sft`, or an adapter folder.
        suffix: appended to a typed text that is not sent as a chat message.
        chat: if False, a typed text is continued even if the tokenizer has a chat template.

    Raises:
        InputError: the source has no language model or no tokenizer.
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
        """The prompt for a typed text: a user message, or text to continue."""
        return [{"role": "user", "content": text}] if self.chat else text + self.suffix

    def complete(
        self,
        prompts: Sequence[Any],
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        max_prompt_length: int | None = None,
    ) -> list[list[str]]:
        """Completions of each prompt.

        Args:
            prompts: texts, or lists of messages.
            columns: what the chat template reads beside them, as `render_prompts` takes it.
            max_prompt_length: longer prompts are cut from the left; None: no cut.

        Raises:
            InputError: a prompt does not fit into the context.
        """
        sampling = self.options
        token_lists, _ = prompt_tokens(
            prompts,
            self.tokenizer,
            self.policy,
            max_prompt_length=max_prompt_length,
            response_length=sampling.response_length,
            columns=columns,
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
        """Answers to the user's next text; the first one is kept in the conversation.

        Without a chat template each text is a separate prompt. A conversation too long for the
        context is cut from the left.
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
    columns: Mapping[str, Sequence[Any]] | None = None,
    typed: bool = False,
    suffix: str = "",
    chat: bool = True,
) -> Iterator[str]:
    """Lines to print: each model's answers to each prompt; one model is loaded at a time.

    Args:
        models: checkpoints by name.
        prompts: texts or lists of messages as in records, or typed texts.
        columns: the other columns of the records.
        typed: the prompts are typed texts, which become messages if there is a chat template.
        suffix, chat: as in `Speaker`, for typed texts.
    """
    answers = {}
    for name, source in models.items():
        speaker = Speaker(source, sampling, suffix=suffix, chat=chat)
        set_seed(sampling.seed)
        asked = [speaker.asked(text) if typed else text for text in prompts]
        answers[name] = speaker.complete(asked, columns=columns)
    for row, prompt in enumerate(prompts):
        yield f"\n> {one_line(prompt)}"
        yield from shown({name: given[row] for name, given in answers.items()})


def converse(
    models: Mapping[str, ModelSource],
    lines: Iterator[str],
    sampling: AnswerOptions,
    *,
    suffix: str = "",
    chat: bool = True,
) -> Iterator[str]:
    """Lines to print: each model's reply to each line that the user types.

    Args:
        models: checkpoints by name, all in memory, each with its own conversation.
        lines: the user's; empty ones are skipped.
        sampling, suffix, chat: as in `Speaker`.
    """
    speakers = {
        name: Speaker(source, sampling, suffix=suffix, chat=chat) for name, source in models.items()
    }
    set_seed(sampling.seed)
    for line in lines:
        if line.strip():
            yield from shown({name: speaker.reply(line) for name, speaker in speakers.items()})


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
