"""Every field of every kind of saved file, damaged in every way: a line, and never a traceback.

The files are the repository's own, with few of their cases and rows.
"""

import csv
import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports.__main__ import main
from linear_vit.reports.saved import records, runs
from tests.reports import saved, test_convert

MEASUREMENTS = runs.MEASUREMENTS
XEON = MEASUREMENTS / "xeon-2.5ghz-2-cores"
(A_RUN, *_) = sorted(XEON.glob("training/ablation-runs/digits-ripple-*/run.json"))
FILES = {
    "run.json": A_RUN,
    "table.json": XEON / "training/table.json",
    "ablation-ripple_stages.json": XEON / "training/ablation-ripple_stages.json",
    "step-breakdown.json": XEON / "training/step-breakdown.json",
    "check.json": XEON / "check.json",
    "static-cuda.json": MEASUREMENTS / "static/static-cuda.json",
    "traffic.json": MEASUREMENTS / "static/traffic.json",
    "benchmark.json": XEON / "benchmark.json",
    "cpu.json": XEON / "cpu.json",
    "step-speed.json": XEON / "training/step-speed.json",
}
TIMED = ("benchmark.json", "cpu.json", "step-speed.json")
MISSING = object()
HOW: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "an object": {"damaged": 1},
    "text": "abc",
    "NaN": math.nan,
    "negative": -64,
    "huge": 1e300,
}

# What no report reads, or what may hold anything.
UNREAD = {
    # of pytest-benchmark
    "machine_info", "commit_info", "version", "group", "fullname", "params", "param", "options",
    "min", "max", "mean", "stddev", "iqr", "iqr_outliers", "stddev_outliers", "outliers", "ld15iqr",
    "hd15iqr", "ops", "total", "iterations",
    # of a machine, a run, and a case
    "python", "platform", "cpu_capability", "triton", "system", "driver", "affinity", "cpu_quota",
    "kernels", "kind",
    "out_of_memory", "interrupted", "resumed", "sources", "energy_how", "profile",
    "peak_memory_how", "rms_tolerance", "max_tolerance", "calls_per_round", "relative_iqr", "stop",
    "host_s",
    "telemetry", "matmul_s", "flop_done",
    # of a training run and a table
    "ripple_stages", "hydra_branches", "dropout", "drop_path", "accumulate", "weight_decay",
    "warmup_epochs", "label_smoothing", "clip", "train_accuracy_is", "epoch", "loss",
    "train_accuracy", "best_epoch", "attention_type", "best", "claimed_best",
    # of what is compiled and counted
    "toolchain", "layout", "configuration", "loops", "steady_fma",
    "steady_load_store", "steady_other", "steady_bytes", "steady_unknown",
    "stack", "blocks_per_multiprocessor", "tf32",  "narrow_loads",
    "narrow_stores", "local", "float_atomics", "architecture", "multiprocessors", "least_loaded",
    "least_stored", "max_error", "passed",
}  # fmt: skip
UNREAD_PATHS = re.compile(
    r"limits|claims\.(accuracy|speedup|best)|rows\[0\]\.(threads|fma)$|epochs\[0\].lr|seconds$|ablations|kernel_suite\.device"
    r"|.*\.settings\.(?!dataset|dim|depth|patch_size|batch_size|backend)"
)
# What may be missing, or null.
OPTIONAL = {
    "cores", "processes", "device_name", "git", "revision", "memory", "sweep", "limits", "datetime",
    "operations", "backends", "not_timed", "failed", "created", "started", "speeds", "colour",
    "machine", "device", "clock", "turns", "captured", "peak_memory_bytes", "median_interval_s",
    "ratios", "ran", "cache", "energy_per_call_j", "shape", "total_tokens", "implementation",
    "other_function", "error", "least_bytes", "least_flop", "gb_per_s", "tflop_per_s", "limit",
    "share_of_limit", "limits_s", "bounds_s", "data", "copy_bytes_per_s", "matmul_flop_per_s",
    "launch_s", "measured", "probes", "backend", "model_title", "peak_memory", "images", "how",
    "exponent", "pass", "dtype", "values", "half_width", "accuracy", "images_per_second", "speedup",
    "spill_stores", "spill_loads",
    "gain", "time_to_baseline", "hours_200_epochs", "claim", "parameters", "arithmetic",
    "exponents", "seconds", "reason", "tensors", "rms_error", "head_dim", "dynamic_shared",
    "second_clock", "occupancy", "ratio", "peak_memory_gb", "B", "H", "Hk", "N", "M", "D",
    "steady", "steady_barriers", "steady_tensor_core", "issue_us", "copy_us", "copy_share",
    "matmul_kernels",
}  # fmt: skip
# Dicts by name, of which any item may be missing.
FREE = {"operations", "backends", "not_timed", "failed", "hours_200_epochs", "ratios", "error"}
FREE |= {"matmul_flop_per_s", "matmul_kernels", "limits_s", "bounds_s"}


def cut(document: Any, most: int = 2) -> Any:
    """With lists and dicts of many alike cut to their first items."""
    if isinstance(document, dict):
        return {name: cut(item, most) for name, item in document.items()}
    if isinstance(document, list):
        return [cut(item, most) for item in document[:most]]
    return document


def content(name: str) -> dict[str, Any]:
    document = json.loads(FILES[name].read_text())
    if name in TIMED:
        benchmarks = document["benchmarks"]
        kept = benchmarks[:1] + [b for b in benchmarks if "training_step" in b["name"]][:1]
        kept += [b for b in benchmarks if "bounds_s" in b["extra_info"]][:1]
        document["benchmarks"] = kept + benchmarks[1:2]
        kept[0]["extra_info"]["disturbed"] = None
        second = {"seconds": 1e-3, "difference": 0.02, "clock": "CUPTI"}
        kept[0]["extra_info"]["second_clock"] = second
        for one in document["benchmarks"]:
            if one["stats"]["data"]:
                one["stats"] |= {"data": one["stats"]["data"][:8], "rounds": 8}
        return document | {"machine_info": {}}
    if name == "ablation-ripple_stages.json":
        document["best"] = document["rows"][0]["value"]
    return cut(document)


def places(
    value: Any, path: tuple[str | int, ...] = (), every: bool = False
) -> Iterator[tuple[str | int, ...]]:
    """The way to every field; of a list, to its first item, or to every one."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield (*path, name)
            yield from places(item, (*path, name), every)
    elif isinstance(value, list):
        for i, item in enumerate(value if every else value[:1]):
            yield (*path, i)
            yield from places(item, (*path, i), every)


def damaged(document: Any, path: tuple[str | int, ...], how: str) -> Any:
    made = json.loads(json.dumps(document))
    at = made
    for name in path[:-1]:
        at = at[name]
    if HOW[how] is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = HOW[how]
    return made


def is_named(path: tuple[str | int, ...], value: Any, how: str) -> bool:
    """Whether a reader has to notice that this field is damaged in this way."""
    if UNREAD & set(path) or UNREAD_PATHS.match(field(path)):
        return False
    name, free = path[-1], len(path) > 1 and path[-2] in FREE
    if how in ("missing", "null"):
        item = isinstance(name, int) or free
        return not (name in OPTIONAL or (how == "missing" and item) or value is None)
    if how == "text":
        return value is not None and not (isinstance(value, str) and name not in CHECKED_WORDS)
    if how == "an object":
        return value is not None and not isinstance(value, dict)
    return True


CHECKED_WORDS = ("created", "started", "datetime", "measured", "colour", "schema", "status",
                 "verdict", "how")  # fmt: skip


def lines_of(folder: Path, name: str) -> list[str]:
    if name in TIMED:
        return runs.newest_of_each(folder).skipped
    kind = next(kind for kind, (pattern, _) in records.KINDS.items() if Path(name).match(pattern))
    return records.below(folder, kind)[1]


def field(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in path).strip(".")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_field_is_named(tmp_path: Path, name: str) -> None:
    whole = content(name)
    file = saved.save(tmp_path / name, whole)
    assert lines_of(tmp_path, name) == []
    named = [
        (path, how)
        for path in places(whole)
        for how in HOW
        if is_named(path, value_at(whole, path), how)
    ]
    assert len(named) > 50
    for path, how in named:
        file.write_text(json.dumps(damaged(whole, path, how)))
        lines = lines_of(tmp_path, name)
        assert lines, (field(path), how)
        text = next(str(step) for step in reversed(path) if isinstance(step, str))
        assert all(str(file) in line for line in lines)
        assert any(text in line for line in lines), (field(path), how, lines)


def value_at(document: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def commands(folder: Path, name: str) -> list[list[str]]:
    file, out = str(folder / name), str(folder / "out")
    asked = [["page", "--results", str(folder), "--out", f"{out}/index.html"]]
    for other in ("static-cuda.json", "traffic.json"):  # else the page reads the repository's
        if not (folder / other).exists():
            saved.save(folder / other, content(other))
    if name == "run.json" or name.startswith("ablation"):
        asked += [["table", str(folder), "--out", out, "--ablations", str(folder)]]
    if name in TIMED:
        asked += [["compare", file, file], ["compare", "--baseline", "torch", file]]
        asked += [["targets", file], ["table", str(folder), "--speeds", file, "--out", out]]
    if name == "benchmark.json":
        asked += [["scaling", file, "--out", out]]
    return asked


@pytest.mark.parametrize(
    "how",
    [h if h in ("missing", "null") else pytest.param(h, marks=pytest.mark.slow) for h in HOW],
)
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_named_is_no_matter(tmp_path: Path, name: str, how: str, capsys) -> None:
    """Every damage together that no reader names: no command falls over it."""
    whole = content(name)
    for path in reversed(list(places(whole))):
        if not is_named(path, value_at(whole, path), how):
            whole = damaged(whole, path, how)
    saved.save(tmp_path / name, whole)
    for command in commands(tmp_path, name):
        assert main(command) in (0, 1, 2)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in TIMED else n for n in FILES]
)
def test_a_column_that_no_row_has_is_no_matter(tmp_path: Path, name: str) -> None:
    """As in a file of an older version: another thing than a cell that is empty."""
    whole = content(name)
    ways = list(places(whole, every=True))
    for column in sorted({str(path[-1]) for path in ways} & OPTIONAL):
        lacks = whole
        for path in ways:
            if path[-1] == column:
                lacks = damaged(lacks, path, "missing")
        saved.save(tmp_path / name, lacks)
        for command in commands(tmp_path, name):
            assert main(command) in (0, 1, 2), (column, command)


SAID: list[tuple[str, tuple[str | int, ...], str, str]] = [
    ("run.json", ("test_accuracy",), "missing", "test_accuracy: missing"),
    ("run.json", ("images_per_second",), "null", "images_per_second: should be a valid number"),
    ("run.json", ("config", "dataset"), "text", "config.dataset: an unknown data set, 'abc'"),
    ("run.json", ("epochs", 0, "val_accuracy"), "NaN", "epochs[0].val_accuracy: not a finite"),
    ("benchmark.json", ("benchmarks", 0, "stats", "q1"), "NaN", "benchmarks[0].stats.q1: not a"),
    ("benchmark.json", ("benchmarks", 0, "extra_info", "N"), "text", "benchmarks[0].extra_info.N:"),
    ("benchmark.json", ("benchmarks", 0, "extra_info", "N"), "negative", "benchmarks[0].extra_"),
    ("step-speed.json", ("kernel_suite", "machine"), "null", "kernel_suite.machine: should be"),
]


@pytest.mark.parametrize(("name", "path", "how", "words"), SAID)
def test_every_command_says_it(
    tmp_path: Path, capsys, name: str, path: tuple[str | int, ...], how: str, words: str
) -> None:
    """And goes on with the rest."""
    for one in ("run.json", "benchmark.json", "step-speed.json"):
        saved.save(tmp_path / one, content(one))
    saved.save(tmp_path / "bad" / name, damaged(content(name), path, how))
    for command in commands(tmp_path, "run.json"):
        assert main(command) == 0
    line, good = f"{tmp_path / 'bad' / name}: {words}", str(tmp_path / "benchmark.json")
    if name == "run.json":  # which tables read, and the page does not
        assert f"skipped {line}" in capsys.readouterr().out
        return
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"Skipped {line}" in html.unescape(page)
    for command in (
        ["scaling", "--out", str(tmp_path), good],
        ["compare", "--baseline", "torch", good],
        ["compare", good],
        ["targets"],
    ):
        assert main([*command, str(tmp_path / "bad")]) in (0, 2)
        assert f"skipped {line}" in capsys.readouterr().err


def test_more_than_all_of_it_is_out_of_range(tmp_path: Path) -> None:
    """What was shown as 750.0 %."""
    file = saved.save(tmp_path / "run.json", content("run.json") | {"test_accuracy": 7.5})
    assert records.read_runs(tmp_path) == ([], [f"{file}: test_accuracy: {TOO_MUCH}, not 7.5"])


TOO_MUCH = "should be less than or equal to 1"


@pytest.mark.parametrize("column", ["machine", "operation", "exponent", "low", "high"])
@pytest.mark.parametrize("cell", ["abc", "nan", "-64", "1e300", ""])
def test_a_damaged_exponent_is_named(tmp_path: Path, column: str, cell: str) -> None:
    path = tmp_path / "exponents.csv"
    rows = list(csv.DictReader((XEON / "exponents.csv").open()))[:3]
    rows[1][column] = cell
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found, skipped = records.read_exponents(path)
    if column in ("machine", "operation") and cell:  # a name may be anything
        assert (len(found), skipped) == (3, [])
    else:
        assert len(found) == 2
        assert [line.startswith(f"{path}: line 3: {column}: ") for line in skipped] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("kind", test_convert.documents())
def test_a_damaged_file_of_an_older_version_costs_no_traceback(tmp_path: Path, kind: str) -> None:
    whole = cut(test_convert.documents()[kind], 8)
    file = saved.save(tmp_path / "run.json", whole)
    for path in places(whole):
        for how in HOW:
            file.write_text(json.dumps(damaged(whole, path, how)))
            assert all(str(file) in line for line in runs.newest_of_each(tmp_path).skipped)


def test_measuring_needs_no_library_of_the_schema() -> None:
    code = "import sys; sys.modules['pydantic'] = None; import linear_vit.bench.plugin"
    code += "; import linear_vit.bench.__main__, linear_vit.training.steps"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
