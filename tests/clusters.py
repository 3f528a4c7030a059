"""Commands that use Ray, in processes of their own; and whether any of Ray's outlived them."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, environment

_MARK = "LINEAR_VIT_TEST_CLUSTER"  # what Ray starts has its starter's variables


class Commands:
    """Starts commands, whose processes, and theirs, are told by a variable of their environment."""

    def __init__(self) -> None:
        self.mine = {_MARK: uuid.uuid4().hex, "OMP_NUM_THREADS": "1"}
        self.mine |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Python with these arguments."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(**self.mine),
            # What runs in a shell's background ignores Ctrl-C, and so does all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._started.append(process)
        return process

    @contextmanager
    def cluster(self) -> Iterator[Any]:
        """A head node of one core, on this machine; ``add_node`` and ``remove_node`` others."""
        from ray.cluster_utils import Cluster

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.mine.items():
                patch.setenv(name, value)
            there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
            try:
                yield there
            finally:
                there.shutdown()

    def left(self, name: str = "") -> list[int]:
        """Processes that are there, of those whose command line has the name."""
        found, mark = [], f"{_MARK}={self.mine[_MARK]}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                of_command = name.encode() in (path / "cmdline").read_bytes()
                if of_command and mark in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def wait_for_none(self, name: str = "") -> None:
        """Ray's processes end with their command; some take two minutes where that was killed."""
        until(lambda: not self.left(name), seconds=120 if name else 240)

    def end(self) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def until(true: Callable[[], Any], seconds: float = 240) -> Any:
    """What it returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.02)
    return found
