"""Every kernel that ships, compiled for every GPU it is meant for: ``python -m bench.static``.

Needs no GPU. Triton's kernels are compiled ahead of time and the CUDA sources by nvcc, as they
would be on the GPU; a row a kernel and configuration gives registers, spills, shared memory, the
occupancy these allow, and what the machine code holds: tensor-core instructions, 16-byte and
narrower accesses. Exits with 1 where something is at fault (:func:`faults`).

    python -m bench.static --arch sm_90a --room linear_attention --all
    python -m bench.static --csv static.csv --json static.json

What was compiled before, from the same sources, is not compiled again.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.instruments import machine
from linear_vit.bench.static import launches, machine_code
from linear_vit.bench.sweep import DTYPES

SCHEMA = 1
BACKENDS = ("cuda", "triton")
ARCHITECTURES = tuple(machine_code.LIMITS)
_ROOT = Path(__file__).resolve().parents[2]
_RAGGED_HEAD_DIM = 64  # rows that 16-byte accesses can't reach are compiled for at one head dim
# A half-precision kernel with more multiply-adds than this, and no tensor core, multiplies matrices
# by hand: what remains beside products (scaling, row sums) is a few per element a thread holds.
_MOST_FMA = 256
_FEW_LOADS, _FEW_STORES = 6, 4

COLUMNS = (
    "backend",
    "room",
    "kernel",
    "head_dim",
    "dtype",
    "architecture",
    "layout",
    "configuration",
    "threads",
    "registers",
    "spill_stores",
    "spill_loads",
    "stack",
    "static_shared",
    "dynamic_shared",
    "blocks_per_multiprocessor",
    "occupancy",
    "tensor_core",
    "tf32",
    "fma",
    "wide_loads",
    "narrow_loads",
    "wide_stores",
    "narrow_stores",
    "local",
    "float_atomics",
    "total",
    "faults",
)

Row = dict[str, Any]


class Incomplete(RuntimeError):
    """Something does not compile: the message has the compiler's, ``rows`` what did."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Unit:
    """What is compiled together and kept: for Triton one dtype and head dim, for CUDA all."""

    backend: str
    room: str
    architecture: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    ragged: bool = False


def compile_all(
    *,
    backends: Iterable[str] = BACKENDS,
    rooms: Iterable[str] | None = None,
    architectures: Iterable[str] = ARCHITECTURES,
    dtypes: Sequence[str] = tuple(DTYPES),
    head_dims: Sequence[int] | None = None,
    ragged: bool = True,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compile all that is asked for, side by side; None takes all there is.

    Args:
        backends, rooms, architectures, dtypes, head_dims: what to compile.
        ragged: Triton's kernels also for rows that 16-byte accesses can't reach.
        jobs: processes; None for one a core.
        progress: called with a line after each step.

    Returns:
        A row, with the keys ``COLUMNS``, for each kernel and configuration.

    Raises:
        Incomplete: a kernel does not compile.
    """
    rooms = launches.rooms() if rooms is None else tuple(rooms)
    head_dims = launches.supported_head_dims() if head_dims is None else tuple(head_dims)
    groups = [
        _units(backend, room, architecture, tuple(dtypes), tuple(head_dims), ragged)
        for backend in backends
        for architecture in architectures
        for room in rooms
    ]
    rows: list[Row] = []
    failures: list[str] = []
    # A process a group: an operator library, and Triton's choice of driver, are a process's own.
    context = multiprocessing.get_context("spawn")
    workers = min(jobs or machine.available_cores(), len(groups))
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        pending = {pool.submit(_compile_group, group): group[0] for group in groups}
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                unit = pending[future]
                what = f"{unit.backend} {unit.room} {unit.architecture}"
                if error := future.exception():
                    failures.append(f"{what}: {type(error).__name__}: {error}")
                    progress(f"[{done}/{len(groups)}] {what}: failed, {type(error).__name__}")
                    continue
                rows += future.result()
                progress(f"[{done}/{len(groups)}] {what}: {len(future.result())} kernels")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    order = {name: i for i, name in enumerate((*BACKENDS, *launches.rooms(), *ARCHITECTURES))}
    rows.sort(
        key=lambda r: (
            order[r["backend"]],
            order[r["room"]],
            order[r["architecture"]],
            r["kernel"],
            r["dtype"] or "",
            r["head_dim"] or 0,
        )
    )
    if failures:
        raise Incomplete("\n".join(failures), rows)
    return rows


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel, in words; empty where nothing is."""
    found = []
    if row["spill_stores"] or row["spill_loads"]:
        found.append(f"spills {row['spill_stores'] + row['spill_loads']} bytes")
    if row["occupancy"] == 0:
        found.append("does not fit a multiprocessor")
    if row["float_atomics"]:
        found.append("adds floats in no fixed order")
    if row["dtype"] == "float32" and row["tf32"]:
        found.append("rounds float32 to TF32")
    half = row["dtype"] in ("float16", "bfloat16")
    by_hand = row["fma"] > _MOST_FMA and launches.has_head_dims(row["room"])
    if half and not row["tensor_core"] and (row["products"] or by_hand):
        found.append(f"{row['fma']} multiply-adds and no tensor core")
    # A few narrow accesses are a row's statistics, or a sum of partials; more are a tile.
    # A CUDA kernel without template arguments knows no element type: it adds up float32 states.
    if half and "aligned" in row["layout"] and row["configuration"]:
        if row["narrow_loads"] > _FEW_LOADS and not row["wide_loads"]:
            found.append(f"{row['narrow_loads']} narrow loads and no 16-byte one")
        if row["narrow_stores"] > _FEW_STORES and not row["wide_stores"]:
            found.append(f"{row['narrow_stores']} narrow stores and no 16-byte one")
    return found


# ---- units: what is compiled together, and kept --------------------------------------------------


def _units(
    backend: str,
    room: str,
    architecture: str,
    dtypes: tuple[str, ...],
    head_dims: tuple[int, ...],
    ragged: bool,
) -> list[Unit]:
    if backend == "cuda":
        return [Unit(backend, room, architecture, dtypes, head_dims)]
    dims = [(d,) for d in head_dims] if launches.has_head_dims(room) else [()]
    units = [Unit(backend, room, architecture, (t,), d) for t in dtypes for d in dims]
    return units + [
        Unit(backend, room, architecture, (t,), d, ragged=True)
        for t in dtypes
        for d in dims
        if ragged and d in ((), (_RAGGED_HEAD_DIM,))
    ]


def _compile_group(units: list[Unit]) -> list[Row]:
    """Runs in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    _cache().mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for unit in units:
        kept = _kept(unit)
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps([_finish(row) for row in _compile(unit)]))
            partial.replace(kept)
        # A kernel of no head dim is in every head dim's unit.
        rows += [row for row in json.loads(kept.read_text()) if row not in rows]
    return rows


def _compile(unit: Unit) -> list[Row]:
    if unit.backend == "cuda":
        from linear_vit.bench.static import cuda as compiled_cuda

        with tempfile.TemporaryDirectory() as folder:
            return compiled_cuda.compile_room(
                unit.room,
                unit.architecture,
                unit.dtypes,
                unit.head_dims,
                Path(folder),
                _cache(),
            )
    from linear_vit.bench.static import triton as compiled_triton

    return compiled_triton.compile_room(
        unit.room,
        unit.architecture,
        DTYPES[unit.dtypes[0]],
        unit.head_dims[0] if unit.head_dims else None,
        _cache(),
        ragged=unit.ragged,
    )


def _finish(row: Row) -> Row:
    """The row with what follows from the rest of it."""
    threads = row["threads"]
    fits: dict[str, float | None]
    if threads is None:
        fits = {"blocks_per_multiprocessor": None, "occupancy": None}
    else:
        asked = (threads, row["registers"], row["static_shared"] + row["dynamic_shared"])
        fits = {
            "blocks_per_multiprocessor": machine_code.resident_blocks(row["architecture"], *asked),
            "occupancy": round(machine_code.occupancy(row["architecture"], *asked), 4),
        }
    row = {**row, **fits}
    return {**row, "faults": faults(row)}


def _kept(unit: Unit) -> Path:
    """Where a unit's rows are kept: named by all that they depend on."""
    digest = hashlib.sha256(repr((SCHEMA, astuple(unit), _toolchain())).encode())
    kernels = _ROOT / "kernels"
    patterns = ["*.py", f"{unit.backend}/*.py", f"{unit.room}/*.py"]
    if unit.backend == "cuda":
        patterns += [f"{unit.room}/{name}" for name in ("cuda.*", "*.cuh", "*.h")]
        patterns += ["cuda/*", "*.h"]
    sources = [p for pattern in patterns for p in kernels.glob(pattern)]
    sources += (_ROOT / "bench" / "problems").glob("*.py")
    sources += Path(__file__).parent.glob("launch_recorder.*")
    sources += Path(__file__).parent.glob("*.py")
    overrides = os.environ.get("LINEAR_VIT_TUNING")
    sources += [Path(overrides)] if overrides and Path(overrides).is_file() else []
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return _cache() / f"{digest.hexdigest()[:24]}.json"


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "linear_vit" / "static"


def _toolchain() -> dict[str, str | None]:

    from linear_vit.kernels import build

    version = build._nvcc_version()
    return {
        "torch": torch.__version__,
        "triton": machine._version("triton"),
        "nvcc": ".".join(map(str, version)) if version else None,
    }


# ---- python -m bench.static ----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.static",
        description="Registers, spills, shared memory, occupancy and instructions of every kernel.",
    )

    def listed(name: str, choices: Sequence[str], text: str) -> None:
        def parse(words: str) -> tuple[str, ...]:
            chosen = tuple(word for word in words.replace(",", " ").split() if word)
            for word in chosen:
                if word not in choices:
                    raise argparse.ArgumentTypeError(f"no {word!r}; there are {', '.join(choices)}")
            return chosen

        parser.add_argument(
            name, type=parse, default=tuple(choices), metavar="A,B", help=f"{text}; all by default"
        )

    listed("--arch", ARCHITECTURES, f"GPU architectures among {', '.join(ARCHITECTURES)}")
    listed("--backend", BACKENDS, "cuda, triton")
    listed("--room", launches.rooms(), "operations' folders")
    listed("--dtypes", tuple(DTYPES), "element types")
    listed("--head-dims", tuple(map(str, launches.supported_head_dims())), "head dimensions")
    parser.add_argument("--jobs", type=int, help="processes side by side (default: a core each)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every row there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same with its toolchain")
    parser.add_argument(
        "--all", action="store_true", help="print every row, not each kernel's worst"
    )
    options = parser.parse_args(argv)

    failure = ""
    try:
        rows = compile_all(
            backends=options.backend,
            rooms=options.room,
            architectures=options.arch,
            dtypes=options.dtypes,
            head_dims=[int(d) for d in options.head_dims],
            jobs=options.jobs,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except Incomplete as error:
        rows, failure = error.rows, str(error)
    if options.csv:
        write_csv(rows, options.csv)
    if options.json:
        write_json(document(rows), options.json)
    print(render(rows, every=options.all), end="")
    if failure:
        print(f"does not compile:\n{failure}", file=sys.stderr)
    return 1 if failure or any(row["faults"] for row in rows) else 0


def document(rows: list[Row]) -> dict[str, Any]:
    """The rows with where and with what they were made."""
    return {
        "kind": "static",
        "schema": SCHEMA,
        "machine": machine.describe(torch.device("cpu")),
        "toolchain": _toolchain(),
        "limits": {name: vars(limits) for name, limits in machine_code.LIMITS.items()},
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document as JSON, a row a line: small, and a diff shows the rows that changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({name: x for name, x in document.items() if name != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in document["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def write_csv(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "faults": "; ".join(row["faults"])})


def render(rows: list[Row], *, every: bool = False, width: int | None = None) -> str:
    """A table for each backend and room: a line a kernel and architecture, or a line a row."""
    from linear_vit.bench.summary import draw

    if width is None:
        width = os.get_terminal_size().columns if sys.stdout.isatty() else 200
    columns = ["kernel", "arch", "configs", "registers", "spills", "shared KiB", "occupancy"]
    columns += ["tensor core", "16-byte", "narrower"]
    if every:
        columns[2:3] = ["D", "dtype", "layout"]
    text = ""
    for backend, room in dict.fromkeys((r["backend"], r["room"]) for r in rows):
        of_room = [r for r in rows if (r["backend"], r["room"]) == (backend, room)]
        groups: dict[Any, list[Row]] = {}
        for i, row in enumerate(of_room):
            key = i if every else (row["kernel"], row["architecture"])
            groups.setdefault(key, []).append(row)
        table = [_line(group, every) for group in groups.values()]
        text += draw(f"{backend} {room}", columns, table, width, sys.stdout.isatty())
    wrong = [(row, fault) for row in rows for fault in row["faults"]]
    for row, fault in wrong:
        what = f"{row['backend']} {row['room']} {row['kernel']} {row['architecture']}"
        text += f"FAULT {what} D={row['head_dim']} {row['dtype']} {row['layout']}: {fault}"
        text += f" ({row['configuration']})\n"
    return f"{text}{len(rows)} kernels compiled, {len(wrong)} faults\n"


def _line(group: list[Row], every: bool) -> list[str]:
    """One line: of several rows, the range or the worst."""
    first = group[0]
    counts = [f"{len(group)}"]
    if every:
        counts = [str(first["head_dim"] or "–"), first["dtype"] or "–", first["layout"]]
    reached = [r for r in group if r["threads"] is not None]
    shared = [(r["static_shared"] + r["dynamic_shared"]) / 1024 for r in reached]
    return [
        first["kernel"],
        first["architecture"],
        *counts,
        _range([r["registers"] for r in group]),
        str(max(r["spill_stores"] + r["spill_loads"] for r in group)),
        _range([round(s) for s in shared]) if reached else "–",
        _range([round(100 * r["occupancy"]) for r in reached]) + " %" if reached else "–",
        _range([r["tensor_core"] for r in group]),
        _range([r["wide_loads"] + r["wide_stores"] for r in group]),
        _range([r["narrow_loads"] + r["narrow_stores"] for r in group]),
    ]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


if __name__ == "__main__":
    sys.exit(main())
