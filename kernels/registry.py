"""The backends and operations there are: those of ``kernels.rows``, and those that joined them.

:func:`register` makes a user's function a backend; :func:`add_operation` adds an operation, whose
backends are the modules of a package anywhere.
"""

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any, TypeVar

import torch

from linear_vit.kernels import entry_points, probes, rows
from linear_vit.kernels.rows import Backend, Operation

Function = TypeVar("Function", bound=Callable[..., Any])
Unusable = Callable[[torch.device, torch.dtype | None, int | None], str | None]


@dataclass(frozen=True)
class Registered:
    """A user's function behind a backend of an operation."""

    function: Callable[..., Any]
    devices: tuple[str, ...]
    unusable: Unusable | None

    @property
    def takes_key_mask(self) -> bool:
        """Whether it can be called with ``key_mask=``, by its signature."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some builtins have none
            return False
        return any(p.name == "key_mask" or p.kind == p.VAR_KEYWORD for p in parameters)


# The built-in ones.
BACKENDS = tuple(row.name for row in rows.BACKEND_ROWS)
OPERATIONS = tuple(row.name for row in rows.OPERATION_ROWS)

_backends = {row.name: row for row in rows.BACKEND_ROWS}
_operations = {row.name: row for row in rows.OPERATION_ROWS}
_registered: dict[tuple[str, str], Registered] = {}
_changes = 0
# Of the same palette as the built-in ones', and then of Paul Tol's muted one.
_COLOURS = ("#56B4E9", "#F0E442", "#000000", "#882255", "#44AA99", "#999933", "#332288")


class Functions:
    """Attribute ``<op>__<backend>``: the function that runs it, once it has been chosen.

    Attributes and not a dict, because torch.compile reads them anew: of a dict it keeps the copy
    it saw first, which lacks what a later call of the same graph loads.
    """


functions = Functions()


# ---- what there is -------------------------------------------------------------------------------


def backend_rows() -> dict[str, Backend]:
    """Every backend by name, the built-in ones first, then those that were registered."""
    entry_points.load()
    return dict(_backends)


def operations() -> dict[str, Operation]:
    """Every operation by name, the built-in ones first, then those that were added."""
    return dict(_operations)


def operation(name: str) -> Operation:
    """An operation's row.

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    if name not in _operations:
        raise ValueError(f"unknown operation {name!r}: there are {', '.join(_operations)}")
    return _operations[name]


def registered(op: str, backend: str) -> Registered | None:
    """The user's function behind a backend of an operation; None where it is a built-in one."""
    return _registered.get((op, backend))


def all_registered() -> dict[tuple[str, str], Registered]:
    """The users' functions, by operation and backend, in the order in which they joined."""
    return dict(_registered)


def is_own(op: str, backend: str) -> bool:
    """Whether a kernel of this project runs: none that a user registered under its name."""
    return _backends[backend].own and (op, backend) not in _registered


def backends_of(op: str) -> list[Backend]:
    """The rows of an operation's backends: all built-in ones, and those registered for it."""
    return [row for row in _backends.values() if row.name in BACKENDS or registered(op, row.name)]


def state() -> tuple[int, str | None]:
    """What a choice of backend depends on beside its arguments: the tables, and the interpreter."""
    return _changes, os.environ.get(probes.INTERPRETER)


# ---- what joins ----------------------------------------------------------------------------------


def register(
    op: str,
    name: str,
    *,
    devices: Sequence[str],
    unusable: Unusable | None = None,
    title: str | None = None,
    colour: str | None = None,
    replace: bool = False,
) -> Callable[[Function], Function]:
    """Decorator: the function becomes a backend of an operation like the others.

    It is taken by name only, never by ``backend=None``; listed with its reasons; checked and timed
    as all are. What it is given has been validated, and cast where autocast is on. It is called by
    position, as the operation's ``reference.py`` is: ``linear_attention(q, k, v, eps)``::

        @kernels.register("linear_attention", "mine", devices=("cpu", "cuda"))
        def mine(q, k, v, eps): ...

        kernels.linear_attention(q, k, v, backend="mine")

    A ``key_mask`` is given by name to a function that has such a parameter. Another can't run a
    call with one, and its reasons say so.

    Args:
        op: the operation, one of ``kernels.operations()``.
        name: the backend's, an identifier; the same one may serve several operations.
        devices: types of the devices that it runs on, as ``("cpu", "cuda")``.
        unusable: called with (device, dtype, head_dim) where the device is one of these; None is
            usable, else it says why not in one line. dtype and head_dim are None where the question
            is about any.
        title, colour: in plots and tables; the name, and a colour of its own, by default.
        replace: take the place of the backend that has this name for the operation. Even a built-in
            one is chosen by name only then.

    Raises:
        ValueError: an unknown operation or device type, a name that is taken or no identifier.
        TypeError: what is decorated, or ``unusable``, can't be called; devices is one string.
    """
    operation(op)
    _check_name("backend", name)
    kinds = _device_types(devices)
    if unusable is not None and not callable(unusable):
        raise TypeError(f"unusable must be callable or None, got {type(unusable).__name__}")
    if not replace and (name in BACKENDS or (op, name) in _registered):
        kind = "a built-in" if name in BACKENDS else "registered as a"
        raise ValueError(
            f"{name!r} is {kind} backend of {op}: take another name, or pass replace=True"
        )

    def join(function: Function) -> Function:
        if not callable(function):
            raise TypeError(f"a backend is a function, got {type(function).__name__}")
        if name not in BACKENDS:
            _backends[name] = _row(name, title, colour)
        _registered[op, name] = Registered(function, kinds, unusable)
        setattr(functions, f"{op}__{name}", function)
        _changed()
        return function

    return join


def add_operation(
    name: str,
    *,
    package: str,
    title: str | None = None,
    has_head_dim: bool = False,
    head_dims: Mapping[str, Sequence[int]] | None = None,
    replace: bool = False,
) -> Operation:
    """Add an operation whose backends are modules of a package.

    The module ``<package>.<backend>`` defines a function called ``name``; a backend without a
    module says so in its reasons. The public function, wherever it is, validates its arguments and
    calls ``kernels.backends.run(name, backend, *arguments)``, with a tensor first.

    Args:
        name: the operation's, an identifier.
        package: dotted, and importable: it holds ``reference.py``, ``torch.py``, ...
        title: how plots and tables write it; the name in words by default.
        has_head_dim: whether the first tensor's last axis is a head dim.
        head_dims: by backend, those that its kernels are written for; any where it isn't named.
        replace: take the place of the operation of this name.

    Returns:
        Its row.

    Raises:
        ValueError: a name that is taken or no identifier, a package that is not to be found.
    """
    _check_name("operation", name)
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"no package {package!r} to import the backends of {name} from")
    if name in _operations and not replace:
        raise ValueError(f"there is an operation {name!r}: take another name, or pass replace=True")
    row = Operation(
        name, title or name.replace("_", " "), package, has_head_dim, dict(head_dims or {})
    )
    _operations[name] = row
    _changed()
    return row


@contextlib.contextmanager
def temporarily() -> Iterator[None]:
    """What joins the tables inside leaves them at the end."""
    tables: tuple[dict[Any, Any], ...] = (_backends, _operations, _registered)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for op, name in _registered:
            delattr(functions, f"{op}__{name}")
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        for (op, name), entry in _registered.items():
            setattr(functions, f"{op}__{name}", entry.function)
        _changed()


@contextlib.contextmanager
def pretend_usable(name: str) -> Iterator[None]:
    """The backend is taken on any device, for as long as someone replaces its launches."""
    with temporarily():
        _backends[name] = replaced(_backends[name], probe=probes.anywhere)
        _changed()
        yield


def refuse_built_in(reason: str) -> None:
    """From now on no built-in backend is usable in this process, for this reason."""

    def refused(device: torch.device) -> str:
        return reason

    for name in BACKENDS:
        _backends[name] = replaced(_backends[name], probe=refused)
    _changed()


def _changed() -> None:
    global _changes
    _changes += 1


def _check_name(kind: str, name: object) -> None:
    # Names are attributes, test ids and words in lists with commas.
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the {kind}'s name is letters, digits and _, got {name!r}")


def _device_types(devices: Sequence[str]) -> tuple[str, ...]:
    if isinstance(devices, str):
        raise TypeError(f"devices is a sequence of types like ('cpu', 'cuda'), got {devices!r}")
    kinds = tuple(devices)
    for kind in kinds:
        try:
            known = torch.device(kind).type == kind
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(f"devices are types like 'cpu' and 'cuda', got {kind!r}")
    if not kinds:
        raise ValueError("devices names no type: a backend runs on 'cpu' or 'cuda', say")
    return kinds


def _row(name: str, title: str | None, colour: str | None) -> Backend:
    """The row of a registered backend; what an earlier registration said stays where unsaid."""
    others = len(_backends) - len(BACKENDS)
    new = Backend(name, name, _COLOURS[others % len(_COLOURS)])
    row = _backends.get(name, new)
    return replaced(row, title=title or row.title, colour=colour or row.colour)
