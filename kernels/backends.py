"""Which backend can run what here, and if not, why not; and running it.

The choice is explicit and never silent: a backend asked for by name runs, or raises with the reason
that it can't. ``kernels.rows`` says which there are.
"""

import functools
import importlib
import importlib.util
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from linear_vit.kernels import entry_points, registry, sharding
from linear_vit.kernels.precision import full_precision
from linear_vit.kernels.registry import Registered, functions, operation
from linear_vit.kernels.rows import Backend, Operation
from linear_vit.kernels.validation import DTYPES

_said: set[str] = set()


def backends(
    op: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    key_mask: bool = False,
) -> dict[str, str | None]:
    """Every backend of an operation, and why it can't be used here where it can't.

    Args:
        op: an operation's name, one of ``kernels.operations()``.
        device: where the tensors are.
        dtype: the inputs' dtype; None asks about any of float32, float16, bfloat16.
        head_dim: the inputs' head dim (attention operations); None asks about any supported one.
        key_mask: whether some keys are masked (attention operations).

    Returns:
        Backend name -> None where it is usable, else the reason and the remedy in one line.

    Raises:
        ValueError: an unknown operation; the message lists those there are.
    """
    device = torch.device(device)
    entry_points.load()
    found = _backends_for(op, device, dtype, head_dim, key_mask)
    missing = _no_such_device(device)
    return {name: reason or missing for name, reason in found.items()}


def _backends_for(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
    key_mask: bool,
) -> dict[str, str | None]:
    """The same, for a device that is there, or that somebody pretends."""
    row, asked = operation(op), (device, dtype, head_dim, key_mask)
    return {b.name: _reason(b, row, *asked) for b in registry.backends_of(op)}


def _no_such_device(device: torch.device) -> str | None:
    count = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) < count:
        return None
    return f"there is no {device} here: CUDA devices to be seen: {count}"


def default_backend(
    op: str,
    device: torch.device | str,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """The backend that ``backend=None`` takes: the first in order of speed that runs here.

    It is loaded by then, and built if need be: one that does not build is not what runs.

    Raises:
        ValueError: an unknown operation, or none runs here, and why.
    """
    where = torch.device(device)
    if missing := _no_such_device(where):
        raise ValueError(f"no backend can run {op} on {where}: {missing}")
    return _choose(op, None, where, dtype, head_dim, False, registry.state())


def is_timeable(backend: str, device: torch.device | str) -> bool:
    """Whether timing the backend says anything: not where Triton runs in its interpreter."""
    del device  # the interpreter takes over on every device
    row = registry.backend_rows().get(backend)
    return row is None or not row.interpreting


def implementation(op: str, backend: str, *arguments: Any) -> str:
    """What runs for these arguments, in one line: for SDPA, the kernel PyTorch picks.

    Args:
        op, backend: names, as for :func:`backends`.
        arguments: the tensors the operation would be called with.
    """
    entry = registry.registered(op, backend)
    if entry is not None:
        function = entry.function
        return f"{backend}: {function.__module__}.{getattr(function, '__qualname__', function)}"
    module = importlib.import_module(_module(operation(op), backend))
    describe = getattr(module, "implementation", None)
    if describe is not None:
        return describe(op, *arguments)
    return f"{backend}: {module.__name__.removeprefix('linear_vit.')}"


def run(op: str, backend: str | None, *arguments: Any, key_mask: Any = None) -> Any:
    """Run an operation whose arguments have been validated, on the chosen backend.

    Args:
        op, backend, arguments: what, where and of what.
        key_mask: the operation's, handed on by name where it is not None. A backend that takes none
            is not called with one: it can't run this.

    Raises:
        ValueError: the backend is unknown, or can't run this; the message lists the others.
        TypeError: ``backend`` is neither a string nor None.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a name or None, got {type(backend).__name__}")
    first = arguments[0]
    device = first.device
    # The choice is a constant of a compiled graph: index makes one of a head dim that varies, too.
    head_dim = operator.index(first.shape[-1]) if operation(op).has_head_dim else None
    masked = key_mask is not None
    options = {"key_mask": key_mask} if masked else {}
    if torch.compiler.is_compiling():
        chosen = _resolve(op, backend, str(device), first.dtype, head_dim, masked)
        with full_precision(device.type):
            return getattr(functions, f"{op}__{chosen}")(*arguments, **options)
    chosen = _choose(op, backend, device, first.dtype, head_dim, masked, registry.state())
    function = getattr(functions, f"{op}__{chosen}")
    if registry.is_own(op, chosen):  # in it there is no operator that the settings change
        return function(*arguments, **options)
    with full_precision(device.type):
        return function(*arguments, **options)


def _resolve(
    op: str,
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    head_dim: int | None,
    key_mask: bool,
) -> str:
    where = torch.device(device)
    chosen = _choose(op, backend, where, dtype, head_dim, key_mask, registry.state())
    sharding.tell_dtensor()  # an operator in a graph has no other occasion to
    return chosen


# torch.compile takes the choice as a constant of the graph. This is what
# torch.compiler.assume_constant_result sets; calling that would import Dynamo, and with it Triton.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
    key_mask: bool,
    state: object,
) -> str:
    """The backend that runs this; its function is in ``functions`` by then."""
    del state  # part of the key: it changes what is usable
    usable = _backends_for(op, device, dtype, head_dim, key_mask)
    if backend is not None and backend not in usable:  # an installed package may have it
        entry_points.load()
        usable = _backends_for(op, device, dtype, head_dim, key_mask)
    if backend is None:
        candidates = _by_default(op, usable)
    elif backend not in usable:
        raise ValueError(f"unknown backend {backend!r} for {op}: there are {_list(usable)}")
    else:
        candidates = [backend] if usable[backend] is None else []
    for name in candidates:
        try:
            setattr(functions, f"{op}__{name}", _load(op, name))
        except RuntimeError as error:  # its extension does not build: the reason from now on
            usable[name] = str(error)
        else:
            if backend is None:
                _say_what_failed(name, usable)
            return name
    what = f"backend {backend!r} can't" if backend is not None else "no backend can"
    because = f": {usable[backend]}" if backend is not None else ""
    raise ValueError(f"{what} run {op} on {device}{because}. All of them: {_list(usable)}")


def _say_what_failed(chosen: str, usable: dict[str, str | None]) -> None:
    """Once a process: that a faster backend did not build is no choice of the user's."""
    from linear_vit.kernels import build  # not for an import of kernels to load

    for name, reason in usable.items():
        if name not in _said and reason is not None and reason == build.failure(name):
            _said.add(name)
            warnings.warn(f"{chosen} runs in place of {name}: {reason}", stacklevel=2)


def _load(op: str, backend: str) -> Callable[..., Any]:
    entry = registry.registered(op, backend)
    if entry is not None:
        return entry.function
    return getattr(importlib.import_module(_module(operation(op), backend)), op)


def _module(op: Operation, backend: str) -> str:
    return f"{op.package}.{backend}"


def _list(usable: dict[str, str | None]) -> str:
    return "; ".join(
        f"{name} (usable)" if reason is None else f"{name} (not usable: {reason})"
        for name, reason in usable.items()
    )


def _by_default(op: str, usable: dict[str, str | None]) -> list[str]:
    """The usable backends that may be taken unasked, fastest first. A registered one never is."""
    rows = [
        row
        for row in registry.backends_of(op)
        if row.rank is not None
        and usable[row.name] is None
        and not row.interpreting
        and not registry.registered(op, row.name)
    ]
    fastest = operation(op).fastest
    return [row.name for row in sorted(rows, key=lambda row: (row.name != fastest, row.rank))]


# ---- why not -------------------------------------------------------------------------------------


def _reason(
    backend: Backend,
    op: Operation,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
    key_mask: bool,
) -> str | None:
    entry = registry.registered(op.name, backend.name)
    if dtype is not None and dtype not in DTYPES:
        return f"{dtype} is not a dtype of the operations: use float32, float16 or bfloat16"
    if dtype == torch.float64 and (entry is not None or not backend.oracle):
        return "float64 is for the reference only: use backend='reference', or float32"
    if entry is not None:
        if key_mask and not entry.takes_key_mask:
            return f"{backend.name} takes no key_mask: its function has no parameter of that name"
        return _users_reason(backend.name, entry, device, dtype, head_dim)
    dims = op.head_dims.get(backend.name)
    if head_dim is not None and dims is not None and head_dim not in dims:
        return f"head dim {head_dim} is {_other_than(dims, backend)}: use backend='torch'"
    if backend.name in op.refused:
        return op.refused[backend.name]
    if importlib.util.find_spec(_module(op, backend.name)) is None:
        return f"{op.name} has no such backend: there is no module {_module(op, backend.name)}"
    return backend.probe(device)


def _other_than(dims: Sequence[int], backend: Backend) -> str:
    if isinstance(dims, range):
        return f"more than the {backend.title} kernels' {dims[-1]}"
    return f"not one of the kernels' {', '.join(map(str, dims))}"


def _users_reason(
    name: str,
    entry: Registered,
    device: torch.device,
    dtype: torch.dtype | None,
    head_dim: int | None,
) -> str | None:
    """Why a registered function can't be used: its devices, then what its user says."""
    if device.type not in entry.devices:
        return f"{name} is registered for {' and '.join(entry.devices)}, not for {device.type}"
    reason = entry.unusable(device, dtype, head_dim) if entry.unusable else None
    if reason is not None and not isinstance(reason, str):
        raise TypeError(
            f"unusable of {name} must return None or the reason in words, got {reason!r}"
        )
    return reason
