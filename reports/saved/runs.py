"""Saved benchmark runs, as pandas tables; files that are none are named and left out."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linear_vit import options
from linear_vit.reports.saved import convert, machines
from linear_vit.reports.saved.files import read_json
from linear_vit.reports.statistics import turns

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = Path("reports/out")
MEASUREMENTS = ROOT / "measurements"
HOW_TO_MEASURE = "pytest --benchmark-only --benchmark-json=reports/out/benchmark.json"
TRAINING_STEP = "training_step"

# Sizes of one and the same sweep; any other sweep is a list of cases of its own, and stands apart.
_EXTENTS = ("quick", "full", None)
_KERNEL_COLUMNS = (
    "operation",
    "backend",
    "pass",
    "dtype",
    "N",
    "implementation",
    "gb_per_s",
    "tflop_per_s",
    "peak_memory_bytes",
    "least_bytes",
    "clock",
)
_STEP_COLUMNS = ("model", "model_title", "backend", "dtype", "images_per_s", "settings")
# What tells the cases of a machine and backend apart.
PLACE = ["sweep", "total_tokens", "setting", "operation", "pass", "dtype", "N"]
# Fields of a shape that are its length.
LENGTHS = ("N", "M", "rows", "cols")


Content = dict[str, Any]
Asked = Sequence[str] | None  # names of a list of options


class NoRuns(Exception):
    """Nothing to report on; the message says what makes something."""


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

    ``kernels``: a row per case, with the columns of ``_KERNEL_COLUMNS``, ``machine`` (a label),
    ``sweep`` (empty, or the name of one that stands apart), ``median_s``, its standard ``error``
    over itself, ``q1_s``, ``q3_s``, ``rounds``, how many ``independent_rounds`` these are worth,
    the ``seconds`` of each (empty where they were not saved), ``turns`` (alike for cases whose
    rounds took turns, else None), ``ratios`` (to other cases by ``name``, where a file has no
    rounds to take them from), ``file`` and ``total_tokens``: 0 where a call is one sequence of N
    tokens, else how many tokens the sequences of a call have together; ``setting`` is what else its
    shape says, in words; ``other_function`` says what a peer computes instead; ``info`` is all that
    the file says of the case. A call replayed from a graph is of a backend of its own.
    ``training``: a row per training step. ``skipped``: a line per file that could not be used.
    ``heads``: per file, where and when. ``words``: titles and colours.
    """

    kernels: pd.DataFrame
    training: pd.DataFrame
    heads: list[Content]
    skipped: list[str] = field(default_factory=list)
    words: Words = field(default_factory=Words)

    def limits(self, file: str) -> Content:
        """The machine's limits that a run measured; empty where it has none."""
        return next((h["limits"] for h in self.heads if h["file"] == file), {})

    def only(self, *asked: Asked) -> "Runs":
        """The kernels of these operations, dtypes and backends; None takes all.

        Raises:
            OptionError: something of which no case is; the message lists what there is.
        """
        return replace(self, kernels=only(self.kernels, *asked))

    def of_file(self, file: str) -> "Runs":
        """What one of the files says."""
        kernels, training = (
            frame if frame.empty else frame[frame["file"] == file]
            for frame in (self.kernels, self.training)
        )
        heads = [head for head in self.heads if head["file"] == file]
        return replace(self, kernels=kernels, training=training, heads=heads)


def only(frame: pd.DataFrame, *asked: Asked) -> pd.DataFrame:
    """Of cases those of these operations, dtypes and backends."""
    for column, names in zip(("operation", "dtype", "backend"), asked, strict=False):
        there = [] if frame.empty else sorted(frame[column].unique())
        known = options.known(f"{column}s", names, there)
        frame = frame[frame[column].isin(known)] if names else frame
    return frame


def load(paths: Sequence[Path]) -> Runs:
    """Read saved runs from files and folders (searched with their sub-folders).

    A case that several runs on one machine measured is taken from the newest. What is no run of
    this suite, is damaged, or has another schema version is named in ``skipped``.

    Raises:
        NoRuns: no path holds a run.
    """
    rows: list[Content] = []
    heads: list[Content] = []
    skipped: list[str] = []
    words = Words()
    for path, explicit in _files(paths, skipped):
        try:
            document = read(path)
        except OfAnotherKind as other:
            skipped += [f"{path}: {other}"] if explicit else []
            continue
        except ValueError as error:
            skipped.append(f"{path}: {error}")
            continue
        head, cases, complaints = _cases(path, document)
        skipped += [f"{path}: {complaint}" for complaint in complaints]
        if cases:
            heads.append(head)
            rows += cases
            _learn(words, document.get("kernel_suite") or {})
    if not heads:
        detail = "".join(f"\n  skipped {line}" for line in skipped)
        raise NoRuns(f"no saved benchmark run found. Make one with: {HOW_TO_MEASURE}{detail}")
    heads.sort(key=lambda head: head["datetime"])
    training = [row for row in rows if "model" in row]
    kernels = [row for row in rows if "model" not in row]
    return Runs(
        _newest(pd.DataFrame(kernels), ["machine", *PLACE, "backend"]),
        _newest(pd.DataFrame(training), ["machine", "sweep", "case", "dtype"]),
        heads,
        skipped,
        words,
    )


def default_paths(out: Path = DEFAULT_OUT) -> list[Path]:
    """The newest run in ``out``, else the repository's own benchmarks."""
    found = [(str(run.get("datetime", "")), path) for path, run in all_below(out, deep=False)]
    return [max(found)[1]] if found else measured()


def measured() -> list[Path]:
    """The benchmarks that the repository has saved."""
    return sorted(MEASUREMENTS.glob("*/benchmark.json"))


def all_below(folder: Path, *, deep: bool = True) -> Iterator[tuple[Path, Content]]:
    """Every run that can be read in a folder, and in those below it; all else is left out."""
    for path in sorted(folder.rglob("*.json") if deep else folder.glob("*.json")):
        with contextlib.suppress(OfAnotherKind, ValueError):
            yield path, read(path)


def newest_of_each(folder: Path) -> tuple[list[Path], list[str]]:
    """Of all runs below a folder: the newest of each sub-folder, machine and sweep.

    And a line for each file that is damaged.
    """
    newest: dict[tuple[Path, str, Any], tuple[str, Path]] = {}
    skipped = []
    for path in sorted(folder.rglob("*.json")):
        try:
            document = read(path)
            suite = document["kernel_suite"]
            key = (path.parent, machines.label(suite["machine"]), suite.get("sweep"))
            found = (str(document["datetime"]), path)
        except OfAnotherKind:
            continue
        except ValueError as error:
            skipped.append(f"{path}: {error}")
        except (KeyError, TypeError):
            skipped.append(f"{path}: no benchmark run of this suite")
        else:
            newest[key] = max(found, newest.get(key, found))
    return sorted(path for _, path in newest.values()), skipped


class OfAnotherKind(Exception):
    """A JSON file of this suite that is something else than a benchmark run."""


def _files(paths: Iterable[Path], skipped: list[str]) -> Iterator[tuple[Path, bool]]:
    for path in paths:
        if path.is_dir():
            yield from ((found, False) for found in sorted(path.rglob("*.json")))
        elif path.exists():
            yield path, True
        else:
            skipped.append(f"{path}: there is no such file or folder")


def read(path: Path) -> Content:
    """A run of today's schema, if need be converted; ValueError says what is wrong."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise ValueError("no benchmark run: not a JSON object")
    if convert.kind_of(document) is None:
        kind = document.get("kind") or document.get("schema")
        if isinstance(document.get("kind"), str) or str(kind).startswith("linear"):
            raise OfAnotherKind(f"no benchmark run, but {kind}")
    try:
        return convert.to_current(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from error


def _learn(words: Words, suite: dict[str, Any]) -> None:
    words.operations.update(suite.get("operations") or {})
    for name, said in (suite.get("backends") or {}).items():
        words.backends[name] = said
        words.backends[_replayed(name)] = said | {"title": f"{said.get('title')}, CUDA graph"}


def _replayed(backend: str) -> str:
    """The name under which a backend's calls stand that were replayed from a graph."""
    return f"{backend} (graph)"


def _cases(path: Path, document: dict[str, Any]) -> tuple[Content, list[Content], list[str]]:
    """Head, a row per case and complaints of one document."""
    suite = document.get("kernel_suite")
    suite = suite if isinstance(suite, dict) else {}
    facts, sweep = suite.get("machine") or {}, suite.get("sweep")
    when = str(document.get("datetime", ""))
    alike = {"file": str(path), "datetime": when, "sweep": "" if sweep in _EXTENTS else str(sweep)}
    settings = _settings(document["benchmarks"])
    rows: list[Content] = []
    bad: Counter[str] = Counter()
    for benchmark in document["benchmarks"]:
        try:
            info = benchmark["extra_info"]
            _check_schema(info)
            where = machines.label(info.get("machine") or facts)
            row = {"machine": where} | alike | _timed(benchmark)
            is_step = info["operation"] == TRAINING_STEP
            rows.append(row | (_of_step(info) if is_step else _of_kernel(info, settings)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            bad[str(error) if type(error) is ValueError else "damaged cases"] += 1
    complaints = [f"{count} {reason}" for reason, count in bad.items()]
    if not document["benchmarks"]:
        complaints.append("an empty run")
    head = {
        "file": str(path),
        "datetime": when,
        "machine": machines.label(facts) if facts else "?",
        "facts": facts,
        "cases": len(rows),
        "sweep": sweep,
        **{name: suite.get(name) or {} for name in ("not_timed", "failed", "limits")},
    }
    return head, rows, complaints


def _check_schema(info: dict[str, Any]) -> None:
    version = info.get("schema")
    if version is None:
        raise ValueError("cases of another suite")
    if version != convert.SCHEMA:
        raise ValueError(f"cases of schema version {version!r}, this reads {convert.SCHEMA}")


def _timed(benchmark: dict[str, Any]) -> Content:
    """What every case has: its time, and what that is known from."""
    info, stats = benchmark["extra_info"], benchmark["stats"]
    row = {
        "name": str(benchmark["name"]),
        "device": info.get("device"),
        "median_s": _positive(stats["median"]),
        "q1_s": float(stats["q1"]),
        "q3_s": float(stats["q3"]),
        "rounds": int(stats["rounds"]),
    }
    row["error"] = _relative_error(row, info.get("median_interval_s"))
    row["seconds"] = _seconds(stats, row["rounds"])
    row["turns"] = info.get("turns")
    row["ratios"] = info.get("ratios") or {}
    dependence = turns.dependence(row["seconds"])
    row["error"] *= dependence
    row["independent_rounds"] = row["rounds"] / dependence**2
    return row


def _of_step(info: dict[str, Any]) -> Content:
    settings = {k: v for k, v in info["settings"].items() if k != "backend"}
    row = {name: info[name] for name in _STEP_COLUMNS} | {"info": info}
    row["peak_memory_bytes"] = info.get("peak_memory_bytes")
    row["case"] = f"{info['model']} {info['backend']} {sorted(settings.items())}"
    return row


def _of_kernel(info: dict[str, Any], settings: dict[Any, tuple[str, ...]]) -> Content:
    row = {name: info[name] for name in _KERNEL_COLUMNS} | {"info": info}
    if info.get("captured"):
        row["backend"] = _replayed(info["backend"])
    row["total_tokens"] = int(info.get("total_tokens") or 0)
    row["other_function"] = info.get("other_function")
    row["limit"] = info.get("limit")
    row["share_of_limit"] = info.get("share_of_limit")
    errors = [error["rms"] for error in info["error"].values()]
    row["worst_rms_error"] = max(errors, default=None)
    shape = info.get("shape") or {}
    names = settings.get(_of_one_plot(info), ())
    row["setting"] = ", ".join(f"{name} = {shape[name]}" for name in names if name in shape)
    for name in ("gb_per_s", "tflop_per_s"):
        row[name] = float("nan") if row[name] is None else float(row[name])
    return row


def _of_one_plot(info: dict[str, Any]) -> tuple[Any, Any]:
    return info.get("operation"), info.get("total_tokens")


def _settings(benchmarks: Iterable[Any]) -> dict[Any, tuple[str, ...]]:
    """By operation: the fields of its shapes that are no length, and what plots stand apart by.

    A length is a field of such a name, or one that is N in every case, of several; where the tokens
    of a call are given, the batch follows from the length, too.
    """
    shapes: dict[Any, list[tuple[Any, Content]]] = {}
    for benchmark in benchmarks:
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        if isinstance(info, dict) and isinstance(info.get("shape"), dict):
            shapes.setdefault(_of_one_plot(info), []).append((info.get("N"), info["shape"]))
    settings = {}
    for (operation, total), found in shapes.items():
        several = len({tokens for tokens, _ in found}) > 1
        lengths = {*LENGTHS, *(("B",) if total else ())}
        names = dict.fromkeys(name for _, shape in found for name in shape if name not in lengths)
        settings[operation, total] = tuple(
            name
            for name in names
            if not (several and all(shape.get(name) == tokens for tokens, shape in found))
        )
    return settings


def _relative_error(row: dict[str, Any], interval: list[float] | None) -> float:
    """Standard error of the median, over the median; NaN where no round is known.

    From its 95 % bootstrap interval; where a run does not have that, from the quartiles of the
    rounds.
    """
    if interval is not None:
        return (float(interval[1]) - float(interval[0])) / (2 * 1.96) / row["median_s"]
    if not row["rounds"]:
        return float("nan")
    return turns.error_of_median(row["q1_s"], row["q3_s"], row["rounds"]) / row["median_s"]


def _seconds(stats: dict[str, Any], rounds: int) -> np.ndarray:
    """The rounds as they followed one another, none where the run does not have them."""
    seconds = np.array([_positive(value) for value in stats.get("data") or ()])
    return seconds if len(seconds) == rounds else np.empty(0)


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError("cases without a positive time")
    return number


def _newest(frame: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    if frame.empty:
        return frame
    newest = frame.sort_values("datetime", kind="stable").drop_duplicates(key, keep="last")
    return newest.sort_index().reset_index(drop=True)
