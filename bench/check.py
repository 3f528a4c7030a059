"""Cross-check every usable backend against the float64 reference: ``python -m bench.check``.

For every operation, dtype and backend: the output and each gradient on a few shapes, by the
accuracy rule of ``kernels.accuracy``. Prints a matrix, writes JSON, and exits with 1 where a result
is wrong. Where there is no GPU, Triton's kernels run in its interpreter, in a process of their own
since Triton reads TRITON_INTERPRET when it is imported.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels
from linear_vit.bench.instruments import machine
from linear_vit.bench.instruments.memory import is_out_of_memory
from linear_vit.bench.problems import (
    FORWARD_BACKWARD,
    Expected,
    Problem,
    Shape,
    check,
    make_problem,
    worst,
)
from linear_vit.bench.problems import operation as operation_of
from linear_vit.bench.sweep import DTYPES, SweepError, resolve_device

SCHEMA = 1
# One head dim: `compiled` compiles anew for each, and the tests go through all of them.
_HEAD_DIM, _HEAD_DIM_INTERPRETED = 64, 16
_SPARED = "each dtype compiles for seconds: python -m bench.check --full goes through all of them"

Result = dict[str, Any]


def cross_check(
    device: torch.device,
    *,
    only: str | None = None,
    full: bool = False,
    progress: Callable[[str], None],
) -> list[Result]:
    """Check every operation x backend x dtype on a device; one result each.

    Args:
        device: where to run.
        only: the one backend to check; None for all of them.
        full: also `compiled` in every dtype and shape; without it, in float32 and one shape.
        progress: called with a line before each step.

    Returns:
        Dicts with operation, backend, dtype, status ("passed", "failed", "unusable", "left out"),
        mode ("native", "interpreter"), reason (why it failed or did not run), and per shape and
        tensor the errors and tolerances.
    """
    results = []
    for operation in kernels.OPERATIONS:
        for dtype_name, dtype in DTYPES.items():
            shapes = _shapes(operation, only)
            prepared: list[tuple[Problem, Expected]] = []
            for backend in kernels.BACKENDS if only is None else (only,):
                reasons = [_unusable(operation, backend, device, dtype, s) for s in shapes]
                result: Result = {
                    "operation": operation,
                    "backend": backend,
                    "dtype": dtype_name,
                    "device": device.type,
                    "mode": "native" if kernels.is_timeable(backend, device) else "interpreter",
                }
                if all(reasons):
                    results.append({**result, "status": "unusable", "reason": reasons[0]})
                    continue
                sparing = backend == "compiled" and not full
                if sparing and dtype != torch.float32:
                    results.append({**result, "status": "left out", "reason": _SPARED})
                    continue
                progress(f"{operation} {dtype_name} {backend}")
                if not prepared:
                    for shape in shapes:
                        problem = make_problem(operation, shape, dtype, device)
                        prepared.append((problem, problem.expected()))
                results.append(
                    {**result, **_check_shapes(prepared[: 1 if sparing else None], backend)}
                )
    return results


def _check_shapes(prepared: list[tuple[Problem, Expected]], backend: str) -> Result:
    tensors: list[Result] = []
    for problem, expected in prepared:
        try:
            verdicts = check(problem, backend, FORWARD_BACKWARD, expected)
        except Exception as error:
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            message = str(error).strip().splitlines() or ["no message"]
            reason = f"{what}: {message[0]} ({problem.shape})"
            return {"status": "failed", "reason": reason, "tensors": tensors}
        for name, verdict in verdicts.items():
            tensors.append({"tensor": name, "shape": str(problem.shape), **_finite(vars(verdict))})
        name, verdict = worst(verdicts)
        if not verdict.passed:
            reason = f"wrong {name}: {verdict} ({problem.shape})"
            return {"status": "failed", "reason": reason, "tensors": tensors}
    return {
        "status": "passed",
        "reason": None,
        "tensors": tensors,
        "worst_rms_error": max(t["rms_error"] for t in tensors),
    }


def _interpreted_triton(progress: Callable[[str], None]) -> list[Result]:
    """Results of Triton's kernels in its interpreter, from a process that has it switched on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        command = [sys.executable, "-m", "bench.check", "--device", "cpu", "--only", "triton"]
        process = subprocess.Popen(
            [*command, "--json", str(path), "--plain"],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        last = ""
        try:
            for line in process.stdout:
                last = line.strip() or last
                if line.startswith("checking "):
                    progress(f"{line.removeprefix('checking ').strip()} (interpreter)")
            code = process.wait()
        finally:
            process.kill()  # an interrupted check leaves nothing running
        if not path.exists():
            reason = f"its process ended with code {code}: {last}"
            return [
                {
                    "operation": operation,
                    "backend": "triton",
                    "dtype": dtype,
                    "device": "cpu",
                    "mode": "interpreter",
                    "status": "failed",
                    "reason": reason,
                    "tensors": [],
                }
                for operation in kernels.OPERATIONS
                for dtype in DTYPES
            ]
        return json.loads(path.read_text())["results"]


def _shapes(operation: str, only: str | None) -> tuple[Shape, ...]:
    interpreted = only == "triton" and not kernels.is_timeable("triton", "cpu")
    head_dim = _HEAD_DIM_INTERPRETED if interpreted else _HEAD_DIM
    return tuple(operation_of(operation).check_shapes(head_dim, interpreted=interpreted))


def _unusable(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, shape: Shape
) -> str | None:
    return kernels.backends(operation, device, dtype=dtype, head_dim=shape.dim)[backend]


def _finite(values: Result) -> Result:
    """NaN and infinity are no JSON: None says that there was no finite error."""
    return {
        key: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for key, value in values.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.check",
        description="Compare every usable backend with the float64 reference.",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--only", choices=kernels.BACKENDS, metavar="BACKEND", help="one backend")
    parser.add_argument("--full", action="store_true", help="`compiled` in every dtype and shape")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live display")
    arguments = parser.parse_args(argv)
    try:
        device = resolve_device(arguments.device)
    except SweepError as error:
        parser.error(str(error))

    with _progress(arguments.plain) as progress:
        results = cross_check(device, only=arguments.only, full=arguments.full, progress=progress)
        # Where Triton has no device, its interpreter stands in, if it is installed.
        if device.type == "cpu" and arguments.only is None:
            results = _with_interpreter(results, progress)

    document = {
        "kind": "check",
        "schema": SCHEMA,
        "device": device.type,
        "machine": machine.describe(device),
        "results": results,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    print(_matrix(results))
    return 1 if any(r["status"] == "failed" for r in results) else 0


def _with_interpreter(results: list[Result], progress: Callable[[str], None]) -> list[Result]:
    triton = [r for r in results if r["backend"] == "triton"]
    import importlib.util

    if importlib.util.find_spec("triton") is None or any(r["status"] != "unusable" for r in triton):
        return results
    interpreted = {(r["operation"], r["dtype"]): r for r in _interpreted_triton(progress)}
    return [
        interpreted.get((r["operation"], r["dtype"]), r) if r["backend"] == "triton" else r
        for r in results
    ]


@contextmanager
def _progress(plain: bool) -> Iterator[Callable[[str], None]]:
    """Shows what is being checked: a live line on a terminal, a line each elsewhere."""
    if not plain and sys.stdout.isatty():
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            with Console().status("checking") as status:
                yield lambda text: status.update(f"checking {text}")
            return
    yield lambda text: print(f"checking {text}", flush=True)


def _matrix(results: list[Result]) -> str:
    """Operation and dtype down, backends across; reasons once, below."""
    from linear_vit.bench.summary import draw

    backends = list(dict.fromkeys(r["backend"] for r in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    notes: dict[str, list[str]] = {}
    for r in results:
        cell = r["status"]
        if r["status"] == "passed":
            cell = f"ok {r['worst_rms_error']:.0e}" + ("†" if r["mode"] == "interpreter" else "")
        elif r["status"] == "failed":
            cell = "FAILED"
            note = f"FAILED {r['operation']} {r['dtype']} {r['backend']}"
            notes.setdefault(r["reason"], []).append(note)
        else:
            cell = "–"
            if r["backend"] not in notes.setdefault(r["reason"], []):
                notes[r["reason"]].append(r["backend"])
        rows.setdefault((r["operation"], r["dtype"]), {})[r["backend"]] = cell
    table = [[*key, *(cells.get(b, "") for b in backends)] for key, cells in rows.items()]
    width = 100
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns
    text = draw(
        "Largest relative rms error over output and gradients, against the float64 reference",
        ["operation", "dtype", *backends],
        table,
        width,
        sys.stdout.isatty(),
    )
    if any(r["mode"] == "interpreter" and r["status"] == "passed" for r in results):
        text += "† in Triton's interpreter, on small shapes: correctness only\n"
    for reason, who in notes.items():
        text += f"{', '.join(who)}: {reason}\n"
    statuses = [r["status"] for r in results]
    counts = [
        f"{statuses.count(status)} {words}"
        for status, words in (
            ("passed", "passed"),
            ("failed", "failed"),
            ("unusable", "not usable here"),
            ("left out", "left out"),
        )
    ]
    return text + ", ".join(counts)


if __name__ == "__main__":
    sys.exit(main())
