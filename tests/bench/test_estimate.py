"""Estimates against what is measured: memory is never under it, and not wildly over it."""

from pathlib import Path

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench import estimate
from linear_vit.bench.instruments import memory
from linear_vit.bench.problems import (
    PASSES,
    AttentionShape,
    Case,
    RippleShape,
    Shape,
    case_name,
    make_problem,
    parse_case,
)
from linear_vit.bench.problems import operation as operation_of
from linear_vit.bench.progress import Countdown, clock
from linear_vit.bench.sweep import Asked, make_sweep

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("mode", PASSES)
@pytest.mark.parametrize("operation", ["linear_attention", "softmax_attention", "ripple_expand"])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_working_set_bounds_what_is_measured(operation: str, mode: str, backend: str) -> None:
    if kernels.backends(operation, CPU, head_dim=64)[backend] is not None:
        pytest.skip("not usable here")
    shape = operation_of(operation).shape(1024)
    call = make_problem(operation, shape, torch.float32, CPU).call(backend, mode)
    call()
    peak, _ = memory.peak_beyond_outputs(call, CPU)
    assert peak is not None
    bound = operation_of(operation).working_set(mode, backend, shape)
    assert peak <= bound + MIB
    assert bound <= 12 * peak + 64 * MIB


def test_cases_that_do_not_fit_are_left_out_with_the_estimate(monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 400 * MIB)
    sweep = make_sweep(
        Asked(device="cpu", operations=["linear_attention"], backends=["torch"], tokens=[64, 2**18])
    )
    assert {case.shape.tokens for case in sweep.cases} == {64}
    reasons = [why for what, why in sweep.left_out.items() if "N from 262144" in what]
    assert len(reasons) == 2
    assert all("GiB, 0.4 GiB are free" in why for why in reasons)


def test_matrices_count(monkeypatch) -> None:
    """Softmax attention that stores them needs N × M, the fused one does not."""
    long = operation_of("softmax_attention").shape(32_768)
    case = Case("softmax_attention", "forward", "float32", long, "reference")
    assert estimate.memory_bytes(case) > 6 * 32_768**2 * 4
    fused = Case("softmax_attention", "forward", "float32", long, "torch")
    assert estimate.memory_bytes(fused) < 6 * 32_768**2 * 4


def test_memory_that_is_free(tmp_path: Path) -> None:
    assert estimate.does_not_fit(90, 100) is None
    assert estimate.does_not_fit(91, 100)
    assert estimate.does_not_fit(10**18, None) is None
    available = memory.available_bytes(CPU)
    assert available is not None
    assert MIB < available < 2**45
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory._of_cgroup(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_cgroup(tmp_path) is None


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        ("linear_attention", AttentionShape(1, 6, 6, 128, 128, 64)),
        ("linear_attention", AttentionShape(4, 16, 4, 128, 64, 32)),
        ("softmax_attention_packed", AttentionShape(4, 6, 6, 128, 128, 64)),
        ("ripple_pool", RippleShape(1, 8, 8, 384)),
        ("ripple_expand_stages", RippleShape(3, 2, 32, 48, 1)),
    ],
)
@pytest.mark.parametrize("captured", [False, True])
def test_names_of_cases_can_be_read_back(operation: str, shape: Shape, captured: bool) -> None:
    case = Case(operation, "forward+backward", "bfloat16", shape, "sdpa_math", captured)
    assert parse_case(case_name(case)) == case
    with pytest.raises(ValueError, match="is no case's name"):
        parse_case("linear_attention")


def test_time_left_is_scaled_by_what_was_seen(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("linear_vit.bench.progress.time.monotonic", lambda: now[0])
    progress = Countdown(["a", "b", "c"], {"a": 1.0, "b": 2.0, "c": 4.0}, None)
    assert progress.times() == (0.0, 7.0)
    now[0] = 3.0  # three times as long as estimated
    progress.done("a", "")
    assert progress.times() == (3.0, 18.0)
    progress.skip("b")
    progress.done("b", "")
    assert progress.times() == (3.0, 12.0)
    assert not progress.finished
    progress.done("c", "")
    assert progress.finished
    assert (clock(59.9), clock(3723)) == ("0:59", "1:02:03")
