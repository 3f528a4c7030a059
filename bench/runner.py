"""Runs cases: checks each, times those of one problem by turns, and keeps every result.

The one way to time anything here. ``pytest --benchmark-only`` and ``train_minimal.py bench`` call
:func:`run`; :func:`measure` times any callables of a user's Python. Knows no pytest.
"""

import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from linear_vit import kernels
from linear_vit.bench import estimate
from linear_vit.bench.estimate import Plan
from linear_vit.bench.group import measure_group
from linear_vit.bench.instruments import clock, profiles
from linear_vit.bench.instruments.clock import Timing
from linear_vit.bench.problems import Case, case_name
from linear_vit.bench.store import FAILED, LEFT_OUT, MEASURED, Result, Store
from linear_vit.bench.worker import PATIENCE, Worker

Group = tuple[Case, ...]


_LENGTHS = {"N", "M", "rows", "cols"}  # sizes that make a case longer


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str | None = None,
    budget_s: float = 1.0,
) -> dict[str, Timing]:
    """Time calls that are to be compared: they take turns, so that drift hits all of them alike.

    Args:
        calls: by name; each does the same work at every call, and is free of set-up.
        device: where they run (default: CUDA if there is one). CUDA takes device time.
        budget_s: seconds to spend on each, at most.

    Returns:
        By name a :class:`Timing`: ``seconds`` of every round, ``median``, ``interval`` (95 % of the
        median), ``over(other)``, the ratio turn by turn, and ``disturbed``: None, or by what, where
        the machine was never left to it for long enough.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = clock.measure_interleaved(calls, where, budget_s=budget_s)
    if marked := _disturbed(found):  # once more, as a case of a run
        again = clock.measure_interleaved(calls, where, budget_s=budget_s)
        found = again if _disturbed(again) <= marked else found
    return found


def _disturbed(found: Mapping[str, Timing]) -> int:
    return sum(timing.disturbed is not None for timing in found.values())


def run(
    groups: Iterable[Group],
    plan: Plan,
    store: Store,
    *,
    minutes: float | None = None,
    isolate: bool | None = None,
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Measure what the store lacks, in order; every outcome is kept.

    Args:
        groups: cases that take turns, most important first.
        plan: how.
        store: where results are kept, and what is finished already.
        minutes: to spend, at most. A group that can't be expected to end before is left out.
        isolate: measure in a process of its own, which is started again should a case take it down
            or break the device. None: on CUDA.
        progress: called after each case.

    Returns:
        The results of the cases, in their order.
    """
    groups = list(groups)
    cases = [case for group in groups for case in group]
    build_ahead(cases, plan.device)
    with Session(plan, store, minutes=minutes, isolate=isolate) as session:
        for group in groups:
            for result in session.measure(group):
                progress(result)
        for result in session.try_again():
            progress(result)
    return [store.results[case_name(case)] for case in cases]


def build_ahead(cases: Iterable[Case], device: torch.device) -> None:
    """Build the CUDA extensions that cases need, before any of them is timed: it takes minutes.

    In a process of its own; what does not build fails its own cases, with the reason.
    """
    rows = kernels.backend_rows()
    needed = {case.backend for case in cases if case.backend in rows and rows[case.backend].builds}
    if device.type == "cuda" and needed:
        root = Path(__file__).resolve().parents[1]
        subprocess.run([sys.executable, "-m", "linear_vit.kernels", "build"], cwd=root, check=False)


class Session:
    """Measures one group after another; used by :func:`run` and, a case at a time, by pytest."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        minutes: float | None = None,
        isolate: bool | None = None,
    ) -> None:
        """As for :func:`run`; the minutes begin now."""
        self._plan, self._store = plan, store
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        alone = plan.device.type == "cuda" if isolate is None else isolate
        self._worker = Worker(measure_group) if alone else None
        self._settled: set[str] = set()
        self._groups: list[list[Case]] = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.stop()

    def measure(self, group: Sequence[Case]) -> list[Result]:
        """The results of all of the group's cases, those that were there before among them."""
        store, pending = self._store, list[Case]()
        for case in group:
            name = case_name(case)
            if name in self._settled or store.finished(name) is not None:
                continue
            self._settled.add(name)
            if reason := store.killer(name):
                store.keep(Result(name, FAILED, reason))
            else:
                pending.append(case)
        if pending:
            self._groups.append(pending)
        for result in self._attempts(pending):
            store.keep(result)
        return [store.results[case_name(case)] for case in group]

    def try_again(self) -> list[Result]:
        """Measure once more, at the end of a run, what was disturbed, and what took longer than a
        longer case; the results that changed.

        All of a group, since its cases have turns in common. A case that is still disturbed stays
        as it was, and one that is still slower is so. One that fails this time has failed.
        """
        store, changed = self._store, list[Result]()
        doubtful = {r.case for r in store.results.values() if r.info.get("disturbed")}
        doubtful |= slower_than_longer(store.results.values())
        for group in self._groups:
            timed = [c for c in group if store.results[case_name(c)].status == MEASURED]
            if not doubtful & set(map(case_name, timed)):
                continue
            for result in self._attempts(timed):
                quiet = result.status == MEASURED and not result.info["disturbed"]
                if quiet or result.status == FAILED:
                    store.keep(result)
                    changed.append(result)
        return changed

    def _attempts(self, pending: list[Case]) -> Iterator[Result]:
        left = [pending] if pending else []
        while left:
            results, again = self._attempt(left.pop(0))
            left[:0] = again
            yield from results

    def _attempt(self, pending: list[Case]) -> tuple[list[Result], list[list[Case]]]:
        """Results of the pending cases, and the groups to try again where one killed a process."""
        plan, left_s = self._plan, self._deadline - time.monotonic()
        seconds = sum(estimate.seconds(case, plan) for case in pending)
        if seconds > left_s:
            reason = f"no time left: {max(left_s, 0):.0f} s, and it takes about {seconds:.0f}"
            return [Result(case_name(case), LEFT_OUT, reason) for case in pending], []
        if self._worker is None:
            results = measure_group(pending, plan, self._started)
            there = {result.case for result in results}
            return results, [[case] for case in pending if case_name(case) not in there]
        if plan.profiles is not None:
            seconds += profiles.NCU_LIMIT_S / PATIENCE
        return self._worker.attempt(pending, plan, self._started, seconds, case_name, left_s)

    def _started(self, name: str | None) -> None:
        if name is None:
            self._store.take_turns()
        else:
            self._store.start(name)


def slower_than_longer(results: Iterable[Result]) -> set[str]:
    """Cases that took longer than a longer one of their curve, by more than their intervals.

    A curve is what differs in the number of tokens alone.
    """
    curves: dict[str, list[Result]] = {}
    for result in results:
        info = result.info
        if result.status != MEASURED or info.get("disturbed") or info["total_tokens"]:
            continue
        if "shape" in info:
            sizes = {n: x for n, x in info["shape"].items() if n not in _LENGTHS}
            what = [info[name] for name in ("operation", "backend", "pass", "dtype", "captured")]
            curves.setdefault(str([*what, sizes]), []).append(result)
    return {
        one.case
        for curve in curves.values()
        for one, other in itertools.permutations(curve, 2)
        if one.info["N"] < other.info["N"]
        and one.info["median_interval_s"][0] > other.info["median_interval_s"][1]
    }
