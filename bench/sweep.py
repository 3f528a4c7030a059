"""Which cases a benchmark run consists of: options in, an ordered list of cases out.

``quick`` and ``full`` are every operation's lengths; ``gpu`` and ``cpu`` are what a machine of that
kind should be asked, most important first, as each operation states it. What an operation is asked
at which size stands in its problem file.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from linear_vit import kernels, options
from linear_vit.bench import estimate, guests, peers
from linear_vit.bench.instruments import memory
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    Case,
    NotOffered,
    Operation,
    Wanted,
    case_name,
    least_work,
    make_problem,
    operation,
    operations,
)
from linear_vit.kernels import registry
from linear_vit.options import OptionError

SWEEPS = ("quick", "full", "gpu", "cpu")
SPECIAL = ("gpu", "cpu")
# One call may cost this many FLOP (least work): about a second at 100 GFLOP/s on a CPU, and at 100
# TFLOP/s on a GPU. This, not a hard-coded length, is what stops a quadratic operation. A special
# sweep, whose time is short, stops at a tenth of a second.
_MOST_FLOP = {
    "cpu": {"quick": 1e11, "full": 2e12, "cpu": 2e12, "gpu": 1e11},
    "cuda": {"quick": 5e13, "full": 1e16, "gpu": 3e13, "cpu": 5e13},
}
_QUICK_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}
_SPARED = "the oracle is timed by --sweep full, or by name with --backends"
_INTERPRETED = "it runs in Triton's interpreter here: right, but no time worth reporting"


@dataclass(frozen=True)
class Sweep:
    """The cases in the order they run, and what was left out with the reason for it.

    ``groups`` are cases that take turns; ``energy`` names those whose joules are measured, None
    all.
    """

    device: torch.device
    extent: str
    groups: tuple[tuple[Case, ...], ...]
    left_out: dict[str, str] = field(default_factory=dict)
    energy: frozenset[str] | None = None

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(case for group in self.groups for case in group)


@dataclass(frozen=True)
class Asked:
    """What the options ask for; an empty sequence takes what the sweep ``extent`` has.

    A case is one sequence, or, with ``total_tokens``, as many of its length as make that many
    tokens: then a call does the same work at every length, and its time says what length costs.
    ``with_peers`` adds other libraries' implementations, of which ``backends`` may name some, too.
    ``rehearse`` takes every case at a tiny size instead, to walk through the code.
    """

    device: str | None = None
    dtypes: Sequence[str] = ()
    tokens: Sequence[int] = ()
    backends: Sequence[str] = ()
    operations: Sequence[str] = ()
    total_tokens: int | None = None
    extent: str = "quick"
    with_peers: bool = False
    rehearse: bool = False

    @functools.cached_property
    def on(self) -> torch.device:
        return options.device(self.device)


def _each_once(left_out: dict[str, str]) -> Iterator[str]:
    """Every reason, with the first that was left out for it and how many others were."""
    of_reason: dict[str, list[str]] = {}
    for what, reason in left_out.items():
        of_reason.setdefault(reason, []).append(what)
    for reason, (first, *others) in of_reason.items():
        yield f"{first}{f' (and {len(others)} more)' if others else ''}: {reason}"


def make_sweep(asked: Asked) -> Sweep:
    """Enumerate the cases.

    Raises:
        OptionError: an unknown or unusable device, dtype, backend or operation, or nothing left to
            time. A backend that can't run an operation is left out of it.
    """
    _check(asked)
    left_out: dict[str, str] = {}
    wanted = _special(asked) if asked.extent in SPECIAL else _regular(asked)
    asked_for = list(_tiny(wanted) if asked.rehearse else wanted)
    cases = list(_fitting(asked, asked_for, left_out))
    if not cases:
        why = "; ".join(_each_once(left_out))
        raise OptionError(f"nothing to time{': ' if why else ''}{why}")
    energy = None
    if asked.extent in SPECIAL:
        with_energy = {(of.name, w.mode, w.dtype, w.shape) for of, w in asked_for if w.energy}
        energy = frozenset(
            case_name(c) for c in cases if (c.operation, c.mode, c.dtype, c.shape) in with_energy
        )
    return Sweep(asked.on, asked.extent, _groups(cases, asked.extent), left_out, energy)


def _chosen(asked: Asked) -> list[Operation]:
    known = operations().values()
    if asked.operations:
        return [of for of in known if of.name in asked.operations]
    return [of for of in known if asked.extent != "quick" or of.quick]


def _check(asked: Asked) -> None:
    options.known("ops", asked.operations, operations())
    options.known("dtypes", asked.dtypes, DTYPES)
    if any(n < 1 for n in asked.tokens):
        raise OptionError(f"--tokens: lengths are positive, got {min(asked.tokens)}")
    if asked.total_tokens is not None and asked.extent in SPECIAL:
        raise OptionError(f"--total-tokens: --sweep {asked.extent} has its own; leave one out")
    if asked.total_tokens is not None and asked.total_tokens < 1:
        raise OptionError(f"--total-tokens: a positive number, got {asked.total_tokens}")
    for name in asked.backends:
        if name not in (*kernels.backend_rows(), *peers.PEERS):
            reasons = _chosen(asked)[0].backends(asked.on, ()).items()
            there = "; ".join(f"{name} ({why or 'usable'})" for name, why in reasons)
            raise OptionError(f"--backends: unknown backend {name!r}; there are {there}")


# What is wanted, whatever can run it.


def _regular(asked: Asked) -> Iterator[tuple[Operation, Wanted]]:
    """Every length of every operation."""
    kind, rank = asked.on.type, 0
    chosen = asked.dtypes or (DTYPES if asked.extent == "full" else _QUICK_DTYPES[kind])
    for of in _chosen(asked):
        for dtype in of.dtypes(kind, tuple(chosen)):
            for shape in of.sizes(kind, asked.extent, asked.tokens, asked.total_tokens):
                for mode in of.modes:
                    rank += 1
                    names, total = of.usual_backends, asked.total_tokens
                    yield of, Wanted(rank, mode, dtype, shape, names, total_tokens=total)


def _special(asked: Asked) -> Iterator[tuple[Operation, Wanted]]:
    """What each operation states for the sweep, most important first, narrowed by the options."""
    found = [(of, wanted) for of in _chosen(asked) for wanted in of.special(asked.extent)]
    for of, wanted in sorted(found, key=lambda item: item[1].rank):
        if asked.dtypes and wanted.dtype not in asked.dtypes:
            continue
        if not asked.tokens or wanted.shape.tokens in asked.tokens:
            yield of, wanted


def _tiny(wanted: Iterable[tuple[Operation, Wanted]]) -> Iterator[tuple[Operation, Wanted]]:
    """Each kind of case once, at the operation's smallest size."""
    seen = set()
    for of, one in wanted:
        small = replace(one, rank=0, shape=of.rehearsal(one.shape), total_tokens=None)
        if (of.name, small) not in seen:
            seen.add((of.name, small))
            yield of, small


# What of it can run here.


def _fitting(
    asked: Asked, wanted: Iterable[tuple[Operation, Wanted]], left_out: dict[str, str]
) -> Iterator[Case]:
    """The cases that a usable backend can do in reasonable time and memory."""
    available = memory.available_bytes(asked.on)
    usable: dict[str, tuple[str, ...]] = {}
    unusable: dict[str, dict[str, str]] = {}
    seen = set()
    for of, one in wanted:
        if of.name not in usable:
            usable[of.name] = _timeable(asked, of, unusable)
        names = (*usable[of.name], *_peers(asked, of, one.dtype, left_out))
        if one.backends and not asked.backends:
            yours = [name for name in names if guests.is_guest(of.name, name)]
            names = tuple(name for name in names if name in (*one.backends, *yours))
        for name in names:
            case = Case(
                of.name, one.mode, one.dtype, one.shape, name, total_tokens=one.total_tokens
            )
            if no := _too_much(asked, case, available):
                what, reason = no
                if not any(key.startswith(f"{what}, N") for key in left_out):
                    left_out[f"{what}, N from {one.shape.tokens}"] = reason
            elif cannot := of.unusable(one.shape, name, asked.on):
                left_out[of.case_name(case)] = cannot
            elif one.mode != FORWARD and (cannot := _only_forward(of, name, one, asked)):
                left_out[f"{name}, {of.name} {one.mode}"] = cannot
            else:
                captured = one.captured and asked.on.type == "cuda"
                ways = [case, replace(case, captured=True)] if captured else [case]
                can_be = of.can_be_captured(name) and not guests.is_guest(of.name, name)
                fitting = [w for w in ways if not w.captured or can_be]
                yield from (way for way in fitting if way not in seen)
                seen.update(fitting)
    for name, reasons in unusable.items():
        if len(reasons) == len(usable):
            left_out[f"backend {name}"] = "; ".join(dict.fromkeys(reasons.values()))
        else:
            left_out |= {f"{name}, {of_name}": reason for of_name, reason in reasons.items()}


def _only_forward(of: Operation, backend: str, one: Wanted, asked: Asked) -> str | None:
    """That a registered kernel has a forward pass alone; None for those that have both."""
    if registry.registered(of.name, backend) is None or one.dtype not in DTYPES:
        return None
    return _no_gradient(of, backend, one.dtype, asked.on, registry.state())


@functools.lru_cache
def _no_gradient(
    of: Operation, backend: str, dtype: str, device: torch.device, state: object
) -> str | None:
    small = make_problem(of.name, of.shape(64), DTYPES[dtype], device)
    try:
        if guests.is_guest(of.name, backend):
            with guests.Guest(guests.files_of(of.name, backend)) as guest:
                guest.open(small, backend, FORWARD_BACKWARD)
                guest.run()
        else:
            small.gradients(backend, small.cotangents)
    except NotOffered as error:
        return str(error)
    except Exception:  # that is for its cases to show
        return None
    return None


def _too_much(asked: Asked, case: Case, available: int | None) -> tuple[str, str] | None:
    """What is left out from this length on, and why; None where the case is not."""
    if case.shape.B == 0:
        return case.operation, f"longer than --total-tokens {asked.total_tokens}"
    # A length that was asked for is only held to the larger limit.
    extent = "full" if asked.tokens else asked.extent
    what = f"{case.operation} {case.mode} {case.dtype}"
    work = least_work(operation(case.operation), case.mode, case.shape, 4)
    limit = _MOST_FLOP[asked.on.type][extent]
    if work.flop > limit:
        further = " (--sweep full goes further)" if extent == "quick" else ""
        reason = f"one call is {work.flop:.1e} FLOP, past the {extent} limit of {limit:.0e}"
        return what, reason + further
    no_room = estimate.does_not_fit(estimate.memory_bytes(case), available)
    return (f"{what} on {case.backend}", no_room) if no_room else None


def _timeable(asked: Asked, of: Operation, unusable: dict[str, dict[str, str]]) -> tuple[str, ...]:
    """Backends to time, in table order; why the others are not goes to ``unusable``."""
    usable = []
    for name, reason in of.backends(asked.on, asked.backends).items():
        interpreted = guests.is_interpreted(of.name, name)
        if reason is None and (interpreted or not kernels.is_timeable(name, asked.on)):
            reason = _INTERPRETED
        if reason is None and asked.extent != "full" and not asked.backends:
            row = kernels.backend_rows().get(name)
            reason = _SPARED if row is not None and row.oracle else None
        if reason is None:
            usable.append(name)
        else:
            unusable.setdefault(name, {})[of.name] = reason
    return tuple(usable)


def _peers(asked: Asked, of: Operation, dtype: str, left_out: dict[str, str]) -> tuple[str, ...]:
    """Peers to time: all that are usable if wanted, or those asked for by name."""
    usable = []
    for name, reason in peers.backends(of.name, asked.on, DTYPES.get(dtype)).items():
        with_peers = asked.with_peers or asked.extent == "gpu"
        if name not in asked.backends and (asked.backends or not with_peers):
            continue
        if reason is None:
            usable.append(name)
        else:
            left_out[f"{name}, {of.name} {dtype}"] = reason
    return tuple(usable)


def _groups(cases: Sequence[Case], extent: str) -> tuple[tuple[Case, ...], ...]:
    """Cases that take turns: those of one problem, in a special sweep those of one size."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        apart = "" if extent in SPECIAL else case.operation
        size = operation(case.operation).turn_key(case.shape)
        key = (apart, case.mode, case.dtype, size, case.total_tokens)
        groups.setdefault(key, []).append(case)
    return tuple(map(tuple, groups.values()))
