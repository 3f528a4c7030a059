"""One run: what it has finished, on disk after every case, and the document it becomes.

Beside the run's file lies a journal, one JSON object a line: a head that says where the run was
made and of what, then a line when a case starts, and one when it has finished (with its rounds),
failed, or was interrupted. A killed run goes on from there: finished cases of the same sources are
kept, failed ones are tried again, a case that the process died in twice is not.

The document is pytest-benchmark's, so that its own comparison reads it; ``kernel_suite`` and each
case's ``extra_info`` are what reports read (schema 2: ``reports/measurements/README.md``).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from linear_vit import kernels
from linear_vit.bench.problems import operations

SCHEMA = 2
MEASURED, FAILED, OUT_OF_MEMORY, LEFT_OUT = "measured", "failed", "out of memory", "left out"
_JOURNAL_SCHEMA = 2
_MOST_DEATHS = 2
_ROOT = Path(__file__).resolve().parents[1]
# What a time depends on. The reports and how a run is shown don't count.
_MEASURED_SOURCES = (
    "kernels",
    "attention",
    "training",
    "bench/problems",
    "bench/peers",
    "bench/instruments",
    "bench/group.py",
    "bench/runner.py",
)
_PARAMETERS = ("operation", "pass", "dtype", "N", "backend")
_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")


class StoreError(ValueError):
    """A run that can't be gone on from or written; the message says why and what to do."""


@dataclass(frozen=True)
class Result:
    """What became of a case: ``status`` and, where it is not ``MEASURED``, the ``reason``.

    ``test`` and ``group`` are pytest-benchmark's names of it; ``seconds`` its rounds; ``info`` what
    goes into ``extra_info``.
    """

    case: str
    status: str
    reason: str | None = None
    test: str = "test_kernel"
    group: str = ""
    seconds: tuple[float, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


class Store:
    """The results of a run that may be told to go on from an earlier one's.

    Attributes:
        results: by case, of this run and of what it goes on from.
        resumed: how many of them are of earlier processes.
        set_aside: where an unfinished run was moved that this one does not go on from.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any], *, resume: bool = False) -> None:
        """``path``: of the run's file; None keeps the results in memory.

        ``head`` is the document's ``kernel_suite``: what differs in ``machine`` (but for the
        revision) or ``sweep`` makes it another run; cases of other ``sources`` are measured again.

        Raises:
            StoreError: with ``resume``, where the journal is of another run, or damaged.
        """
        self.path, self.head = path, dict(head)
        self.results: dict[str, Result] = {}
        self.deaths: dict[str, int] = {}
        self.interrupted = False
        self.set_aside: Path | None = None
        self._file = None
        if path is None:
            self.resumed = 0
            return
        journal = self.journal(path)
        if journal.exists():
            if resume:
                self._read(journal)
            else:
                self.set_aside = journal.with_name(journal.name + ".old")
                journal.replace(self.set_aside)
        self.resumed = len(self.results)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = journal.open("a", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write {journal}: {error.strerror}") from error
        self._write({"kind": "journal", "schema": _JOURNAL_SCHEMA, "head": self._identity()})

    @staticmethod
    def journal(path: Path) -> Path:
        """Where the journal of a run's file is."""
        return path.with_name(path.name + ".journal")

    def start(self, case: str) -> None:
        """The case is about to be run for the first time: should it kill the process."""
        self._write({"started": case})

    def take_turns(self) -> None:
        """Several cases run by turns from now on: should the process die, none is at fault."""
        self._write({"turns": True})

    def keep(self, result: Result) -> None:
        """A case has ended: it is on disk when this returns.

        What could not be tried takes nothing away from what was measured before.
        """
        before = self.results.get(result.case)
        if result.status in (LEFT_OUT, OUT_OF_MEMORY) and before and before.status == MEASURED:
            return
        self.results[result.case] = result
        if result.status == MEASURED:
            self._write({"finished": result.case, "result": finite(asdict(result))})
        else:
            self._write({"failed": result.case, "reason": result.reason})

    def interrupt(self) -> None:
        """The user stopped the run: whatever had started did not kill it."""
        self.interrupted = True
        self._write({"interrupted": True})

    def finished(self, case: str) -> Result | None:
        """A result that stands; None where the case has to be run."""
        found = self.results.get(case)
        if found is None or found.status != MEASURED or found.info.get("disturbed"):
            return None
        return found

    def killer(self, case: str) -> str | None:
        """Why the case is not tried again; None where it is."""
        times = self.deaths.get(case, 0)
        return f"the process died in it {times} times" if times >= _MOST_DEATHS else None

    @property
    def measured(self) -> list[Result]:
        """Those that have a time."""
        return [result for result in self.results.values() if result.status == MEASURED]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure: no case was left out for lack of time."""
        return not any(r.status == LEFT_OUT for r in self.results.values())

    def close(self, *, done: bool) -> None:
        """``done``: everything is in the run's file, and the journal is of no more use."""
        if self._file is not None and self.path is not None:
            self._file.close()
            self._file = None
            if done:
                self.journal(self.path).unlink(missing_ok=True)

    # The document.

    def suite(self) -> dict[str, Any]:
        """``kernel_suite``: the run without its cases' times."""

        def why(status: str) -> dict[str, str]:
            return {n: str(r.reason) for n, r in self.results.items() if r.status == status}

        return {
            "kind": "benchmarks",
            "schema": SCHEMA,
            **self.head,
            **titles(r.info for r in self.measured),
            "not_timed": {**self.head.get("not_timed", {}), **why(LEFT_OUT)},
            "failed": why(FAILED),
            "out_of_memory": why(OUT_OF_MEMORY),
            "interrupted": self.interrupted,
            "resumed": self.resumed,
        }

    def benchmarks(self) -> list[dict[str, Any]]:
        """The measured cases as pytest-benchmark describes them."""
        from pytest_benchmark.stats import Stats

        made = []
        for result in self.measured:
            stats = Stats()
            for seconds in result.seconds:
                stats.update(seconds)
            name = f"{result.test}[{result.case}]"
            made.append(
                {
                    "group": result.group,
                    "name": name,
                    "fullname": f"bench/bench_{result.test.removeprefix('test_')}s.py::{name}",
                    "params": {name: result.info.get(name) for name in _PARAMETERS},
                    "param": result.case,
                    "extra_info": result.info,
                    "options": {"timer": "linear_vit.bench", "disable_gc": True},
                    "stats": {**stats.as_dict(), "data": list(result.seconds), "iterations": 1},
                }
            )
        return made

    def document(self) -> dict[str, Any]:
        """The whole run, as ``pytest --benchmark-json`` writes it."""
        from pytest_benchmark import __version__
        from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
        from pytest_benchmark.utils import get_commit_info

        return finite(
            {
                "machine_info": pytest_benchmark_generate_machine_info(),
                "commit_info": get_commit_info(),
                "benchmarks": self.benchmarks(),
                "datetime": datetime.now(UTC).isoformat(),
                "version": __version__,
                "kernel_suite": self.suite(),
            }
        )

    def write(self) -> None:
        """Put the document into the run's file, in one step."""
        if self.path is None:
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n")
            partial.replace(self.path)
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}") from error

    # The journal.

    def _write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _identity(self) -> dict[str, Any]:
        machine = {k: v for k, v in self.head.get("machine", {}).items() if k != "git"}
        return json.loads(json.dumps({"machine": machine, "sweep": self.head.get("sweep")}))

    def _read(self, journal: Path) -> None:
        lines = journal.read_bytes().splitlines(keepends=True)
        running: str | None = None
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                if number == len(lines):  # cut off by the kill: nothing may follow on that line
                    os.truncate(journal, sum(map(len, lines[:-1])))
                    break
                raise StoreError(
                    f"{journal}: damaged in line {number}; remove it to start anew"
                ) from error
            if "head" in entry:
                self._check(journal, entry)
                self._count_death(running)
            running = entry.get("started")
            if "finished" in entry:
                saved = entry["result"]
                result = Result(**{**saved, "seconds": tuple(saved["seconds"])})
                if result.info.get("sources") == self.head.get("sources"):
                    self.results[result.case] = result
            self.results.pop(str(entry.get("failed")), None)
        self._count_death(running)

    def _count_death(self, running: str | None) -> None:
        if running is not None:
            self.deaths[running] = self.deaths.get(running, 0) + 1

    def _check(self, journal: Path, entry: dict[str, Any]) -> None:
        if entry.get("schema") != _JOURNAL_SCHEMA:
            raise StoreError(f"{journal}: of another version; remove it to start anew")
        theirs, head = entry["head"], self._identity()
        apart = [k for k in {*head, *theirs} if head.get(k) != theirs.get(k)]
        if apart:
            what = "; ".join(f"{k}: {theirs.get(k)} then, {head.get(k)} now" for k in sorted(apart))
            raise StoreError(
                f"{journal}: its run was another one ({what}); leave out --resume-bench to start "
                "anew, which sets it aside"
            )


def sources() -> str:
    """A name for the code that times depend on."""
    digest = hashlib.sha256()
    for name in _MEASURED_SOURCES:
        path = _ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in _SUFFIXES:
                digest.update(str(file.relative_to(_ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def titles(timed: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Titles and colours of the operations and backends of these cases, for reports."""
    timed = list(timed)
    known = operations()
    names = dict.fromkeys(info["operation"] for info in timed)
    ops = {name: {"title": known[name].title if name in known else name} for name in names}
    rows = kernels.backend_rows()
    backends = {}
    for name in dict.fromkeys(info["backend"] for info in timed):
        row = rows.get(name)
        shown = {"title": row.title, "colour": row.colour, "own": row.own} if row else None
        backends[name] = shown or {"title": name, "colour": None, "own": False}
    return {"operations": ops, "backends": backends}


def finite(value: Any) -> Any:
    """NaN and infinity are no JSON: None says that there is no finite number."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
