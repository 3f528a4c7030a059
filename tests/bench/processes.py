"""pytest in a process of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*options: str) -> list[str]:
    """What else runs on this machine disturbs nothing (see ``calm``)."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.bench.calm",
        *options,
    ]


def environment(folder: Path | None = None) -> dict[str, str]:
    """``folder``: of modules for ``-p``.

    Benchmarks refuse to run in a worker of pytest-xdist, which these tests may well be in.
    """
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return mine | ({"PYTHONPATH": str(folder)} if folder else {})


def run(*options: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
