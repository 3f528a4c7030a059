"""A process that measures, and may crash: started when needed, and again after it died.

A group that raises, hangs or takes the process down with it costs the case at fault its result, and
no other.
"""

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from linear_vit import options
from linear_vit.bench.store import FAILED, Result

# A process hangs that says nothing for longer than this many times what its group was expected to
# take, and more; or that has not begun after so long.
PATIENCE, GRACE_S, BEGIN_S = 4.0, 60.0, 180.0
# After an error on the device every later call on it fails: a new process is needed.
_DEVICE_IS_LOST = ("CUDA error", "Triton Error")

# Told a case's name before it runs for the first time, and None before cases take turns.
Started = Callable[[str | None], None]
# (cases, plan, started) -> results, but for cases that have to be tried in another process
Measure = Callable[[Sequence[Any], Any, Started], list[Result]]


def is_lost(reason: str | None) -> bool:
    """Whether a case that failed for this reason has taken the device from its process."""
    return reason is not None and any(words in reason for words in _DEVICE_IS_LOST)


class Worker:
    """Runs groups in a process of its own."""

    def __init__(self, measure: Measure) -> None:
        """``measure``: a function at the top of a module, whose results can be pickled."""
        self._measure = measure
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._new = False

    def attempt(
        self,
        cases: Sequence[Any],
        plan: Any,
        started: Started,
        seconds: float,
        name_of: Callable[[Any], str],
        left_s: float = math.inf,
    ) -> tuple[list[Result], list[list[Any]]]:
        """Measure a group: results, and the groups to try again in a new process.

        Args:
            cases, plan: what ``measure`` is given.
            started: told what the process begins.
            seconds: about what the group takes.
            name_of: of a case.
            left_s: what it may take at the most.
        """
        patience = min(GRACE_S + PATIENCE * seconds, left_s)
        running: str | None = None
        try:
            connection = self._started()
            connection.send((list(cases), plan))
            while True:
                if not connection.poll(patience):
                    raise TimeoutError(f"no result within {patience:.0f} s")
                kind, content = connection.recv()
                if kind != "started":
                    break
                running = content
                started(content)
        except (EOFError, ConnectionError, TimeoutError) as error:
            never_began = self._new
            reason = self._ended(error)
            if len(cases) == 1 or never_began:
                return [Result(name_of(case), FAILED, reason) for case in cases], []
            if running is not None:
                others = [case for case in cases if name_of(case) != running]
                return [Result(running, FAILED, reason)], [others]
            # It may have been any of them, taking turns: each again, by itself.
            return [], [[case] for case in cases]
        lost = any(is_lost(result.reason) for result in content)
        if lost:
            self.stop()
        there = {result.case for result in content}
        again = [case for case in cases if name_of(case) not in there]
        return content, [again] if lost and again else [[case] for case in again]

    def stop(self) -> None:
        """End the process and what it has started, whatever they do."""
        process = self._process
        if process is not None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # a profiler that it runs, too
            process.kill()
            process.join()
        self._process = None

    def _started(self) -> Connection:
        if self._process is None or self._connection is None or not self._process.is_alive():
            context = multiprocessing.get_context("forkserver")
            # A fork of a process that has touched no device: no worker imports PyTorch anew.
            context.set_forkserver_preload(["torch"])
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._measure), daemon=True
            )
            self._new = True
            self._process.start()
            theirs.close()
            if not self._connection.poll(BEGIN_S):
                raise TimeoutError(f"not begun within {BEGIN_S:.0f} s")
            self._connection.recv()  # it has imported all it needs: that is no case's time
            self._new = False
        return self._connection

    def _ended(self, error: Exception) -> str:
        """Why there is no result, in words; the process is gone afterwards."""
        process = self._process
        if isinstance(error, TimeoutError) or process is None:
            self.stop()
            return str(error)
        process.join()
        code = process.exitcode or 0
        self.stop()
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"its process ended with {why}"


def _serve(connection: Connection, measure: Measure) -> None:
    """The process's loop: groups in, what has started and then the results out."""
    os.setsid()  # so that what it starts ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    options.load_plugins()
    multiprocessing.current_process().daemon = False  # a kernel from outside has one of its own
    importlib.import_module("linear_vit.bench.guests").announce_again()
    connection.send("ready")
    while True:
        try:
            cases, plan = connection.recv()
        except EOFError:
            return
        results = measure(cases, plan, lambda name: connection.send(("started", name)))
        connection.send(("results", results))
