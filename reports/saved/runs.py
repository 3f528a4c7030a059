"""Saved benchmark runs, as pandas tables; files that are none are named and left out."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linear_vit import options
from linear_vit.reports.saved import convert, machines, schema
from linear_vit.reports.saved.files import read_json
from linear_vit.reports.saved.schema import Damaged
from linear_vit.reports.statistics import turns
from linear_vit.screen import counted

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = Path("reports/out")
MEASUREMENTS = ROOT / "measurements"
HOW_TO_MEASURE = "pytest --benchmark-only --benchmark-json=reports/out/benchmark.json"
TRAINING_STEP = "training_step"
WHOLE_MODEL = "whole_model"
OVER_PROCESSES = "over_processes"

# Sizes of one and the same sweep; any other sweep is a list of cases of its own, and stands apart.
_EXTENTS = ("quick", "full", None)
# What a case says itself, of a kernel or a training step.
_COLUMNS = {"operation", "backend", "pass_", "dtype", "turns", "clock", "device", "disturbed"}
_COLUMNS |= {"peak_memory_bytes", "N", "implementation", "other_function", "least_bytes", "limit"}
_COLUMNS |= {"gb_per_s", "tflop_per_s", "share_of_limit", "model", "model_title", "images_per_s"}
_COLUMNS |= {"whole_model", "attention", "resolution", "batch", "parameters"}
_COLUMNS |= {"attention_s", "attention_alone_s"}
_COLUMNS |= {"processes", "heads", "head_dim", "sent_bytes", "exchanges"}
_COLUMNS |= {"all_reduce_latency_s", "all_reduce_bytes_per_s"}
# What tells the cases of a machine and backend apart.
PLACE = ["sweep", "total_tokens", "setting", "operation", "pass", "dtype", "N"]
# Fields of a shape that are its length.
LENGTHS = ("N", "M", "rows", "cols")

Content = dict[str, Any]
Asked = Sequence[str] | None  # names of a list of options
Settings = dict[tuple[str, int | None], tuple[str, ...]]


class NoRuns(Exception):
    """Nothing to report on; the message says what makes something."""


class OfAnotherKind(Exception):
    """A JSON file of this suite that is something else than a benchmark run."""


@dataclass(frozen=True)
class Words:
    """What saved runs say of a name: its title, and a backend's colour and whether it is ours."""

    operations: dict[str, dict[str, Any]] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)

    def operation(self, name: str) -> str:
        """An operation's name as prose has it."""
        found = self.operations.get(name, {}).get("title")
        return str(found or name.replace("_", " "))

    def backend(self, name: str) -> str:
        """A backend's title."""
        return str(self.backends.get(name, {}).get("title") or name)

    def own(self, name: str) -> bool:
        """Whether a backend's kernels are this project's."""
        return bool(self.backends.get(name, {}).get("own"))

    def colour(self, name: str) -> str | None:
        found = self.backends.get(name, {}).get("colour")
        return str(found) if found else None


@dataclass
class Runs:
    """Measured cases of one or several saved runs.

    ``kernels``: a row per case, with the columns that :class:`schema.Kernel` names, ``machine`` (a
    label), ``sweep`` (empty, or the name of one that stands apart), ``median_s``, its standard
    ``error`` over itself, ``q1_s``, ``q3_s``, ``rounds``, how many ``independent_rounds`` these are
    worth, the ``seconds`` of each (empty where they were not saved), ``turns`` (alike for cases
    whose rounds took turns, else None), ``ratios`` (to other cases by ``name``, where a file has no
    rounds to take them from), ``file`` and ``total_tokens``: 0 where a call is one sequence of N
    tokens, else how many tokens the sequences of a call have together; ``setting`` is what else its
    shape says, in words; ``other_function`` says what a peer computes instead; ``disturbed`` what
    disturbed the measurement, None where nothing did; ``info`` is all that the file says of the
    case. A call replayed from a graph is of a backend of its own.
    ``training``: a row per training step, ``models`` per whole model, ``over`` per sequence over
    processes. ``skipped``: a line per file that could not be used. ``heads``: per file, where and
    when. ``words``: titles and colours.
    """

    kernels: pd.DataFrame
    training: pd.DataFrame
    heads: list[Content]
    skipped: list[str] = field(default_factory=list)
    words: Words = field(default_factory=Words)
    models: pd.DataFrame = field(default_factory=pd.DataFrame)
    over: pd.DataFrame = field(default_factory=pd.DataFrame)

    def limits(self, file: str) -> Content:
        """The machine's limits that a run measured; empty where it has none."""
        return next((h["limits"] for h in self.heads if h["file"] == file), {})

    def disturbed(self) -> list[str]:
        """A line per file and reason: what counts for nothing, because it was disturbed."""
        lines = [
            f"{head['file']}: the machine's limits ({head['limits']['disturbed']})"
            for head in self.heads
            if head["limits"].get("disturbed")
        ]
        for frame in (self.kernels, self.training, self.models, self.over):
            if len(frame) and len(lost := frame[frame["disturbed"].notna()]):
                for (file, why), part in lost.groupby(["file", "disturbed"], sort=False):
                    first = part["name"].iloc[0]
                    lines.append(
                        f"{file}: {counted(len(part), 'case')} disturbed ({why}), as {first}"
                    )
        return lines

    def only(self, *asked: Asked) -> "Runs":
        """The kernels of these operations, dtypes and backends; None takes all.

        Raises:
            OptionError: something of which no case is; the message lists what there is.
        """
        return replace(self, kernels=only(self.kernels, *asked))

    def of_file(self, file: str) -> "Runs":
        """What one of the files says."""
        frames = {
            name: frame if frame.empty else frame[frame["file"] == file]
            for name in ("kernels", "training", "models", "over")
            for frame in [getattr(self, name)]
        }
        heads = [head for head in self.heads if head["file"] == file]
        return replace(self, heads=heads, **frames)


def only(frame: pd.DataFrame, *asked: Asked) -> pd.DataFrame:
    """Of cases those of these operations, dtypes and backends."""
    columns = {"ops": "operation", "dtypes": "dtype", "backends": "backend"}  # by option
    for (option, column), names in zip(columns.items(), asked, strict=False):
        there = [] if frame.empty else sorted(frame[column].unique())
        known = options.known(option, names, there)
        frame = frame[frame[column].isin(known)] if names else frame
    return frame


def load(paths: Sequence[Path], *, every: bool = False) -> Runs:
    """Read saved runs from files and folders (searched with their sub-folders).

    A case that several runs on one machine measured is taken from the newest, of those that nothing
    disturbed if there is one; with ``every``, from each of them. What is no run of this suite, or
    is damaged, is named in ``skipped``.

    Raises:
        NoRuns: no path holds a run.
    """
    skipped: list[str] = []
    found = _made(_documents(paths, skipped), skipped, ["file"] if every else [])
    if not found.heads:
        detail = "".join(f"\n  skipped {line}" for line in skipped)
        raise NoRuns(f"no saved benchmark run found. Make one with: {HOW_TO_MEASURE}{detail}")
    return found


def newest_of_each(folder: Path) -> Runs:
    """Of all runs below a folder: the newest of each sub-folder, machine and sweep."""
    skipped: list[str] = []
    newest: dict[Any, tuple[Path, Content]] = {}
    found = _documents([folder] if folder.is_dir() else [], skipped)
    for path, document in sorted(found, key=lambda one: _when(one[1])):
        suite = document["kernel_suite"]
        key = path.parent, machines.label(suite["machine"]), suite.get("sweep")
        newest[key] = path, document
    return _made(sorted(newest.values(), key=lambda one: one[0]), skipped)


def default_paths(out: Path = DEFAULT_OUT) -> list[Path]:
    """The newest run in ``out``, else the repository's own benchmarks."""
    found = list(_documents(sorted(out.glob("*.json")), []))
    return [max(found, key=lambda one: _when(one[1]))[0]] if found else measured()


def measured() -> list[Path]:
    """The benchmarks that the repository has saved."""
    return sorted(MEASUREMENTS.glob("*/benchmark.json"))


def read(path: Path) -> Content:
    """A run of today's schema, if need be converted, whose single cases may still be damaged.

    Raises:
        Damaged: what is wrong with the file, and with which field.
        OfAnotherKind: it is none.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise Damaged("no benchmark run: not a JSON object")
    if convert.kind_of(document) is None:
        kind = document.get("kind") or document.get("schema")
        if isinstance(document.get("kind"), str) or str(kind).startswith("linear"):
            raise OfAnotherKind(f"no benchmark run, but {kind}")
    try:
        document = convert.to_current(document)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise Damaged(f"damaged ({type(error).__name__}: {error})") from error
    schema.check(schema.Head, {k: v for k, v in document.items() if k in _OF_THE_HEAD})
    return document


_OF_THE_HEAD = ("kernel_suite", "datetime")


def _documents(paths: Iterable[Path], skipped: list[str]) -> Iterator[tuple[Path, Content]]:
    """Every run in these files and folders; a line for what is none, or is damaged."""
    for path in paths:
        if not path.exists():
            skipped.append(f"{path}: there is no such file or folder")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path][: path.exists()]:
            try:
                yield file, read(file)
            except ValueError as error:
                skipped.append(f"{file}: {error}")
            except OfAnotherKind as other:
                skipped += [f"{file}: {other}"] if file == path else []


def _when(document: Content) -> str:
    return str(document.get("datetime", ""))


def _made(
    documents: Iterable[tuple[Path, Content]], skipped: list[str], apart: Sequence[str] = ()
) -> Runs:
    """The cases of these documents; of one that several measured, the newest.

    ``apart``: the columns in which cases differ and are then no longer the same one.
    """
    kinds: dict[str, list[Content]] = {"": [], "model": [], "whole_model": [], "processes": []}
    heads: list[Content] = []
    words = Words()
    for path, document in documents:
        rows, complaints = _cases(path, document)
        skipped += [f"{path}: {complaint}" for complaint in complaints]
        if rows:
            heads.append(_head(path, document, len(rows)))
            for row in rows:  # a kernel has none of what the others are told by
                kinds[next((kind for kind in kinds if kind in row), "")].append(row)
            _learn(words, document["kernel_suite"])
    kernels, training, models, over = map(pd.DataFrame, kinds.values())
    return Runs(
        _newest(kernels, ["machine", *PLACE, "backend", *apart]),
        _newest(training, ["machine", "sweep", "case", "dtype", *apart]),
        sorted(heads, key=lambda head: head["datetime"]),
        skipped,
        words,
        _newest(models, ["machine", "sweep", "name", *apart]),
        _newest(over, ["machine", "name", *apart]),
    )


def _head(path: Path, document: Content, cases: int) -> Content:
    suite = document["kernel_suite"]
    return {
        "file": str(path),
        "datetime": _when(document),
        "machine": machines.label(suite["machine"]),
        "facts": suite["machine"],
        "cases": cases,
        "sweep": suite.get("sweep"),
        **{name: suite.get(name) or {} for name in ("not_timed", "failed", "limits")},
    }


def _learn(words: Words, suite: Content) -> None:
    words.operations.update(suite.get("operations") or {})
    for name, said in (suite.get("backends") or {}).items():
        words.backends[name] = said
        words.backends[_replayed(name)] = said | {"title": f"{said.get('title')}, CUDA graph"}


def _replayed(backend: str) -> str:
    """The name under which a backend's calls stand that were replayed from a graph."""
    return f"{backend} (graph)"


def _cases(path: Path, document: Content) -> tuple[list[Content], list[str]]:
    """A row per case, and complaints: one for all cases that the same field of is damaged."""
    suite = document["kernel_suite"]
    sweep = suite.get("sweep")
    alike = {"file": str(path), "datetime": _when(document)}
    alike["sweep"] = "" if sweep in _EXTENTS else str(sweep)
    found: list[tuple[Content, Any]] = []
    bad: dict[str, tuple[str, int]] = {}  # by field: of the first such case, and how many there are
    for number, benchmark in enumerate(document["benchmarks"]):
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        operation = info.get("operation") if isinstance(info, dict) else None
        try:
            case = schema.check(_KINDS.get(str(operation), schema.Case), benchmark)
        except Damaged as error:
            field = str(error).partition(":")[0]
            first, count = bad.get(field, (f"benchmarks[{number}].{error}", 0))
            bad[field] = first, count + 1
        else:
            found.append((benchmark, case))
    settings = _settings(case.extra_info for _, case in found)
    rows = [alike | _row(raw, case, suite["machine"], settings) for raw, case in found]
    complaints = [f"{text} ({counted(count, 'case')} left out)" for text, count in bad.values()]
    return rows, complaints or ([] if rows else ["an empty run"])


_KINDS = {
    TRAINING_STEP: schema.StepCase,
    WHOLE_MODEL: schema.ModelCase,
    OVER_PROCESSES: schema.OverCase,
}


def _row(raw: Content, case: Any, facts: Content, settings: Settings) -> Content:
    """What every case has: its time, and what that is known from."""
    info, stats = case.extra_info, case.stats
    data = stats.data or []
    seconds = np.array(data if len(data) == stats.rounds else [])
    dependence = turns.dependence(seconds)
    row = {
        "machine": machines.label(raw["extra_info"].get("machine") or facts),
        "name": case.name,
        "median_s": stats.median,
        "q1_s": stats.q1,
        "q3_s": stats.q3,
        "rounds": stats.rounds,
        "seconds": seconds,
        "error": dependence * _relative_error(stats, info.median_interval_s),
        "independent_rounds": stats.rounds / dependence**2,
        "ratios": info.ratios or {},
        "info": raw["extra_info"],
        **info.model_dump(by_alias=True, include=_COLUMNS),
    }
    if isinstance(info, schema.Kernel):
        return row | _of_kernel(info, settings)
    if info.operation in (WHOLE_MODEL, OVER_PROCESSES):
        return row
    setting = raw["extra_info"]["settings"]
    alike = sorted((name, value) for name, value in setting.items() if name != "backend")
    return row | {"settings": setting, "case": f"{info.model} {info.backend} {alike}"}


def _of_kernel(info: Any, settings: Settings) -> Content:
    shape = _shape(info)
    names = settings.get((info.operation, info.total_tokens), ())
    return {
        "backend": _replayed(info.backend) if info.captured else info.backend,
        "total_tokens": info.total_tokens or 0,
        "setting": ", ".join(f"{name} = {shape[name]}" for name in names if name in shape),
        "worst_rms_error": max((error.rms for error in info.error.values()), default=None),
        **{name: _or_nan(getattr(info, name)) for name in _RATES},
    }


# Null in a column of numbers is no number, also where no case has one.
_RATES = ("gb_per_s", "tflop_per_s", "share_of_limit")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _shape(info: Any) -> Content:
    return info.shape.model_dump(exclude_unset=True) if info.shape else {}


def _settings(infos: Iterable[Any]) -> Settings:
    """By operation: the fields of its shapes that are no length, and what plots stand apart by.

    A length is a field of such a name, or one that is N in every case, of several; where the tokens
    of a call are given, the batch follows from the length, too.
    """
    shapes: dict[Any, list[tuple[int, Content]]] = {}
    for info in infos:
        if isinstance(info, schema.Kernel) and info.shape:
            of = shapes.setdefault((info.operation, info.total_tokens), [])
            of.append((info.N, _shape(info)))
    settings = {}
    for (operation, total), found in shapes.items():
        lengths = {*LENGTHS, *(("B",) if total else ())}
        if len({tokens for tokens, _ in found}) > 1:
            lengths |= {n for n in found[0][1] if all(s.get(n) == tokens for tokens, s in found)}
        names = dict.fromkeys(name for _, shape in found for name in shape if name not in lengths)
        settings[operation, total] = tuple(names)
    return settings


def _relative_error(stats: Any, interval: list[float] | None) -> float:
    """Standard error of the median, over the median; NaN where no round is known.

    From its 95 % bootstrap interval; where a run does not have that, from the quartiles of the
    rounds.
    """
    if interval is not None:
        return (interval[1] - interval[0]) / (2 * 1.96) / stats.median
    if not stats.rounds:
        return float("nan")
    return turns.error_of_median(stats.q1, stats.q3, stats.rounds) / stats.median


def _newest(frame: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    if frame.empty:
        return frame
    in_order = frame.assign(steady=frame["disturbed"].isna()).sort_values(
        ["steady", "datetime"], kind="stable"
    )
    newest = in_order.drop_duplicates(key, keep="last").drop(columns="steady")
    return newest.sort_index().reset_index(drop=True)
