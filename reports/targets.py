"""``python -m reports targets RUN``: the bounds this project sets itself, judged from a saved run.

A target is a row of ``CPU`` or ``GPU``: its name, the bound, why it is that, and what reads it off
the run. Ratios are turn by turn. What a run did not measure is "not measured", and neither kept
nor broken.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import Any

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved.runs import LENGTHS, NoRuns, Runs
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import fit_scaling
from linear_vit.reports.tables.table import Table, word
from linear_vit.screen import counted

Found = tuple[str, bool]  # what was measured, in words, and whether it keeps the bound
Case = dict[Any, Any]  # a row of Runs.kernels
Place = tuple[str, int, str]


@dataclass(frozen=True)
class Target:
    """A bound on what a run shows; ``judge`` says what it shows, None where it was not measured."""

    name: str
    bound: str
    reason: str
    judge: Callable[[Runs], Found | None]


@dataclass(frozen=True)
class Verdict:
    target: Target
    found: Found | None

    @property
    def holds(self) -> bool | None:
        return None if self.found is None else self.found[1]

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "not measured"}[self.holds]
        measured = f": {self.found[0]}" if self.found else ""
        return f"{word:12}  {self.target.name}, {self.target.bound}{measured}"


def verdicts(run: Runs, targets: Sequence[Target]) -> list[Verdict]:
    """Every target of a list, in its order.

    Raises:
        NoRuns: the run measured nothing that any of them reads.
    """
    found = [Verdict(target, target.judge(run)) for target in targets]
    if all(verdict.holds is None for verdict in found):
        raise NoRuns("none of the targets can be read off this run")
    return found


def of_device(run: Runs) -> tuple[Target, ...]:
    """The targets for the device that a run was on."""
    return GPU if run.heads[-1]["facts"].get("device") == "cuda" else CPU


def as_table(found: Sequence[Verdict]) -> Table:
    """A row per target: what was measured, and whether that keeps it."""
    marks = {True: ("yes", "passed"), False: ("no", "failed"), None: ("–", "")}
    lines = [
        {
            "": word(verdict.target.name, verdict.target.reason),
            "target": word(verdict.target.bound),
            "measured": word(verdict.found[0] if verdict.found else "not measured"),
            "met": word(marks[verdict.holds][0], mark=marks[verdict.holds][1]),
        }
        for verdict in found
    ]
    return Table("Targets", lines)


# ---- what is read off a run ----------------------------------------------------------------------


def _cases(run: Runs, *, call: int | None = None, **wanted: Any) -> list[Case]:
    """Cases with these values, ``pass_`` for pass; if it is said, of so many tokens a ``call``.

    Those that were disturbed decide nothing.
    """
    frame = run.kernels[run.kernels["disturbed"].isna()] if len(run.kernels) else run.kernels
    for name, value in wanted.items():
        frame = frame[frame[name.rstrip("_")] == value] if len(frame) else frame
    found = frame.sort_values("N", kind="stable").to_dict("records") if len(frame) else []
    return [case for case in found if call in (None, _batch(case) * case["N"])]


def shape(case: Case) -> dict[str, Any]:
    return case["info"].get("shape") or {}


def _batch(case: Case) -> int:
    return int(shape(case).get("B", 1))


def place(case: Case) -> Place:
    """What cases that may be set against each other have in common: the file and all of a shape."""
    return case["file"], int(case["N"]), str(sorted(shape(case).items()))


def _limits(run: Runs, case: Case) -> dict[str, Any]:
    """What the machine can do; nothing, where something kept it from its best."""
    limits = run.limits(case["file"])
    return {} if limits.get("disturbed") else limits


def over(own: Case, other: Case) -> float:
    """How much faster the first is, turn by turn."""
    return math.exp(turns.speedup(own, other)[0])


def _over(own: Iterable[Case], others: Iterable[Case]) -> list[tuple[Case, float]]:
    """Of our cases those that have their like among the others, and how much faster they are."""
    at = {place(case): case for case in others}
    return [(case, over(case, at[place(case)])) for case in own if place(case) in at]


def _mean_and_worst(ratios: Iterable[float], mean: float, worst: float) -> Found | None:
    ratios = list(ratios)
    if not ratios:
        return None
    found = geometric_mean(ratios)
    text = f"mean {found:.2f}×, worst {min(ratios):.2f}×"
    return text, found >= mean and min(ratios) >= worst


def _faster(
    name: str, mean: float, worst: float, reason: str, judge: Callable[..., Any], **of: Any
) -> Target:
    """Bounds on the mean and the worst of the ratios that ``judge(run, **of)`` gives."""
    bound = f"mean ≥ {mean:g}×, worst ≥ {worst:g}×"
    return Target(name, bound, reason, lambda run: _mean_and_worst(judge(run, **of), mean, worst))


_COMPILED = "what PyTorch's own compiler makes of the composed products"
_FEW_TOKENS = "linear attention is worth its while from few tokens on"


# ---- the C++ kernels, on a CPU -------------------------------------------------------------------

_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536)
_CALL = 65_536  # tokens of a call of linear attention
_GRIDS = 8192  # and of ripple
_SHORTEST = 1024  # of the lengths whose growth is fitted
_FORWARD: dict[str, Any] = {"pass_": "forward", "dtype": "float32"}


def _own(
    run: Runs,
    operation: str = "linear_attention",
    call: int = _CALL,
    *,
    matrix_unit: bool = False,
    **of: Any,
) -> list[Case]:
    """The C++ cases of batches, a case a shape: that which took turns with other backends.

    ``matrix_unit``: those alone that ran on one.
    """
    found = _cases(run, operation=operation, backend="cpu", call=call, **of)
    found = [c for c in found if is_on_matrix_unit(c) or not matrix_unit]
    return list(
        {place(c): c for c in sorted(found, key=lambda c: (c["N"], c["total_tokens"]))}.values()
    )


def _over_compiled(run: Runs, *, matrix_unit: bool = False, **of: Any) -> list[float]:
    others = _cases(run, operation="linear_attention", backend="compiled", call=_CALL, **of)
    own = _own(run, matrix_unit=matrix_unit, **of)
    return [ratio for case, ratio in _over(own, others) if case["N"] in _TOKENS]


def _ripple(run: Runs, **of: Any) -> list[float]:
    ratios = []
    for operation in ("ripple_pool", "ripple_expand"):
        others = _cases(run, operation=operation, backend=PYTORCH, call=_GRIDS, **of)
        ratios += [ratio for _, ratio in _over(_own(run, operation, _GRIDS, **of), others)]
    return ratios


def is_on_matrix_unit(case: Case) -> bool:
    return "for AMX" in str(case["implementation"])


def matmul_of(case: Case) -> str:
    """The dtype of the matmul that uses the same unit of the processor."""
    return str(case["dtype"]) if is_on_matrix_unit(case) else "float32"


def over_matmul(run: Runs, case: Case) -> float | None:
    """Dense FLOP a second over those of that matmul: turn by turn where they took turns."""
    peak = (_limits(run, case).get("matmul_flop_per_s") or {}).get(matmul_of(case))
    ratio: float | None = case["ratios"].get("matmul")
    if ratio is None and peak and not math.isnan(case["tflop_per_s"]):
        return float(1e12 * case["tflop_per_s"] / peak)
    return ratio


def _over_matmul(run: Runs) -> list[float]:
    own = [c for c in _own(run, **_FORWARD) if c["N"] in _TOKENS and c["N"] >= _SHORTEST]
    return [ratio for case in own if (ratio := over_matmul(run, case)) is not None]


def _over_sdpa(run: Runs, least: int, *, matrix_unit: bool = False, **of: Any) -> Found | None:
    sdpa = _cases(run, operation="softmax_attention", backend=PYTORCH, call=_CALL, **of)
    own = _own(run, matrix_unit=matrix_unit, **of)
    ratios = [(case["N"], ratio) for case, ratio in _over(own, sdpa)]
    text = ", ".join(f"{ratio:.1f}× at {n:,}" for n, ratio in ratios)
    return (text, all(ratio > 1 or n < least for n, ratio in ratios)) if ratios else None


def _share_of_limit(run: Runs, least: float, **of: Any) -> Found | None:
    """Of what the matrix product or the copy allows on the matrix unit, whichever binds."""
    shares = [
        (case["N"], float(case["share_of_limit"]))
        for case in _own(run, matrix_unit=True, **of)
        if case["N"] in _TOKENS and case["N"] >= _SHORTEST
    ]
    known = [(n, share) for n, share in shares if not math.isnan(share)]
    text = ", ".join(f"{share:.0%} at {n:,}" for n, share in known)
    return (text, all(share >= least for _, share in known)) if known else None


def one_sequence(run: Runs) -> list[Case]:
    """The C++ forward pass of one sequence, a case per length: the curve of the most lengths."""
    cases = _cases(run, operation="linear_attention", backend="cpu", **_FORWARD)
    curves: dict[str, dict[int, Case]] = {}
    # Of two of a length that which took turns with other lengths, not with other backends.
    for case in sorted(cases, key=lambda case: case["total_tokens"], reverse=True):
        if _batch(case) == 1 and case["N"] >= _SHORTEST:
            alike = [item for item in sorted(shape(case).items()) if item[0] not in LENGTHS]
            curves.setdefault(f"{case['file']} {alike}", {})[case["N"]] = case
    longest = max(curves.values(), key=len, default={})
    return [longest[tokens] for tokens in sorted(longest)]


def _exponent(run: Runs) -> Found | None:
    cases = one_sequence(run)
    if not cases:
        return None
    fit = fit_scaling([c["N"] for c in cases], [c["median_s"] for c in cases])
    return str(fit), fit.reason is None and abs(fit.exponent - 1) <= 0.05


def _compiled(mode: str, dtype: str, mean: float, worst: float, *, unit: bool = False) -> Target:
    of: dict[str, Any] = {"pass_": mode, "dtype": dtype, "matrix_unit": unit}
    name = f"{mode}, {dtype}{_ON_MATRIX_UNIT * unit}, over compiled"
    return _faster(name, mean, worst, _COMPILED, _over_compiled, **of)


def _sdpa(mode: str, dtype: str, least: int, *, unit: bool = False) -> Target:
    of: dict[str, Any] = {"pass_": mode, "dtype": dtype, "matrix_unit": unit}
    name = f"{mode}, {dtype}{_ON_MATRIX_UNIT * unit}, over SDPA"
    judge = partial(_over_sdpa, least=least, **of)
    return Target(name, f"faster from N = {least}", _FEW_TOKENS, judge)


_ON_MATRIX_UNIT = " on the matrix unit"
_SHARE = 0.5


CPU = (
    _compiled("forward", "float32", 5, 3),
    _faster(
        "forward, float32, N ≥ 1,024, over the float32 matmul's rate",
        1.5,
        1.2,
        "the kernels do half of the dense work that is counted, a matmul all of it",
        _over_matmul,
    ),
    _sdpa("forward", "float32", 128),
    _compiled("forward", "bfloat16", 6, 4),
    _compiled("forward+backward", "float32", 5, 3),
    _compiled("forward+backward", "bfloat16", 4, 2.5),
    _compiled("forward", "bfloat16", 12, 8, unit=True),
    _compiled("forward+backward", "bfloat16", 8, 4, unit=True),
    _sdpa("forward", "bfloat16", 64, unit=True),
    _sdpa("forward+backward", "bfloat16", 64, unit=True),
    Target(
        f"forward, bfloat16{_ON_MATRIX_UNIT}, N ≥ 1,024",
        f"≥ {_SHARE:.0%} of the limit",
        "the rate of the bfloat16 matmul or of a copy, whichever binds",
        partial(_share_of_limit, least=_SHARE, pass_="forward", dtype="bfloat16"),
    ),
    _faster(
        "ripple, forward+backward, over torch",
        3,
        1.5,
        "one pass over the grid where depthwise conv2d makes several",
        _ripple,
        pass_="forward+backward",
        dtype="float32",
    ),
    Target("exponent of time against N", "1.00 ± 0.05", "it is linear attention", _exponent),
)


# ---- the Triton and CUDA kernels, on a GPU -------------------------------------------------------


def _fastest(run: Runs, operation: str, mode: str, *, own: bool) -> dict[Place, Case]:
    """Of our backends, or of the others, by place; replays from a graph are of neither."""
    cases = [
        case
        for case in _cases(run, operation=operation, pass_=mode, dtype="bfloat16")
        if run.words.own(case["backend"]) is own and not case["info"].get("captured")
    ]
    return {place(c): c for c in sorted(cases, key=lambda c: -c["median_s"])}  # the last one counts


def _own_and_sdpa(run: Runs) -> list[tuple[Case, Case]]:
    """The forward pass: the fastest of ours, and of PyTorch's kernels for softmax attention."""
    others = _fastest(run, "softmax_attention", "forward", own=False)
    own = _fastest(run, "linear_attention", "forward", own=True)
    return [(case, others[at]) for at, case in own.items() if at in others]


def _heads(case: Case) -> int:
    """Heads of all sequences of a call."""
    return _batch(case) * int(shape(case).get("H", 1))


def _all_right(run: Runs) -> Found | None:
    """Every case is checked against the float64 reference before it is timed."""
    if run.kernels.empty:
        return None
    own = tuple(name for name in run.words.backends if run.words.own(name))
    failed = [item for head in run.heads for item in head["failed"].items()]
    wrong = [f"; {case}: {why}" for case, why in failed if case.endswith(own)]
    found = f"{counted(len(run.kernels), 'case')} done, {len(wrong)} wrong"
    return found + "".join(wrong[:1]), not wrong


def _of_copy(run: Runs, mode: str, least: float, wanted: Callable[[Case], bool]) -> Found | None:
    """Least bytes over the time, as a share of the copy rate, of the faster of ours."""
    shares = []
    for case in _fastest(run, "linear_attention", mode, own=True).values():
        copy = _limits(run, case).get("copy_bytes_per_s")
        if copy and case["least_bytes"] > 0 and wanted(case):
            text = f"{case['backend']} at N={case['N']:,}"
            shares.append((case["least_bytes"] / case["median_s"] / copy, text))
    if not shares:
        return None
    share, text = min(shares)
    return f"{share:.1%} at the lowest, {text}", share >= least


def _over_compiled_on_gpu(run: Runs, mode: str) -> list[float]:
    """Of one sequence of 16 heads."""
    of: dict[str, Any] = {"operation": "linear_attention", "pass_": mode, "dtype": "bfloat16"}
    compiled = _cases(run, backend="compiled", **of)
    single = [case for case in compiled if _batch(case) == 1 and _heads(case) == 16]
    own = _fastest(run, "linear_attention", mode, own=True)
    return [ratio for _, ratio in _over(own.values(), single)]


def _crossover(run: Runs) -> Found | None:
    """The least length measured from which on ours wins at every length and shape measured."""
    wins: dict[int, bool] = {}
    for own, other in _own_and_sdpa(run):
        if _heads(own) >= 64 and shape(own)["H"] == 16:
            won = own["median_s"] < other["median_s"]
            wins[own["N"]] = wins.get(own["N"], True) and won
    if 512 not in wins:
        return None
    lengths = sorted(wins)
    lost = [n for n in lengths if not wins[n]]
    if lost and lost[-1] == lengths[-1]:
        return f"slower at N={lengths[-1]:,}", False
    first = min(n for n in lengths if n > max(lost, default=0))
    return f"from N={first:,} on, of {', '.join(f'{n:,}' for n in lengths)}", first <= 512


def _vit(run: Runs) -> Found | None:
    for own, other in _own_and_sdpa(run):
        if (_batch(own), shape(own).get("H"), own["N"]) == (128, 6, 64):
            one, two = (f"{c['median_s'] * 1e6:.1f} µs ({c['backend']})" for c in (own, other))
            return f"{one} against {two}", own["median_s"] <= other["median_s"]
    return None


def _copy_rate(
    name: str, mode: str, least: float, reason: str, wanted: Callable[[Case], bool]
) -> Target:
    judge = partial(_of_copy, mode=mode, least=least, wanted=wanted)
    return Target(f"{mode}, {name}", f"≥ {least:.0%} of the copy rate", reason, judge)


_TRAFFIC = "it is bound by memory, and this is the least traffic over what a copy moves"
GPU = (
    Target("every result of ours", "right", "a wrong result has no speed", _all_right),
    *(
        _copy_rate(
            "N ≥ 64k, B·H ≥ 16",
            mode,
            least,
            _TRAFFIC,
            lambda case: case["N"] >= 65_536 and _heads(case) >= 16,
        )
        for mode, least in (("forward", 0.85), ("backward", 0.75))
    ),
    _copy_rate(
        "one head of 1M tokens",
        "forward",
        0.8,
        "the sum over tokens is split, so that one head fills the device",
        lambda case: case["N"] >= 1_000_000 and _heads(case) == 1,
    ),
    *(
        _faster(f"{mode} over compiled", 3, 2, _COMPILED, _over_compiled_on_gpu, mode=mode)
        for mode in ("forward", "backward")
    ),
    Target(
        "forward, B·H ≥ 64",
        "faster than the best SDPA kernel from N ≤ 512 on",
        _FEW_TOKENS,
        _crossover,
    ),
    Target(
        "forward, batch 128 × 6 heads × 64 tokens",
        "at or under SDPA's time",
        "the size of a vision transformer on small images",
        _vit,
    ),
)

LISTS = {"cpu": CPU, "gpu": GPU}
