"""Every kernel that ships, compiled for every GPU it is meant for.

Needs no GPU. Triton's kernels are compiled ahead of time and the CUDA sources by nvcc, as they
would be on the GPU; a row a kernel and configuration gives registers, spills, shared memory, the
occupancy these allow, and what the machine code holds: tensor-core instructions, 16-byte and
narrower accesses. Of each main loop it counts what a warp runs for a tile (``steady.py``): the
time that memory needs for the tile's bytes, over the time to start that many instructions, is the
share of the copy rate that is possible at all. Exits with 1 where something is at fault
(``faults.py``).

    python -m bench static --arch sm_90a --ops linear_attention --all
    python -m bench static --arch sm_90a --head-dims 64 --explain half_apply_kernel
    python -m bench static --out static.json
    python -m bench static --kernels mine.py --arch sm_90a      # those of a file of yours
    python -m bench static --backends cuda,sdpa --ops softmax_attention --arch sm_90a

``sdpa`` is PyTorch's own flash kernels, by name alone: what ours are compared with, by warp
instructions to one of the tensor cores.

What was compiled before, from the same sources, is not compiled again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit import options
from linear_vit.bench import guests, tables
from linear_vit.bench.instruments import machine
from linear_vit.bench.problems import DTYPES
from linear_vit.bench.static import launches, machine_code, sdpa, steady, yours
from linear_vit.bench.static.faults import Row, finished
from linear_vit.bench.static.units import (
    ARCHITECTURES,
    BACKENDS,
    SCHEMA,
    Incomplete,
    compile_all,
    toolchain,
)
from linear_vit.kernels.rows import HEAD_DIMS
from linear_vit.screen import counted, say

COLUMNS = (
    "backend", "room", "kernel", "head_dim", "dtype", "architecture", "layout", "configuration",
    "threads", "registers", "spill_stores", "spill_loads", "stack", "static_shared",
    "dynamic_shared", "blocks_per_multiprocessor", "occupancy", "tensor_core", "tf32", "fma",
    "wide_loads", "narrow_loads", "wide_stores", "narrow_stores", "local", "float_atomics", "total",
    *steady.COLUMNS, "issue_us", "copy_us", "copy_share", "instructions_per_kib",
    "faults",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench static",
        description="Registers, spills, shared memory, occupancy and instructions of every kernel.",
    )
    text = "operations or their folders; all by default"
    options.option(parser, "--ops", "--room", **options.settings("ops", text))
    text = f"{', '.join(BACKENDS)}; all by default"
    options.option(parser, "--backends", "--backend", **options.settings("backends", text))
    options.add(parser, "dtypes", arch=f"among {', '.join(ARCHITECTURES)}; all by default")
    text = "head dimensions; all by default"
    options.option(parser, "--head-dims", type=options.words, metavar="A,B", help=text)
    options.add(parser, "kernels", out=tables.OUT)
    tables.add_old_options(parser)
    parser.add_argument("--jobs", type=int, help="processes side by side (default: a core each)")
    text = "print every row, not each kernel's worst"
    parser.add_argument("--all", action="store_true", help=text)
    text = "print the main loops of kernels of this name instead, and the path that is counted"
    parser.add_argument("--explain", metavar="KERNEL", help=text)
    given = parser.parse_args(argv)
    try:
        backends = options.known("backends", given.backends or BACKENDS, (*BACKENDS, sdpa.NAME))
        folders = _folders(given.ops)
        architectures = options.known("arch", given.arch, ARCHITECTURES)
        dtypes = options.known("dtypes", given.dtypes, DTYPES)
        head_dims = options.known("head-dims", given.head_dims, HEAD_DIMS)
    except options.OptionError as error:
        parser.error(str(error))

    failure = ""
    what: dict[str, Any] = {
        "architectures": architectures,
        "dtypes": dtypes,
        "head_dims": head_dims,
        "jobs": given.jobs,
        "progress": lambda line: say(line, sys.stderr),
    }
    try:
        if given.kernels:
            rows = yours.compile_files(list(map(guests.spelled, given.kernels)), **what)
        else:
            ours = [name for name in backends if name != sdpa.NAME]
            rows = compile_all(backends=ours, folders=folders, **what)
            if sdpa.NAME in backends and sdpa.FOLDER in folders:
                found = sdpa.flash_rows(architectures, dtypes, head_dims)
                rows += [{**finished(row), "faults": []} for row in found]  # nothing of ours
    except Incomplete as error:
        rows, failure = error.rows, str(error)
    except FileNotFoundError as error:
        parser.error(str(error))
    except yours.Nothing as error:
        say(f"--kernels: {error}", sys.stderr)
        return 2
    tables.write(document(rows), COLUMNS, given)
    if given.explain:
        say(explained([row for row in rows if row["kernel"] == given.explain]))
    else:
        say(render(rows, every=given.all).removesuffix("\n"))
    if failure:
        say(f"does not compile:\n{failure}", sys.stderr)
    return 1 if failure or any(row["faults"] for row in rows) else 0


def _folders(asked: Sequence[str] | None) -> tuple[str, ...]:
    """The folders of what was asked for: operations, or folders themselves."""
    there = {folder: folder for backend in BACKENDS for folder in launches.folders(backend)}
    there |= {name: folder for folder in there for name in launches.inside(folder)}
    return tuple(dict.fromkeys(there[name] for name in options.known("ops", asked, there)))


def explained(rows: list[Row]) -> str:
    """The steady paths of these kernels, instruction by instruction."""
    parts = []
    for row in rows:
        path, name = row["code"]
        what = (row["backend"], row["kernel"], row["architecture"], f"D={row['head_dim']}")
        head = " ".join(map(str, (*what, row["dtype"], row["layout"], row["configuration"])))
        code = machine_code.disassemble(Path(path))[name]
        parts.append(f"{head}\n{steady.explain(code)}")
    return "\n\n".join(parts) or "no such kernel among those asked for"


def document(rows: list[Row]) -> dict[str, Any]:
    """The rows with where and with what they were made."""
    return {
        "kind": "static",
        "schema": SCHEMA,
        "machine": machine.describe(torch.device("cpu")),
        "toolchain": toolchain(),
        "limits": {name: vars(limits) for name, limits in machine_code.LIMITS.items()},
        "rows": [{name: row[name] for name in COLUMNS} for row in rows],
    }


def render(rows: list[Row], *, every: bool = False, width: int | None = None) -> str:
    """A table for each backend and folder: a line a kernel and architecture, or a line a row."""
    columns = ["kernel", "arch", "configs", "registers", "spills", "shared KiB", "occupancy"]
    columns += [
        "tensor core",
        "16-byte",
        "narrower",
        "a tile",
        "a KiB",
        "a product",
        "barriers",
        "issue/copy",
        "copy share",
    ]
    if every:
        columns[2:3] = ["D", "dtype", "layout"]
    text = ""
    for backend, folder in dict.fromkeys((r["backend"], r["room"]) for r in rows):
        groups: dict[Any, list[Row]] = {}
        for i, row in enumerate(rows):
            if (row["backend"], row["room"]) == (backend, folder):
                key = i if every else (row["kernel"], row["architecture"])
                groups.setdefault(key, []).append(row)
        table = [_line(group, every) for group in groups.values()]
        text += tables.draw(f"{backend} {folder}", columns, table, width, keys=5 if every else 2)
    wrong = [(row, fault) for row in rows for fault in row["faults"]]
    for row, fault in wrong:
        what = f"{row['backend']} {row['room']} {row['kernel']} {row['architecture']}"
        text += f"FAULT {what} D={row['head_dim']} {row['dtype']} {row['layout']}: {fault}"
        text += f" ({row['configuration']})\n"
    return f"{text}{counted(len(rows), 'kernel')} compiled, {counted(len(wrong), 'fault')}\n"


def _line(group: list[Row], every: bool) -> list[str]:
    """One line: of several rows, the range or the worst."""
    first = group[0]
    counts = [f"{len(group)}"]
    if every:
        counts = [str(first["head_dim"] or "–"), first["dtype"] or "–", first["layout"]]
    reached = [r for r in group if r["occupancy"] is not None]
    spilled = [r["spill_stores"] + r["spill_loads"] for r in group if r["spill_stores"] is not None]
    shared = [(r["static_shared"] + r["dynamic_shared"]) / 1024 for r in reached]
    return [
        first["kernel"],
        first["architecture"],
        *counts,
        _range([r["registers"] for r in group]),
        str(max(spilled)) if spilled else "–",
        _range([round(s) for s in shared]) if reached else "–",
        _range([round(100 * r["occupancy"]) for r in reached]) + " %" if reached else "–",
        _range([r["tensor_core"] for r in group]),
        _range([r["wide_loads"] + r["wide_stores"] for r in group]),
        _range([r["narrow_loads"] + r["narrow_stores"] for r in group]),
        *_steady(group),
    ]


def _steady(group: list[Row]) -> list[str]:
    """Instructions of a warp for a tile, of all for a KiB, of a warp to one of the tensor cores;
    barriers; time beside the bytes'."""
    timed = [r for r in group if r.get("copy_share") is not None]  # older files have none
    if not timed:
        return ["–"] * 6
    products = [r["steady"] / r["steady_tensor_core"] for r in timed if r["steady_tensor_core"]]
    return [
        _range([r["steady"] for r in timed]),
        _range([round(r["instructions_per_kib"]) for r in timed]),
        _range([round(x, 1) for x in products]) if products else "–",
        _range([r["steady_barriers"] for r in timed]),
        _range([round(100 * r["issue_us"] / r["copy_us"]) for r in timed]) + " %",
        _range([round(100 * r["copy_share"]) for r in timed]) + " %",
    ]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
