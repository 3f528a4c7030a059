"""Runs cases one after another in a process that may crash, and keeps every result on disk.

A case that raises, runs out of memory, hangs or takes the process down with it costs its own result
and no other: the process is started again for the rest. Each result is on disk before the next case
begins, so that whatever ends the run leaves valid files, and a later run goes on from them.
"""

import hashlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SCHEMA = 1
MEASURED, FAILED, OUT_OF_MEMORY, LEFT_OUT = "measured", "failed", "out of memory", "left out"
# Outcomes that a later run takes as they are.
_FINAL = (MEASURED, OUT_OF_MEMORY)
# A process hangs that takes longer than this many times what its case was expected to, and more.
_PATIENCE, _GRACE_S = 4.0, 30.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing to measure: a section's function is called with ``parameters``.

    ``seconds`` is about what it takes, compilation included; ``builds`` are what must have been
    built before (``"cuda"``), or None.
    """

    section: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    builds: str | None = None

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"


class NotHere(Exception):
    """Raised by a case that this device or PyTorch can't do; the message says why."""


# ---- what is kept --------------------------------------------------------------------------------


class Store:
    """A folder with a JSON file a section: ``kind``, ``schema``, ``machine``, and its results.

    Args:
        folder: where the files are.
        facts: written into each file (device, versions, whether it is a dry run).
        sources: names the code measured; a result of other code is not taken as finished.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], sources: str) -> None:
        self.folder = folder
        self._facts = dict(facts)
        self._sources = sources
        self._results: dict[str, dict[str, Result]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def key(self, case: Case) -> str:
        """Names a case and the code that it measures."""
        text = json.dumps([case.section, case.name, dict(case.parameters), self._sources])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def finished(self, case: Case) -> Result | None:
        """The case's result if a run, this or an earlier one, got one that stands."""
        result = self.section(case.section).get(case.name)
        if result is None or result.get("key") != self.key(case):
            return None
        return result if result["status"] in _FINAL else None

    def save(self, case: Case, result: Result) -> None:
        section = self.section(case.section)
        section[case.name] = {"case": case.name, "key": self.key(case), **_finite(result)}
        document = {
            "kind": "gpu",
            "schema": SCHEMA,
            "section": case.section,
            **self._facts,
            "results": list(section.values()),
        }
        path = self._path(case.section)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)

    def section(self, name: str) -> dict[str, Result]:
        """Results by case: of the file, until the first of this run is saved over it."""
        if name not in self._results:
            self._results[name] = _read(self._path(name))
        return self._results[name]

    def results(self, cases: Iterable[Case]) -> list[Result]:
        """What there is for the cases, in their order, each with its section."""
        found = ((c.section, self.section(c.section).get(c.name)) for c in cases)
        return [{"section": section, **r} for section, r in found if r is not None]

    def _path(self, section: str) -> Path:
        return self.folder / f"{section}.json"


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: None says that there is no finite number."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> dict[str, Result]:
    """Results by case; none where there is no file, or one of another schema or damaged."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA or document["kind"] != "gpu":
            return {}
        return {result["case"]: result for result in document["results"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# ---- running -------------------------------------------------------------------------------------


def run(
    cases: Iterable[Case],
    store: Store,
    measure: Callable[[Case], Result],
    *,
    deadline: float,
    builds: Mapping[str, Callable[[], bool]] | None = None,
    progress: Callable[[Case, Result], None] = lambda case, result: None,
) -> None:
    """Measure what is not finished, in order, until the deadline; every outcome is saved.

    Args:
        cases: most important first.
        store: where results are kept.
        measure: module-level function; runs in a process of its own and returns a result that JSON
            can hold. May raise :class:`NotHere`.
        deadline: in ``time.monotonic()``; a case that can't be expected to end before is left out.
        builds: by name, whether a build that cases wait for is done. Others go first meanwhile.
        progress: called after each case that was run or left out.
    """
    builds = builds or {}
    pending = [case for case in cases if store.finished(case) is None]
    worker = _Worker(measure)
    try:
        while pending:
            case = _next(pending, builds, deadline)
            pending.remove(case)
            left = deadline - time.monotonic()
            if left < case.seconds:
                reason = (
                    f"no time left: {max(left, 0):.0f} s, and it takes about {case.seconds:.0f}"
                )
                result: Result = {"status": LEFT_OUT, "reason": reason}
                earlier = store.section(case.section).get(case.name)
                if earlier is None:
                    store.save(case, result)
            else:
                started = time.monotonic()
                result = worker.measure(case, min(left, _GRACE_S + _PATIENCE * case.seconds))
                result["took_s"] = round(time.monotonic() - started, 3)
                store.save(case, result)
            progress(case, result)
    finally:
        worker.stop()


def _next(pending: list[Case], builds: Mapping[str, Callable[[], bool]], deadline: float) -> Case:
    """The first case whose build is done; waits where all of them need one that is not."""
    while True:
        for case in pending:
            done = builds.get(case.builds) if case.builds else None
            if done is None or done() or time.monotonic() >= deadline:
                return case
        time.sleep(0.2)


class _Worker:
    """The process that measures, started when needed and again after it died."""

    def __init__(self, measure: Callable[[Case], Result]) -> None:
        self._measure = measure
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._new = False

    def measure(self, case: Case, patience_s: float) -> Result:
        process, connection = self._started()
        try:
            if self._new:
                connection.recv()  # it has imported all it needs: that is no case's time
                self._new = False
            connection.send(case)
            if not connection.poll(patience_s):
                self.stop()
                return {"status": FAILED, "reason": f"no result within {patience_s:.0f} s"}
            result, healthy = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            code = process.exitcode or 0
            self.stop()
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
            return {"status": FAILED, "reason": f"its process ended with {why}"}
        if not healthy:
            self.stop()
        return result

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _started(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        if self._process is None or self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._measure), daemon=True
            )
            self._process.start()
            self._new = True
            theirs.close()
        return self._process, self._connection


def _serve(connection: Connection, measure: Callable[[Case], Result]) -> None:
    """The process's loop: cases in, results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    connection.send("ready")
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(case, measure))


def _attempt(case: Case, measure: Callable[[Case], Result]) -> tuple[Result, bool]:
    """A result whatever happens, and whether the process is still good for another case."""
    try:
        return {"status": MEASURED, "reason": None, **measure(case)}, True
    except NotHere as error:
        return {"status": LEFT_OUT, "reason": str(error)}, True
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        reason = f"{type(error).__name__}: {lines[0][:400]}"
        from linear_vit.bench.instruments.memory import is_out_of_memory

        out_of_memory = is_out_of_memory(error)
        # After an error on the device every later call on it fails: a new process is needed.
        healthy = "CUDA error" not in str(error) and "Triton Error" not in str(error)
    if out_of_memory:
        _empty_cache()
    return {"status": OUT_OF_MEMORY if out_of_memory else FAILED, "reason": reason}, healthy


def _empty_cache() -> None:
    """Outside of the handler, whose traceback keeps the case's tensors alive."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
