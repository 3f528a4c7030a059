"""Triton's kernels compiled ahead of time, by running their launchers with the launch left out.

Triton's own ``JITFunction`` does the work: it specialises each launch on the tensors and numbers it
is given (dtype, alignment, divisibility by 16, equality to 1) as it would on the GPU, and compiles
for the target that its driver names. Here the driver is one of ours, and every launch a warm-up.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from linear_vit.bench.problems import DTYPES
from linear_vit.bench.static import launches, machine_code
from linear_vit.bench.static.units import Unit
from linear_vit.kernels.registry import pretend_usable
from linear_vit.kernels.triton import tuning

_READERS = ("triton", "machine_code", "sass", "steady")
# What a kept row depends on beside its kernel: how it was compiled and read.
_READER = hashlib.sha256(
    b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in _READERS)
).hexdigest()
_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Rows that 16-byte accesses can't reach, masks, and gradients by themselves are compiled for at one
# head dim: each is one more kernel.
_ONE_HEAD_DIM = 64


@dataclass(frozen=True)
class _Driver:
    """What Triton asks of a GPU in order to compile for it."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device: a device for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def split(asked: Unit) -> list[Unit]:
    """A unit for each dtype and head dim, and for rows that 16-byte accesses can't reach."""
    dims = [(d,) for d in asked.head_dims] if launches.has_head_dims(asked.folder) else [()]
    return [
        replace(asked, dtypes=(dtype,), head_dims=dim, ragged=ragged)
        for ragged in ((False, True) if asked.ragged else (False,))
        for dtype in asked.dtypes
        for dim in dims
        if not ragged or dim in ((), (_ONE_HEAD_DIM,))
    ]


def compile_unit(unit: Unit, cache: Path) -> list[dict[str, Any]]:
    """Compile what a unit's folder launches; a row (``bench.static``) a kernel.

    Args:
        unit: of this backend, as :func:`split` made it.
        cache: as for :func:`compile_exercises`.
    """
    head_dim = unit.head_dims[0] if unit.head_dims else None
    found = launches.exercises(
        unit.folder,
        DTYPES[unit.dtypes[0]],
        head_dim,
        ragged=unit.ragged,
        variants=head_dim in (None, _ONE_HEAD_DIM) and not unit.ragged,
    )
    rows = compile_exercises(found, unit.architecture, head_dim, cache)
    return [{"backend": "triton", "room": unit.folder, **row} for row in rows]


def compile_exercises(
    exercises: Iterable[launches.Exercise],
    architecture: str,
    head_dim: int | None,
    cache: Path,
    backend: str = "triton",
) -> list[dict[str, Any]]:
    """Compile what these launch for an architecture, without saying whose kernels they are.

    Args:
        head_dim: of the exercises, if they have one.
        backend: that launches; every configuration that its autotuner may choose is compiled.
        cache: a folder; a kernel that was compiled before, from the same source and for the same
            launch, is read from there, whatever else has changed since.
    """
    launched: set[tuple[Any, ...]] = set()
    rows: dict[str, dict[str, Any]] = {}
    run, compile_now = JITFunction.run, JITFunction._do_compile

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # Launches that differ in sizes alone run the same code but for a constant or two (an
        # integer that is 1, or no multiple of 16): the first stands for them.
        dtypes = (x.dtype for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        key = (function.__name__, *dtypes, *_constants(function, args, kwargs))
        if key not in launched:
            launched.add(key)
            run(function, *args, grid=grid, warmup=True, **kwargs)

    def compile_all(tuner: Any, *args: Any, **kwargs: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    def compile_kept(
        function: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any,
        attributes: Any, warmup: bool,
    ) -> None:  # fmt: skip
        source = function.ASTSource(function, signature, constants, attributes)
        asked = (source.hash(), options.hash(), architecture, triton.__version__, _READER)
        name = hashlib.sha256(repr(asked).encode()).hexdigest()[:24]
        if name in rows:
            return
        kept = cache / f"kernel-{name}.json"
        if not kept.exists():
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = compile_now(
                    function, key, signature, device, constants, options, attributes, warmup
                )
            # Or the next call in this process would not come by here, and miss the row.
            function.device_caches[device][0].pop(key, None)
            cubin = kept.with_suffix(".cubin")
            partial = kept.with_suffix(f".{os.getpid()}")
            partial.write_bytes(compiled.asm["cubin"])
            partial.replace(cubin)
            row = _row(function, compiled, architecture, log.getvalue(), cubin)
            partial.write_text(json.dumps(row))
            partial.replace(kept)
        row = json.loads(kept.read_text())
        of_head_dim = f"D={head_dim}" in row["configuration"].split()  # else of every one
        own = {"head_dim": head_dim if of_head_dim else None, "layout": exercise.layout}
        rows[name] = row | own

    with (
        _target(architecture),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(JITFunction, "_do_compile", compile_kept),
        mock.patch.object(Autotuner, "run", compile_all),
    ):
        for exercise in exercises:
            exercise.run(backend)
    return list(rows.values())


@contextlib.contextmanager
def _target(architecture: str) -> Iterator[None]:
    """Triton compiles everything afresh for an architecture, and prints what ptxas says."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets and compiles nothing")
    capability = int(re.sub(r"\D", "", architecture))
    driver = _Driver(GPUTarget("cuda", capability, 32))
    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.nvidia.scope())
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        stack.enter_context(pretend_usable("triton"))
        multiprocessors = machine_code.LIMITS[architecture].multiprocessors
        stack.enter_context(tuning.assume(architecture, multiprocessors))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        yield


def _constants(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """What a launch fixes at compile time: constexpr parameters, and options such as num_warps."""
    parameters = {p.name: p for p in function.params}
    yield from (
        (p.name, value) for p, value in zip(function.params, args, strict=False) if p.is_constexpr
    )
    for name, value in sorted(kwargs.items()):
        if name not in parameters or parameters[name].is_constexpr:
            yield name, value


def _row(function: Any, compiled: Any, architecture: str, log: str, cubin: Path) -> dict[str, Any]:
    ((name, usage),) = machine_code.read_ptxas(log).items()
    code = machine_code.disassemble(cubin)
    kernel = code.pop(name)  # the others are functions of its own that were not inlined
    metadata, source = compiled.metadata, compiled.src
    pointers = [t.lstrip("*") for t in _leaves(source.signature.values()) if t.startswith("*")]
    halves = [p for p in pointers if p in ("fp16", "bf16")]
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    options = {name: v for name, v in constants.items() if name.isupper() or name.startswith("BLO")}
    return {
        "kernel": function.__name__,
        "dtype": _NAMES[halves[0]] if halves else "float32",
        "products": "tt.dot" in compiled.asm["ttir"],
        "architecture": architecture,
        "configuration": " ".join(
            f"{name}={value}"
            for name, value in {
                **options,
                "num_warps": metadata.num_warps,
                "num_stages": metadata.num_stages,
            }.items()
        ),
        "threads": 32 * metadata.num_warps,
        "dynamic_shared": metadata.shared,
        **machine_code.as_columns(usage, kernel, [one for body in code.values() for one in body]),
        "code": [str(cubin), name],
    }


def _leaves(types: Iterable[Any]) -> Iterator[str]:
    """A signature's types, those of tuples one by one."""
    for t in types:
        if isinstance(t, tuple):
            yield from _leaves(t)
        else:
            yield t
