"""Every token is loaded once and stored once, counted while Triton's interpreter runs."""

import csv
import json
import re
import subprocess
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from linear_vit.bench import traffic
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    least_work,
    operation,
)
from tests import processes
from tests.kernels.test_triton import interpreter_reason, pytestmark

__all__ = ["pytestmark"]

TOKENS = {"q", "k", "v", "qkv", "out", "dout", "dq", "dk", "dv", "dqkv"}
# How often a tensor is read where k and v are read twice.
AGAIN = {"k": 2, "v": 2, "qkv": Fraction(5, 3)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.python("-m", "bench", "traffic", *arguments, timeout=3000)


@cache
def counted(folder: Path, *arguments: str) -> tuple[dict[str, Any], ...]:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    file = folder / ("-".join(arguments).replace(",", "_") + ".json")
    done = run(*arguments, "--out", str(file), "--csv", str(file.with_suffix(".csv")))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    document = json.loads(file.read_text())
    assert document["kind"] == "traffic"
    assert document["schema"] == 1
    assert document["machine"]["triton"]
    with file.with_suffix(".csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(document["rows"])
    return tuple(document["rows"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traffic")


def shape_of(row: dict[str, Any]) -> AttentionShape:
    return AttentionShape(**{k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row["shape"])})


def held(rows: tuple[dict[str, Any], ...]) -> None:
    """Exactly the least of every tensor of tokens, and at most 8 % of workspace beside it.

    One exception: where the backward's one launch works the state out again from the keys, it reads
    them once more.
    """
    short_keys = 256
    for row in rows:
        shape = shape_of(row)
        label = f"{row['operation']} {row['pass']} {row['dtype']} {row['shape']} {row['tensor']}"
        if row["tensor"] in TOKENS:
            again = row["pass"] == "backward" and short_keys >= shape.M
            times = AGAIN.get(row["tensor"], 1) if again else 1
            assert row["distinct"] == row["least_loaded"], label
            assert row["stored"] == row["least_stored"], label
            assert row["loaded"] == times * row["least_loaded"], label
        elif row["tensor"] == "workspace":
            if shape.Hk == shape.H:
                assert row["ratio"] <= 0.08, f"{label}: {row['ratio']}"
            if short_keys >= shape.M:
                assert row["loaded"] == row["stored"] == 0, f"{label}: one launch needs none"
                assert len(row["launches"].split()) == 1, label
    for row in rows:
        mode_total = sum(
            r["least_loaded"] + r["least_stored"]
            for r in rows
            if (r["pass"], r["shape"]) == (row["pass"], row["shape"])
        )
        forward = least_work(
            operation(row["operation"]), FORWARD, shape_of(row), row_size(row)
        ).bytes
        both = least_work(
            operation(row["operation"]), FORWARD_BACKWARD, shape_of(row), row_size(row)
        ).bytes
        assert mode_total == (forward if row["pass"] == "forward" else both - forward)


def row_size(row: dict[str, Any]) -> int:
    return 4 if row["dtype"] == "float32" else 2


PACKED = {"qkv", "out", "dout", "dqkv"}


@pytest.mark.parametrize(
    ("operation", "head_dim", "tokens"),
    [
        pytest.param("linear_attention_packed", 16, PACKED, marks=pytest.mark.slow),
        pytest.param("linear_attention", 64, TOKENS - {"qkv", "dqkv"}, marks=pytest.mark.slow),
    ],
)
def test_every_token_is_read_and_written_once(
    folder: Path, operation: str, head_dim: int, tokens: set[str]
) -> None:
    options = ("--dtypes", "bfloat16", "--head-dims", str(head_dim))
    rows = counted(folder, "--ops", operation, *options)
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["tensor"] for row in rows} == tokens | {"workspace"}
    held(rows)


@pytest.mark.slow
def test_ripple_stores_once_and_reads_nothing_but_its_taps(folder: Path) -> None:
    """Each output once; of inputs all and nothing else, each element for at most 3×3 taps and z."""
    rows = counted(folder, "--ops", "ripple_pool,ripple_expand", "--dtypes", "bfloat16")
    assert {row["operation"] for row in rows} == {"ripple_pool", "ripple_expand"}
    moved = {"x", "z", "weight", "lateral_weight", "out", "dout", "dx", "dz", "dweight"}
    assert moved <= {row["tensor"] for row in rows}
    for row in rows:
        label = f"{row['operation']} {row['pass']} {row['shape']} {row['tensor']}"
        if row["tensor"] != "workspace":
            assert row["distinct"] == row["least_loaded"], label
            assert row["stored"] == row["least_stored"], label
        if row["tensor"] in ("x", "z", "dout"):
            assert row["loaded"] <= 10 * row["least_loaded"], label


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "head_dim"),
    [("linear_attention", 16), ("linear_attention", 48), ("linear_attention_packed", 64)],
)
def test_half_precision_at_other_head_dims(folder: Path, operation: str, head_dim: int) -> None:
    held(
        counted(folder, "--ops", operation, "--dtypes", "float16", "--head-dims", str(head_dim))
    )  # fmt: skip


@pytest.mark.slow
def test_what_wide_heads_read_again_is_said(folder: Path) -> None:
    """At D = 96 the forward reads once and the backward streams, as triton.py's header says."""
    rows = counted(folder, "--ops", "linear_attention", "--dtypes", "bfloat16", "--head-dims", "96")
    again = {(row["pass"], row["tensor"]) for row in rows if traffic.read_again(row)}
    assert {tensor for mode, tensor in again if mode == "forward"} == set()
    assert {"q", "dout"} <= {tensor for mode, tensor in again if mode == "backward"}
    assert f"{len([r for r in rows if traffic.read_again(r)])} read more than once" in (
        traffic.render(list(rows))
    )


def test_the_table_names_what_is_read_again() -> None:
    row = {"operation": "linear_attention", "pass": "backward", "dtype": "float32"}
    row |= {"architecture": "sm_90", "shape": "B=1", "launches": "_a _b", "tensor": "q"}
    row |= {"loaded": 300, "distinct": 100, "stored": 0, "least_loaded": 100, "least_stored": 0}
    rows = [row | {"ratio": 3.0}, row | {"tensor": "k", "loaded": 100, "ratio": 1.0}]
    text = traffic.render(rows)
    assert "READ AGAIN linear_attention backward float32 sm_90 B=1: q 3.00 times" in text
    assert text.endswith("2 tensors counted, 1 read more than once\n")


def test_an_unknown_operation_is_named() -> None:
    done = run("--ops", "linear_attenshun")
    assert done.returncode == 2
    assert "unknown operation 'linear_attenshun'; there are linear_attention" in done.stderr
