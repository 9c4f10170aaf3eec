"""TRL's reward-function signature: how a reward is called, and how its failures are reported.

f(prompts, completions, completion_ids, **columns) -> list[float | None], plain or async: one score
per completion, None where the reward does not apply. Prompts and completions are both texts or
both lists of messages; `completion_ids` are the completions' tokens, EOS included; `columns` are
the prompt dataset's further columns. A function gets only what it has parameters for.
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from functools import cache
from threading import Thread, current_thread
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn

from trl_instruct.console import shown
from trl_instruct.errors import InputError, harmless, redact
from trl_instruct.models.precision import store_in

Scores = list[float | None]
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
Result = TypeVar("Result")
Texts = Sequence[Any]  # texts, or lists of messages
Columns = Mapping[str, Sequence[Any]]

NONE_APPLIES = "at least one reward must apply"
LOOP_THREAD = "async rewards"
LARGEST = 3.4028234663852886e38  # float32
# Counters of texts cut to a model's context and of a judge's answers without a score.
COUNTED = ("truncated", "unparsable")


class RewardError(InputError):
    """A reward failed: `fault` says how, `row` at which index, if known (from 1 in the message)."""

    def __init__(self, fault: str, row: int | None = None):
        super().__init__(fault if row is None else f"{fault} (completion {row + 1})")
        self.fault, self.row = harmless(fault), row


class RewardUnreachableError(RewardError):
    """A reward cannot be reached: asking again for single completions would not help."""

    http_status = 503  # of a server whose reward it is: clients try again


def call_reward(
    reward: RewardFunction, prompts: Texts, completions: Texts, columns: Columns
) -> list[float]:
    """Scores of a reward function, checked: B finite floats.

    If it raises, it is called for one completion at a time to find the faulty one; its state
    (`state_dict`) is then as before the call. InputError if the names of its parameters do not fit;
    RewardError if it raised, or returned None, another number of scores or one that is not finite.
    """
    scores = call_part(reward, prompts, completions, columns, none_is_fault=True)
    return [score for score in scores if score is not None]  # None was a fault


def call_part(
    reward: RewardFunction,
    prompts: Texts,
    completions: Texts,
    columns: Columns,
    *,
    none_is_fault: bool = False,
) -> Scores:
    """Like `call_reward`, for a part of a reward: None where it does not apply."""
    call = _Call(reward, prompts, completions, _wanted(reward, columns))
    before = _Memory(reward)
    try:
        scores, faults = call.ask(none_is_fault=none_is_fault)
        for row, fault in faults.items():
            raise RewardError(fault, row)
    except RewardError as error:
        before.restore()
        raised = error.row is None and error.__cause__ is not None
        raised = raised and not isinstance(error, RewardUnreachableError)
        for row, (_, why) in enumerate(call.one_by_one() if raised else ()):
            if why is not None:
                before.restore()
                raise RewardError(why, row) from error.__cause__
        before.restore()
        raise
    return scores


def try_reward(
    reward: RewardFunction, prompts: Texts, completions: Texts, columns: Columns
) -> tuple[list[float], dict[int, str]]:
    """Scores of a reward function, NaN where it fails, and the faults by the completion's index."""
    call = _Call(reward, prompts, completions, _wanted(reward, columns))
    count, before = len(completions), _Memory(reward)
    try:
        return call.ask()
    except RewardUnreachableError as away:
        before.restore()
        return [math.nan] * count, dict.fromkeys(range(count), away.fault)
    except RewardError:
        before.restore()
    answers = list(call.one_by_one())
    alone = [score for score, _ in answers]
    faults = {row: fault for row, (_, fault) in enumerate(answers) if fault is not None}
    if before.states and len(faults) < count:
        alone = _together(call, alone, faults, before)
    return alone, faults


class _Call(NamedTuple):
    """A reward and its arguments: only the columns that it has parameters for."""

    reward: RewardFunction
    prompts: Texts
    completions: Texts
    columns: dict[str, Any]

    def of(self, rows: Sequence[int]) -> "_Call":
        """The same for some of the completions."""

        def those(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        count = len(self.completions)
        picked = {k: those(v) if is_column(v, count) else v for k, v in self.columns.items()}
        return _Call(self.reward, those(self.prompts), those(self.completions), picked)

    def ask(self, *, none_is_fault: bool = True) -> tuple[list[Any], dict[int, str]]:
        """Scores, NaN for a fault, and faults by index; RewardError if it fails as a whole."""
        name, count = reward_name(self.reward), len(self.completions)
        try:
            given = {"prompts": self.prompts, "completions": self.completions}
            scores: Any = self.reward(**given, **self.columns)
            if inspect.isawaitable(scores):
                scores = _awaited(scores)
            returned = _returned(scores)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit(0) would end a run as if it were done
            raise RewardError(f"Reward {name!r} raised {type(error).__name__}: {error}") from error
        if returned != f"{count} scores":
            raise RewardError(
                f"Reward {name!r} returned {returned} for {count} completions; it must return a "
                "list with one float per completion."
            )
        read, faults = [], {}
        for row, score in enumerate(scores):
            value = None if score is None and not none_is_fault else _float(score)
            if value is not None and math.isnan(value):
                must = "it must be a finite number" if score is not None else NONE_APPLIES
                faults[row] = f"Reward {name!r} gave the score {shown(score)}; {must}."
            read.append(value)
        return read, faults

    def one_by_one(self) -> Iterator[tuple[float, str | None]]:
        """Score and fault of each completion alone; an unreachable reward is not called again."""
        unreachable = None
        for row in range(len(self.completions)):
            score, fault = math.nan, unreachable
            try:
                if unreachable is None:
                    (score,), faults = self.of([row]).ask()
                    fault = faults.get(0)
            except RewardUnreachableError as error:
                fault = unreachable = error.fault
            except RewardError as error:
                fault = error.fault
            yield score, fault


class _Memory:
    """What a call changes in a reward, to undo a call that failed."""

    def __init__(self, reward: RewardFunction):
        self.reward, self.states, self.counts = reward, states_of(reward), counts_of(reward)

    def restore(self) -> None:
        load_states(self.reward, self.states)
        for part, counts in zip(parts_of(self.reward), self.counts, strict=True):
            for name, count in counts.items():
                if getattr(part, name) != count:  # a user's counter may be read-only
                    setattr(part, name, count)


def _together(
    call: _Call, scores: list[float], faults: Mapping[int, str], before: _Memory
) -> list[float]:
    """The scores, those without a fault computed again in one call.

    One at a time, a reward with state has scored each with the state of those before it only.
    """
    count, alone = len(scores), _Memory(call.reward)
    kept = [row for row in range(count) if row not in faults]
    before.restore()
    try:
        together, more = call.of(kept).ask()
    except RewardError:
        together, more = [], dict(faults)
    if more:
        alone.restore()
        return scores
    given = dict(zip(kept, together, strict=True))
    return [given.get(row, math.nan) for row in range(count)]


def _wanted(reward: RewardFunction, columns: Columns) -> dict[str, Any]:
    """The columns that the reward has parameters for; InputError if it needs a missing one."""
    parameters = inspect.signature(reward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and not {"prompts", "completions"} <= set(parameters):
        raise InputError(
            f"Reward {reward_name(reward)!r} takes ({', '.join(parameters)}); arguments are "
            "passed by name, so it needs (prompts, completions), and (..., **columns) for further "
            "columns."
        )
    given = {"prompts", "completions", *columns}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters.values() if p.kind in named and p.default is p.empty]
    lacking = [name for name in needed if name not in given]
    if lacking:
        raise InputError(
            f"Reward {reward_name(reward)!r} needs the column `{lacking[0]}`, which is missing. "
            f"It gets {', '.join(sorted(given))}."
        )
    return {k: v for k, v in columns.items() if takes_all or k in parameters}


@cache
def _event_loop(within: Thread | None) -> asyncio.AbstractEventLoop:
    """One loop for all calls, since a client or semaphore that an async function keeps belongs to
    the loop it was first used in; in a thread, since a notebook already runs one in its own.
    An async reward that calls another waits, in its loop's thread, for a second loop.
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True, name=LOOP_THREAD).start()
    return loop


def _awaited(answer: Awaitable[Any]) -> Any:
    """What an async function returns."""

    async def answered() -> Any:
        try:
            return await answer
        except SystemExit as error:  # it would end the loop, and leave the caller waiting
            raise RuntimeError(f"SystemExit: {error}") from error

    caller = current_thread()
    loop = _event_loop(caller if caller.name == LOOP_THREAD else None)
    return asyncio.run_coroutine_threadsafe(answered(), loop).result()


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a call returns; TimeoutError if it takes longer (see `TimeLimit`)."""
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError("timed out")
    return answer.result()


def _float(score: Any) -> float:
    """The score, or NaN if it is not a finite float32, the type of the tensors of scores."""
    try:
        value = math.nan if isinstance(score, str | bytes) else float(score)
    except Exception:
        return math.nan
    return value if abs(value) <= LARGEST else math.nan


def _returned(scores: Any) -> str:
    """What a reward returned: "8 scores" for a list of 8, or a tensor or array of shape (8,)."""
    kind, shape = type(scores).__name__, getattr(scores, "shape", None)
    if shape is not None and len(shape) != 1:
        return f"{kind} of shape {tuple(shape)}"
    no_list = isinstance(scores, Mapping | Set | str | bytes) or not hasattr(scores, "__len__")
    return kind if no_list else f"{len(scores)} scores"


def is_column(value: Any, count: int) -> bool:
    """Whether an argument of a reward holds a value per completion (TRL passes others as well)."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count


def as_completions(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """Completion texts in the prompts' own format: text, or an assistant message."""
    if isinstance(prompts[0], str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def as_text(content: Any) -> str:
    """A prompt or completion as text; messages are joined by newlines."""
    return content if isinstance(content, str) else "\n".join(m["content"] for m in content)


def reward_name(reward: RewardFunction) -> str:
    """The name of a reward in messages and tables, without secrets."""
    return redact(getattr(reward, "__name__", type(reward).__name__))


def parts_of(reward: RewardFunction) -> list[Any]:
    """The reward and, if it combines others, all its `parts`, each once."""
    parts = [reward, *(p for part in getattr(reward, "parts", ()) for p in parts_of(part))]
    return list({id(part): part for part in parts}.values())


def models_of(reward: Any) -> list[nn.Module]:
    """The models that a reward's parts hold; of a model, itself."""
    parts = parts_of(reward)
    held = [p if isinstance(p, nn.Module) else getattr(p, "model", None) for p in parts]
    return [model for model in held if isinstance(model, nn.Module)]


def place_on(
    reward: RewardFunction,
    device: Any,
    dtype: torch.dtype = torch.float32,
    shared: Container[nn.Parameter] = (),
) -> None:
    """Move a reward's models to a device: `to(device)` of each part that has it.

    Their linear layers are stored in `dtype` (see `store_in`, also for `shared`).
    """
    for model in models_of(reward):
        store_in(model, dtype, shared)
    for part in parts_of(reward):
        if hasattr(part, "to"):
            part.to(device)


def tell_tokenizer(reward: RewardFunction, tokenizer: Any) -> None:
    """Tell a reward's models which tokenizer `completion_ids` come from: the policy's."""
    for part in parts_of(reward):
        if hasattr(part, "ids_are_of"):
            part.ids_are_of(tokenizer)


def states_of(reward: RewardFunction) -> list[dict[str, Any]]:
    """A reward's state between calls: `state_dict()` of each part that has one, as JSON."""
    return [part.state_dict() for part in parts_of(reward) if hasattr(part, "state_dict")]


def load_states(reward: RewardFunction, states: list[dict[str, Any]]) -> None:
    """Restore what `states_of` returned; InputError if it is another reward's."""
    remembering = [part for part in parts_of(reward) if hasattr(part, "state_dict")]
    if len(remembering) != len(states):
        raise InputError(
            f"The checkpoint holds the state of {len(states)} rewards, but {len(remembering)} of "
            "this run have state. Resume with the same reward."
        )
    for part, state in zip(remembering, states, strict=True):
        part.load_state_dict(state)


def merge_states(reward: RewardFunction) -> None:
    """Give a reward's state what it has seen in every process; all of them call this."""
    for part in parts_of(reward):
        if hasattr(part, "merge"):
            part.merge(gather_object([part.state_dict()]))


def counts_of(reward: RewardFunction) -> list[dict[str, int]]:
    """The counters of each part of a reward, by name."""
    return [
        {name: count for name in COUNTED if isinstance(count := getattr(part, name, None), int)}
        for part in parts_of(reward)
    ]
