"""The bytes that Triton's kernels load and store, counted exactly, with no GPU.

    python -m bench.traffic
    python -m bench.traffic --ops linear_attention --dtypes bfloat16 --head-dims 64 --json out.json
    python -m bench.traffic --dtypes all --head-dims all --arch sm_90,sm_86

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
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from linear_vit.bench.problems import Shape

SCHEMA = 1
WORKSPACE = "workspace"
COLUMNS = (
    "operation", "pass", "dtype", "shape", "architecture", "multiprocessors", "launches",
    "tensor", "loaded", "distinct", "stored", "least_loaded", "least_stored", "ratio",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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
    from triton.runtime import interpreter

    if not _interpreting():
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
    shape: "Shape",
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
    from linear_vit.bench.problems import make_problem
    from linear_vit.kernels.triton import tuning

    if multiprocessors is None:
        tokens = shape.B * getattr(shape, "H", 1) * shape.tokens
        multiprocessors = max(1, tokens // _TOKENS_A_MULTIPROCESSOR)
    problem = make_problem(operation, shape, dtype, torch.device("cpu"))
    rows = []
    with tuning.assume(architecture, multiprocessors):
        with recording() as forward:
            outputs = problem.run(problem.inputs, "triton")
        with recording() as backward:
            leaves = tuple(problem.inputs.values())
            gradients = torch.autograd.grad(outputs, leaves, problem.cotangents)
    read = dict(problem.inputs)
    written = dict(zip(problem.output_names, outputs, strict=True))
    common = {
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": " ".join(f"{name}={value}" for name, value in vars(shape).items()),
        "architecture": architecture,
        "multiprocessors": multiprocessors,
    }
    for row in _rows(forward, read, written, set(read), set(written)):
        rows.append(common | {"pass": "forward"} | row)
    read |= written
    cotangents = [f"d{name}" for name in problem.output_names]
    read |= dict(zip(cotangents, problem.cotangents, strict=True))
    written = dict(zip((f"d{name}" for name in problem.inputs), gradients, strict=True))
    needed = {*problem.inputs, *cotangents}
    if problem.operation.backward_reads_outputs:
        needed |= set(problem.output_names)
    for row in _rows(backward, read, written, needed, set(written)):
        rows.append(common | {"pass": "backward"} | row)
    return rows


def _rows(
    recorder: Recorder,
    read: dict[str, Tensor],
    written: dict[str, Tensor],
    needed: set[str],
    made: set[str],
) -> Iterator[Row]:
    """A row per tensor that was moved or has to be, then one for all workspace together."""
    launches = " ".join(recorder.launches)
    left = dict(recorder.storages)
    for name, x in {**read, **written}.items():
        traffic = left.pop(x.untyped_storage().data_ptr(), None)
        size = x.numel() * x.element_size()
        row: Row = {
            "launches": launches,
            "tensor": name,
            "loaded": traffic.loaded if traffic else 0,
            "distinct": traffic.distinct if traffic else 0,
            "stored": traffic.stored if traffic else 0,
            "least_loaded": size if name in needed else 0,
            "least_stored": size if name in made else 0,
        }
        least = row["least_loaded"] + row["least_stored"]
        if least or row["loaded"] or row["stored"]:
            row["ratio"] = (row["loaded"] + row["stored"]) / least if least else None
            yield row
    least = sum(x.numel() * x.element_size() for name, x in read.items() if name in needed)
    least += sum(x.numel() * x.element_size() for name, x in written.items() if name in made)
    loaded, stored = (sum(getattr(t, what) for t in left.values()) for what in ("loaded", "stored"))
    yield {
        "launches": launches,
        "tensor": WORKSPACE,
        "loaded": loaded,
        "distinct": sum(t.distinct for t in left.values()),
        "stored": stored,
        "least_loaded": 0,
        "least_stored": 0,
        # Of the least traffic of the pass.
        "ratio": (loaded + stored) / least if least else None,
    }


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among a launch's arguments, and in the tuples among them."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from _tensors(x)


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


# ---- python -m bench.traffic ---------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description="Bytes that Triton's kernels load and store, counted in the interpreter.",
    )
    parser.add_argument("--ops", metavar="A,B", help="operations; all by default")
    parser.add_argument("--dtypes", metavar="A,B", default="bfloat16,float32", help="or all")
    parser.add_argument("--head-dims", metavar="A,B", default="64", help="or all")
    parser.add_argument(
        "--arch", metavar="A,B", default="sm_90", help="GPUs assumed (default: sm_90)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every row there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same with its environment")
    options = parser.parse_args(argv)
    # Before Triton is imported: its decorators choose between compiling and interpreting.
    os.environ["TRITON_INTERPRET"] = "1"
    from linear_vit import kernels
    from linear_vit.bench.static import launches
    from linear_vit.bench.static import table as static

    if options.dtypes == "all":
        options.dtypes = ",".join(DTYPES)
    if options.head_dims == "all":
        options.head_dims = ",".join(map(str, launches.supported_head_dims()))
    operations = options.ops.split(",") if options.ops else list(kernels.OPERATIONS)
    for name in operations:
        if name not in kernels.OPERATIONS:
            parser.error(f"no operation {name!r}; there are {', '.join(kernels.OPERATIONS)}")
    for name in options.dtypes.split(","):
        if name not in DTYPES:
            parser.error(f"no dtype {name!r}; there are {', '.join(DTYPES)}")
    reason = kernels.backends(operations[0], "cpu")["triton"]
    if reason:
        print(f"nothing to count: {reason}", file=sys.stderr)
        return 2

    rows: list[Row] = []
    failed = False
    for architecture in options.arch.split(","):
        for operation in operations:
            for shape, dtype in _cases(operation, options.dtypes, options.head_dims):
                print(f"{architecture} {operation} {shape} {dtype}", file=sys.stderr, flush=True)
                try:
                    rows += count(operation, shape, dtype, architecture)
                except Exception as error:  # one kernel that fails must not hide the others
                    failed = True
                    print(f"  failed: {type(error).__name__}: {error}", file=sys.stderr)
    if options.csv:
        write_csv(rows, options.csv)
    if options.json:
        static.write_json(document(rows), options.json)
    print(render(rows), end="")
    return 1 if failed else 0


def _cases(operation: str, dtypes: str, head_dims: str) -> Iterator[tuple["Shape", torch.dtype]]:
    from linear_vit.bench.problems import operation as operation_of

    seen = set()
    for head_dim in head_dims.split(","):
        for shape in operation_of(operation).traffic_shapes(int(head_dim)):
            for dtype in dtypes.split(","):
                if (shape, dtype) not in seen:  # ripple has no head dim
                    seen.add((shape, dtype))
                    yield shape, DTYPES[dtype]


def document(rows: list[Row]) -> dict[str, Any]:
    """The rows with where and with what they were counted."""
    from linear_vit.bench.instruments import machine

    return {
        "kind": "traffic",
        "schema": SCHEMA,
        "machine": machine.describe(torch.device("cpu")),
        "rows": rows,
    }


def write_csv(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            ratio = row["ratio"]
            writer.writerow(row | {"ratio": "" if ratio is None else f"{ratio:.4f}"})


def render(rows: list[Row]) -> str:
    """A table an operation: bytes of each pass and tensor, and how often the least that is."""
    from linear_vit.bench.summary import draw

    columns = ["pass", "dtype", "GPU", "shape", "launches", "tensor", "loaded", "distinct"]
    columns += ["stored", "least", "× least"]
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 200
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
        text += draw(operation, columns, table, width, sys.stdout.isatty())
    again = [row for row in rows if read_again(row)]
    for row in again:
        case = " ".join(row[name] for name in ("operation", "pass", "dtype", "architecture"))
        times = row["loaded"] / row["distinct"]
        text += f"READ AGAIN {case} {row['shape']}: {row['tensor']} {times:.2f} times\n"
    return f"{text}{len(rows)} tensors counted, {len(again)} read more than once\n"


def read_again(row: Row) -> bool:
    """Whether a tensor, workspace aside, is loaded more than once: from memory, or from a cache."""
    return row["tensor"] != WORKSPACE and row["loaded"] > row["distinct"]


if __name__ == "__main__":
    sys.exit(main())
