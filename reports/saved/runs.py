"""Saved benchmark runs, as pandas tables; files that are none are named and left out."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from linear_vit.reports.statistics import turns

# The version of a case's extra_info that this file reads.
SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = Path("reports/out")
MEASUREMENTS = ROOT / "measurements"
HOW_TO_MEASURE = "pytest --benchmark-only --benchmark-json=reports/out/benchmark.json"

_KERNEL_COLUMNS = {
    "operation": "operation",
    "backend": "backend",
    "pass": "pass",
    "dtype": "dtype",
    "N": "N",
    "implementation": "implementation",
    "gb_per_s": "gb_per_s",
    "tflop_per_s": "tflop_per_s",
    "peak_memory_bytes": "peak_memory_bytes",
    "least_bytes": "least_bytes",
    "clock": "clock",
}
_CASE = ["machine", "total_tokens", "operation", "pass", "dtype", "N", "backend"]


class NoRuns(Exception):
    """Nothing to report on; the message says what makes something."""


@dataclass
class Runs:
    """Measured cases of one or several saved runs.

    ``kernels``: a row per case, with the columns of ``_KERNEL_COLUMNS``, ``machine`` (a label),
    ``median_s``, its standard ``error`` over itself, ``q1_s``, ``q3_s``, ``rounds``, how many
    ``independent_rounds`` these are worth, the ``seconds`` of each (empty where they were not
    saved), ``turns`` (alike for cases whose rounds took turns, else None), ``file`` and
    ``total_tokens``: 0 where a call is one sequence of N tokens, else how many tokens the sequences
    of a call have together; ``other_function`` says what a peer computes instead. ``training``: a
    row per training step. ``skipped``: a line per file that could not be used. ``heads``: per file,
    where and when.
    """

    kernels: pd.DataFrame
    training: pd.DataFrame
    heads: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """What a notebook shows: a table and plots."""
        from linear_vit.reports import notebook

        return notebook.show(self)


def load(paths: Sequence[Path]) -> Runs:
    """Read saved runs from files and folders (searched with their sub-folders).

    A case that several runs on one machine measured is taken from the newest. What is no run of
    this suite, is damaged, or has another schema version is named in ``skipped``.

    Raises:
        NoRuns: no path holds a run.
    """
    kernels: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    skipped: list[str] = []
    for path, explicit in _files(paths, skipped):
        try:
            document = _read(path)
        except _OurOwn as other:
            if explicit:
                skipped.append(f"{path}: {other}")
            continue
        except ValueError as error:
            skipped.append(f"{path}: {error}")
            continue
        head, kernel_rows, training_rows, complaints = _rows(path, document)
        skipped += [f"{path}: {complaint}" for complaint in complaints]
        if kernel_rows or training_rows:
            heads.append(head)
            kernels += kernel_rows
            training += training_rows
    if not heads:
        detail = "".join(f"\n  skipped {line}" for line in skipped)
        raise NoRuns(f"no saved benchmark run found. Make one with: {HOW_TO_MEASURE}{detail}")
    heads.sort(key=lambda head: head["datetime"])
    return Runs(
        _newest(pd.DataFrame(kernels), _CASE),
        _newest(pd.DataFrame(training), ["machine", "model", "backend"]),
        heads,
        skipped,
    )


def default_paths(out: Path = DEFAULT_OUT) -> list[Path]:
    """The newest run in ``out``, else the repository's own measurements."""
    candidates = []
    for path in sorted(out.glob("*.json")) if out.is_dir() else []:
        try:
            candidates.append((str(_read(path)["datetime"]), path))
        except (_OurOwn, ValueError, KeyError):
            continue
    if candidates:
        return [max(candidates)[1]]
    return [MEASUREMENTS]


class _OurOwn(Exception):
    """A JSON file of this suite that is something else than a benchmark run."""


def _files(paths: Iterable[Path], skipped: list[str]) -> Iterable[tuple[Path, bool]]:
    for path in paths:
        if path.is_dir():
            yield from ((found, False) for found in sorted(path.rglob("*.json")))
        elif path.exists():
            yield path, True
        else:
            skipped.append(f"{path}: there is no such file or folder")


def _read(path: Path) -> dict[str, Any]:
    """A pytest-benchmark document; ValueError says what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"unreadable ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"damaged: no valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError("no benchmark run: not a JSON object")
    if not isinstance(document.get("benchmarks"), list):
        if isinstance(document.get("kind"), str) or str(document.get("schema")).startswith(
            "linear"
        ):
            raise _OurOwn(f"no benchmark run, but {document.get('kind') or document['schema']}")
        raise ValueError("no benchmark run: it has no list of benchmarks")
    return document


def _rows(
    path: Path, document: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Head, kernel rows, training rows and complaints of one document."""
    kernels: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    bad: dict[str, int] = {}
    facts: dict[str, Any] = {}
    when = str(document.get("datetime", ""))
    for benchmark in document["benchmarks"]:
        try:
            info, stats = benchmark["extra_info"], benchmark["stats"]
            version = info.get("schema")
            if version is None:
                raise ValueError("cases of another suite")
            if version != SCHEMA:
                raise ValueError(f"cases of schema version {version!r}, this reads {SCHEMA}")
            facts = info["machine"]
            row = {
                "machine": machine_label(facts),
                "file": str(path),
                "datetime": when,
                "device": info["device"],
                "median_s": _positive(stats["median"]),
                "q1_s": float(stats["q1"]),
                "q3_s": float(stats["q3"]),
                "rounds": int(stats["rounds"]),
            }
            row["error"] = _relative_error(row, info.get("median_interval_s"))
            row["seconds"] = _seconds(stats, row["rounds"])
            row["turns"] = info.get("turns")
            dependence = turns.dependence(row["seconds"])
            row["error"] *= dependence
            row["independent_rounds"] = row["rounds"] / dependence**2
            if info["operation"] == "training_step":
                names = ("model", "model_title", "backend", "dtype", "images_per_s")
                row.update({name: info[name] for name in names})
                row["settings"] = info["settings"]
                row["peak_memory_bytes"] = info.get("peak_memory_bytes")
                training.append(row)
            else:
                row.update({column: info[name] for column, name in _KERNEL_COLUMNS.items()})
                row["total_tokens"] = int(info.get("total_tokens") or 0)
                row["other_function"] = info.get("other_function")
                row["limit"] = info.get("limit")
                row["share_of_limit"] = info.get("share_of_limit")
                row["worst_rms_error"] = max(
                    (error["rms"] for error in info["error"].values()), default=None
                )
                kernels.append(row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else "damaged cases"
            bad[reason] = bad.get(reason, 0) + 1
    complaints = [f"{count} {reason}" for reason, count in bad.items()]
    if not document["benchmarks"]:
        complaints.append("an empty run")
    suite = document.get("kernel_suite")
    suite = suite if isinstance(suite, dict) else {}
    head = {
        "file": str(path),
        "datetime": when,
        "machine": machine_label(facts) if facts else "?",
        "facts": facts,
        "cases": len(kernels) + len(training),
        "not_timed": suite.get("not_timed", {}),
        "failed": suite.get("failed", {}),
        "sweep": suite.get("sweep"),
    }
    return head, kernels, training, complaints


def _relative_error(row: dict[str, Any], interval: list[float] | None) -> float:
    """Standard error of the median, over the median.

    From its 95 % bootstrap interval; where a run does not have that, from the quartiles of the
    rounds.
    """
    if interval is not None:
        return (float(interval[1]) - float(interval[0])) / (2 * 1.96) / row["median_s"]
    return turns.error_of_median(row["q1_s"], row["q3_s"], row["rounds"]) / row["median_s"]


def machine_label(facts: dict[str, Any]) -> str:
    """One line that tells the machines of a report apart."""
    if facts["device"] == "cuda":
        return f"{facts['device_name']}, torch {facts['torch']}"
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    memory = f", freed memory {facts['memory']}" if facts.get("memory") else ""
    return f"{facts['cpu']}, {threads}, torch {facts['torch']}{memory}"


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
