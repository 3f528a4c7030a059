"""Compiling all that ships, side by side, and keeping what was compiled.

A backend has a module of its name here (``cuda.py``, ``triton.py``) with ``split(unit)``, which
says what is compiled together, and ``compile_unit(unit, cache)``, which does it: a row a kernel.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels, options
from linear_vit.bench.instruments import machine
from linear_vit.bench.problems import DTYPES
from linear_vit.bench.static import launches, machine_code
from linear_vit.bench.static.faults import Row, finished
from linear_vit.kernels import build, toolchains
from linear_vit.kernels.rows import HEAD_DIMS
from linear_vit.screen import counted

SCHEMA = 1
ARCHITECTURES = tuple(machine_code.LIMITS)
_HERE = Path(__file__).resolve().parent
BACKENDS = tuple(name for name in kernels.BACKENDS if (_HERE / f"{name}.py").exists())


@dataclass(frozen=True)
class Unit:
    """What is asked for of a backend and folder; ``split``, what is compiled together and kept."""

    backend: str
    folder: str
    architecture: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    ragged: bool = False


class Incomplete(RuntimeError):
    """Something does not compile: the message has the compiler's, ``rows`` what did."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


def compile_all(
    *,
    backends: Iterable[str] = BACKENDS,
    folders: Sequence[str] | None = None,
    architectures: Iterable[str] = ARCHITECTURES,
    dtypes: Sequence[str] = tuple(DTYPES),
    head_dims: Sequence[int] | None = None,
    ragged: bool = True,
    jobs: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compile all that is asked for, side by side; None takes all there is.

    Args:
        backends, folders, architectures, dtypes, head_dims: what to compile.
        ragged: Triton's kernels also for rows that 16-byte accesses can't reach.
        jobs: processes; None for one a core.
        progress: called with a line after each step.

    Returns:
        A row, with the keys ``table.COLUMNS``, for each kernel and configuration.

    Raises:
        Incomplete: a kernel does not compile.
    """
    asked = [
        Unit(backend, folder, architecture, tuple(dtypes), tuple(head_dims or HEAD_DIMS), ragged)
        for backend in backends
        for folder in launches.folders(backend)
        if folders is None or folder in folders
        for architecture in architectures
    ]
    found: dict[Unit, list[Row]] = {}
    failures: list[str] = []
    # A process each: an operator library, and Triton's choice of driver, are a process's own.
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(jobs or machine.available_cores(), len(asked)))
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        pending = {pool.submit(compile_parts, unit): unit for unit in asked}
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                unit = pending[future]
                what = f"{unit.backend} {unit.folder} {unit.architecture}"
                if error := future.exception():
                    failures.append(f"{what}: {type(error).__name__}: {error}")
                    progress(f"[{done}/{len(asked)}] {what}: failed, {type(error).__name__}")
                    continue
                found[unit] = future.result()
                progress(f"[{done}/{len(asked)}] {what}: {counted(len(found[unit]), 'kernel')}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = [row for unit in asked for row in sorted(found.get(unit, ()), key=_by_name)]
    if failures:
        raise Incomplete("\n".join(failures), rows)
    return rows


def compile_parts(asked: Unit) -> list[Row]:
    """All of a unit, part by part. Runs in a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    options.load_plugins()
    module = importlib.import_module(f"{__package__}.{asked.backend}")
    cache_folder().mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for unit in module.split(asked):
        kept = kept_in(unit)
        if not kept.exists():
            partial = kept.with_suffix(f".{os.getpid()}")
            found = module.compile_unit(unit, cache_folder())
            partial.write_text(json.dumps([finished(row) for row in found]))
            partial.replace(kept)
        # A kernel of no head dim is in every head dim's unit.
        rows += [row for row in json.loads(kept.read_text()) if row not in rows]
    return rows


def cache_folder() -> Path:
    """Where what was compiled is kept."""
    return build.users_cache() / "linear_vit" / "static"


def kept_in(unit: Unit) -> Path:
    """Where a unit's rows are kept: named by all that they depend on."""
    asked = repr((SCHEMA, astuple(unit), toolchain()))
    return cache_folder() / f"{digest(asked, sorted(sources(unit)))}.json"


def digest(asked: str, files: Iterable[Path]) -> str:
    """What something kept is named by: all that was asked for, and the files it was made of."""
    found = hashlib.sha256(asked.encode())
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:24]


def sources(unit: Unit) -> set[Path]:
    """The files that decide what a unit's rows say."""
    folder = launches.path(unit.folder)
    found = {*folder.glob("*.py"), *folder.parent.glob("*.py"), *_HERE.glob("*.*")}
    found |= {*folder.parent.glob(f"{unit.backend}/*.*"), *_HERE.parent.glob("problems/*.py")}
    found |= {p for p in (*folder.glob("*.*"), *folder.parent.glob("*.h")) if p.suffix != ".py"}
    overrides = os.environ.get("LINEAR_VIT_TUNING")
    found |= {Path(overrides)} if overrides else set()
    return {path for path in found if path.is_file()}


def toolchain() -> dict[str, str | None]:
    """What compiles."""
    version = toolchains.nvcc_version()
    return {
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "nvcc": ".".join(map(str, version)) if version else None,
    }


def _by_name(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["kernel"], row["dtype"] or "", row["head_dim"] or 0
