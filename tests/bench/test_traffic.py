"""Every token is loaded once and stored once, counted while Triton's interpreter runs."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.problems import FORWARD, FORWARD_BACKWARD, AttentionShape, least_work
from tests.kernels.test_triton import ROOT, interpreter_reason, pytestmark

__all__ = ["pytestmark"]

TOKENS = {"q", "k", "v", "qkv", "out", "dout", "dq", "dk", "dv", "dqkv"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.traffic", *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )


@cache
def counted(folder: Path, *arguments: str) -> tuple[dict[str, Any], ...]:
    reason = interpreter_reason()
    if reason:
        pytest.skip(reason)
    file = folder / ("-".join(arguments).replace(",", "_") + ".json")
    done = run(*arguments, "--json", str(file), "--csv", str(file.with_suffix(".csv")))
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
    """Exactly the least of every tensor of tokens, and at most 8 % of workspace beside it."""
    short_keys = 256  # read again in the backward rather than S
    for row in rows:
        shape = shape_of(row)
        label = f"{row['operation']} {row['pass']} {row['dtype']} {row['shape']} {row['tensor']}"
        if row["tensor"] in TOKENS:
            again = row["pass"] == "backward" and short_keys >= shape.M
            assert row["distinct"] == row["least_loaded"], label
            assert row["stored"] == row["least_stored"], label
            if again and row["tensor"] in ("k", "v", "qkv"):
                assert row["loaded"] <= 2 * row["least_loaded"], label
            else:
                assert row["loaded"] == row["least_loaded"], label
        elif row["tensor"] == "workspace":
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
        forward = least_work(row["operation"], FORWARD, shape_of(row), row_size(row)).bytes
        both = least_work(row["operation"], FORWARD_BACKWARD, shape_of(row), row_size(row)).bytes
        assert mode_total == (forward if row["pass"] == "forward" else both - forward)


def row_size(row: dict[str, Any]) -> int:
    return 4 if row["dtype"] == "float32" else 2


def test_linear_attention_reads_and_writes_every_token_once(folder: Path) -> None:
    rows = counted(folder, "--ops", "linear_attention", "--dtypes", "bfloat16")
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["tensor"] for row in rows} == (TOKENS - {"qkv", "dqkv"}) | {"workspace"}
    held(rows)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["linear_attention", "linear_attention_packed"])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_half_precision_at_other_head_dims(folder: Path, operation: str, head_dim: int) -> None:
    held(
        counted(folder, "--ops", operation, "--dtypes", "float16", "--head-dims", str(head_dim))
    )  # fmt: skip


def test_an_unknown_operation_is_named() -> None:
    done = run("--ops", "linear_attenshun")
    assert done.returncode == 2
    assert "no operation 'linear_attenshun'; there are linear_attention" in done.stderr
