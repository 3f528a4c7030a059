"""The bounds that this project sets itself on a GPU, and whether a run's results keep them.

Bounds are on the faster of our kernels. Rates are the least traffic of an operation (whatever an
implementation moves) over the measured time, as a share of the measured copy rate.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from linear_vit.bench.gpu_measure import BACKWARD, OURS
from linear_vit.bench.gpu_runner import FAILED, MEASURED, Result
from linear_vit.bench.problems import FORWARD

_KERNELS = tuple(f"linear_attention/{backend}" for backend in OURS)


@dataclass(frozen=True)
class Verdict:
    """A bound, what was found, and whether it holds; None where nothing was measured."""

    bound: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "not measured"}[self.holds]
        return f"{word:12} {self.bound}: {self.found}"


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Every bound, in the order they matter."""
    found = list(results)
    rows = [r for r in found if r["section"] == "sweep" and r["status"] == MEASURED]
    bf16 = [r for r in rows if r["dtype"] == "bfloat16"]
    copy = _copy_rate(found)
    return [
        _correct(found),
        _share("forward ≥ 85 % of the copy rate, N ≥ 64k, B·H ≥ 16", bf16, copy, FORWARD, 0.85),
        _share("backward ≥ 75 % of the copy rate, N ≥ 64k, B·H ≥ 16", bf16, copy, BACKWARD, 0.75),
        _single_head(bf16, copy),
        *(_over_compiled(bf16, mode) for mode in (FORWARD, BACKWARD)),
        _crossover(bf16),
        _vit(bf16),
    ]


def _copy_rate(results: list[Result]) -> float | None:
    for r in results:
        if r["section"] == "ceilings" and r["status"] == MEASURED:
            return r["copy_bytes_per_s"]
    return None


def _correct(results: list[Result]) -> Verdict:
    checked = [r for r in results if r["section"] in ("check", "huge", "capture")]
    wrong = [r for r in checked if r["status"] == FAILED]
    done = sum(r["status"] == MEASURED for r in checked)
    found = f"{done} of {len(checked)} cases done, {len(wrong)} wrong"
    if wrong:
        found += f"; {wrong[0]['case']}: {wrong[0]['reason']}"
    off = sum(bool(r.get("off")) for r in checked)
    if off:
        found += f" ({off} of PyTorch's own are past our tolerances)"
    return Verdict("every result of ours right", found, not wrong if done else None)


def _fastest(row: Result, names: Iterable[str]) -> tuple[str, dict[str, Any]] | None:
    timed = [(name, row["times"][name]) for name in names if name in row["times"]]
    return min(timed, key=lambda item: item[1]["seconds"]) if timed else None


def _rivals(row: Result) -> list[str]:
    return [name for name in row["times"] if name.startswith("sdpa/")]


def _heads(row: Result) -> int:
    return row["shape"]["B"] * row["shape"]["H"]


def _share(bound: str, rows: list[Result], copy: float | None, mode: str, least: float) -> Verdict:
    """The lowest share over the shapes that the bound is about."""
    about = [r for r in rows if r["mode"] == mode and r["shape"]["N"] >= 65_536 and _heads(r) >= 16]
    shares = list(_shares(about, copy))
    if not shares:
        return Verdict(bound, "no such case", None)
    share, name, row = min(shares, key=lambda item: item[0])
    found = f"{share:.1%} at the lowest, {name} at N={row['shape']['N']:,}"
    return Verdict(bound, found, share >= least)


def _shares(rows: list[Result], copy: float | None) -> Iterator[tuple[float, str, Result]]:
    for row in rows:
        fastest = _fastest(row, _KERNELS)
        if fastest is not None and copy is not None:
            yield fastest[1]["bytes_per_s"] / copy, fastest[0], row


def _single_head(rows: list[Result], copy: float | None) -> Verdict:
    bound = "forward ≥ 80 % of the copy rate for one head of 1M tokens"
    about = [
        r for r in rows if r["mode"] == FORWARD and _heads(r) == 1 and r["shape"]["N"] >= 1_000_000
    ]
    for share, name, _ in _shares(about, copy):
        return Verdict(bound, f"{share:.1%}, {name}", share >= 0.8)
    return Verdict(bound, "no such case", None)


def _over_compiled(rows: list[Result], mode: str) -> Verdict:
    bound = f"{mode} over compiled ≥ 3× in the geometric mean over N, ≥ 2× at the worst"
    ratios = {}
    for row in rows:
        ours = _fastest(row, _KERNELS)
        theirs = row["times"].get("linear_attention/compiled")
        if row["mode"] == mode and row["what"] == "long" and ours and theirs:
            ratios[row["shape"]["N"]] = theirs["seconds"] / ours[1]["seconds"]
    if not ratios:
        return Verdict(bound, "no such case", None)
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    at, worst = min(ratios.items(), key=lambda item: item[1])
    found = f"{mean:.2f}× over {len(ratios)} lengths, {worst:.2f}× at N={at:,}"
    return Verdict(bound, found, mean >= 3 and worst >= 2)


def _crossover(rows: list[Result]) -> Verdict:
    """Forward: the least length measured from which on ours wins at every length measured."""
    bound = "forward faster than the best SDPA kernel from N ≤ 512 on, B·H ≥ 64"
    wins = {}
    for row in rows:
        ours, theirs = _fastest(row, _KERNELS), _fastest(row, _rivals(row))
        about = row["mode"] == FORWARD and row["what"] == "crossover" and _heads(row) >= 64
        if about and ours and theirs:
            wins[row["shape"]["N"]] = ours[1]["seconds"] < theirs[1]["seconds"]
    lengths = sorted(wins)
    if 512 not in wins:
        return Verdict(bound, "no such case", None)
    from_here = [n for n in lengths if all(wins[m] for m in lengths if m >= n)]
    if not from_here:
        return Verdict(bound, f"slower at N={lengths[-1]:,}", False)
    found = f"from N={from_here[0]:,} on, of {', '.join(f'{n:,}' for n in lengths)}"
    return Verdict(bound, found, from_here[0] <= 512)


def _vit(rows: list[Result]) -> Verdict:
    bound = "forward of batch 128 × 6 heads × 64 tokens at or under SDPA's time"
    for row in rows:
        shape = (row["shape"]["B"], row["shape"]["H"], row["shape"]["N"])
        ours, theirs = _fastest(row, _KERNELS), _fastest(row, _rivals(row))
        if row["mode"] == FORWARD and shape == (128, 6, 64) and ours and theirs:
            a, b = ours[1]["seconds"], theirs[1]["seconds"]
            found = f"{a * 1e6:.1f} µs ({ours[0]}) against {b * 1e6:.1f} µs ({theirs[0]})"
            return Verdict(bound, found, a <= b)
    return Verdict(bound, "no such case", None)
