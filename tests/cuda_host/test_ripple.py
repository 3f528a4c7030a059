"""Ripple's CUDA kernels on the host: see emulator.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_vit.kernels.ripple import reference
from linear_vit.kernels.ripple.stages import level_shapes
from tests.cuda_host.checks import (
    DTYPES,
    ORDERS,
    Mutation,
    assert_accurate,
    assert_sanitizers_find_nothing,
    double,
    first_failure,
    grad,
    needs_compiler,
    see_red,
)
from tests.cuda_host.emulator import build_once, guarded
from tests.cuda_host.ripple import RippleOperators

ROOM = "ripple"
pytestmark = needs_compiler


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    return build_once(ROOM)


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


@dataclass(frozen=True)
class Pyramid:
    """A whole pyramid's inputs: level 0 (batch, rows, cols, channels), the axis of each stage."""

    shape: tuple[int, int, int, int]
    axes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    order: str = "forward"
    num_splits: int | None = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape, axes = "x".join(map(str, self.shape)), "".join(map(str, self.axes))
        return f"{shape}-axes{axes}-{dtype}-{self.layout}-{self.order}"

    def normal(self) -> Callable[..., Tensor]:
        """Draws tensors of a shape, laid out as asked for."""
        random = torch.Generator().manual_seed(sum(self.shape))

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=random).to(self.dtype)
            if len(shape) == 4 and self.layout == "transposed":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            return guarded(x, 1 if self.layout == "misaligned" else 0)

        return draw


def check_pyramid(libraries: dict[str, Path], case: Pyramid) -> dict[str, Tensor]:
    """Pooling and expansion of a pyramid, with the gradients of every tensor, beside the composed
    float64 reference. Pooled levels are the composition's, bit for bit."""
    emulated = RippleOperators(libraries, thread_order=case.order, num_splits=case.num_splits)
    emulated.watch_nothing()
    normal, axes, count = case.normal(), case.axes, len(case.axes)
    shapes, channels = level_shapes(case.shape, axes), case.shape[3]
    x = normal(*case.shape)
    weights = [normal(channels, 3, 3) for _ in axes]

    levels = emulated.ripple_pool_stages(x, weights, axes)
    finer = x
    for s, level in enumerate(levels):
        finer = emulated.ripple_pool(finer, weights[s], axes[s])
        assert torch.equal(level, finer), f"level {s + 1}"
    dlevels = [normal(*shape) for shape in shapes[1:]]
    finer_levels = [x, *levels[:-1]]
    gradients = emulated.ripple_pool_stages_backward(dlevels, finer_levels, weights, axes)
    # The backward pass is given levels that were rounded, so each stage is a problem of its own.
    exact_levels, exact_weights = double(*finer_levels), double(*weights)
    gradient = dlevels[-1].double()
    for s in reversed(range(count)):
        pooled = reference.ripple_pool(exact_levels[s], exact_weights[s], axes[s])
        pooled.backward(gradient)
        if s > 0:
            gradient = grad(exact_levels[s]) + dlevels[s - 1].double()
    actual = {f"level {s + 1}": level for s, level in enumerate(levels)}
    expected = [grad(exact_levels[0]), *(grad(w) for w in exact_weights)]
    for s, (a, b) in enumerate(zip(gradients, expected, strict=True)):
        assert_accurate("dx" if s == 0 else f"dweight {s - 1}", a, b, gradient=True)
        actual[f"pool gradient {s}"] = a

    z, dout = normal(*shapes[-1]), normal(*case.shape)
    grids = [x, *(normal(*shape) for shape in shapes[1:-1])]
    pairs = [normal(2, channels) for _ in axes]
    out = emulated.ripple_expand_stages(z, grids, pairs, weights, axes)
    inputs = (z, grids, pairs, weights)
    gradients = emulated.ripple_expand_stages_backward(dout, *inputs, axes)
    emulated.check_guards()
    exact = double(z, *grids, *pairs, *weights)
    lists = [exact[1 + i * count : 1 + (i + 1) * count] for i in range(3)]
    exact_out = reference.ripple_expand_stages(exact[0], *lists, axes)
    exact_out.backward(dout.double())
    assert_accurate("expanded", out, exact_out.detach(), gradient=False)
    actual["expanded"] = out
    for i, (a, b) in enumerate(zip(gradients, exact, strict=True)):
        assert_accurate(
            f"expand gradient {i} of z, levels, pairs, laterals", a, grad(b), gradient=True
        )
        actual[f"expand gradient {i}"] = a
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


PYRAMIDS = (
    Pyramid((2, 5, 6, 40), (0, 1, 0), order="reverse", num_splits=2),
    Pyramid((3, 8, 8, 64), (0, 1, 0), torch.bfloat16, order="strided", num_splits=2),
    Pyramid((1, 1, 7, 9), (1, 0, 1), torch.float16),
    Pyramid((3, 4, 4, 24), (0, 1), torch.float16, layout="misaligned", num_splits=None),
    Pyramid((1, 6, 3, 72), (1, 1, 0, 0), torch.bfloat16, layout="transposed"),
)


@pytest.mark.parametrize("case", PYRAMIDS, ids=str)
def test_pyramids(libraries: dict[str, Path], case: Pyramid) -> None:
    check_pyramid(libraries, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [(0, 1), (0, 1, 0), (1, 0, 1, 0)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_more_pyramids(
    libraries: dict[str, Path], dtype: torch.dtype, axes: tuple[int, ...], order: str
) -> None:
    check_pyramid(libraries, Pyramid((5, 9, 11, 88), axes, dtype, order=order, num_splits=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_traffic_of_a_pyramid_is_the_least(libraries: dict[str, Path], dtype: torch.dtype) -> None:
    """Each element of x, the levels, z and their gradients once, in 16-byte accesses."""
    case = Pyramid((4, 8, 8, 64), (0, 1, 0), dtype)
    normal, axes = case.normal(), case.axes
    shapes = level_shapes(case.shape, axes)
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    x, z, dout = normal(*case.shape), normal(*shapes[-1]), normal(*case.shape)
    grids = [x, *(normal(*shape) for shape in shapes[1:-1])]
    dlevels = [normal(*shape) for shape in shapes[1:]]
    weights, pairs = [normal(64, 3, 3) for _ in axes], [normal(2, 64) for _ in axes]

    def moved(run: Callable[[RippleOperators], object], **inputs: Tensor) -> dict:
        emulated = RippleOperators(libraries, num_splits=2)
        emulated.watch_nothing()
        emulated.watch(**inputs)
        for name, tensors in (("levels", grids[1:]), ("dlevels", dlevels), ("weights", weights)):
            for tensor in tensors:
                emulated.watch(**{f"{name} in": tensor})
        run(emulated)
        traffic = emulated.traffic()
        emulated.watch_nothing()
        for name, t in traffic.items():
            if not name.startswith(("weights", "workspace", "other")):
                assert t.loaded_narrow == t.stored_narrow == 0, name
        return {name: (t.loaded, t.stored) for name, t in traffic.items()}

    coarser, inner = sum(sizes[1:]), sum(sizes[1:-1])
    found = moved(lambda e: e.ripple_pool_stages(x, weights, axes), x=x)
    assert found["x"] == (sizes[0], 0)
    assert found["levels"] == (0, coarser)
    assert found["other"] == (0, 0)

    found = moved(lambda e: e.ripple_pool_stages_backward(dlevels, grids, weights, axes), x=x)
    assert found["x"] == (sizes[0], 0)
    assert found["levels in"] == (0, 0)  # pooled again
    assert found["dlevels in"] == (coarser, 0)
    assert found["dx"] == (0, sizes[0])

    found = moved(lambda e: e.ripple_expand_stages(z, grids, pairs, weights, axes), x=x, z=z)
    assert found["x"] == (sizes[0], 0)
    assert found["levels in"] == (inner, 0)
    assert found["z"] == (sizes[-1], 0)
    assert found["out"] == (0, sizes[0])

    found = moved(
        lambda e: e.ripple_expand_stages_backward(dout, z, grids, pairs, weights, axes),
        x=x, z=z, dout=dout,
    )  # fmt: skip
    assert found["x"] == found["dout"] == (sizes[0], 0)
    assert found["levels in"] == (inner, 0)
    assert found["z"] == (sizes[-1], 0)
    assert found["dz"] == (0, sizes[-1])
    assert found["dlevels"] == (0, sizes[0] + inner)
    sums = 2 * 3 * 11 * 64 * 4  # splits, stages, sums, channels, bytes
    assert found["workspace"] == (sums, sums)


def test_a_grid_too_large_for_shared_memory_is_refused(libraries: dict[str, Path]) -> None:
    emulated = RippleOperators(libraries)
    with pytest.raises(RuntimeError, match="error 1,"):
        emulated.ripple_pool_stages(torch.zeros(1, 300, 300, 8), [torch.zeros(8, 3, 3)] * 2, (0, 1))


def test_the_largest_grid_fits(libraries: dict[str, Path]) -> None:
    """What kernels.ripple.stages lets through, in the layout that takes most memory."""
    check_pyramid(libraries, Pyramid((1, 32, 32, 8), (0, 1, 0, 1)))
    check_pyramid(libraries, Pyramid((1, 1, 1024, 3), (1, 1), torch.bfloat16))


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
    case = Pyramid((3, 5, 4, 24), (0, 1), num_splits=2)
    runs = [check_pyramid(libraries, replace(case, order=order)) for order in ORDERS]
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(x, other[name]), name


# ---- what is asked for ---------------------------------------------------------------------------


def assert_subsets_are_of_all(run: Callable[..., list], count: int, masks: range) -> None:
    """``run(wanted)``: gradients asked for are those of all, bit for bit; others aren't made."""
    everything = run(-1)
    for wanted in masks:
        for i, (a, b) in enumerate(zip(run(wanted), everything, strict=True)):
            assert (a is None) == (wanted >> i & 1 == 0)
            assert a is None or torch.equal(a, b), f"gradient {i} of {wanted:b}"
    assert len(everything) == count


def test_gradients_alone(libraries: dict[str, Path]) -> None:
    case = Pyramid((3, 5, 6, 24), (0, 1), torch.bfloat16)
    normal, axes = case.normal(), case.axes
    emulated = RippleOperators(libraries, num_splits=2)
    fine, middle, coarse = level_shapes(case.shape, axes)
    x, z, dout = normal(*fine), normal(*middle), normal(*fine)
    weights, pairs = [normal(24, 3, 3) for _ in axes], [normal(2, 24) for _ in axes]
    pool, expand = emulated.ripple_pool_backward, emulated.ripple_expand_backward
    assert_subsets_are_of_all(lambda w: pool(z, x, weights[0], 0, w), 2, range(4))
    assert_subsets_are_of_all(
        lambda w: expand(dout, z, x, pairs[0], weights[0], 0, w), 4, range(16)
    )

    grids, dlevels = [x, z], [normal(*middle), normal(*coarse)]
    pools = emulated.ripple_pool_stages_backward
    assert_subsets_are_of_all(lambda w: pools(dlevels, grids, weights, axes, w), 3, range(8))
    inputs = dout, normal(*coarse), grids, pairs, weights, axes
    expands = emulated.ripple_expand_stages_backward
    assert_subsets_are_of_all(lambda w: expands(*inputs, w), 7, range(128))
    emulated.check_guards()


def test_without_a_weights_gradient_no_level_is_read(libraries: dict[str, Path]) -> None:
    case = Pyramid((4, 8, 8, 64), (0, 1))
    normal, axes = case.normal(), case.axes
    fine, middle, coarse = level_shapes(case.shape, axes)
    x, inner, z, dout = normal(*fine), normal(*middle), normal(*coarse), normal(*fine)
    weights, pairs = [normal(64, 3, 3) for _ in axes], [normal(2, 64) for _ in axes]
    dlevels = [normal(*middle), normal(*coarse)]

    def read(run: Callable[[RippleOperators], object]) -> int:
        emulated = RippleOperators(libraries, num_splits=2)
        emulated.watch_nothing()
        for tensor in (x, inner, z):
            emulated.watch(levels=tensor)
        run(emulated)
        counted = emulated.traffic()["levels"].loaded
        emulated.watch_nothing()
        return counted

    levels = (x, inner)
    for wanted, nothing in ((0b1, True), (0b11, False)):
        moved = read(lambda e, w=wanted: e.ripple_pool_backward(dlevels[0], x, weights[0], 0, w))
        assert (moved == 0) == nothing
        moved = read(
            lambda e, w=wanted: e.ripple_pool_stages_backward(dlevels, levels, weights, axes, w)
        )
        assert (moved == 0) == nothing
    for wanted, nothing in ((0b11, True), (0b1011, False)):
        moved = read(
            lambda e, w=wanted: e.ripple_expand_backward(dout, inner, x, pairs[0], weights[0], 0, w)
        )
        assert (moved == 0) == nothing
    for wanted, nothing in ((0b111, True), (0b1000111, False)):
        moved = read(
            lambda e, w=wanted: e.ripple_expand_stages_backward(
                dout, z, levels, pairs, weights, axes, w
            )
        )
        assert (moved == 0) == nothing


# ---- do these tests fail when they should? -------------------------------------------------------


def mutation(name: str, old: str, new: str = "") -> Mutation:
    return Mutation(name, "ripple/cuda.cu", old, new)


MUTATIONS = (
    mutation(
        "taps in reverse",
        "weight[i % kTaps][i / kTaps] = flat",
        "weight[kTaps - 1 - i % kTaps][i / kTaps] = flat",
    ),
    mutation("no barrier between levels", "__syncthreads();  // level s is there\n"),
)

# For the slow tests.
MORE_MUTATIONS = (
    mutation("no barrier between rounds", "__syncthreads();  // the round before has been read"),
    mutation(
        "one warp is left out",
        "for (int w = 0; w < kWarps; ++w) value",
        "for (int w = 1; w < kWarps; ++w) value",
    ),
    mutation(
        "odd tokens weigh as even ones",
        "p.pair_weight + along % 2 * p.channels + place.channel",
        "p.pair_weight + along * 0 + place.channel",
    ),
    mutation("an odd token's part of dz is lost", "add_product(dz, pair, next);"),
    mutation(
        "stride ignored backward",
        "if (!kPairs && (row % p.row_stride != 0 || col % p.col_stride != 0)) continue;",
    ),
    mutation(
        "an odd size keeps its last pair",
        "if (row >= rows || col >= cols) continue;  // an odd size cuts the last pair",
    ),
    mutation(
        "the images before are forgotten",
        "float value = total[first * width + c];",
        "float value = 0.0f;",
    ),
    mutation(
        "a level's own gradient is left out",
        "if (s > 0) load<T, kSize>(dx, p.gradient[s]",
        "if (s > 1) load<T, kSize>(dx, p.gradient[s]",
    ),
    mutation(
        "no barrier between levels pooled again",
        "__syncthreads();  // level s is there, to be pooled again",
    ),
    mutation(
        "no barrier before a gradient is read",
        "__syncthreads();  // the gradient of level s + 1 is there",
    ),
    mutation(
        "no barrier between expanded levels",
        "__syncthreads();  // level s is there, and the expanded level s + 1",
    ),
    mutation(
        "no barrier between expanded levels, backward",
        "__syncthreads();  // the expanded level s + 1 is there, and level s",
    ),
    mutation(
        "no barrier before the way up",
        "__syncthreads();  // the gradient of the expanded level s is there, and that level",
    ),
    mutation(
        "a finer level's gradient is taken",
        "floats.read(g, gradients + first + r * cols + c);",
        "elements.read(g, r * cols + c);",
    ),
)

# One head dim and element type: a mutant compiles in a second or two.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float")


def narrow_checks(libraries: dict[str, Path]) -> list:
    grids = (Grid((2, 5, 7, 40), 0, num_splits=2), Grid((1, 5, 7, 40), 1))
    # Of one stage too: there some barriers are the only ones between a write and a read.
    pyramids = (Pyramid((3, 5, 7, 24), (0, 1, 0), num_splits=2), Pyramid((1, 5, 7, 24), (0,)))
    checks = []
    for order in ("forward", "reverse"):
        checks += [partial(check, libraries, replace(grid, order=order)) for grid in grids]
        for pyramid in pyramids:
            checks.append(partial(check_pyramid, libraries, replace(pyramid, order=order)))
    return checks


@pytest.fixture(scope="session")
def sound() -> None:
    """The unbroken kernels, built as the mutants are, pass."""
    libraries = build_once(ROOM, NARROW)
    assert first_failure(narrow_checks(libraries)) is None


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", MUTATIONS[:1], ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


@pytest.mark.slow
@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("mutation", [*MUTATIONS[1:], *MORE_MUTATIONS], ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(mutation: Mutation, tmp_path: Path) -> None:
    see_red(mutation, ROOM, NARROW, tmp_path, narrow_checks)


SANITIZED = """
import sys
from pathlib import Path
from tests.cuda_host import test_ripple as t

libraries = {t.ROOM: Path(sys.argv[1], f"{t.ROOM}.so")}
for layout in ("contiguous", "misaligned"):
    t.check(libraries, t.Grid((1, 3, 5, 33), layout=layout, num_splits=2))
    t.check_pyramid(libraries, t.Pyramid((3, 3, 5, 36), (0, 1, 0), layout=layout, num_splits=2))
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    assert_sanitizers_find_nothing(ROOM, NARROW, tmp_path, SANITIZED)
