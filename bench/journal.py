"""What a benchmark run has finished, on disk after every case: a killed run goes on from there.

One JSON object a line, beside the file of --benchmark-json: a head that says where the run was made
and of what, then a line when a case starts, and one when it has finished (with its rounds), failed,
or was interrupted. Failed cases are tried again. A case that the process died in twice is not.
"""

import json
import os
from pathlib import Path
from typing import Any

_SCHEMA = 1
_MOST_DEATHS = 2


class JournalError(ValueError):
    """A journal that can't be gone on from; the message says why and what to do."""


class Journal:
    """The journal of a run that may be told to go on from an earlier one's.

    Attributes:
        finished: per case what :meth:`finish` was given, by this run or before it.
        deaths: per case how often the process died in it.
    """

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool) -> None:
        """Open ``path``. Without ``resume`` a journal that is there is set aside as ``….old``.

        Raises:
            JournalError: with ``resume``, where the journal is of another machine, revision or
                sweep, or damaged.
        """
        self.path = path
        self.finished: dict[str, dict[str, Any]] = {}
        self.deaths: dict[str, int] = {}
        self.set_aside: Path | None = None
        if path.exists():
            if resume:
                self._read(head)
            else:
                self.set_aside = path.with_name(path.name + ".old")
                path.replace(self.set_aside)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.resumed = len(self.finished)
        self._file = path.open("a", encoding="utf-8")
        self._write({"kind": "journal", "schema": _SCHEMA, "head": head})

    def start(self, case: str) -> None:
        self._write({"started": case})

    def finish(self, case: str, **what: Any) -> None:
        self.finished[case] = what
        self._write({"finished": case, **what})

    def fail(self, case: str, reason: str) -> None:
        self._write({"failed": case, "reason": reason})

    def interrupt(self) -> None:
        """The user stopped the run: whatever had started did not kill it."""
        self._write({"interrupted": True})

    def killer(self, case: str) -> str | None:
        """Why the case is not tried again; None where it is."""
        times = self.deaths.get(case, 0)
        return f"the process died in it {times} times" if times >= _MOST_DEATHS else None

    def close(self, *, done: bool) -> None:
        """``done``: everything is in the JSON file, and the journal is of no more use."""
        self._file.close()
        if done:
            self.path.unlink(missing_ok=True)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, head: dict[str, Any]) -> None:
        # As the file will have it: tuples become lists.
        head = json.loads(json.dumps(head))
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        running: str | None = None
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    break  # cut off by the kill
                raise JournalError(
                    f"{self.path}: damaged in line {number}; remove it to start anew"
                ) from error
            if "head" in entry:
                self._check(entry, head)
            if running is not None and "head" in entry:
                self.deaths[running] = self.deaths.get(running, 0) + 1
            running = entry.get("started")
            if "finished" in entry:
                self.finished[entry.pop("finished")] = entry
        if running is not None:
            self.deaths[running] = self.deaths.get(running, 0) + 1
        if text and not text.endswith("\n"):
            # What follows must not continue the line that was cut off.
            with self.path.open("rb+") as file:
                file.truncate(len(text.encode()[: text.encode().rfind(b"\n") + 1]))

    def _check(self, entry: dict[str, Any], head: dict[str, Any]) -> None:
        if entry.get("schema") != _SCHEMA:
            raise JournalError(f"{self.path}: of another version; remove it to start anew")
        theirs = entry["head"]
        apart = [k for k in {*head, *theirs} if head.get(k) != theirs.get(k)]
        if apart:
            what = "; ".join(f"{k}: {theirs.get(k)} then, {head.get(k)} now" for k in sorted(apart))
            raise JournalError(
                f"{self.path}: its run was another one ({what}); leave out --resume-bench to start "
                "anew, which sets it aside"
            )
