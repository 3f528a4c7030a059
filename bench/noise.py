"""``make check-noise``: is a busy neighbour noticed, and 10 % more work in a real kernel caught?

First the same cases on the machine as it is, beside a process that multiplies matrices, and on the
machine as it is again, one length at a time. Each median that is kept beside it has to be within
10 % of the quiet ones before and after, which differ where the machine itself has changed; or the
case is marked as disturbed. On the quiet machine fewer than one turn in 50 may be dropped.

Then linear attention at 24 lengths beside a process that keeps one core busy a tenth of the time:
twice as it is, and once with more work planted in the kernel under test (it runs again on a tenth
of the tokens). Six lengths at a time, the three take turns, each in a process of its own, since
what the machine has to spare changes from minute to minute. Then ``reports compare`` has to call
all lengths together slower, and of the two plain runs nothing may be called changed: they are the
same, or the machine is too noisy to be sure of that.

With ``--only repeats`` it records what the power and the false alarms of ``compare`` are counted
from: processes of the same code, and of 2, 5 and 10 % more work, by turns, on the machine as it is.

``--out`` keeps what was found: check-noise.md and .json, or repeats.md, .csv and .json.

Some minutes; not one of the tests, since it measures time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels, options
from linear_vit.bench import tables
from linear_vit.bench.instruments import machine
from linear_vit.screen import counted, say

_ROOT = Path(str(kernels.__file__)).resolve().parents[1]  # run by its old name, this has no file
_SHARE = 0.1
_LENGTHS = (*range(512, 2048, 128), *range(2048, 5120, 256))
_TURNS = 4
# Of the line in which compare judges all lengths.
_TOGETHER = re.compile(r"all lengths together: [^:]*?\b1 (\w+)")
# What is recorded of repeats: the same code twice as often, since both sides are drawn from it.
_RECORDED, _PLANTED = 10, (0.0, 0.02, 0.0, 0.05, 0.10)
_OF_REPEATS = "1024,1536,2048,3072,4096"
_CLOSE, _MOST_DROPPED = 0.1, 1 / 50
_BESIDE = ("64", "128", "512", "1024", "4096")
_RUNS = ("quiet", "beside", "again")
_COLUMNS = ("quiet, ms", "beside a neighbour, ms", "quiet again, ms", "ratio")
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
    parts = {
        "neighbour": "is a busy one noticed",
        "planted": "is 10 %% more work caught",
        "repeats": "record the luck of processes, and planted work",
    }
    text = "; ".join(f"{name}: {what}" for name, what in parts.items())
    parser.add_argument("--only", choices=tuple(parts), help=f"{text} (the first two)")
    text = "plant beside no neighbour"
    options.option(parser, "--quiet-machine", action="store_true", help=text)
    options.add(
        parser, minutes="to record repeats, at most", out="folder that keeps what was found"
    )
    arguments = parser.parse_args(argv)
    usable = kernels.backends("linear_attention", "cpu", head_dim=64)
    rows = [row for row in kernels.backend_rows().values() if row.own or row.compiles]
    rows.sort(key=lambda row: not row.own)
    backend = next((row.name for row in rows if usable[row.name] is None), None)
    if backend is None:
        why = "; ".join(f"{row.name}: {usable[row.name]}" for row in rows)
        say(f"no kernel to plant in here: {why}", sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        if arguments.only == "repeats":
            out = arguments.out or Path("reports/out/noise")
            return _record(Path(name), backend, out, arguments.minutes)
        found = []
        if arguments.only != "planted":
            found.append(_noticed(Path(name), backend))
        if arguments.only != "neighbour":
            program = None if arguments.quiet_machine else _NEIGHBOUR
            with _beside(program):
                found.append(_caught(Path(name), backend))
    if arguments.out:
        _keep(found, arguments.out)
    return 0 if all(part["right"] for part in found) else 1


def _keep(found: list[dict[str, Any]], out: Path) -> None:
    """What was found as Markdown, and as JSON with where it was."""
    facts = machine.describe(torch.device("cpu"))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"kind": "noise", "schema": 1, "created": created, "machine": facts}
    cases = [case for part in found for case in part.pop("cases", [])]
    tables.write_json(head | {"parts": found, "rows": cases}, out / "check-noise.json")
    threads = counted(facts["threads"], "thread")
    text = "# What `make check-noise` found\n\n"
    text += f"{facts['cpu']}, {threads}, torch {facts['torch']}; {created[:10]}.\n"
    for part in found:
        text += f"\n## {part['title']}\n\n{'Yes' if part['right'] else 'No'}.\n"
        if rows := [case for case in cases if case["part"] == part["title"]]:
            text += f"\n{_markdown(rows)}"
        text += f"\n```\n{part['said'].rstrip()}\n```\n"
    (out / "check-noise.md").write_text(text)
    say(f"written to {out}/check-noise.{{md,json}}")


def _markdown(cases: list[dict[str, Any]]) -> str:
    lines = [f"| case | {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join([case['case'], *_times(case)])} |" for case in cases]
    return "\n".join(lines) + "\n"


@contextmanager
def _beside(program: str | None) -> Iterator[None]:
    """A neighbour: a process of this program, or none."""
    neighbour = None if program is None else subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


# ---- is a busy neighbour noticed? ----------------------------------------------------------------


def _noticed(folder: Path, backend: str) -> dict[str, Any]:
    found: dict[str, list[Any]] = {name: [] for name in _RUNS}
    for tokens in _BESIDE:
        given = ["--ops", "linear_attention,softmax_attention", "--tokens", tokens]
        for name in _RUNS:
            path = folder / name / f"{tokens}.json"
            path.parent.mkdir(exist_ok=True)
            with _beside(_BUSY if name == "beside" else None):
                _run(path, ["--backends", f"{_plain()},{backend}", *given])
            found[name] += json.loads(path.read_text())["benchmarks"]
    return compared(found)


def compared(runs: dict[str, list[Any]]) -> dict[str, Any]:
    """Saved cases of ``_RUNS``, the same in each, of which one was beside a neighbour.

    Returns:
        ``title``; ``cases``, a row each; ``said``, the rest in words; ``right``: whether each case
        is within 10 % or says that it may not be, and few turns of the quiet machine were dropped.
    """
    title = "Is a busy neighbour noticed?"
    of_param = {name: {one["param"]: one for one in cases} for name, cases in runs.items()}
    cases = []
    for param in of_param["quiet"]:
        of_case: dict[str, Any] = {"part": title, "case": param}
        for name in _RUNS:
            one = of_param[name][param]
            of_case[f"{name}_s"] = one["stats"]["median"]
            of_case[f"{name}_disturbed"] = one["extra_info"]["disturbed"] or None
        cases.append(of_case)
    unmarked = [c for c in cases if not any(c[f"{name}_disturbed"] for name in _RUNS)]
    wrong, changed = [], []
    for case in unmarked:
        low, high = sorted((case["quiet_s"], case["again_s"]))
        if not low * (1 - _CLOSE) <= case["beside_s"] <= high * (1 + _CLOSE):
            wrong.append(case["case"])
        if high > low * (1 + _CLOSE):
            changed.append(case["case"])
    rows = [[case["case"], *_times(case)] for case in cases]
    say(tables.draw("The same cases three times; † marked as disturbed", ["case", *_COLUMNS], rows))
    share = _dropped(runs["quiet"] + runs["again"])
    said = f"turns dropped: {share:.1%} on the quiet machine, {_dropped(runs['beside']):.1%} "
    said += f"beside it\nof {counted(len(cases), 'case')} {len(unmarked)} are not marked, "
    said += f"of which {len(changed)} changed by over {_CLOSE:.0%} on the quiet machine itself\n"
    if share >= _MOST_DROPPED:
        said += f"FAILED: more than {_MOST_DROPPED:.0%} of the quiet machine's turns\n"
    if wrong:
        said += f"FAILED: further than {_CLOSE:.0%} apart, and not marked: {', '.join(wrong)}\n"
    say(said.rstrip())
    right = not wrong and share < _MOST_DROPPED
    return {"title": title, "right": right, "said": said, "cases": cases}


def _times(case: dict[str, Any]) -> list[str]:
    """The times of a case, with their marks, and how far the one beside it is from the mean."""
    shown = [
        f"{1e3 * case[f'{name}_s']:.3f}{' †' * bool(case[f'{name}_disturbed'])}" for name in _RUNS
    ]
    return [*shown, f"{2 * case['beside_s'] / (case['quiet_s'] + case['again_s']):.2f}"]


def _dropped(cases: list[Any]) -> float:
    """The share of their turns that were dropped; cases of a group have theirs in common."""
    turns = {one["extra_info"]["turns"]: one["extra_info"]["telemetry"] for one in cases}.values()
    return sum(one["turns_dropped"] for one in turns) / sum(one["turns"] for one in turns)


# ---- is 10 % more work caught? -------------------------------------------------------------------


def _caught(folder: Path, backend: str) -> dict[str, Any]:
    plant = _planted(folder, backend, _SHARE)
    for turn in range(_TURNS):
        for variant in ("before", "same", "slower"):
            path = folder / variant / f"{turn}.json"
            _time(path, backend, turn, plant if variant == "slower" else None)
    return _judge(folder / "before", folder / "same", folder / "slower", backend)


def _planted(folder: Path, backend: str, share: float) -> Path:
    """The folder of a plugin that has a backend do so much more."""
    found = folder / f"plant{100 * share:g}"
    found.mkdir()
    (found / "planted.py").write_text(_PLANT.format(backend=backend, share=share))
    return found


def _record(folder: Path, backend: str, out: Path, minutes: float | None = None) -> int:
    """Fresh processes of every share by turns, and what ``reports`` counts from them."""
    plants = {share: _planted(folder, backend, share) for share in set(_PLANTED) if share}
    given = ["--ops", "linear_attention", "--tokens", _OF_REPEATS, "-k", "forward-"]
    given += ["--backends", f"{_plain()},{backend}"]
    began = time.monotonic()
    for number in range(_RECORDED):
        spent = (time.monotonic() - began) / 60
        # The next round takes as long as those before it, on the average.
        if minutes and number and spent * (1 + 1 / number) > minutes:
            break
        for turn, share in enumerate(_PLANTED):
            plant, path = plants.get(share), folder / f"{100 * share:g}" / f"{number}.{turn}.json"
            path.parent.mkdir(exist_ok=True)
            _run(path, [*given, *(["-p", "planted"] if plant else [])], plant)
    code, said = _reports(["power", str(folder), "--out", str(out.resolve())])
    say(said.rstrip())
    return code


def _reports(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command that reads what was saved, and what it says."""
    command = [sys.executable, "-m", "reports", *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


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
    say(f"timing {path.relative_to(path.parents[1])}")
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


def _judge(before: Path, same: Path, slower: Path, backend: str) -> dict[str, Any]:
    """What counts is the verdict on all lengths together: single ones may be right by luck."""
    verdicts, codes, all_said = {}, {}, []
    for after in (same, slower):
        compare = ["compare", str(before), str(after), "--fail-on", "slower"]
        codes[after.stem], said = _reports(compare)
        all_said.append(f"{before.stem} → {after.stem}\n{said}")
        say(all_said[-1])
        together = _TOGETHER.findall(said)
        verdicts[after.stem] = together[0] if len(together) == 1 else "not compared"
    right = verdicts["slower"] == "slower" and verdicts["same"] in ("same", "undecided")
    right &= codes == {"same": 0, "slower": 1}
    text = (
        f"the same code in {backend}: {verdicts['same']}; a tenth more work: {verdicts['slower']}"
    )
    say(text)
    if not right:
        wanted = "FAILED: wanted slower of a tenth more work, and no change of the same code"
        say(f"{wanted} (undecided: the machine is too noisy)", sys.stderr)
    said = "\n".join([*all_said, text])
    return {"title": "Is 10 % more work caught?", "right": right, "said": said}


if __name__ == "__main__":  # the old spelling
    from linear_vit.bench.__main__ import main as command

    sys.exit(command(["noise", *sys.argv[1:]]))
