"""``python -m reports targets RUN``: the bounds this project sets itself, judged from a saved run.

A target is a row of ``CPU`` or ``GPU``: its name, the bound, why it is that, and what reads it off
the run. Ratios are turn by turn. What a run did not measure is "not measured", and neither kept
nor broken.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import Any

from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved.runs import LENGTHS, NoRuns, Runs
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import fit_scaling
from linear_vit.reports.tables.table import Table, word

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
    """Cases with these values, ``pass_`` for pass; if it is said, of so many tokens a ``call``."""
    asked = {name.rstrip("_"): value for name, value in wanted.items()}
    found = [
        case
        for case in run.kernels.to_dict("records")
        if all(case[name] == value for name, value in asked.items())
        and call in (None, _batch(case) * case["N"])
    ]
    return sorted(found, key=lambda case: case["N"])


def shape(case: Case) -> dict[str, Any]:
    return case["info"].get("shape") or {}


def _batch(case: Case) -> int:
    return int(shape(case).get("B", 1))


def place(case: Case) -> Place:
    """What cases that may be set against each other have in common: the file and all of a shape."""
    return case["file"], int(case["N"]), str(sorted(shape(case).items()))


def over(own: Case, other: Case) -> float:
    """How much faster the first is, turn by turn."""
    return math.exp(turns.speedup(own, other)[0])


def _over(own: Iterable[Case], others: Iterable[Case]) -> list[tuple[Case, float]]:
    """Of our cases those that have their like among the others, and how much faster they are."""
    at = {place(case): case for case in others}
    return [(case, over(case, at[place(case)])) for case in own if place(case) in at]


def _mean_and_worst(ratios: Sequence[float], mean: float, worst: float) -> Found | None:
    if not ratios:
        return None
    found = geometric_mean(ratios)
    text = f"mean {found:.2f}×, worst {min(ratios):.2f}×"
    return text, found >= mean and min(ratios) >= worst


# ---- the C++ kernels, on a CPU -------------------------------------------------------------------

_TOKENS = (64, 256, 1024, 4096, 16_384, 65_536)
_CALL = 65_536  # tokens of a call of linear attention
_GRIDS = 8192  # and of ripple
_SDPA_FROM = 128
_SHORTEST = 1024  # of the lengths whose growth is fitted


def _own(run: Runs, mode: str, dtype: str) -> list[Case]:
    own = {"operation": "linear_attention", "backend": "cpu", "pass_": mode, "dtype": dtype}
    return _of_turns(_cases(run, **own, call=_CALL), others=True)


def _of_turns(cases: Sequence[Case], *, others: bool) -> list[Case]:
    """One case a shape: of two, that which took turns with other backends, or that with lengths.

    One sequence of 65,536 tokens may be in a run as either.
    """
    in_order = sorted(cases, key=lambda case: case["total_tokens"], reverse=not others)
    at = {place(case): case for case in in_order}
    return sorted(at.values(), key=lambda case: case["N"])


def _over_compiled(run: Runs, mode: str, dtype: str, mean: float, worst: float) -> Found | None:
    others = {"operation": "linear_attention", "backend": "compiled", "pass_": mode}
    both = _over(_own(run, mode, dtype), _cases(run, **others, dtype=dtype, call=_CALL))
    return _mean_and_worst([ratio for case, ratio in both if case["N"] in _TOKENS], mean, worst)


def over_matmul(run: Runs, case: Case) -> float | None:
    """Dense FLOP a second over those of a float32 matmul: turn by turn where they took turns."""
    peak = (run.limits(case["file"]).get("matmul_flop_per_s") or {}).get("float32")
    ratio: float | None = case["ratios"].get("matmul")
    if ratio is None and peak and not math.isnan(case["tflop_per_s"]):
        return float(1e12 * case["tflop_per_s"] / peak)
    return ratio


def _over_matmul(run: Runs, mean: float, worst: float) -> Found | None:
    own = [c for c in _own(run, "forward", "float32") if c["N"] in _TOKENS and c["N"] >= _SHORTEST]
    ratios = [over_matmul(run, case) for case in own]
    return _mean_and_worst([ratio for ratio in ratios if ratio is not None], mean, worst)


def _over_sdpa(run: Runs) -> Found | None:
    softmax = {"operation": "softmax_attention", "backend": PYTORCH, "pass_": "forward"}
    others = _cases(run, **softmax, dtype="float32", call=_CALL)
    ratios = [(c["N"], ratio) for c, ratio in _over(_own(run, "forward", "float32"), others)]
    if not ratios:
        return None
    slow = [n for n, ratio in ratios if ratio <= 1]
    text = ", ".join(f"{ratio:.1f}× at {n:,}" for n, ratio in ratios)
    return text, max(slow, default=0) < _SDPA_FROM


def _ripple(run: Runs, mean: float, worst: float) -> Found | None:
    ratios = []
    for operation in ("ripple_pool", "ripple_expand"):
        of = {"operation": operation, "pass_": "forward+backward", "dtype": "float32"}
        own, others = (_cases(run, **of, backend=b, call=_GRIDS) for b in ("cpu", PYTORCH))
        ratios += [ratio for _, ratio in _over(own, others)]
    return _mean_and_worst(ratios, mean, worst)


def one_sequence(run: Runs) -> list[Case]:
    """The C++ forward pass of one sequence, a case per length: the curve of the most lengths."""
    own = {"operation": "linear_attention", "backend": "cpu", "pass_": "forward"}
    cases = _cases(run, call=None, **own, dtype="float32")
    single = [case for case in cases if _batch(case) == 1 and case["N"] >= _SHORTEST]
    curves: dict[str, list[Case]] = {}
    for case in _of_turns(single, others=False):
        alike = [item for item in sorted(shape(case).items()) if item[0] not in LENGTHS]
        curves.setdefault(str(alike), []).append(case)
    return max(curves.values(), key=len, default=[])


def _exponent(run: Runs) -> Found | None:
    cases = one_sequence(run)
    if not cases:
        return None
    fit = fit_scaling([c["N"] for c in cases], [c["median_s"] for c in cases])
    return str(fit), fit.reason is None and abs(fit.exponent - 1) <= 0.05


def _ratio_target(
    name: str, judge: Callable[..., Found | None], mean: float, worst: float, reason: str
) -> Target:
    bound = f"mean ≥ {mean:g}×, worst ≥ {worst:g}×"
    return Target(name, bound, reason, partial(judge, mean=mean, worst=worst))


def _compiled_target(mode: str, dtype: str, mean: float, worst: float) -> Target:
    judge = partial(_over_compiled, mode=mode, dtype=dtype)
    reason = "what PyTorch's own compiler makes of the composed products"
    return _ratio_target(f"{mode}, {dtype}, over compiled", judge, mean, worst, reason)


CPU = (
    _compiled_target("forward", "float32", 5, 3),
    _ratio_target(
        "forward, float32, N ≥ 1,024, over the float32 matmul's rate",
        _over_matmul,
        1.5,
        1.2,
        "the kernels do half of the dense work that is counted, a matmul all of it",
    ),
    Target(
        "forward, float32, over SDPA",
        f"faster from N = {_SDPA_FROM}",
        "linear attention is worth its while from few tokens on",
        _over_sdpa,
    ),
    _compiled_target("forward", "bfloat16", 6, 4),
    _compiled_target("forward+backward", "float32", 5, 3),
    _compiled_target("forward+backward", "bfloat16", 4, 2.5),
    _ratio_target(
        "ripple, forward+backward, over torch",
        _ripple,
        3,
        1.5,
        "one pass over the grid where depthwise conv2d makes several",
    ),
    Target("exponent of time against N", "1.00 ± 0.05", "it is linear attention", _exponent),
)


# ---- the Triton and CUDA kernels, on a GPU -------------------------------------------------------


def _bf16(run: Runs, operation: str, mode: str) -> list[Case]:
    """Without replays from a graph, which are backends of their own."""
    found = _cases(run, operation=operation, pass_=mode, dtype="bfloat16")
    return [case for case in found if not case["info"].get("captured")]


def _fastest(run: Runs, operation: str, mode: str, *, own: bool) -> dict[Place, Case]:
    """Of our backends, or of the others, by place."""
    cases = [c for c in _bf16(run, operation, mode) if run.words.own(c["backend"]) is own]
    return {place(c): c for c in sorted(cases, key=lambda c: -c["median_s"])}  # the last one counts


def _fastest_own(run: Runs, mode: str) -> dict[Place, Case]:
    return _fastest(run, "linear_attention", mode, own=True)


def _fastest_sdpa(run: Runs) -> dict[Place, Case]:
    """Of PyTorch's kernels for softmax attention."""
    return _fastest(run, "softmax_attention", "forward", own=False)


def _heads(case: Case) -> int:
    """Heads of all sequences of a call."""
    return _batch(case) * int(shape(case).get("H", 1))


def _all_right(run: Runs) -> Found | None:
    """Every case is checked against the float64 reference before it is timed."""
    own = tuple(name for name in run.words.backends if run.words.own(name))
    failed = {case: why for head in run.heads for case, why in head["failed"].items()}
    wrong = {case: why for case, why in failed.items() if case.endswith(own)}
    if run.kernels.empty:
        return None
    found = f"{len(run.kernels)} cases done, {len(wrong)} wrong"
    for case, why in list(wrong.items())[:1]:
        found += f"; {case}: {why}"
    return found, not wrong


def _shares(run: Runs, mode: str) -> Iterator[tuple[float, Case]]:
    """Least bytes over the time, as a share of the copy rate, of the faster of ours."""
    for case in _fastest_own(run, mode).values():
        copy = run.limits(case["file"]).get("copy_bytes_per_s")
        if copy and case["least_bytes"]:
            yield case["least_bytes"] / case["median_s"] / copy, case


def _long(run: Runs, mode: str, least: float) -> Found | None:
    about = [s for s in _shares(run, mode) if s[1]["N"] >= 65_536 and _heads(s[1]) >= 16]
    if not about:
        return None
    share, case = min(about, key=lambda item: item[0])
    text = f"{share:.1%} at the lowest, {case['backend']} at N={case['N']:,}"
    return text, share >= least


def _single_head(run: Runs) -> Found | None:
    for share, case in _shares(run, "forward"):
        if _heads(case) == 1 and case["N"] >= 1_000_000:
            return f"{share:.1%}, {case['backend']}", share >= 0.8
    return None


def _gpu_over_compiled(run: Runs, mode: str) -> Found | None:
    """Of one sequence of 16 heads."""
    compiled = [c for c in _bf16(run, "linear_attention", mode) if c["backend"] == "compiled"]
    single = [case for case in compiled if _batch(case) == 1 and _heads(case) == 16]
    ratios = [(r, case["N"]) for case, r in _over(_fastest_own(run, mode).values(), single)]
    if not ratios:
        return None
    mean = geometric_mean(ratio for ratio, _ in ratios)
    worst, at = min(ratios)
    lengths = len({n for _, n in ratios})
    text = f"{mean:.2f}× over {lengths} lengths, {worst:.2f}× at N={at:,}"
    return text, mean >= 3 and worst >= 2


def _crossover(run: Runs) -> Found | None:
    """The least length measured from which on ours wins at every length and shape measured."""
    others, wins = _fastest_sdpa(run), dict[int, bool]()
    for at, case in _fastest_own(run, "forward").items():
        if at in others and _heads(case) >= 64 and shape(case)["H"] == 16:
            won = case["median_s"] < others[at]["median_s"]
            wins[case["N"]] = wins.get(case["N"], True) and won
    lengths = sorted(wins)
    if 512 not in wins:
        return None
    from_here = [n for n in lengths if all(wins[m] for m in lengths if m >= n)]
    if not from_here:
        return f"slower at N={lengths[-1]:,}", False
    text = f"from N={from_here[0]:,} on, of {', '.join(f'{n:,}' for n in lengths)}"
    return text, from_here[0] <= 512


def _vit(run: Runs) -> Found | None:
    others = _fastest_sdpa(run)
    for at, own in _fastest_own(run, "forward").items():
        if (_batch(own), shape(own).get("H"), own["N"]) == (128, 6, 64) and at in others:
            a, b = own["median_s"], others[at]["median_s"]
            text = f"{a * 1e6:.1f} µs ({own['backend']}) against {b * 1e6:.1f} µs"
            return f"{text} ({others[at]['backend']})", a <= b
    return None


_TRAFFIC = "it is bound by memory, and this is the least traffic over what a copy moves"
GPU = (
    Target("every result of ours", "right", "a wrong result has no speed", _all_right),
    *(
        Target(
            f"{mode}, N ≥ 64k, B·H ≥ 16",
            f"≥ {least:.0%} of the copy rate",
            _TRAFFIC,
            partial(_long, mode=mode, least=least),
        )
        for mode, least in (("forward", 0.85), ("backward", 0.75))
    ),
    Target(
        "forward, one head of 1M tokens",
        "≥ 80% of the copy rate",
        "the sum over tokens is split, so that one head fills the device",
        _single_head,
    ),
    *(
        Target(
            f"{mode} over compiled",
            "≥ 3× in the geometric mean over N, ≥ 2× at the worst",
            "what PyTorch's own compiler makes of the composed products",
            partial(_gpu_over_compiled, mode=mode),
        )
        for mode in ("forward", "backward")
    ),
    Target(
        "forward, B·H ≥ 64",
        "faster than the best SDPA kernel from N ≤ 512 on",
        "linear attention is worth its while from few tokens on",
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
