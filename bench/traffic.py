"""The bytes that Triton's kernels load and store, counted exactly, with no GPU.

    python -m bench traffic
    python -m bench traffic --ops linear_attention --dtypes bfloat16 --out traffic.json
    python -m bench traffic --dtypes all --head-dims all --arch sm_90,sm_86

Triton's interpreter runs every kernel on CPU tensors, as the public operations launch it for the
architecture that is assumed, and each load and store is counted by the tensor that its addresses
lie in: masked lanes not at all, lanes of one access that share an address once. Beside it stands
the least traffic there can be (``bench.problems.least_work``). What is neither an input nor a
result is workspace: states, partial sums, row statistics. A byte that is loaded twice counts twice,
though the second time may come from a cache; ``distinct`` is what memory has to deliver at least.

Interpreted programs are slow, so sequences are short, and the GPU has as few multiprocessors as
give each about the tokens that one of 132 has when there are 512k tokens.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from linear_vit import kernels, options
from linear_vit.bench import tables
from linear_vit.bench.instruments import machine
from linear_vit.bench.problems import DTYPES, Shape, make_problem
from linear_vit.bench.problems import operation as operation_of
from linear_vit.bench.static import launches
from linear_vit.kernels.rows import HEAD_DIMS
from linear_vit.kernels.triton import tuning
from linear_vit.screen import counted, say

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
WORKSPACE = "workspace"
COLUMNS = (
    "operation", "pass", "dtype", "shape", "architecture", "multiprocessors", "launches",
    "tensor", "loaded", "distinct", "stored", "least_loaded", "least_stored", "ratio",
)  # fmt: skip
BACKEND = "triton"  # whose interpreter this counts in
# What a multiprocessor has of 512k tokens where there are 132 of them.
_TOKENS_A_MULTIPROCESSOR = 512 * 1024 // 132

Row = dict[str, Any]


@dataclass
class Traffic:
    """Bytes of one storage: loaded and stored, and which of its elements were loaded at all."""

    start: int
    size: int
    itemsize: int
    owner: Tensor  # keeps the memory from being given to another tensor meanwhile
    loaded: int = 0
    stored: int = 0
    seen: "np.ndarray[Any, Any] | None" = None

    @property
    def distinct(self) -> int:
        return 0 if self.seen is None else int(self.seen.sum()) * self.itemsize


@dataclass
class Recorder:
    """What the launches made while it was recording moved, by storage."""

    launches: list[str] = field(default_factory=list)
    storages: dict[int, Traffic] = field(default_factory=dict)

    def launch(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        self.launches.append(kernel)
        for x in tensors:
            storage = x.untyped_storage()
            if storage.nbytes():
                start = storage.data_ptr()
                known = Traffic(start, storage.nbytes(), x.element_size(), x)
                self.storages.setdefault(start, known)

    def access(self, addresses: "np.ndarray[Any, Any]", mask: Any, *, store: bool) -> None:
        import numpy as np

        wanted = np.unique(np.broadcast_to(addresses, np.shape(mask))[np.asarray(mask, bool)])
        if not wanted.size:
            return
        for traffic in self.storages.values():
            # One pointer argument and offsets to it: an access lies in one storage.
            if traffic.start <= wanted[0] < traffic.start + traffic.size:
                break
        else:
            raise RuntimeError(f"{self.launches[-1]} touches memory of no argument")
        if wanted[-1] >= traffic.start + traffic.size:
            raise RuntimeError(f"{self.launches[-1]} runs past the end of an argument")
        moved = wanted.size * traffic.itemsize
        if store:
            traffic.stored += moved
            return
        traffic.loaded += moved
        if traffic.seen is None:
            traffic.seen = np.zeros(traffic.size // traffic.itemsize, dtype=bool)
        traffic.seen[(wanted - traffic.start) // traffic.itemsize] = True


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record every kernel that the interpreter runs in this context."""
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is not in its interpreter: set TRITON_INTERPRET=1 and restart")
    recorder = Recorder()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = (
        builder.create_masked_load, builder.create_masked_store, executor.__call__
    )  # fmt: skip

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        recorder.access(ptrs.data, mask.data, store=False)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.access(ptrs.data, mask.data, store=True)
        return store(self, ptrs, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.launch(self.fn.__name__, [*_tensors(args), *_tensors(kwargs.values())])
        return call(self, *args, **kwargs)

    def refused(self: Any, *args: Any) -> Any:
        raise RuntimeError(
            "a kernel with atomics: their traffic can't be counted as loads and stores"
        )

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", refused),
        mock.patch.object(builder, "create_atomic_cas", refused),
        mock.patch.object(executor, "__call__", counted_call),
    ):
        yield recorder


def count(
    operation: str,
    shape: Shape,
    dtype: torch.dtype,
    architecture: str = "sm_90",
    multiprocessors: int | None = None,
) -> list[Row]:
    """Forward and backward of one problem: a row per pass and tensor, workspace one of them.

    The forward is a training step's, which keeps what the backward reads.

    Args:
        operation, shape, dtype: as for :func:`bench.problems.make_problem`.
        architecture, multiprocessors: of the GPU assumed; by default as many multiprocessors as
            leave each the tokens that 132 have of 512k.
    """
    if multiprocessors is None:
        tokens = shape.B * getattr(shape, "H", 1) * shape.tokens
        multiprocessors = max(1, tokens // _TOKENS_A_MULTIPROCESSOR)
    problem = make_problem(operation, shape, dtype, torch.device("cpu"))
    with tuning.assume(architecture, multiprocessors):
        with recording() as forward:
            outputs = problem.run(problem.inputs, BACKEND)
        with recording() as backward:
            leaves = tuple(problem.inputs.values())
            gradients = torch.autograd.grad(outputs, leaves, problem.cotangents)
    common = {
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": " ".join(f"{name}={value}" for name, value in vars(shape).items()),
        "architecture": architecture,
        "multiprocessors": multiprocessors,
    }
    inputs, made = problem.inputs, dict(zip(problem.output_names, outputs, strict=True))
    rows = [common | {"pass": "forward"} | row for row in _rows(forward, inputs, made, {*inputs})]
    names = [f"d{name}" for name in problem.output_names]
    read = {**inputs, **made, **dict(zip(names, problem.cotangents, strict=True))}
    needed = {*inputs, *names, *(made if problem.operation.backward_reads_outputs else ())}
    made = {f"d{name}": x for name, x in zip(inputs, gradients, strict=True)}
    return rows + [common | {"pass": "backward"} | r for r in _rows(backward, read, made, needed)]


def _rows(
    recorder: Recorder, read: dict[str, Tensor], made: dict[str, Tensor], needed: set[str]
) -> Iterator[Row]:
    """A row per tensor that was moved or has to be, then one for all workspace together."""
    launches = " ".join(recorder.launches)
    left = dict(recorder.storages)
    least = 0
    for name, x in {**read, **made}.items():
        size = x.numel() * x.element_size()
        wanted = (size if name in needed else 0, size if name in made else 0)
        least += sum(wanted)
        traffic = left.pop(x.untyped_storage().data_ptr(), None)
        row = _row(name, [traffic] if traffic else [], *wanted, least=sum(wanted))
        if sum(wanted) or row["loaded"] or row["stored"]:
            yield {"launches": launches, **row}
    yield {"launches": launches, **_row(WORKSPACE, left.values(), 0, 0, least=least)}


def _row(
    name: str, moved: Iterable[Traffic], least_loaded: int, least_stored: int, *, least: int
) -> Row:
    """``least`` is what the bytes moved are compared with: of workspace, the whole pass's."""
    found = list(moved)
    loaded, stored = sum(t.loaded for t in found), sum(t.stored for t in found)
    return {
        "tensor": name,
        "loaded": loaded,
        "distinct": sum(t.distinct for t in found),
        "stored": stored,
        "least_loaded": least_loaded,
        "least_stored": least_stored,
        "ratio": (loaded + stored) / least if least else None,
    }


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among a launch's arguments, and in the tuples among them."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from _tensors(x)


# ---- python -m bench traffic ---------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description="Bytes that Triton's kernels load and store, counted in the interpreter.",
    )
    options.add(parser, "ops", dtypes="or all (default: bfloat16,float32)")
    text = "or all (default: 64)"
    options.option(parser, "--head-dims", type=options.words, metavar="A,B", help=text)
    options.add(parser, arch="GPUs assumed (default: sm_90)", out=tables.OUT)
    tables.add_old_options(parser)
    given = parser.parse_args(argv)
    try:
        operations = options.known("ops", given.ops, launches.operations(BACKEND))
        dtypes = options.known("dtypes", given.dtypes or ("bfloat16", "float32"), DTYPES)
        head_dims = options.known("head-dims", given.head_dims or ("64",), HEAD_DIMS)
    except options.OptionError as error:
        parser.error(str(error))
    # Before Triton is imported: its decorators choose between compiling and interpreting.
    os.environ[str(kernels.backend_rows()[BACKEND].interpreter)] = "1"
    reason = kernels.backends(operations[0], "cpu")[BACKEND]
    if reason:
        say(f"nothing to count: {reason}", sys.stderr)
        return 2

    rows: list[Row] = []
    failed = False
    for architecture in given.arch or ("sm_90",):
        for operation, shape, dtype in _cases(operations, dtypes, head_dims):
            say(f"{architecture} {operation} {shape} {dtype}", sys.stderr)
            try:
                rows += count(operation, shape, DTYPES[dtype], architecture)
            except Exception as error:  # one kernel that fails must not hide the others
                failed = True
                say(f"  failed: {type(error).__name__}: {error}", sys.stderr)
    tables.write(document(rows), COLUMNS, given)
    say(render(rows).removesuffix("\n"))
    return 1 if failed else 0


def _cases(
    operations: Iterable[str], dtypes: Sequence[str], head_dims: Sequence[int]
) -> Iterator[tuple[str, Shape, str]]:
    """Each once: an operation without head dim has the same shapes for all of them."""
    for name in operations:
        shapes = (s for dim in head_dims for s in operation_of(name).traffic_shapes(dim))
        for shape in dict.fromkeys(shapes):
            for dtype in dtypes:
                yield name, shape, dtype


def document(rows: list[Row]) -> dict[str, Any]:
    """The rows with where and with what they were counted."""
    return {
        "kind": "traffic",
        "schema": SCHEMA,
        "machine": machine.describe(torch.device("cpu")),
        "rows": rows,
    }


def render(rows: list[Row]) -> str:
    """A table an operation: bytes of each pass and tensor, and how often the least that is."""
    columns = ["pass", "dtype", "GPU", "shape", "launches", "tensor", "loaded", "distinct"]
    columns += ["stored", "least", "× least"]
    text = ""
    for operation in dict.fromkeys(row["operation"] for row in rows):
        table = []
        for row in (r for r in rows if r["operation"] == operation):
            ratio = row["ratio"]
            if row["tensor"] == WORKSPACE:
                shown = "–" if ratio is None else f"+{100 * ratio:.1f} %"
            else:
                shown = "not needed" if ratio is None else f"{ratio:.3f}"
            least = row["least_loaded"] + row["least_stored"]
            sizes = [row[name] for name in ("loaded", "distinct", "stored")] + [least]
            what = [row[name] for name in ("pass", "dtype", "architecture", "shape")]
            what += [str(len(row["launches"].split())), row["tensor"]]
            table.append([*what, *(f"{size:,}" for size in sizes), shown])
        text += tables.draw(operation, columns, table, keys=6)
    again = [row for row in rows if read_again(row)]
    for row in again:
        case = " ".join(row[name] for name in ("operation", "pass", "dtype", "architecture"))
        times = row["loaded"] / row["distinct"]
        text += f"READ AGAIN {case} {row['shape']}: {row['tensor']} {times:.2f} times\n"
    return f"{text}{counted(len(rows), 'tensor')} counted, {len(again)} read more than once\n"


def read_again(row: Row) -> bool:
    """Whether a tensor, workspace aside, is loaded more than once: from memory, or from a cache."""
    return row["tensor"] != WORKSPACE and row["loaded"] > row["distinct"]


if __name__ == "__main__":  # the old spelling
    from linear_vit.bench.__main__ import main as command

    sys.exit(command(["traffic", *sys.argv[1:]]))
