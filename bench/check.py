"""Cross-check every usable backend against the float64 reference.

    python -m bench check
    python -m bench check --ops linear_attention --backends cpu,triton --out check.json
    python -m bench check --kernels mine.py     # the kernels that mine.py registers
    python -m bench -p mine check       # mine.py registers operations and backends of its own

For every operation, dtype and backend: the output and each gradient on a few shapes, by the
accuracy rule of ``kernels.accuracy``; the output again of a forward pass alone, on inputs that want
no gradient, under ``no_grad`` and in inference mode; and that the inputs are what they were. Prints
a matrix, writes JSON, and exits with 1 where a result of ours is wrong. What a compiler makes
wrong, or can't make, is shown, and is no verdict on us. A backend that has an interpreter and no
device here runs in that, in a process of its own, since a switch like TRITON_INTERPRET is read at
import. Kernels of ``--kernels`` are checked more strictly (``guests/strict.py``).
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels, options
from linear_vit.bench import guests, tables
from linear_vit.bench.guests import strict
from linear_vit.bench.instruments import machine
from linear_vit.bench.instruments.memory import is_out_of_memory
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    Expected,
    NotOffered,
    Operation,
    Problem,
    check_call,
    make_problem,
    operations,
    worst,
)
from linear_vit.bench.store import finite, titles
from linear_vit.screen import say

SCHEMA = 1
# One head dim: what compiles does so anew for each, and the tests go through all of them.
_HEAD_DIM, _HEAD_DIM_INTERPRETED = 64, 16
_SPARED = "each dtype compiles for seconds: python -m bench check --full goes through all of them"

_FORWARD_ONLY = "its gradient is not offered: a forward pass alone, which is right"

Result = dict[str, Any]


def known_operations() -> tuple[str, ...]:
    """Those that have backends: a problem here, and a row in ``kernels``."""
    return tuple(name for name in operations() if name in kernels.operations())


def cross_check(
    device: torch.device,
    *,
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    full: bool = False,
    draws: int = strict.DRAWS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Check every operation x backend x dtype on a device; one result each.

    Args:
        device: where to run.
        ops, backends: names; None for all there are.
        dtypes: names, keys of ``DTYPES``.
        full: also what compiles in every dtype and shape; without it, in float32 and one shape.
        draws: trials that are drawn for a kernel of ``--kernels``.
        progress: called with a line before each step.

    Returns:
        Dicts with operation, backend, dtype, status ("passed", "failed", "unusable", "left out"),
        mode ("native", "interpreter"), reason (why it failed or did not run), and per shape and
        tensor the errors and tolerances.
    """
    return [
        {
            "operation": name,
            "backend": backend,
            "dtype": dtype,
            "device": device.type,
            "mode": "interpreter" if _is_interpreted(name, backend, device) else "native",
            **(
                _check_guest(operations()[name], backend, dtype, device, draws, progress)
                if guests.is_guest(name, backend)
                else _check(operations()[name], backend, dtype, device, full, progress)
            ),
        }
        for name in (known_operations() if ops is None else ops)
        for dtype in dtypes
        for backend in kernels.backends(name, device)
        if backends is None or backend in backends
    ]


def _check(
    operation: Operation,
    backend: str,
    dtype: str,
    device: torch.device,
    full: bool,
    progress: Callable[[str], None],
) -> Result:
    interpreted = not kernels.is_timeable(backend, device)
    head_dim = _HEAD_DIM_INTERPRETED if interpreted else _HEAD_DIM
    reasons = [
        kernels.backends(operation.name, device, dtype=DTYPES[dtype], head_dim=shape.dim)[backend]
        for shape in operation.check_shapes(head_dim, interpreted=interpreted)
    ]
    if all(reasons):
        return {"status": "unusable", "reason": reasons[0]}
    sparing = kernels.backend_rows()[backend].compiles and not full
    if sparing and DTYPES[dtype] != torch.float32:
        return {"status": "left out", "reason": _SPARED}
    progress(f"{operation.name} {dtype} {backend}")
    prepared = _prepared(operation, head_dim, interpreted, dtype, device)
    return _check_shapes(prepared[: 1 if sparing else None], backend)


def _is_interpreted(operation: str, backend: str, device: torch.device) -> bool:
    guest = guests.is_interpreted(operation, backend)
    return guest or not kernels.is_timeable(backend, device)


def _check_guest(
    operation: Operation,
    backend: str,
    dtype: str,
    device: torch.device,
    draws: int,
    progress: Callable[[str], None],
) -> Result:
    try:
        report = strict.check(operation, backend, dtype, device, draws=draws, progress=progress)
    except ValueError as error:
        return {"status": "unusable", "reason": str(error)}
    found: Result = {"status": "passed", "reason": None, **finite(strict.summary(report))}
    if not report.gradient:
        found["reason"] = _FORWARD_ONLY
    if report.finding is not None:
        (file,) = guests.files_of(operation.name, backend)
        found |= {"status": "failed", "reason": str(report.finding)}
        found["snippet"] = strict.snippet(report.finding, backend, file)
    errors = [t["rms_error"] for t in found["tensors"] if t["rms_error"] is not None]
    return {**found, "worst_rms_error": max(errors, default=0.0)}


@functools.lru_cache(maxsize=2)  # for all backends of an operation and dtype
def _prepared(
    operation: Operation, head_dim: int, interpreted: bool, dtype: str, device: torch.device
) -> list[tuple[Problem, Expected]]:
    shapes = operation.check_shapes(head_dim, interpreted=interpreted)
    problems = [make_problem(operation.name, s, DTYPES[dtype], device) for s in shapes]
    return [(problem, problem.expected()) for problem in problems]


def _check_shapes(prepared: list[tuple[Problem, Expected]], backend: str) -> Result:
    tensors: list[Result] = []
    reason: str | None = None
    ways = [(p, e, *way) for p, e in prepared for way in _ways(p, e, backend)]
    for problem, expected, how, mode, call in ways:
        try:
            verdicts = check_call(problem, mode, call, expected)
        except NotOffered:
            reason = _FORWARD_ONLY
            continue
        except Exception as error:
            what = "out of memory" if is_out_of_memory(error) else type(error).__name__
            message = str(error).strip().splitlines() or ["no message"]
            reason = f"{what}: {message[0]}, {how} ({problem.shape})"
            return {"status": "failed", "reason": reason, "tensors": tensors}
        for name, verdict in verdicts.items():
            found = {"tensor": name, "shape": str(problem.shape), "way": how}
            tensors.append({**found, **finite(vars(verdict))})
        name, verdict = worst(verdicts)
        if not verdict.passed:
            reason = f"wrong {name}, {how}: {verdict} ({problem.shape})"
            return {"status": "failed", "reason": reason, "tensors": tensors}
    return {
        "status": "passed",
        "reason": reason,
        "tensors": tensors,
        "worst_rms_error": max(t["rms_error"] for t in tensors),
    }


def _ways(
    problem: Problem, expected: Expected, backend: str
) -> Iterator[tuple[str, str, Callable[[], tuple[torch.Tensor, ...]]]]:
    """Each way in which an operation may be called: in words, the pass, and the call."""
    forward = functools.partial(problem.run, problem.inputs, backend)
    both = functools.partial(problem.gradients, backend, expected.cotangents)
    yield "with gradients", FORWARD_BACKWARD, both
    yield "without gradients", FORWARD, problem.call(backend, FORWARD)
    yield "under no_grad", FORWARD, torch.no_grad()(forward)
    yield "in inference mode", FORWARD, torch.inference_mode()(forward)


# ---- in an interpreter, where there is no device ----------------------------------------------


def with_interpreters(results: list[Result], progress: Callable[[str], None]) -> list[Result]:
    """The results on a CPU; of a backend that can't run there but interpreted, those instead."""
    for backend, row in kernels.backend_rows().items():
        own = [r for r in results if r["backend"] == backend]
        if row.interpreter is None or row.interpreting or not own:
            continue
        if any(r["status"] != "unusable" for r in own):
            continue
        found = {
            (r["operation"], r["dtype"]): r
            for r in _interpreted(backend, row.interpreter, own, progress)
        }
        results = [
            found.get((r["operation"], r["dtype"]), r) if r["backend"] == backend else r
            for r in results
        ]
    return results


def _interpreted(
    backend: str, switch: str, asked: list[Result], progress: Callable[[str], None]
) -> list[Result]:
    """What was asked of a backend, from a process that has its interpreter switched on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.json"
        command = [sys.executable, "-m", "linear_vit.bench", "check", "--device", "cpu", "--plain"]
        command += ["--backends", backend, "--out", str(path)]
        for option, key in (("--ops", "operation"), ("--dtypes", "dtype")):
            command += [option, ",".join(dict.fromkeys(r[key] for r in asked))]
        process = subprocess.Popen(
            command,
            env={**os.environ, switch: "1"},
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
        if path.exists():
            found: list[Result] = json.loads(path.read_text())["results"]
            return found
        ended = {"status": "failed", "reason": f"its process ended with code {code}: {last}"}
        return [{**r, **ended, "mode": "interpreter", "tensors": []} for r in asked]


# ---- python -m bench check -----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench check",
        description="Compare every usable backend with the float64 reference.",
    )
    options.add(parser, "ops", "dtypes", "device", "kernels")
    options.option(parser, "--backends", "--only", **options.settings("backends"))
    text = "write the results there, as JSON"
    options.option(parser, "--out", "--json", **options.settings("out", text))
    text = "trials to draw for each kernel of --kernels, operation and dtype"
    parser.add_argument("--draws", type=int, default=strict.DRAWS, metavar="COUNT", help=text)
    parser.add_argument("--full", action="store_true", help="what compiles in every dtype, too")
    parser.add_argument("--plain", action="store_true", help="lines instead of a live display")
    given = parser.parse_args(argv)
    try:
        device = options.device(given.device)
        yours = guests.announce(given.kernels or ())
        ops = options.known("ops", given.ops or _names(yours, "operation"), known_operations())
        asked = given.backends or _names(yours, "name")
        backends = options.known("backends", asked, kernels.backend_rows())
        dtypes = options.known("dtypes", given.dtypes, DTYPES)
    except options.OptionError as error:
        parser.error(str(error))

    with _progress(given.plain) as progress:
        results = cross_check(
            device,
            ops=ops,
            backends=backends,
            dtypes=dtypes,
            full=given.full,
            draws=given.draws,
            progress=progress,
        )
        if device.type == "cpu":
            results = with_interpreters(results, progress)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document(results, device), indent=1) + "\n")
    say(matrix(results))
    shown = set()
    for result in results:  # the first dtype's will do
        of = (result["operation"], result["backend"])
        if "snippet" in result and of not in shown:
            shown.add(of)
            what = f"{result['operation']} {result['dtype']} {result['backend']}"
            say(f"\nTo see it fail in a Python of yours ({what}):\n")
            say(textwrap.indent(result["snippet"], "    "))
    return 1 if any(r["status"] == "failed" and _is_ours(r["backend"]) for r in results) else 0


def _names(yours: Sequence[guests.Entry], of: str) -> tuple[str, ...] | None:
    """What the kernels of ``--kernels`` are for, where nothing else is asked for."""
    return tuple(dict.fromkeys(getattr(entry, of) for entry in yours)) or None


def _is_ours(backend: str) -> bool:
    """Whether a failure is one of ours: not of a compiler, which is only compared with."""
    return not kernels.backend_rows()[backend].compiles


def document(results: list[Result], device: torch.device) -> dict[str, Any]:
    """The results with where they were found, and what their operations and backends are called."""
    return {
        "kind": "check",
        "schema": SCHEMA,
        "device": device.type,
        "machine": machine.describe(device),
        **titles(results),
        "results": results,
    }


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
    yield lambda text: say(f"checking {text}")


def matrix(results: list[Result]) -> str:
    """Operation and dtype down, backends across; reasons once, below."""
    backends = list(dict.fromkeys(r["backend"] for r in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    notes: dict[str, dict[str, None]] = {}
    for r in results:
        cell, who = "–", r["backend"]
        if r["status"] == "passed":
            cell = f"ok {r['worst_rms_error']:.0e}" + ("†" if r["mode"] == "interpreter" else "")
            who = f"{r['operation']} {r['dtype']} {who}" if r["reason"] else who
        elif r["status"] == "failed":
            cell, who = "FAILED", f"FAILED {r['operation']} {r['dtype']} {r['backend']}"
            who += "" if _is_ours(r["backend"]) else " (not ours)"
        if r["reason"]:
            notes.setdefault(r["reason"], {})[who] = None
        rows.setdefault((r["operation"], r["dtype"]), {})[r["backend"]] = cell
    text = tables.draw(
        "Largest relative rms error over output and gradients, against the float64 reference",
        ["operation", "dtype", *backends],
        [[*key, *(cells.get(b, "") for b in backends)] for key, cells in rows.items()],
        keys=2,
    )
    if any(r["mode"] == "interpreter" and r["status"] == "passed" for r in results):
        text += "† interpreted, on small shapes: correctness only\n"
    text += "".join(f"{', '.join(who)}: {reason}\n" for reason, who in notes.items())
    statuses = [r["status"] for r in results]
    words = {"unusable": "not usable here"}
    return text + ", ".join(
        f"{statuses.count(status)} {words.get(status, status)}"
        for status in ("passed", "failed", "unusable", "left out")
    )


if __name__ == "__main__":  # the old spelling
    from linear_vit.bench.__main__ import main as command

    sys.exit(command(["check", *sys.argv[1:]]))
