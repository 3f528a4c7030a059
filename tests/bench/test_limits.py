"""The limits, and which of them binds."""

import time

import pytest
import torch

from linear_vit.bench.instruments import limits
from linear_vit.bench.instruments.limits import Limits
from linear_vit.bench.problems import Work

KNOWN = Limits(
    copy_bytes_per_s=1e10, matmul_flop_per_s={"float32": 1e11, "bfloat16": 1e12}, launch_s=1e-6
)


@pytest.mark.parametrize(
    ("work", "dtype", "binding", "seconds"),
    [
        (Work(bytes=10**9, flop=10**9), "float32", "copy", 0.1),
        (Work(bytes=10**9, flop=10**11), "float32", "float32 matmul", 1.0),
        (Work(bytes=2 * 10**9, flop=10**11), "bfloat16", "copy", 0.2),
    ],
)
def test_the_longer_time_binds(work: Work, dtype: str, binding: str, seconds: float) -> None:
    allowed = KNOWN.least_seconds(work.bytes, work.flop, dtype)
    name, least = max(allowed.items(), key=lambda item: item[1])
    assert name == binding
    assert least == pytest.approx(seconds)


@pytest.fixture(scope="module")
def found() -> Limits:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_BUDGET_S", 0.02)
        probes = {"adds": lambda: torch.ones(1000).sum().item()}
        return limits.measure(torch.device("cpu"), ("float32",), probes)


def test_rates_are_those_of_the_machine(found: Limits) -> None:
    """Of the order of magnitude that a plain round here shows, and a copy is not free."""
    a = torch.randn(512, 512)
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        rounds.append(time.perf_counter() - start)
    # A wrong unit or count of FLOP is off by more than what a busy machine takes away.
    assert found.matmul_flop_per_s["float32"] > 0.02 * 2 * 512**3 / min(rounds)
    assert 1e8 < found.copy_bytes_per_s < 1e12
    assert 0 < found.launch_s < 1e-3


def test_the_kernel_of_a_product_is_told_by_onednn(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(limits, "_BUDGET_S", 0.02)
    print("before")
    found = limits.measure(torch.device("cpu"), ("bfloat16",))
    print("after")
    kernel = found.matmul_kernels.get("bfloat16", "")
    if torch.cpu._is_amx_tile_supported():
        assert "amx" in kernel
    assert capfd.readouterr().out.splitlines() == ["before", "after"]


def test_the_kernel_of_a_product_is_the_last_one_that_multiplied() -> None:
    head = "onednn_verbose,v1,primitive,exec,cpu,"
    lines = (
        "onednn_verbose,v1,info,cpu,isa:Intel AMX with bfloat16 and 8-bit integer support",
        head + "reorder,jit:uni,undef,src:bf16::blocked:ab::f0,,,256x256,0.01",
        head + "matmul,brg_matmul:avx10_1_512_amx,undef,src:bf16::blocked:ab::f0,,,256x256,0.02",
        head + "reorder,jit:uni,undef,src:bf16::blocked:ab::f0,,,256x256,0.01",
    )
    assert limits.kernel_in("\n".join(lines)) == "brg_matmul:avx10_1_512_amx"
    assert limits.kernel_in("\n".join(lines[:2])) is None


def test_what_kernels_need_is_told_by_their_probes(found: Limits) -> None:
    assert set(found.probes) == {"adds"}
    assert found.fresh_bytes_per_s is not None
    assert found.fresh_large_bytes_per_s is not None
    assert 1e7 < found.fresh_bytes_per_s < 1e12
    seconds = found.seconds_of({"adds": 10 * found.probes["adds"], "unknown": 1.0, "fresh": 0.0})
    assert seconds == {"adds": pytest.approx(10.0), "fresh": 0.0}
    assert KNOWN.seconds_of({"adds": 1.0}) == {}
