"""Everything saved that the page shows, by file name; what is damaged is named, not guessed."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from linear_vit.reports.saved import runs
from linear_vit.reports.saved.runs import Runs

Content = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    path: Path
    content: Content


@dataclass
class Documents:
    """``runs`` are the timed cases; the others hold the documents of a kind, in order of path."""

    runs: Runs | None = None
    checks: list[Saved] = field(default_factory=list)
    tables: list[Saved] = field(default_factory=list)
    ablations: list[Saved] = field(default_factory=list)
    speeds: list[Saved] = field(default_factory=list)
    breakdowns: list[Saved] = field(default_factory=list)
    cpus: list[Saved] = field(default_factory=list)
    statics: list[Saved] = field(default_factory=list)
    traffics: list[Saved] = field(default_factory=list)
    gpus: list[Saved] = field(default_factory=list)  # a file a section, those of a device together
    skipped: list[str] = field(default_factory=list)

    def each(self, saved: Iterable[Saved], build: Callable[[Saved], T]) -> list[T]:
        """What ``build`` makes of each; a document that lacks what it reads is named as damaged."""
        made = []
        for one in saved:
            try:
                made.append(build(one))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                self.skipped.append(f"{one.path}: damaged ({type(error).__name__}: {error})")
        return made


def _schema(value: str) -> Callable[[Content], Any]:
    return lambda content: content["schema"] == value


def _kind(name: str, rows: str) -> Callable[[Content], Any]:
    return lambda c: c["kind"] == name and c["schema"] == 1 and isinstance(c[rows], list)


# The files of bench.gpu; another command has a check.json, too.
_GPU_SECTIONS = ("check", "ceilings", "sweep", "huge", "capture", "training", "graphs")
# File name, where it is kept, and whether a document is what its name says.
_KINDS: tuple[tuple[str, str, Callable[[Content], Any]], ...] = (
    ("check.json", "checks", _kind("check", "results")),
    ("table.json", "tables", _schema("linear-vit-table/1")),
    ("ablation-*.json", "ablations", _schema("linear-vit-ablation/1")),
    ("step-speed.json", "speeds", _schema("linear-vit-step-speed/1")),
    ("step-breakdown.json", "breakdowns", _schema("linear-vit-step-breakdown/1")),
    # bench.cpu's file says no schema of its own.
    ("cpu*.json", "cpus", lambda c: c.get("schema", 1) == 1 and c["machine"] and c["rows"]),
    ("static*.json", "statics", _kind("static", "rows")),
    ("traffic.json", "traffics", _kind("traffic", "rows")),
    *((f"{section}.json", "gpus", _kind("gpu", "results")) for section in _GPU_SECTIONS),
)
# Machine code and counted bytes are the same anywhere; what a GPU did says which it was.
_ANYWHERE = ("statics", "traffics", "gpus")


def load(paths: Sequence[Path], results: Path) -> Documents:
    """Read timed runs from ``paths``, and all else from ``results`` and its sub-folders.

    Without ``paths``, the newest run in ``results``, else the repository's measurements. Where
    ``results`` holds nothing at all, so are the other documents; static and traffic reports and
    what a GPU did are the repository's wherever ``results`` lacks them.

    Raises:
        reports.runs.NoRuns: ``paths`` were given and hold no run.
    """
    found = Documents()
    every = tuple(name for _, name, _ in _KINDS)
    _read_all(found, results, every)
    runs_here = runs.default_paths(results)
    if runs_here == [runs.MEASUREMENTS] and not any(getattr(found, name) for name in every):
        _read_all(found, runs.MEASUREMENTS, every)
    _read_all(found, runs.MEASUREMENTS, tuple(n for n in _ANYWHERE if not getattr(found, n)))
    known = {str(saved.path) for _, name, _ in _KINDS for saved in getattr(found, name)}
    try:
        found.runs = runs.load(paths or runs_here)
    except runs.NoRuns:
        if paths:
            raise
    else:
        complaints = [line for line in found.runs.skipped if line.split(": ")[0] not in known]
        found.skipped += [line for line in complaints if line not in found.skipped]
    return found


def _read_all(found: Documents, folder: Path, wanted: tuple[str, ...]) -> None:
    for pattern, name, is_right in _KINDS:
        if name not in wanted or not folder.is_dir():
            continue
        for path in sorted(folder.rglob(pattern), key=lambda path: path.with_suffix("")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                of_gpu = isinstance(content, dict) and content.get("kind") == "gpu"
                if of_gpu != (name == "gpus"):
                    continue
                if not isinstance(content, dict) or not is_right(content):
                    raise ValueError("of another schema")
            except (OSError, ValueError) as error:
                found.skipped.append(f"{path}: {error}")
            except (KeyError, TypeError) as error:
                found.skipped.append(f"{path}: of another schema ({error} is missing)")
            else:
                getattr(found, name).append(Saved(path, content))


# What tells the cases of a run apart, as columns of Runs.kernels.
CASE = ("operation", "pass", "dtype", "N", "total_tokens", "backend")


@dataclass(frozen=True)
class RunExtras:
    """What a run holds beyond times: its machine's limits; by case, lines of text and a profile."""

    limits: Content
    details: dict[tuple[Any, ...], str]
    profiles: dict[tuple[Any, ...], Content]


def extras(run: str) -> RunExtras:
    """Read a run again for what ``Runs`` leaves out. Runs of older versions say less."""
    try:
        content = json.loads(Path(run).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # gone since it was loaded
        return RunExtras({}, {}, {})
    details: dict[tuple[Any, ...], str] = {}
    profiles: dict[tuple[Any, ...], Content] = {}
    for benchmark in content["benchmarks"]:
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        if not isinstance(info, dict):
            continue
        info = info | {"total_tokens": info.get("total_tokens") or 0}
        case = tuple(map(info.get, CASE))
        if isinstance(info.get("profile"), dict):
            profiles[case] = info["profile"]
        try:
            details[case] = _lines(info)
        except (TypeError, ValueError, AttributeError):
            continue  # a damaged case, which Runs has named
    suite = content.get("kernel_suite")
    limits = suite.get("limits") if isinstance(suite, dict) else None
    return RunExtras(limits if isinstance(limits, dict) else {}, details, profiles)


def _lines(info: Content) -> str:
    lines = []
    if info.get("share_of_limit") is not None:
        lines.append(f"{info['share_of_limit']:.0%} of the {info.get('limit')} limit")
    worst = [error.get("rms") for error in (info.get("error") or {}).values()]
    if worst and None not in worst:
        lines.append(f"rms error {max(worst):.1e} against float64")
    ran = info.get("ran")
    if isinstance(ran, list) and ran:
        names = ", ".join(str(name)[:60] for name in ran[:4]) + (
            f" and {len(ran) - 4} more" if ran[4:] else ""
        )
        lines.append(f"ran: {names}")
    telemetry = info.get("telemetry")
    for name, value in (telemetry if isinstance(telemetry, dict) else {}).items():
        if isinstance(value, list) and value and all(isinstance(v, int | float) for v in value):
            value = " / ".join(f"{v:.4g}" for v in value)  # least, median, greatest
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "", False):
            lines.append(f"{name.replace('_', ' ')}: {value}")
    if info.get("energy_per_call_j") is not None:
        lines.append(f"{info['energy_per_call_j']:.4g} J a call")
    if info.get("cache"):
        lines.append(f"{info['cache']} cache")
    if info.get("other_function"):
        lines.append(f"computes another function: {info['other_function']}")
    if info.get("stop"):
        lines.append(f"stopped: {info['stop']}")
    return "\n".join(lines)
