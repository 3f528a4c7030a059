"""``make check-noise``: is 10 % more work in a real kernel caught end to end, on a noisy machine?

Times linear attention at 24 lengths beside a process that keeps one core busy a tenth of the time:
twice as it is, and once with more work planted in the kernel under test (it runs again on a tenth
of the tokens). Six lengths at a time, the three take turns, each in a process of its own, since
what the machine has to spare changes from minute to minute. Then ``reports compare`` has to call
all lengths together slower, and of the two plain runs nothing may be called changed: they are the
same, or the machine is too noisy to be sure of that. Some minutes; not one of the tests, since it
measures time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from linear_vit import kernels, options

_ROOT = Path(str(kernels.__file__)).resolve().parents[1]  # run by its old name, this has no file
_SHARE = 0.1
_LENGTHS = (*range(512, 2048, 128), *range(2048, 5120, 256))
_TURNS = 4
_TOGETHER = " cases together "  # of the line in which compare judges all lengths
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
        description="Is 10 % more work in a kernel caught, beside a noisy neighbour? (minutes)",
    )
    text = "without the busy neighbour"
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
    neighbour = None
    if not arguments.quiet_machine:
        neighbour = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR])
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plant = folder / "plant"
            plant.mkdir()
            (plant / "planted.py").write_text(_PLANT.format(backend=backend, share=_SHARE))
            for turn in range(_TURNS):
                for variant in ("before", "same", "slower"):
                    path = folder / variant / f"{turn}.json"
                    _time(path, backend, turn, plant if variant == "slower" else None)
            return _judge(folder / "before", folder / "same", folder / "slower", backend)
    finally:
        if neighbour is not None:
            neighbour.kill()


def _time(path: Path, backend: str, turn: int, plant: Path | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    lengths = ",".join(map(str, _LENGTHS[turn::_TURNS]))
    given = ["--benchmark-only", "--device", "cpu", "--ops", "linear_attention"]
    plain = next(r.name for r in kernels.backend_rows().values() if r.eager and not r.oracle)
    given += ["--tokens", lengths, "--backends", f"{plain},{backend}", "--sweep", "full"]
    given += ["--dtypes", "float32", "-k", "forward-", "-p", "no:cacheprovider"]
    given += [f"--benchmark-json={path}", *(["-p", "planted"] if plant else [])]
    print(f"timing {path.parent.name}, {turn + 1} of {_TURNS}", flush=True)
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, str(plant or path.parent), *given],
        cwd=_ROOT,
        # One thread: with as many as there are cores, each would wait for the neighbour's core.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"the run {path.parent.name} failed:\n{said}")


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
