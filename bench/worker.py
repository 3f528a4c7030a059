"""A process that measures, and may crash: started when needed, and again after it died.

A group that raises, hangs or takes the process down with it costs the case at fault its result, and
no other.
"""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from linear_vit import options
from linear_vit.bench.store import FAILED, Result

# A process hangs that takes longer than this many times what its group was expected to, and more.
PATIENCE, GRACE_S = 4.0, 60.0
# After an error on the device every later call on it fails: a new process is needed.
_DEVICE_IS_LOST = ("CUDA error", "Triton Error")

# (cases, plan, started) -> results
Measure = Callable[[Sequence[Any], Any, Callable[[str], None]], list[Result]]


class Worker:
    """Runs groups in a process of its own."""

    def __init__(self, measure: Measure) -> None:
        """``measure``: a function at the top of a module, whose results can be pickled."""
        self._measure = measure
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def attempt(
        self,
        cases: Sequence[Any],
        plan: Any,
        started: Callable[[str], None],
        seconds: float,
        name_of: Callable[[Any], str],
    ) -> tuple[list[Result], list[list[Any]]]:
        """Measure a group: results, and the groups to try again in a new process.

        Args:
            cases, plan: what ``measure`` is given.
            started: told a case's name before it runs for the first time.
            seconds: about what the group takes.
            name_of: of a case.
        """
        connection = self._started()
        running: str | None = None
        try:
            connection.send((list(cases), plan))
            while True:
                if not connection.poll(GRACE_S + PATIENCE * seconds):
                    raise TimeoutError
                kind, content = connection.recv()
                if kind == "started":
                    running = content
                    started(content)
                else:
                    break
        except (EOFError, ConnectionError, TimeoutError) as error:
            reason = self._ended(error, seconds)
            if len(cases) == 1:
                return [Result(name_of(cases[0]), FAILED, reason)], []
            if running is not None and running != name_of(cases[-1]):
                others = [case for case in cases if name_of(case) != running]
                return [Result(running, FAILED, reason)], [others]
            # It may have been any of them, taking turns: each again, by itself.
            return [], [[case] for case in cases]
        if any(r.reason and any(w in r.reason for w in _DEVICE_IS_LOST) for r in content):
            self.stop()
        return content, []

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _started(self) -> Connection:
        if self._process is None or self._connection is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._measure), daemon=True
            )
            self._process.start()
            theirs.close()
            self._connection.recv()  # it has imported all it needs: that is no case's time
        return self._connection

    def _ended(self, error: Exception, seconds: float) -> str:
        """Why there is no result, in words; the process is gone afterwards."""
        process = self._process
        if isinstance(error, TimeoutError) or process is None:
            self.stop()
            return f"no result within {GRACE_S + PATIENCE * seconds:.0f} s"
        process.join()
        code = process.exitcode or 0
        self.stop()
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return f"its process ended with {why}"


def _serve(connection: Connection, measure: Measure) -> None:
    """The process's loop: groups in, what has started and then the results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    options.load_plugins()
    connection.send("ready")
    while True:
        try:
            cases, plan = connection.recv()
        except EOFError:
            return
        results = measure(cases, plan, lambda name: connection.send(("started", name)))
        connection.send(("results", results))
