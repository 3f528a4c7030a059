"""``make check-noise``: is a busy neighbour noticed, and 10 % more work in a real kernel caught?

First the same cases on the machine as it is and beside a process that multiplies matrices. Each
median that is kept has to be within 10 % of the quiet one, or its case marked as disturbed; on the
quiet machine fewer than one turn in 50 may be dropped.

Then linear attention at 24 lengths beside a process that keeps one core busy a tenth of the time:
twice as it is, and once with more work planted in the kernel under test (it runs again on a tenth
of the tokens). Six lengths at a time, the three take turns, each in a process of its own, since
what the machine has to spare changes from minute to minute. Then ``reports compare`` has to call
all lengths together slower, and of the two plain runs nothing may be called changed: they are the
same, or the machine is too noisy to be sure of that.

Some minutes; not one of the tests, since it measures time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linear_vit import kernels, options
from linear_vit.bench import tables

_ROOT = Path(str(kernels.__file__)).resolve().parents[1]  # run by its old name, this has no file
_SHARE = 0.1
_LENGTHS = (*range(512, 2048, 128), *range(2048, 5120, 256))
_TURNS = 4
_TOGETHER = " cases together "  # of the line in which compare judges all lengths
_CLOSE, _MOST_DROPPED = 0.1, 1 / 50
_BUSY = "import torch\ntorch.set_num_threads(1)\na = torch.randn(512, 512)\nwhile True: a @ a\n"
_NEIGHBOUR = (
    "import time\n"
    "while True:\n"
    "    end = time.perf_counter() + 0.005\n"
    "    while time.perf_counter() < end: pass\n"
    "    time.sleep(0.045)\n"
)
# A plugin for the timed process: the tenth is real work of the kernel, not a sleep.
_PLANT = """
from linear_vit import kernels

plain = kernels.linear_attention


def slower(q, k, v, *, eps=1e-6, backend=None):
    if backend == {backend!r}:
        some = max(1, int({share} * q.shape[2]))
        plain(q[:, :, :some], k[:, :, :some], v[:, :, :some], eps=eps, backend=backend)
    return plain(q, k, v, eps=eps, backend=backend)


kernels.linear_attention = slower
"""
_COMMAND = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import pytest;"
    "sys.exit(pytest.main(sys.argv[1:]))"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench noise",
        description="Is a busy neighbour noticed, and 10 % more work caught? (minutes)",
    )
    parts = {"neighbour": "is a busy one noticed", "planted": "is 10 %% more work caught"}
    text = "; ".join(f"{name}: {what}" for name, what in parts.items())
    parser.add_argument("--only", choices=tuple(parts), help=text)
    text = "plant beside no neighbour"
    options.option(parser, "--quiet-machine", action="store_true", help=text)
    arguments = parser.parse_args(argv)
    usable = kernels.backends("linear_attention", "cpu", head_dim=64)
    rows = [row for row in kernels.backend_rows().values() if row.own or row.compiles]
    rows.sort(key=lambda row: not row.own)
    backend = next((row.name for row in rows if usable[row.name] is None), None)
    if backend is None:
        why = "; ".join(f"{row.name}: {usable[row.name]}" for row in rows)
        print(f"no kernel to plant in here: {why}", file=sys.stderr)
        return 2
    code = 0
    with tempfile.TemporaryDirectory() as name:
        if arguments.only != "planted":
            code = _noticed(Path(name), backend)
        if arguments.only != "neighbour":
            program = None if arguments.quiet_machine else _NEIGHBOUR
            with _beside(program):
                code = _caught(Path(name), backend) or code
    return code


@contextmanager
def _beside(program: str | None) -> Iterator[None]:
    """A neighbour: a process of this program, or none."""
    neighbour = None if program is None else subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        if neighbour is not None:
            neighbour.kill()


# ---- is a busy neighbour noticed? ----------------------------------------------------------------


def _noticed(folder: Path, backend: str) -> int:
    given = ["--ops", "linear_attention,softmax_attention", "--tokens", "64,128,512,1024,4096"]
    paths = {}
    for name, program in (("quiet", None), ("beside a neighbour", _BUSY)):
        paths[name] = folder / f"{name}.json"
        with _beside(program):
            _run(paths[name], ["--backends", f"{_plain()},{backend}", *given])
    quiet, beside = (json.loads(path.read_text()) for path in paths.values())
    text, right = compared(quiet, beside)
    print(text, flush=True)
    return 0 if right else 1


def compared(quiet: dict[str, Any], beside: dict[str, Any]) -> tuple[str, bool]:
    """Two saved runs of the same cases, the second beside a neighbour: what they show, and
    whether each case is right or says that it may not be."""
    others = {case["param"]: case for case in beside["benchmarks"]}
    rows, wrong = [], []
    for case in quiet["benchmarks"]:
        name, other = case["param"], others[case["param"]]
        medians = [one["stats"]["median"] for one in (case, other)]
        ratio = medians[1] / medians[0]
        marks = [bool(one["extra_info"]["disturbed"]) for one in (case, other)]
        if abs(ratio - 1) > _CLOSE and not any(marks):
            wrong.append(name)
        shown = zip(medians, marks, strict=True)
        times = [f"{1e3 * median:.3f}{' †' * mark}" for median, mark in shown]
        rows.append([name, *times, f"{ratio:.2f}"])
    columns = ["case", "quiet, ms", "beside a neighbour, ms", "ratio"]
    text = tables.draw("The same cases twice; † marked as disturbed", columns, rows)
    share = _dropped(quiet)
    text += f"turns dropped: {share:.1%} on the quiet machine, {_dropped(beside):.1%} beside it\n"
    if share >= _MOST_DROPPED:
        text += f"FAILED: more than {_MOST_DROPPED:.0%} of the quiet machine's turns\n"
    if wrong:
        text += f"FAILED: further than {_CLOSE:.0%} apart, and not marked: {', '.join(wrong)}\n"
    return text, not wrong and share < _MOST_DROPPED


def _dropped(run: dict[str, Any]) -> float:
    """The share of a run's turns that were dropped; cases of a group have theirs in common."""
    infos = [case["extra_info"] for case in run["benchmarks"]]
    turns = {info["turns"]: info["telemetry"] for info in infos}.values()
    return sum(one["turns_dropped"] for one in turns) / sum(one["turns"] for one in turns)


# ---- is 10 % more work caught? -------------------------------------------------------------------


def _caught(folder: Path, backend: str) -> int:
    plant = folder / "plant"
    plant.mkdir()
    (plant / "planted.py").write_text(_PLANT.format(backend=backend, share=_SHARE))
    for turn in range(_TURNS):
        for variant in ("before", "same", "slower"):
            path = folder / variant / f"{turn}.json"
            _time(path, backend, turn, plant if variant == "slower" else None)
    return _judge(folder / "before", folder / "same", folder / "slower", backend)


def _time(path: Path, backend: str, turn: int, plant: Path | None) -> None:
    path.parent.mkdir(exist_ok=True)
    lengths = ",".join(map(str, _LENGTHS[turn::_TURNS]))
    given = ["--ops", "linear_attention", "--tokens", lengths, "--sweep", "full", "-k", "forward-"]
    given += ["--backends", f"{_plain()},{backend}", *(["-p", "planted"] if plant else [])]
    # One thread: with as many as there are cores, each would wait for the neighbour's core.
    _run(path, given, plant, OMP_NUM_THREADS="1")


def _plain() -> str:
    return next(r.name for r in kernels.backend_rows().values() if r.eager and not r.oracle)


def _run(path: Path, given: Sequence[str], plugins: Path | None = None, **environment: str) -> None:
    """Time cases in a process of its own, which finds its plugins in a folder."""
    command = ["--benchmark-only", "--device", "cpu", "--dtypes", "float32", *given]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={path}"]
    print(f"timing {path.relative_to(path.parents[1])}", flush=True)
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, str(plugins or path.parent), *command],
        cwd=_ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"the run {path.stem} failed:\n{said}")


def _judge(before: Path, same: Path, slower: Path, backend: str) -> int:
    """What counts is the verdict on all lengths together: single ones may be right by luck."""
    verdicts, codes = {}, {}
    for after in (same, slower):
        command = [sys.executable, "-m", "reports", "compare", str(before), str(after)]
        command += ["--fail-on", "slower"]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        print(f"{before.stem} → {after.stem}\n{done.stdout}{done.stderr}", flush=True)
        together = [line.split()[0] for line in done.stdout.splitlines() if _TOGETHER in line]
        verdicts[after.stem] = together[0] if len(together) == 1 else "not compared"
        codes[after.stem] = done.returncode
    print(
        f"the same code in {backend}: {verdicts['same']}; a tenth more work: {verdicts['slower']}"
    )
    right = verdicts["slower"] == "slower" and verdicts["same"] in ("same", "undecided")
    right &= codes == {"same": 0, "slower": 1}
    if not right:
        wanted = "FAILED: wanted slower of a tenth more work, and no change of the same code"
        print(f"{wanted} (undecided: the machine is too noisy)", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":  # the old spelling
    from linear_vit.bench.__main__ import main as command

    sys.exit(command(["noise", *sys.argv[1:]]))
