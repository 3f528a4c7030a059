"""Ripple's CUDA kernels on the host: see emulator.py."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.ripple import reference
from tests.cuda_host.checks import (
    DTYPES,
    ORDERS,
    Mutation,
    assert_accurate,
    assert_sanitizers_find_nothing,
    build_room,
    double,
    first_failure,
    grad,
    needs_compiler,
    see_red,
)
from tests.cuda_host.emulator import guarded
from tests.cuda_host.ripple import RippleOperators

ROOM = "ripple"
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build_room(ROOM, tmp_path_factory.mktemp(ROOM))


@dataclass(frozen=True)
class Grid:
    """Ripple inputs: the fine grid (batch, rows, cols, channels)."""

    shape: tuple[int, int, int, int]
    axis: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    order: str = "forward"
    num_splits: int | None = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return f"{shape}-axis{self.axis}-{dtype}-{self.layout}-{self.order}"


def check(libraries: dict[str, Path], grid: Grid) -> dict[str, Tensor]:
    """Pooling, and expansion of a coarse grid, with the gradients of every tensor."""
    emulated = RippleOperators(libraries, thread_order=grid.order, num_splits=grid.num_splits)
    random = torch.Generator().manual_seed(sum(grid.shape))

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=random).to(grid.dtype)
        if len(shape) == 4 and grid.layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return guarded(x, 1 if grid.layout == "misaligned" else 0)

    channels = grid.shape[3]
    coarse = list(grid.shape)
    coarse[grid.axis + 1] = (coarse[grid.axis + 1] + 1) // 2
    x, weight, dpooled = normal(*grid.shape), normal(channels, 3, 3), normal(*coarse)
    z, pair_weight, dexpanded = normal(*coarse), normal(2, channels), normal(*grid.shape)

    pooled = emulated.ripple_pool(x, weight, grid.axis)
    dx, dweight = emulated.ripple_pool_backward(dpooled, x, weight, grid.axis)
    actual = {"pooled": pooled, "dx": dx, "dweight": dweight}
    exact = double(x, weight)
    expected = reference.ripple_pool(*exact, grid.axis)
    expected.backward(dpooled.double())
    assert_accurate("pooled", pooled, expected.detach(), gradient=False)
    assert_accurate("dx", dx, grad(exact[0]), gradient=True)
    assert_accurate("dweight", dweight, grad(exact[1]), gradient=True)

    expanded = emulated.ripple_expand(z, x, pair_weight, weight, grid.axis)
    gradients = emulated.ripple_expand_backward(dexpanded, z, x, pair_weight, weight, grid.axis)
    emulated.check_guards()
    exact = double(z, x, pair_weight, weight)
    expected = reference.ripple_expand(*exact, grid.axis)
    expected.backward(dexpanded.double())
    assert_accurate("expanded", expanded, expected.detach(), gradient=False)
    actual["expanded"] = expanded
    names = ("dz", "expand dx", "dpair_weight", "dlateral_weight")
    for name, gradient, of in zip(names, gradients, exact, strict=True):
        assert_accurate(name, gradient, grad(of), gradient=True)
        actual[name] = gradient
    return actual


# ---- numbers -------------------------------------------------------------------------------------

GRIDS = (
    Grid((2, 5, 6, 40), axis=0, order="reverse", num_splits=3),
    Grid((1, 4, 7, 33), axis=1, dtype=torch.float16),
    Grid((1, 1, 9, 16), axis=1, dtype=torch.bfloat16, layout="misaligned", num_splits=None),
    Grid((2, 8, 5, 136), axis=0, dtype=torch.float16, layout="transposed", order="strided"),
)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_numbers(libraries: dict[str, Path], grid: Grid) -> None:
    check(libraries, grid)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_more_numbers(
    libraries: dict[str, Path], dtype: torch.dtype, axis: int, order: str
) -> None:
    check(libraries, Grid((3, 9, 11, 72), axis, dtype, order=order, num_splits=4))


def test_results_repeat_bit_for_bit_whatever_the_thread_order(libraries: dict[str, Path]) -> None:
    grid = Grid((1, 3, 5, 40), num_splits=2)
    runs = [check(libraries, replace(grid, order=order)) for order in ORDERS]
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(x, other[name]), name


# ---- do these tests fail when they should? -------------------------------------------------------

MUTATIONS = (
    Mutation(
        "taps in reverse",
        "ripple/cuda.cu",
        "sum[e] += weight[tap][e] * x[e];",
        "sum[e] += weight[kTaps - 1 - tap][e] * x[e];",
    ),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "no barrier between taps",
        "ripple/cuda.cu",
        "__syncthreads();  // the tap before has been read",
        "",
    ),
    Mutation(
        "one warp is left out",
        "ripple/cuda.cu",
        "for (int w = 0; w < kWarps; ++w) total",
        "for (int w = 1; w < kWarps; ++w) total",
    ),
    Mutation(
        "odd tokens weigh as even ones",
        "ripple/cuda.cu",
        "p.pair_weight[along % 2 * p.channels + channel + e]",
        "p.pair_weight[channel + e]",
    ),
    Mutation(
        "odd size keeps its last pair",
        "ripple/cuda.cu",
        "if (row >= p.rows || col >= p.cols) continue;  // an odd size cuts the last pair",
        "",
    ),
    Mutation(
        "stride ignored backward",
        "ripple/cuda.cu",
        "if (row < 0 || col < 0 || row % p.row_stride != 0 || col % p.col_stride != 0) continue;",
        "if (row < 0 || col < 0) continue;",
    ),
)

# One head dim and element type: a mutant compiles in a second or two.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float")


def narrow_checks(libraries: dict[str, Path]) -> list:
    grids = (Grid((2, 5, 7, 40), 0, num_splits=2), Grid((1, 5, 7, 40), 1))
    return [
        partial(check, libraries, replace(grid, order=order))
        for order in ("forward", "reverse")
        for grid in grids
    ]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The unbroken kernels, built as the mutants are, pass."""
    libraries = build_room(ROOM, tmp_path_factory.mktemp("sound"), NARROW)
    assert first_failure(narrow_checks(libraries)) is None


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


@pytest.mark.slow
@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MORE_MUTATIONS, ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


SANITIZED = """
import sys
from pathlib import Path
from tests.cuda_host import test_ripple as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
for layout in ("contiguous", "misaligned"):
    t.check(libraries, t.Grid((1, 3, 5, 33), layout=layout, num_splits=2))
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    assert_sanitizers_find_nothing(ROOM, NARROW, tmp_path, SANITIZED)
