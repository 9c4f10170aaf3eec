"""Memory that a stage will need: its models, and an estimate for its batch, before it starts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from trl_instruct.models.sharding import launched_sharded

# Values kept for the backward pass per token and layer, in hidden sizes: Korthikanti et al. 2022
# (arXiv:2205.05198), equation 1, without dropout masks and with fused attention.
KEPT_PER_LAYER = 16
# Of them the inputs of linear layers: bitsandbytes' in 8 bit keep these, whatever is recomputed.
KEPT_INPUTS = 7
# As large as the vocabulary, with a backward pass: logits, log-probabilities and their gradient.
KEPT_LOGITS = 3
FLOAT32, HALF = 4, 2
# On CPU: code that libraries load at first use, and small blocks that the C allocator keeps
# (measured: `make bench-memory`).
PROCESS = 260 * 2**20


class Holding(NamedTuple):
    """A role's parameters: how many, how many of them train, their bytes and dtypes."""

    role: str
    parameters: int
    trainable: int
    bytes: int
    dtypes: str


class Work(NamedTuple):
    """One forward pass: `rows` of `length` tokens, logits for `predicted` tokens of each row.

    `models`: how many models run at once; `backward`: whether activations are kept; `tile`: most
    logits that are in memory at once, if they are computed in tiles; 0: all of them.
    """

    rows: int
    length: int
    predicted: int
    models: int = 1
    backward: bool = True
    tile: int = 0


class Estimate(NamedTuple):
    """Estimated bytes of a step at its peak, in one process.

    weights: of all roles that are there at once. gradients: of those that train; once more for
    DDP's buckets; a process's share with FSDP and ZeRO, which reduce them in every micro-batch.
    optimizer: its state, also shared so. copies: autocast's, two bytes of each float32 weight that
    trains, which it keeps from the forward pass to its end (frozen weights are rounded one at a
    time, or stored so); the copy that a policy draws with takes less. process: on CPU, code, the
    allocator's waste, a quantised model's file, which stays mapped. activations: `activation_bytes`
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    process: int
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
    work: Work, *, hidden: int, layers: int, vocabulary: int, width: int, kept: int
) -> int:
    """Bytes that a forward pass keeps: hidden states, or a cache, and logits.

    `hidden`, `layers` and `vocabulary` are sizes of the model, `width` bytes per value, `kept` the
    hidden sizes of a token for the backward pass. Logits are float32 and three times as many with
    a backward pass; without one they stay as the head returns them, and are read a few rows at a
    time; of tiles there is one.
    """
    tokens = work.rows * work.length
    kept = kept if work.backward else 2 * layers  # keys and values, for sampling
    behind, logits = tokens * hidden * kept * width * work.models, work.rows * work.predicted
    if work.tile or not work.backward:
        whole = logits * vocabulary
        return behind + width * (min(work.tile, whole) if work.tile else whole)
    return behind + logits * vocabulary * FLOAT32 * KEPT_LOGITS


def estimate(roles: Mapping[str, nn.Module | None], works: Sequence[Work], args: Any) -> Estimate:
    """The run's peak memory. Roles are as in `holdings`, `args` are `TrainingArguments`.

    The passes take turns; activations are those of the first role's model.
    """
    first: Any = next(iter(roles.values()))
    rows, text = holdings(roles), first.config.get_text_config()
    trainable = sum(row.trainable for row in rows)
    mixed = args.bf16 or args.fp16
    width = HALF if mixed or "bfloat16" in rows[0].dtypes else FLOAT32
    layers, dtypes = text.num_hidden_layers, ", ".join(row.dtypes for row in rows)
    kept = layers * KEPT_PER_LAYER
    if args.gradient_checkpointing:  # recomputed in one layer at a time
        kept = layers * (1 + KEPT_INPUTS * ("int8" in dtypes)) + KEPT_PER_LAYER
    sizes = {"hidden": text.hidden_size, "layers": layers, "width": width, "kept": kept}
    sizes["vocabulary"] = text.vocab_size
    held = {p for m in roles.values() if m is not None for p in m.parameters()}
    gradients = sum(p.nbytes for p in held if p.requires_grad)
    packed = sum(_count(p) for p in held if not p.is_floating_point())
    share = args.world_size if launched_sharded() else 1
    ddp = args.world_size > 1 and not launched_sharded()
    on_cpu, waiting = args.device.type == "cpu", [0]
    if getattr(args, "offload_frozen", False) and not on_cpu:  # one is there at a time
        waiting = [sum(r.bytes for r in rows if r.role.startswith(s)) for s in ("ref", "reward")]
    return Estimate(
        weights=sum(row.bytes for row in rows) - sum(waiting) + max(waiting),
        gradients=(2 if ddp else 1) * gradients // share,
        optimizer=optimizer_bytes(args.optim, trainable) // share,
        copies=HALF * trainable if mixed else 0,
        process=(PROCESS + FLOAT32 * packed) if on_cpu else 0,
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
    parts = ", ".join(f"{name} {_mb(size)}" for name, size in needed._asdict().items() if size)
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
