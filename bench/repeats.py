"""``--repeats N``: the same run in N fresh processes, one after another.

A process has a luck of its own, in where its memory lies, that makes all of its times a few per
cent longer or shorter. Runs of several processes tell it from a change: ``reports compare`` pools
them.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from linear_vit.bench.instruments import machine
from linear_vit.bench.store import Store, sources
from linear_vit.options import device as where
from linear_vit.screen import say


def run(config: pytest.Config, count: int, path: Path | None) -> int:
    """Leave ``name.1.json`` to ``name.N.json`` in the place of ``name.json``.

    Returns:
        The first exit code that is not 0; else 0.

    Raises:
        pytest.UsageError: no file was named, or fewer than one run is wanted.
    """
    if count < 1:
        raise pytest.UsageError(f"--repeats: a positive number, got {count}")
    if path is None:
        raise pytest.UsageError("--repeats: name the runs' file with --benchmark-json or --out")
    codes = []
    for number in range(1, count + 1):
        one = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if config.getoption("resume_bench") and _stands(one, config.getoption("device")):
            say(f"repeat {number} of {count}: {one} is there already")
            continue
        say(f"repeat {number} of {count}: {one}")
        # What is given last counts.
        given = [*config.invocation_params.args, "--repeats=1", f"--benchmark-json={one}"]
        command = [sys.executable, "-m", "pytest", *map(str, given)]
        codes.append(_wait_for(subprocess.Popen(command, cwd=config.invocation_params.dir)))
        if codes[-1] == pytest.ExitCode.INTERRUPTED:
            break
    return next((code for code in codes if code), 0)


def _stands(path: Path, device: str | None) -> bool:
    """Whether the file is a whole run of this code and machine."""
    if not path.exists() or Store.journal(path).exists():
        return False
    try:
        suite, facts = json.loads(path.read_text())["kernel_suite"], machine.describe(where(device))
        theirs, here = ({**of, "git": None} for of in (suite["machine"], facts))
        ended = not (suite["failed"] or suite["out_of_memory"] or suite["interrupted"])
        return ended and theirs == here and suite["sources"] == sources()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. Ctrl-C reaches it, too: it may write its file. A kill is passed on."""
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue
