"""The strict check of a kernel from outside: trial after trial, in its process, judged in this one.

A trial is five calls in the same memory: the first numbers twice, other ones, the first with a row
changed, and the first again. Each answer is held to SPEC's accuracy; equal numbers have to give
equal bits; inputs have to be what they were; an answer has to stay what it was while inputs and
later answers change. The first trial that fails is reduced to the smallest that fails alike.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench import guests
from linear_vit.bench.guests import trials
from linear_vit.bench.guests.guest import Failed, Guest
from linear_vit.bench.guests.trials import Attempt, Trial
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD,
    Expected,
    NotOffered,
    Operation,
    Problem,
    WrongResult,
    worst,
)
from linear_vit.kernels.accuracy import Comparison

DRAWS = 12
# What a reduction may cost.
_MOST_TRIES, _MOST_SECONDS = 60, 20.0
_SILENT = "no answer within"
_HEAD_DIMS = (64, 32, 16, 128, 48, 96, 33)


class _Wrong(Exception):
    """What is wrong with a call: ``kind`` stays alike while the trial is reduced."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


@dataclass(frozen=True)
class Finding:
    """An attempt that failed, and how, after it was reduced."""

    attempt: Attempt
    text: str

    def __str__(self) -> str:
        attempt = self.attempt
        return f"{self.text} ({attempt.trial}, {attempt.mode}, {attempt.way})"


@dataclass
class Report:
    """What came of all attempts at an operation and dtype.

    Attributes:
        attempts: how many there were.
        gradient: whether the kernel offers one.
        verdicts: of every answer, by tensor, with the attempt.
        finding: the one that failed, reduced; None where none did.
    """

    attempts: int = 0
    gradient: bool = True
    verdicts: list[tuple[Attempt, str, Comparison]] = field(default_factory=list)
    finding: Finding | None = None


def check(
    operation: Operation,
    backend: str,
    dtype: str,
    device: torch.device,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    guest: Guest | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Try a guest's kernel on everything that has a name, and on drawn trials.

    Args:
        draws: how many are drawn; ``seed`` gives other ones.
        guest: the kernel's process; None for one that ends with the check.

    Raises:
        ValueError: no head dim is usable, for the reason in the message.
    """
    head_dims = _usable(operation, backend, dtype, device)
    refused = kernels.backends(operation.name, device, key_mask=True)[backend]

    def asked(attempts: Iterable[Attempt]) -> Iterator[Attempt]:
        """Without those that have a mask of keys, where the kernel takes none."""
        return (a for a in attempts if not refused or not dict(a.trial.settings).get("key_mask"))

    attempts = [
        *asked(trials.named(operation, dtype, head_dims)),
        *islice(asked(trials.drawn(operation, dtype, head_dims, seed)), draws),
    ]
    report = Report()
    own = guest or Guest(guests.files_of(operation.name, backend))
    examiner = Examiner(own, backend, device)
    try:
        for number, attempt in enumerate(attempts, 1):
            progress(f"{operation.name} {dtype} {backend} [{number}/{len(attempts)}]")
            report.attempts += 1
            try:
                found = _or_forward(examiner, attempt, report)
            except _Wrong as wrong:
                report.finding = _reduced(examiner, _fitting(attempt, report), wrong)
                break
            report.verdicts += [(_fitting(attempt, report), *one) for one in found]
    finally:
        if guest is None:
            own.stop()
    return report


def _or_forward(
    examiner: "Examiner", attempt: Attempt, report: Report
) -> list[tuple[str, Comparison]]:
    """Its verdicts; of the forward pass where the kernel has no other, which the report notes."""
    if report.gradient:
        try:
            return examiner.verdicts(attempt)
        except NotOffered:
            report.gradient = False
    return examiner.verdicts(_fitting(attempt, report))


def _fitting(attempt: Attempt, report: Report) -> Attempt:
    return attempt if report.gradient else replace(attempt, mode=FORWARD)


def _usable(
    operation: Operation, backend: str, dtype: str, device: torch.device
) -> tuple[int, ...]:
    """The head dims that the kernel is said to take; (0,) where the operation has none."""
    of, name = DTYPES[dtype], operation.name
    has_dims = kernels.operations()[name].has_head_dim
    dims: Sequence[int | None] = _HEAD_DIMS if has_dims else (None,)
    reasons = {
        dim or 0: kernels.backends(name, device, dtype=of, head_dim=dim)[backend] for dim in dims
    }
    usable = tuple(dim for dim, reason in reasons.items() if reason is None)
    if not usable:
        raise ValueError(next(iter(reasons.values())))
    return usable


# ---- one attempt ---------------------------------------------------------------------------------


class Examiner:
    """Makes attempts at one kernel."""

    def __init__(self, guest: Guest, backend: str, device: torch.device) -> None:
        self._guest, self._backend, self._device = guest, backend, device

    def verdicts(self, attempt: Attempt) -> list[tuple[str, Comparison]]:
        """Of every answer, by the tensor's name.

        Raises:
            _Wrong: one is wrong, or something else is.
            NotOffered: the kernel has no gradient.
        """
        try:
            return self._verdicts(attempt)
        except WrongResult as error:
            raise _Wrong(str(error), str(error)) from error
        except Failed as error:
            kind = str(error).partition(":")[0]
            raise _Wrong(f"fails with {kind}", str(error)) from error

    def _verdicts(self, attempt: Attempt) -> list[tuple[str, Comparison]]:
        self._untouched()
        trial, guest = attempt.trial, self._guest
        first, other = (trial.problem(self._device, draw) for draw in (0, 1))
        # With NaN in it, one row more or less is no other problem.
        changed = trials.touched(first, trial.seed) if not trial.poisoned else other
        right = {id(p): trial.expected(p) for p in (first, other, changed)}
        calls = _Calls(guest, attempt, right)
        guest.open(
            first, self._backend, attempt.mode, way=attempt.way, settings=dict(trial.settings)
        )
        calls.make(first, "", poisoned=True)
        calls.make(first, " of the same numbers")
        guest.write(other)
        calls.still(0, "memory of its inputs")
        calls.make(other, " of other numbers", poisoned=True)
        calls.still(1, "memory of an earlier answer")
        guest.write(changed)
        calls.make(changed, " of the first numbers with a row changed")
        guest.write(first)
        calls.make(first, " of the first numbers again")
        self._untouched()
        return calls.verdicts

    def _untouched(self) -> None:
        patched = self._guest.ask("patched")["patched"]
        if patched:
            raise _Wrong("patches", f"it patches {', '.join(patched[:5])}")
        if library := own_library(self._guest.pid):
            raise _Wrong("falls back", f"it has this suite's own {library} loaded")


class _Calls:
    """The calls of one attempt, one after another."""

    def __init__(self, guest: Guest, attempt: Attempt, right: dict[int, Expected]) -> None:
        self._guest, self._attempt, self._right = guest, attempt, right
        self._answers: list[tuple[Tensor, ...]] = []
        self._of: list[int] = []
        self.verdicts: list[tuple[str, Comparison]] = []

    def make(self, problem: Problem, which: str, *, poisoned: bool = False) -> None:
        """One call, of the numbers that are there, held to all that can be said of it."""
        answer, number = self._guest.run(1, poisoned=poisoned).answer, len(self._answers) + 1
        assert answer is not None
        if changed := self._guest.changed():
            what = ", ".join(changed)
            raise _Wrong("changes its input", f"it writes over its input: {what}")
        mode = self._attempt.mode
        found = self._attempt.trial.judge(problem, mode, answer, self._right[id(problem)])
        name, verdict = worst(found) if found else ("", None)
        if verdict is not None and not verdict.passed:
            hint = self._hint(problem, answer)
            where = f" in call {number}{which}" if number > 1 else ""
            raise _Wrong(f"wrong{where}", f"wrong {name}{where}: {verdict}{hint}")
        self.verdicts += found.items()
        for earlier, of in zip(self._answers, self._of, strict=True):
            if of == id(problem) and not _same(earlier, answer):
                raise _Wrong("no same bits", f"other bits in call {number}{which}")
        self._answers.append(answer)
        self._of.append(id(problem))

    def still(self, back: int, what: str) -> None:
        """An answer is what it was: the last one, or the one before that."""
        if not _same(self._guest.answer(back), self._answers[-1 - back]):
            raise _Wrong(what, f"it returns {what}: the answer changes after it was given")

    def _hint(self, problem: Problem, answer: Sequence[Tensor]) -> str:
        """What the wrong answer is, where that can be told."""
        for earlier, of in zip(self._answers, self._of, strict=True):
            if of != id(problem) and _same(earlier, answer):
                return "; it is the answer to earlier numbers"
        if all(not x.any() for x in answer):
            return "; all of it is zero"
        if any(x.isnan().any() for x in answer) and not self._attempt.trial.poisoned:
            return "; there is NaN in it, as in memory that nobody wrote"
        return ""


def own_library(pid: int | None) -> str | None:
    """The extension of ours that a process has loaded, as the system tells it; None for none."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {Path(line.split()[-1]).name for line in lines if line.endswith(".so")}
    return next((name for name in loaded if name.startswith("linear_vit_")), None)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit, NaN too."""
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


# ---- a failure, reduced --------------------------------------------------------------------------


def _reduced(examiner: Examiner, attempt: Attempt, wrong: _Wrong) -> Finding:
    """The smallest attempt that fails alike, of those that are tried."""
    if _SILENT in wrong.text:  # each try would take as long
        return Finding(attempt, wrong.text)
    end, left, found = time.monotonic() + _MOST_SECONDS, _MOST_TRIES, wrong
    candidates = trials.simpler(attempt.trial)
    while left > 0 and time.monotonic() < end:
        trial = next(candidates, None)
        if trial is None:
            break
        left -= 1
        smaller = replace(attempt, trial=trial)
        again = _fails(examiner, smaller)
        if again is not None and again.kind == wrong.kind:
            attempt, found, candidates = smaller, again, trials.simpler(trial)
    return Finding(attempt, found.text)


def _fails(examiner: Examiner, attempt: Attempt) -> _Wrong | None:
    try:
        examiner.verdicts(attempt)
    except _Wrong as wrong:
        return wrong
    except NotOffered:
        return None
    return None


def snippet(finding: Finding, backend: str, file: str) -> str:
    """Lines that show the failing attempt in a Python of one's own, without a process of its own.

    Args:
        file: the kernel's file, or its module.
    """
    attempt, path = finding.attempt, Path(file)
    is_file = path.suffix == ".py"
    lines = ["import sys"] if is_file else []
    lines += [f"sys.path.insert(0, {str(path.parent)!r})"] if is_file else []
    lines += [f"import {path.stem if is_file else file}  # registers {backend}"]
    shape = type(attempt.trial.shape)
    lines += [
        f"from {shape.__module__} import {shape.__name__}",
        f"from {Trial.__module__} import Trial",
        "",
        f"trial = {attempt.trial!r}",
        "inputs = trial.problem().inputs",
        f"for name, verdict in trial.verdicts({backend!r}, {attempt.mode!r}).items():",
        "    print(name, verdict, verdict.passed)",
    ]
    return "\n".join(lines)


def summary(report: Report) -> dict[str, Any]:
    """What goes into a check's file: the worst of each tensor, and what failed."""
    worst_of: dict[str, tuple[Attempt, Comparison]] = {}
    for attempt, name, verdict in report.verdicts:
        before = worst_of.get(name)
        if before is None or _strain(verdict) > _strain(before[1]):
            worst_of[name] = (attempt, verdict)
    return {
        "attempts": report.attempts,
        "gradient": "offered" if report.gradient else "not offered",
        "tensors": [
            {"tensor": name, "shape": str(a.trial), "way": a.way, **vars(verdict)}
            for name, (a, verdict) in worst_of.items()
        ],
    }


def _strain(verdict: Comparison) -> float:
    share = verdict.rms_error / verdict.rms_tolerance if verdict.rms_tolerance else 0.0
    return -1.0 if math.isnan(share) else share
