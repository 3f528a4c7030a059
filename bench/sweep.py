"""Which cases a benchmark run consists of: options in, an ordered list of cases out."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from linear_vit import kernels
from linear_vit.bench import estimate, peers
from linear_vit.bench.problems import (
    PASSES,
    AttentionShape,
    RippleShape,
    Shape,
    least_work,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)

TRAINING_STEP = "training_step"
OPERATIONS = (*kernels.OPERATIONS, TRAINING_STEP)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SWEEPS = ("quick", "full")

# One sequence, six heads of 64: time against N is then the scaling of one attention layer of a
# ViT-S.
HEADS, HEAD_DIM, CHANNELS = 6, 64, 384

# One call may cost this many FLOP (least work): about a second at 100 GFLOP/s on a CPU, and at 100
# TFLOP/s on a GPU. This, not a hard-coded length, is what stops a quadratic operation.
_MOST_FLOP = {"cpu": {"quick": 1e11, "full": 2e12}, "cuda": {"quick": 5e13, "full": 1e16}}
_LONGEST = {"cpu": {"quick": 16_384, "full": 1_048_576}, "cuda": {"quick": 1_048_576}}
_QUICK_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}
# Made of the same kernels as the operations themselves, so a quick sweep leaves them out.
_FULL_ONLY = (
    "linear_attention_packed",
    "linear_attention_state",
    "linear_attention_apply",
    "softmax_attention_packed",
    "ripple_pool_stages",
    "ripple_expand_stages",
)
# Grids from 8×8 to 64×64 tokens; --seq-lens may name others.
_GRIDS = {"quick": (64, 256, 512, 1024, 4096), "full": tuple(2**i for i in range(6, 13))}
# The oracle; nobody's choice of an implementation.
_FULL_ONLY_BACKENDS = ("reference",)


_SPARED = "the oracle is timed by --sweep full, or by name with --backends"


class SweepError(ValueError):
    """An option that asks for what there isn't; the message says what there is."""


@dataclass(frozen=True)
class Case:
    """One kernel to time."""

    operation: str
    mode: str
    dtype: str
    tokens: int
    batch: int
    backend: str

    def __str__(self) -> str:
        size = f"B{self.batch}-N{self.tokens}" if self.batch > 1 else f"N{self.tokens}"
        return f"{self.operation}-{self.mode}-{self.dtype}-{size}-{self.backend}"


def parse_case(name: str) -> Case:
    """The case of this name, as :class:`Case` writes it."""
    match = re.fullmatch(r"(\w+)-([\w+]+)-(\w+)-(?:B(\d+)-)?N(\d+)-(\w+)", name)
    if match is None:
        raise ValueError(f"{name!r} is no case's name")
    operation, mode, dtype, batch, tokens, backend = match.groups()
    return Case(operation, mode, dtype, int(tokens), int(batch or 1), backend)


@dataclass(frozen=True)
class Sweep:
    """The cases in the order they run, and what was left out with the reason for it."""

    device: torch.device
    extent: str
    cases: tuple[Case, ...]
    training_backends: tuple[str | None, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    total_tokens: int | None = None


def make_sweep(
    *,
    device: str | None = None,
    dtypes: Sequence[str] = (),
    seq_lens: Sequence[int] = (),
    backends: Sequence[str] = (),
    operations: Sequence[str] = (),
    total_tokens: int | None = None,
    extent: str = "quick",
    with_peers: bool = False,
) -> Sweep:
    """Enumerate the cases; an empty sequence takes what the extent ("quick", "full") has.

    A case is one sequence, or, with ``total_tokens``, as many of its length as make that many
    tokens: then a call does the same work at every length, and its time says what length costs.
    ``with_peers`` adds other libraries' implementations, of which ``backends`` may name some, too.

    Raises:
        SweepError: an unknown or unusable device, dtype, backend or operation, or nothing left to
            time. A backend that was not asked for by name and can't run is left out instead.
    """
    where = resolve_device(device)
    kind = where.type
    _known("operation", operations, OPERATIONS)
    _known("dtype", dtypes, tuple(DTYPES))
    if any(n < 1 for n in seq_lens):
        raise SweepError(f"--seq-lens: lengths are positive, got {min(seq_lens)}")
    if total_tokens is not None and total_tokens < 1:
        raise SweepError(f"--total-tokens: a positive number, got {total_tokens}")
    unknown = [name for name in backends if name not in (*kernels.BACKENDS, *peers.NAMES)]
    if unknown:
        there_are = _list_backends("linear_attention", where)
        raise SweepError(f"--backends: unknown backend {unknown[0]!r}; there are {there_are}")

    chosen_operations = operations or tuple(
        op for op in OPERATIONS if extent == "full" or op not in _FULL_ONLY
    )
    chosen_dtypes = dtypes or (tuple(DTYPES) if extent == "full" else _QUICK_DTYPES[kind])
    left_out: dict[str, str] = {}
    available = estimate.available_bytes(where)
    cases: list[Case] = []
    for operation in chosen_operations:
        if operation == TRAINING_STEP:
            continue
        usable = _timeable(operation, where, backends, left_out)
        if extent == "quick" and not backends:
            usable = tuple(name for name in usable if name not in _FULL_ONLY_BACKENDS)
            left_out |= {f"backend {name}": _SPARED for name in _FULL_ONLY_BACKENDS}
        for dtype in chosen_dtypes:
            others = _peers(operation, where, DTYPES[dtype], backends, with_peers, left_out)
            lengths = seq_lens or _lengths(operation, kind, extent)
            for tokens in sorted(set(lengths)):
                batch = total_tokens // tokens if total_tokens else 1
                if batch == 0:
                    what = f"{operation}, N from {tokens}"
                    left_out.setdefault(what, f"longer than --total-tokens {total_tokens}")
                    continue
                for mode in PASSES:
                    for backend in (*usable, *others):
                        case = Case(operation, mode, dtype, tokens, batch, backend)
                        # A length that was asked for is only held to the larger limit.
                        limit = "full" if seq_lens else extent
                        reason = _too_much_work(case, kind, limit)
                        what = f"{operation} {mode} {dtype}"
                        if reason is None:
                            reason = _too_much_memory(case, available)
                            what += f" on {backend}"
                        if reason is None:
                            cases.append(case)
                        elif not any(key.startswith(f"{what}, N") for key in left_out):
                            left_out[f"{what}, N from {tokens}"] = reason

    training: tuple[str | None, ...] = ()
    if TRAINING_STEP in chosen_operations and (not seq_lens or 64 in seq_lens):
        usable = _timeable("linear_attention", where, backends, left_out)
        training = usable if backends else (None,)
    if not cases and not training:
        why = "; ".join(f"{what}: {reason}" for what, reason in left_out.items())
        raise SweepError(f"nothing to time{': ' if why else ''}{why}")
    return Sweep(where, extent, tuple(cases), training, left_out, total_tokens)


def shape_of(operation: str, tokens: int, batch: int = 1) -> Shape:
    """The shape timed at N tokens: attention over N = M, ripple on the squarest grid of N."""
    if operation.startswith("ripple"):
        rows = next(r for r in range(int(tokens**0.5), 0, -1) if tokens % r == 0)
        return RippleShape(batch, rows, tokens // rows, CHANNELS)
    return AttentionShape(batch, HEADS, HEADS, tokens, tokens, HEAD_DIM)


def resolve_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SweepError(f"--device: {name!r} is no device; take cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise SweepError(f"--device: {name!r} can't be timed; take cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SweepError("--device cuda: PyTorch finds no CUDA device here; take --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise SweepError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _known(what: str, asked: Iterable[str], known: tuple[str, ...]) -> None:
    for name in asked:
        if name not in known:
            option = "--ops" if what == "operation" else f"--{what}s"
            raise SweepError(f"{option}: unknown {what} {name!r}; there are {', '.join(known)}")


def _timeable(
    operation: str, device: torch.device, asked: Sequence[str], left_out: dict[str, str]
) -> tuple[str, ...]:
    """Backends to time, in table order; the others go to ``left_out`` or, if asked for, raise."""
    usable = []
    reasons = kernels.backends(operation, device, head_dim=HEAD_DIM)
    for name, reason in reasons.items():
        if asked and name not in asked:
            continue
        if reason is None and not kernels.is_timeable(name, device):
            reason = "it runs in Triton's interpreter here: right, but no time worth reporting"
        if reason is None:
            usable.append(name)
        elif asked:
            there_are = _list_backends(operation, device)
            raise SweepError(
                f"--backends: {name!r} can't be timed for {operation} on {device}: {reason}. "
                f"There are {there_are}"
            )
        else:
            left_out[f"backend {name}"] = reason
    return tuple(usable)


def _peers(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    asked: Sequence[str],
    wanted: bool,
    left_out: dict[str, str],
) -> tuple[str, ...]:
    """Peers to time: all that are usable if wanted, or those asked for by name."""
    usable = []
    for name, reason in peers.backends(operation, device, dtype).items():
        if not wanted and name not in asked:
            continue
        if reason is None:
            usable.append(name)
        else:
            kind = str(dtype).removeprefix("torch.")
            left_out[f"{name}, {operation} {kind}"] = reason
    return tuple(usable)


def _list_backends(operation: str, device: torch.device) -> str:
    return "; ".join(
        f"{name} ({'usable' if reason is None else reason})"
        for name, reason in kernels.backends(operation, device).items()
    )


def _lengths(operation: str, kind: str, extent: str) -> tuple[int, ...]:
    if operation.startswith("ripple"):
        return _GRIDS[extent]
    longest = _LONGEST[kind].get(extent, _LONGEST[kind]["quick"])
    return tuple(2**i for i in range(6, longest.bit_length()))


def _too_much_work(case: Case, kind: str, extent: str) -> str | None:
    shape = shape_of(case.operation, case.tokens, case.batch)
    flop = least_work(operation_of(case.operation), case.mode, shape, 4).flop
    limit = _MOST_FLOP[kind][extent]
    if flop <= limit:
        return None
    further = " (--sweep full goes further)" if extent == "quick" else ""
    return f"one call is {flop:.1e} FLOP, past the {extent} limit of {limit:.0e}{further}"


def memory_of(case: Case) -> int:
    """Bytes that the case is estimated to take at once."""
    shape = shape_of(case.operation, case.tokens, case.batch)
    size = DTYPES[case.dtype].itemsize
    return estimate.memory_bytes(case.operation, case.mode, case.backend, shape, size)


def _too_much_memory(case: Case, available: int | None) -> str | None:
    return estimate.does_not_fit(memory_of(case), available)
