"""``--repeats N``: the same run in N fresh processes, one after another.

A process has a luck of its own, in where its memory lies, that makes all of its times a few per
cent longer or shorter. Runs of several processes tell it from a change: ``reports compare`` pools
them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from linear_vit.bench.store import Store


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
        if config.getoption("resume_bench") and one.exists() and not Store.journal(one).exists():
            print(f"repeat {number} of {count}: {one} is there already", flush=True)
            continue
        print(f"repeat {number} of {count}: {one}", flush=True)
        # What is given last counts.
        given = [*config.invocation_params.args, "--repeats=1", f"--benchmark-json={one}"]
        command = [sys.executable, "-m", "pytest", *map(str, given)]
        codes.append(subprocess.run(command, cwd=config.invocation_params.dir).returncode)
        if codes[-1] == pytest.ExitCode.INTERRUPTED:
            break
    return next((code for code in codes if code), 0)
