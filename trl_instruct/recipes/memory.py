"""Memory that a stage will need: its models, and an estimate for its batch, before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

# Values kept for the backward pass per token and layer, in hidden sizes: Korthikanti et al. 2022
# (arXiv:2205.05198), equation 1, without dropout masks and with fused attention.
KEPT_PER_LAYER = 16
# As large as the vocabulary: logits, log-probabilities and, with a backward pass, the gradient.
KEPT_LOGITS, READ_LOGITS = 3, 2
FLOAT32 = 4


class Holding(NamedTuple):
    """A role's parameters: how many, how many of them train, their bytes and dtypes."""

    role: str
    parameters: int
    trainable: int
    bytes: int
    dtypes: str


class Work(NamedTuple):
    """One forward pass: `rows` of `length` tokens, logits for `predicted` tokens of each row.

    `models`: how many models run at once; `backward`: whether activations are kept.
    """

    rows: int
    length: int
    predicted: int
    models: int = 1
    backward: bool = True


class Estimate(NamedTuple):
    """Estimated bytes of a step at its peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


def holdings(roles: Mapping[str, nn.Module | None]) -> list[Holding]:
    """What each role's model holds (nothing if None); first, what several roles share."""
    owners: dict[nn.Parameter, set[str]] = {}
    for role, model in roles.items():
        for parameter in model.parameters() if model is not None else ():
            owners.setdefault(parameter, set()).add(role)
    held: dict[str, list[nn.Parameter]] = {"shared": [], **{role: [] for role in roles}}
    for parameter, by in owners.items():
        held["shared" if len(by) > 1 else next(iter(by))].append(parameter)
    return [
        Holding(
            role,
            sum(_count(p) for p in parameters),
            sum(_count(p) for p in parameters if p.requires_grad),
            sum(p.nbytes for p in parameters),
            ", ".join(sorted({_dtype(p) for p in parameters})),
        )
        for role, parameters in held.items()
        if parameters
    ]


def _count(parameter: nn.Parameter) -> int:
    """Number of values in a parameter; bitsandbytes packs two into a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return quantised.shape.numel() if quantised is not None else parameter.numel()


def _dtype(parameter: nn.Parameter) -> str:
    quantised = getattr(parameter, "quant_state", None)
    return quantised.quant_type if quantised is not None else str(parameter.dtype)[6:]


def optimizer_bytes(optim: str, parameters: int) -> int:
    """Bytes of an optimizer's state, by its name in transformers and how many parameters train.

    >>> [optimizer_bytes(name, 10) for name in ("adamw_torch", "adamw_bnb_8bit", "lion_32bit")]
    [80, 20, 40]
    """
    moments = 2 if "adam" in optim else 0 if optim.startswith(("sgd", "adafactor")) else 1
    return parameters * moments * (1 if "8bit" in optim else FLOAT32)


def activation_bytes(
    work: Work, *, hidden: int, layers: int, vocabulary: int, width: int, checkpointing: bool
) -> int:
    """Bytes that a forward pass keeps: logits, and layer inputs or a cache.

    `hidden`, `layers` and `vocabulary` are sizes of the model, `width` bytes per value. With
    `checkpointing`, the backward pass recomputes activations inside each layer.
    """
    tokens = work.rows * work.length
    if not work.backward:
        kept = 2 * layers  # keys and values, for sampling
    elif checkpointing:
        kept = layers + KEPT_PER_LAYER
    else:
        kept = layers * KEPT_PER_LAYER
    logits = KEPT_LOGITS if work.backward else READ_LOGITS
    behind = tokens * hidden * kept * width * work.models
    return behind + work.rows * work.predicted * vocabulary * FLOAT32 * logits


def estimate(roles: Mapping[str, nn.Module | None], works: Sequence[Work], args: Any) -> Estimate:
    """The run's peak memory. Roles are as in `holdings`, `args` are `TrainingArguments`.

    The passes take turns; activations are those of the first role's model.
    """
    first: Any = next(iter(roles.values()))
    rows, text = holdings(roles), first.config.get_text_config()
    trainable = sum(row.trainable for row in rows)
    width = 2 if args.bf16 or args.fp16 or "bfloat16" in rows[0].dtypes else FLOAT32
    sizes = {"hidden": text.hidden_size, "layers": text.num_hidden_layers, "width": width}
    sizes |= {"vocabulary": text.vocab_size, "checkpointing": args.gradient_checkpointing}
    trained = {p for m in roles.values() if m is not None for p in m.parameters()}
    return Estimate(
        weights=sum(row.bytes for row in rows),
        gradients=sum(p.nbytes for p in trained if p.requires_grad),
        optimizer=optimizer_bytes(str(getattr(args.optim, "value", args.optim)), trainable),
        activations=max(activation_bytes(work, **sizes) for work in works),
    )


def memory_table(roles: Mapping[str, nn.Module | None], works: Sequence[Work], args: Any) -> str:
    """What each role holds, and the estimate, as text; arguments as in `estimate`."""
    needed, lines = estimate(roles, works, args), [["role", "parameters", "trainable", "MB", ""]]
    for role, count, trainable, size, dtypes in holdings(roles):
        lines.append([role, _short(count), _short(trainable), _mb(size), dtypes])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:4], widths[1:4]), line[4]])
        for line in lines
    ]
    parts = ", ".join(f"{name} {_mb(size)}" for name, size in needed._asdict().items())
    passes = " or ".join(f"{work.rows} x {work.length} tokens" for work in works)
    total = f"about {_mb(sum(needed))} MB at {passes}: {parts}"
    if torch.cuda.is_available():
        total += f"; {_mb(torch.cuda.mem_get_info()[0])} MB are free"
    return "\n".join([line.rstrip() for line in ["memory", *shown, total]])


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _mb(size: int) -> str:
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"
