"""Everything that needs a GPU, in one go: ``python -m bench.gpu --minutes 8``.

Most important first, and saved as it goes: correctness on the device, the two ceilings, attention
over length and batch (times, share of the measured copy rate, memory, energy), sizes past 2³¹
elements, CUDA graphs, training steps. The results go to ``reports/measurements/<device>/gpu/``, a
file a section. Run again, it goes on with what is not finished, or was measured of other sources.
It ends with the bounds that the project sets itself, and exits with 1 where one is broken.

    python -m bench.gpu --only check,ceilings
    python -m bench.gpu --dry-run              # all of it, tiny, on a machine without a GPU
"""

import argparse
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels
from linear_vit.bench import gpu_measure
from linear_vit.bench.gpu_plan import plan
from linear_vit.bench.gpu_runner import FAILED, MEASURED, Case, Result, Store, run
from linear_vit.bench.gpu_verdicts import verdicts
from linear_vit.bench.instruments import machine
from linear_vit.bench.summary import format_seconds

_ROOT = Path(__file__).resolve().parent.parent
MEASUREMENTS = _ROOT / "reports" / "measurements"
# What a result depends on. The reports and this file's wording don't count.
_MEASURED_SOURCES = (
    "kernels",
    "attention",
    "training",
    "bench/clock.py",
    "bench/limits.py",
    "bench/gpu_measure.py",
    "bench/problems.py",
)
_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device here: run on a machine with one, or with --dry-run", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    folder = _folder(options.out, device, options.dry_run)
    if folder is None:
        print("--dry-run: its figures mean nothing, so not into measurements/", file=sys.stderr)
        return 2

    backends = _backends(options.backends, device)
    cases = plan(device.type, backends, dry_run=options.dry_run)
    cases = [case for case in cases if not options.only or case.section in options.only]
    facts = {"dry_run": options.dry_run, "machine": machine.describe(device)}
    store = Store(folder, facts, _sources())
    finished = sum(store.finished(case) is not None for case in cases)
    print(f"{len(cases)} cases into {folder}, {finished} finished before", flush=True)

    # The profiler, which memory is measured with, talks on stderr about every session else.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    builds = _start_builds(cases, store, options.dry_run)
    interrupted = False
    try:
        run(
            cases,
            store,
            gpu_measure.measure,
            deadline=deadline,
            builds={name: functools.partial(_ended, build) for name, build in builds.items()},
            progress=_progress(started, len(cases) - finished),
        )
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what is finished is kept", flush=True)
    finally:
        for build in builds.values():
            build.terminate()

    results = store.results(cases)
    print(_summary(results, len(cases)))
    found = verdicts(results)
    if options.dry_run:
        print("dry run: the times mean nothing, nor would bounds on them")
        return 130 if interrupted else int(any(r["status"] == FAILED for r in results))
    print("\n".join(map(str, found)))
    if interrupted:
        return 130
    return int(any(verdict.holds is False for verdict in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description="Everything that needs a GPU, in one go."
    )
    parser.add_argument(
        "--minutes", type=_positive, default=8.0, help="to spend, at most (default 8)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: reports/measurements/<device>/gpu"
    )
    parser.add_argument(
        "--only", type=_names(gpu_measure.SECTIONS), default=(), metavar="A,B",
        help=f"sections among {', '.join(gpu_measure.SECTIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--backends", type=_names(kernels.BACKENDS), default=(), metavar="A,B",
        help="default: all that can run here but the reference",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="walk all of it at tiny sizes on the CPU"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a positive number of minutes")
    return value


def _names(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(word for word in text.replace(",", " ").split() if word)
        for word in chosen:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"no {word!r}; there are {', '.join(choices)}")
        return chosen

    return parse


def _folder(out: Path | None, device: torch.device, dry_run: bool) -> Path | None:
    """Where results go; None where a dry run was sent to the measurements."""
    if dry_run:
        if out is None:
            return Path(tempfile.mkdtemp(prefix="bench-gpu-dry-run-"))
        inside = out.resolve().is_relative_to(MEASUREMENTS)
        return None if inside else out
    name = machine.describe(device)["device_name"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return out or MEASUREMENTS / slug / "gpu"


def _backends(asked: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
    """Backends to measure, ours first. A dry run leaves out those that compile for long."""
    if asked:
        return asked
    usable = kernels.backends("linear_attention", device)
    names = [
        name
        for name, reason in usable.items()
        if reason is None and name != "reference" and kernels.is_timeable(name, device)
    ]
    if device.type == "cpu":
        names = [name for name in names if name != "compiled"]
    return tuple(sorted(names, key=lambda name: name not in gpu_measure.OURS))


def _sources() -> str:
    """A name for the code that results depend on."""
    digest = hashlib.sha256()
    for name in _MEASURED_SOURCES:
        path = _ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.suffix in _SUFFIXES:
                digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _start_builds(
    cases: list[Case], store: Store, dry_run: bool
) -> dict[str, subprocess.Popen[bytes]]:
    """The CUDA extension takes minutes to build: in the background, while other cases run."""
    needed = {case.builds for case in cases if case.builds and store.finished(case) is None}
    if dry_run or "cuda" not in needed:
        return {}
    command = "from linear_vit.kernels import build; build.load('cuda')"
    return {"cuda": subprocess.Popen([sys.executable, "-c", command], cwd=_ROOT)}


def _ended(build: subprocess.Popen[bytes]) -> bool:
    return build.poll() is not None


# ---- what is shown -------------------------------------------------------------------------------


def _progress(started: float, total: int) -> Callable[[Case, Result], None]:
    done = 0

    def show(case: Case, result: Result) -> None:
        nonlocal done
        done += 1
        seconds = int(time.monotonic() - started)
        clock = f"[{done:>{len(str(total))}}/{total} {seconds // 60}:{seconds % 60:02}]"
        print(f"{clock} {case}: {_line(result)}", flush=True)

    return show


def _line(result: Result) -> str:
    if result["status"] != MEASURED:
        return f"{result['status']}: {result['reason']}"
    if "copy_bytes_per_s" in result:
        rates = result["matmul_flop_per_s"].items()
        products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates)
        return f"copy {result['copy_bytes_per_s'] / 1e9:,.0f} GB/s, {products}"
    if "images_per_s" in result:
        return f"{format_seconds(result['seconds'])}, {result['images_per_s']:,.0f} images/s"
    if times := result.get("times"):
        fastest = sorted(times.items(), key=lambda item: item[1]["seconds"])
        return ", ".join(f"{name} {format_seconds(t['seconds'])}" for name, t in fastest[:4])
    return f"off: {result['off']}" if result.get("off") else "right"


def _summary(results: list[dict[str, Any]], cases: int) -> str:
    statuses = [r["status"] for r in results]
    counts = [f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)]
    unseen = cases - len(results)
    text = ", ".join(counts) + (f", {unseen} not reached" if unseen else "")
    failed = [r for r in results if r["status"] == FAILED]
    return "\n".join([text, *(f"failed: {r['case']}: {r['reason']}" for r in failed)])


if __name__ == "__main__":
    sys.exit(main())
