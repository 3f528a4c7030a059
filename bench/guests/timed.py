"""A guest's kernel among the calls that take turns, and what keeps it honest while it is timed.

Some rounds, drawn at random, are of other numbers, and the last answer of some is judged. Now and
then one call on numbers that never were before is timed beside the next on the same: a kernel
that keeps answers is fast in the second alone. Between its turns the process is stopped, so that it
can't work on in a neighbour's. What it says of its time is held against a clock of ours.
"""

import random
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from linear_vit.bench import estimate, guests
from linear_vit.bench.guests.guest import Guest, Round
from linear_vit.bench.guests.strict import own_library
from linear_vit.bench.guests.trials import touched
from linear_vit.bench.instruments import clock, memory
from linear_vit.bench.problems import (
    Case,
    Expected,
    Problem,
    WrongResult,
    judge,
    make_problem,
    worst,
)

# Of the rounds, how many are of other numbers, how many (others) are judged; and how many have a
# probe before them.
CHECKED, PROBED = 0.25, 0.1
# What our clock may see beyond the process's own: a share, and what waking up may take.
_MOST_LAG, _WAKING_S = 0.1, 3e-4
_MORE_ROUNDS = 15  # before it is called wrong
# A first call on fresh numbers that takes so many times as long as the next, and so much more.
_KEPT_RATIO, _KEPT_S = 3.0, 1e-4
_LEAST_PROBES, _LEAST_JUDGED = 5, 5
_SHORT_S = 0.05  # a reference that takes no longer is worked out for every probe


@dataclass
class _Account:
    """What has been done beside the timing, and what two clocks said."""

    rounds: int = 0
    checked: int = 0
    checking_s: float = 0.0
    total_s: float = 0.0
    lags: list[float] = field(default_factory=list)
    overruns: list[float] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)


class TimedCall:
    """One case's call, in a process of its own: ``clock.Elsewhere``, and a callable.

    Attributes:
        fault: what went wrong in a round; None where nothing did.
    """

    def __init__(self, case: Case, problem: Problem, expected: Expected) -> None:
        """Start the process, and give it the problem.

        Raises:
            NotOffered, Failed: as the kernel's process does.
        """
        self._case, self._random = case, random.SystemRandom()
        self._device = next(iter(problem.inputs.values())).device
        self._guest = Guest(guests.files_of(case.operation, case.backend))
        self._account = _Account()
        self.fault: Exception | None = None
        self._draws = [_fitting(problem, expected)]
        self._now = self._draws[0]
        self._calls = 1  # of the last round
        self._expected_s = 0.0  # that the last reference took
        try:
            self._guest.open(self._draws[0][0], case.backend, case.mode)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._guest.stop()

    # Before it is timed.

    def prepare(self) -> dict[str, Any]:
        """Its first answers, judged; what a case says of them.

        Raises:
            WrongResult, Failed.
        """
        problem, expected = self._now
        first, second = (self._guest.run(poisoned=poisoned) for poisoned in (True, False))
        assert second.answer is not None
        verdicts = judge(problem, self._case.mode, second.answer, expected)
        name, verdict = worst(verdicts)
        if not verdict.passed:
            raise WrongResult(f"wrong result: {name}: {verdict}")
        if changed := self._guest.changed():
            raise WrongResult(f"it writes over its input: {', '.join(changed)}")
        facts = self._guest.ask("facts")
        self._draw_more()
        return {
            "compile_s": max(0.0, first.wall - second.wall),
            "verdicts": verdicts,
            "operators": tuple(facts["operators"]),
            "kernels": tuple(facts["kernels"]),
            "peak_memory_bytes": facts["peak"],
            "peak_memory_how": facts["how"],
        }

    def _draw_more(self) -> None:
        """Other numbers, and the first with a row changed, where there is memory for them."""
        need = 3 * estimate.memory_bytes(self._case)
        if estimate.does_not_fit(need, memory.available_bytes(self._device)):
            return
        first, seed = self._draws[0][0], secrets.randbits(31)
        of = (self._case.operation, first.shape, first.dtype, self._device)
        for other in (make_problem(*of, seed), touched(first, seed)):
            self._draws.append(_fitting(other, self._expected(other)))

    # While it is timed.

    def __call__(self) -> None:
        """One call."""
        self._guest.run(rounds=True, share=CHECKED)

    def rounds(self, calls: int) -> list[float]:
        """A round of so many calls, or a few more; seconds a call.

        Raises:
            WrongResult: an answer was judged, and is wrong.
        """
        try:
            return self._round(calls)
        except Exception as error:
            self.fault = error
            raise

    def _round(self, calls: int) -> list[float]:
        began, account = time.perf_counter(), self._account
        clock.settle()
        if self._random.random() < PROBED:
            self._checking(self._probe)
        if self._random.random() < CHECKED:
            self._checking(self._take_other)
        more = 0 if self._device.type == "cuda" else self._random.randrange(calls // 8 + 2)
        taken = self._run_and_ping(calls + more)
        self._checking(lambda: self._judge("a timed call", taken, *self._now))
        self._guest.rest()
        account.rounds += 1
        account.total_s += time.perf_counter() - began
        return taken.seconds

    def _checking(self, what: Callable[[], None]) -> None:
        began = time.perf_counter()
        what()
        self._account.checking_s += time.perf_counter() - began

    def _probe(self) -> None:
        """Two calls on numbers that never were before: both timed, and mostly judged.

        Where the reference takes long, one in four is judged.
        """
        numbers = touched(self._random.choice(self._draws)[0], secrets.randbits(31))
        expected = None
        if self._expected_s < _SHORT_S or self._random.random() < CHECKED:
            numbers, expected = _fitting(numbers, self._expected(numbers))
        self._guest.run(self._random.randint(1, 3), rounds=True, share=CHECKED)
        self._guest.write(numbers)
        first, second = (self._guest.run(rounds=True) for _ in range(2))
        if expected is not None:
            self._judge("a call on fresh numbers", first, numbers, expected)
            self._judge("the call after it", second, numbers, expected)
        self._account.fresh += first.seconds
        self._account.again += second.seconds
        self._guest.write(self._now[0])

    def _take_other(self) -> None:
        """Others of the numbers that were drawn before."""
        others = [draw for draw in self._draws if draw is not self._now] or self._draws
        self._now = self._random.choice(others)
        self._guest.write(self._now[0])

    def _judge(self, which: str, taken: Round, problem: Problem, expected: Expected) -> None:
        """The answer of a round, if it was looked at."""
        if taken.answer is None:
            return
        found = judge(problem, self._case.mode, taken.answer, expected)
        name, verdict = worst(found)
        self._account.checked += 1
        if not verdict.passed:
            raise WrongResult(f"wrong result in {which}: {name}: {verdict}")

    def _expected(self, problem: Problem) -> Expected:
        began = time.perf_counter()
        found = problem.expected()
        self._expected_s = time.perf_counter() - began
        return found

    # The clocks.

    def _run_and_ping(self, calls: int) -> Round:
        """A round, by both clocks, and what waking the process takes at about the same time."""
        self._guest.rest()
        before = self._guest.ran()
        taken = self._guest.run(calls, rounds=True, share=CHECKED)
        # On CUDA rounds have spins and cache flushes between them; and copying takes time, too.
        if self._device.type != "cuda" and taken.answer is None:
            self._guest.rest()
            worked = self._guest.ran() - before
            began = time.perf_counter()
            self._guest.ask("ping")
            waking = time.perf_counter() - began
            claimed = sum(taken.seconds) * calls
            self._account.claimed.append(claimed)
            self._account.lags.append(taken.wall - claimed - waking)
            self._account.overruns.append(worked - claimed)
            self._calls = calls
        return taken

    def verdict(self) -> dict[str, Any]:
        """What goes into the file once it was timed.

        Raises:
            WrongResult: it was tampered with, answers are kept, or its clock can't be right.
        """
        account = self._account
        while len(account.fresh) < _LEAST_PROBES:
            self._probe()
        while account.checked < _LEAST_JUDGED:
            self._take_other()
            taken = self._guest.run(self._random.randint(1, 3), rounds=True, share=CHECKED)
            self._judge("a timed call", taken, *self._now)
        if patched := self._guest.ask("patched")["patched"]:
            raise WrongResult(f"it patches {', '.join(patched[:5])}")
        if library := own_library(self._guest.pid):
            raise WrongResult(f"it falls back to this suite's own {library}")
        self._raise_for_clock()
        fresh, again = min(account.fresh), min(account.again)  # a busy machine makes some longer
        if fresh > _KEPT_RATIO * again + _KEPT_S:
            raise WrongResult(
                f"it keeps answers: a call on fresh numbers takes {1e6 * fresh:,.0f} µs, the next "
                f"one on the same {1e6 * again:,.0f} µs"
            )
        return {
            "draws": len(self._draws),
            "rounds": account.rounds,
            "calls_judged": account.checked,
            "share_of_time": account.checking_s / account.total_s if account.total_s else None,
        }

    def _raise_for_clock(self) -> None:
        """Where its clock lags behind ours. A busy machine may be why: so it has to do so again."""
        account = self._account
        if not account.lags or not _lags(account):
            return
        for told in (account.lags, account.overruns, account.claimed):
            told.clear()
        for _ in range(_MORE_ROUNDS):
            self._run_and_ping(self._calls)
        if account.lags and _lags(account):
            claimed, lag = statistics.median(account.claimed), _lag(account)
            raise WrongResult(
                f"its clock can't be right: a round took {1e3 * claimed:.2f} ms by its own, and "
                f"{1e3 * (claimed + lag):.2f} ms by ours"
            )


def _lags(account: _Account) -> bool:
    return _lag(account) > _MOST_LAG * statistics.median(account.claimed) + _WAKING_S


def _lag(account: _Account) -> float:
    """What a round took beyond what it is said to: by our clock, or of a core as Linux counts it.

    The first sees who sleeps or has others work, the second can't be hidden by a busy machine.
    """
    return max(statistics.median(account.lags), statistics.median(account.overruns))


def _fitting(problem: Problem, expected: Expected) -> tuple[Problem, Expected]:
    """With the output gradients that the expected results belong to."""
    return replace(problem, cotangents=expected.cotangents), expected
