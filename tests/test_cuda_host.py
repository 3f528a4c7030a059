"""Every CUDA kernel's numbers, on a machine with no GPU: the same sources, run on the host.

See ``tests/cuda_host``: threads run one after the other in a chosen order, shared memory starts as
NaN, and so does everything a kernel must write.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.accuracy import compare
from kernels.linear_attention import reference as linear_reference
from kernels.ripple import reference as ripple_reference
from kernels.softmax_attention import reference as softmax_reference
from tests.cuda_host import emulator
from tests.cuda_host.emulator import Emulator, guarded
from tests.cuda_host.mutations import MORE_MUTATIONS, MUTATIONS, Mutation

pytestmark = pytest.mark.skipif(
    emulator.compiler() is None, reason="no C++ compiler (g++, or what CXX names) on this machine"
)

HEAD_DIMS = (16, 32, 48, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = tuple(emulator.THREAD_ORDERS)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return emulator.build(emulator.sources(), tmp_path_factory.mktemp("cuda_host"))


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Attention inputs: q (B, H, N, D), k and v (B, Hk, M, D), and how they lie in memory."""

    head_dim: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 70
    keys: int = 70
    layout: str = "contiguous"
    order: str = "forward"
    num_splits: int | None = 1
    eps: float = 1e-6

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"D{self.head_dim}-{dtype}-B{self.batch}H{self.heads}Hk{self.kv_heads}"
            f"N{self.queries}M{self.keys}-{self.layout}-{self.order}-splits{self.num_splits}"
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient."""
        random = torch.Generator().manual_seed(self.head_dim + self.queries)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.dtype)

        q_shape = (self.batch, self.heads, self.queries, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.keys, self.head_dim)
        offset = 1 if self.layout == "misaligned" else 0
        if self.layout == "packed":  # views into one (B, N, 3, H, D) projection
            qkv = normal(self.batch, self.queries, 3, self.heads, self.head_dim)
            q, k, v = guarded(qkv).permute(2, 0, 3, 1, 4).unbind(0)
            gradient = normal(self.batch, self.queries, self.heads, self.head_dim)
            return q, k, v, guarded(gradient).transpose(1, 2)
        if self.layout == "expanded":  # one head, one gradient row, seen many times
            k, v = (normal(self.batch, 1, *k_shape[2:]).expand(k_shape) for _ in range(2))
            gradient = normal(self.batch, self.heads, 1, self.head_dim).expand(q_shape)
        else:
            k, v, gradient = normal(*k_shape), normal(*k_shape), normal(*q_shape)
        q, k, v, gradient = (guarded(x, offset) for x in (normal(*q_shape), k, v, gradient))
        return q, k, v, gradient


def assert_accurate(name: str, actual: Tensor, expected: Tensor, *, gradient: bool) -> None:
    comparison = compare(actual, expected, gradient=gradient)
    assert comparison.passed, f"{name}: {comparison}"


def double(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def run_linear_attention(
    emulated: Emulator, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, eps: float
) -> dict[str, Tensor]:
    S, z = emulated.linear_attention_state(k, v)
    out = emulated.linear_attention_apply(q, S, z, eps)
    dq, dS, dz = emulated.linear_attention_apply_backward(gradient, q, S, z, eps)
    dk, dv = emulated.linear_attention_state_backward(dS, dz, k, v)
    emulated.check_guards()
    return {"S": S, "z": z, "out": out, "dq": dq, "dk": dk, "dv": dv}


def check_linear_attention(libraries: dict[str, Path], case: Case) -> dict[str, Tensor]:
    emulated = Emulator(libraries, thread_order=case.order, num_splits=case.num_splits)
    q, k, v, gradient = case.inputs()
    actual = run_linear_attention(emulated, q, k, v, gradient, case.eps)
    exact = double(q, k, v)
    S, z = linear_reference.linear_attention_state(*exact[1:])
    out = linear_reference.linear_attention_apply(exact[0], S, z, case.eps)
    out.backward(gradient.double())
    for name, expected in (("S", S), ("z", z), ("out", out)):
        assert_accurate(name, actual[name], expected.detach(), gradient=False)
    for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)
    return actual


def run_softmax_attention(
    emulated: Emulator, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    scale = q.shape[-1] ** -0.5
    out, lse = emulated.softmax_attention(q, k, v, scale)
    dq, dk, dv = emulated.softmax_attention_backward(gradient, q, k, v, out, lse, scale)
    emulated.check_guards()
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def check_softmax_attention(libraries: dict[str, Path], case: Case) -> dict[str, Tensor]:
    emulated = Emulator(libraries, thread_order=case.order)
    q, k, v, gradient = case.inputs()
    actual = run_softmax_attention(emulated, q, k, v, gradient)
    exact = double(q, k, v)
    scale = case.head_dim**-0.5
    out = softmax_reference.softmax_attention(*exact, scale)
    out.backward(gradient.double())
    keys = exact[1].detach().repeat_interleave(case.heads // case.kv_heads, dim=1)
    lse = (exact[0].detach() @ keys.mT * scale).logsumexp(dim=-1)
    assert_accurate("lse", actual["lse"], lse, gradient=False)
    assert_accurate("out", actual["out"], out.detach(), gradient=False)
    for name, x in zip(("dq", "dk", "dv"), exact, strict=True):
        assert_accurate(name, actual[name], grad(x), gradient=True)
    return actual


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


def check_ripple(libraries: dict[str, Path], grid: Grid) -> dict[str, Tensor]:
    """Pooling, and expansion of a coarse grid, with the gradients of every tensor."""
    emulated = Emulator(libraries, thread_order=grid.order, num_splits=grid.num_splits)
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
    expected = ripple_reference.ripple_pool(*exact, grid.axis)
    expected.backward(dpooled.double())
    assert_accurate("pooled", pooled, expected.detach(), gradient=False)
    assert_accurate("dx", dx, grad(exact[0]), gradient=True)
    assert_accurate("dweight", dweight, grad(exact[1]), gradient=True)

    expanded = emulated.ripple_expand(z, x, pair_weight, weight, grid.axis)
    gradients = emulated.ripple_expand_backward(dexpanded, z, x, pair_weight, weight, grid.axis)
    emulated.check_guards()
    exact = double(z, x, pair_weight, weight)
    expected = ripple_reference.ripple_expand(*exact, grid.axis)
    expected.backward(dexpanded.double())
    assert_accurate("expanded", expanded, expected.detach(), gradient=False)
    actual["expanded"] = expanded
    names = ("dz", "expand dx", "dpair_weight", "dlateral_weight")
    for name, gradient, of in zip(names, gradients, exact, strict=True):
        assert_accurate(name, gradient, grad(of), gradient=True)
        actual[name] = gradient
    return actual


# ---- numbers -------------------------------------------------------------------------------------

# What is cheap and finds most: every head dim, dtype, layout, order and number of splits once.
ATTENTION_CASES = (
    Case(16, torch.bfloat16, queries=130, keys=33, layout="misaligned", order="reverse"),
    Case(32, heads=4, queries=133, keys=70, num_splits=3, eps=0.5),
    Case(32, heads=4, queries=133, keys=70, num_splits=3, order="strided"),
    Case(48, torch.float16, heads=6, kv_heads=3, layout="expanded", num_splits=2),
    Case(64, torch.bfloat16, layout="packed", order="reverse"),
    Case(64, batch=2, heads=1, kv_heads=1, queries=1, keys=2, num_splits=None),
    Case(96, torch.float16, heads=1, kv_heads=1, queries=65, keys=31, order="reverse"),
    Case(128, torch.bfloat16, heads=2, kv_heads=1, queries=33, keys=65, num_splits=2),
)
MORE_ATTENTION_CASES = (
    *(
        Case(head_dim, dtype, 1, 4, 2, 133, 70, layout, order, num_splits=2)
        for head_dim in HEAD_DIMS
        for dtype, order, layout in zip(
            DTYPES, ORDERS, ("misaligned", "contiguous", "expanded"), strict=True
        )
    ),
    Case(16, heads=1, kv_heads=1, queries=5, keys=1500),  # several chunks of tokens
    Case(16, heads=1, kv_heads=1, queries=1100, keys=5, num_splits=None),
)
GRIDS = (
    Grid((2, 5, 6, 40), axis=0, order="reverse", num_splits=3),
    Grid((1, 4, 7, 33), axis=1, dtype=torch.float16),
    Grid((1, 1, 9, 16), axis=1, dtype=torch.bfloat16, layout="misaligned", num_splits=None),
    Grid((2, 8, 5, 136), axis=0, dtype=torch.float16, layout="transposed", order="strided"),
)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_linear_attention(libraries: dict[str, Path], case: Case) -> None:
    check_linear_attention(libraries, case)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_softmax_attention(libraries: dict[str, Path], case: Case) -> None:
    check_softmax_attention(libraries, case)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ripple(libraries: dict[str, Path], grid: Grid) -> None:
    check_ripple(libraries, grid)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_ATTENTION_CASES, ids=str)
def test_linear_attention_more(libraries: dict[str, Path], case: Case) -> None:
    check_linear_attention(libraries, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_ATTENTION_CASES, ids=str)
def test_softmax_attention_more(libraries: dict[str, Path], case: Case) -> None:
    check_softmax_attention(libraries, case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_ripple_more(libraries: dict[str, Path], dtype: torch.dtype, axis: int, order: str) -> None:
    check_ripple(libraries, Grid((3, 9, 11, 72), axis, dtype, order=order, num_splits=4))


def test_results_repeat_bit_for_bit_whatever_the_thread_order(libraries: dict[str, Path]) -> None:
    case = Case(32, heads=2, kv_heads=1, queries=40, keys=50, num_splits=2)
    grid = Grid((1, 3, 5, 40), num_splits=2)
    for check, problem in (
        (check_linear_attention, case),
        (check_softmax_attention, case),
        (check_ripple, grid),
    ):
        runs = [check(libraries, replace(problem, order=order)) for order in ORDERS]
        for other in runs[1:]:
            for name, x in runs[0].items():
                assert torch.equal(x, other[name]), f"{check.__name__}: {name}"


# ---- edges ---------------------------------------------------------------------------------------


def test_no_keys_gives_zeros(libraries: dict[str, Path]) -> None:
    q, k, v, gradient = Case(16, queries=3, keys=0).inputs()
    linear = run_linear_attention(Emulator(libraries), q, k, v, gradient, 1e-6)
    softmax = run_softmax_attention(Emulator(libraries), q, k, v, gradient)
    for result in (linear, softmax):
        assert torch.equal(result["out"], torch.zeros_like(q))
        assert torch.equal(result["dq"], torch.zeros_like(q))
        assert result["dk"].shape == k.shape
    assert torch.equal(linear["S"], torch.zeros(1, 2, 32, 16))
    assert (softmax["lse"] == -torch.inf).all()


@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}])
def test_no_queries_and_no_batch(libraries: dict[str, Path], empty: dict[str, int]) -> None:
    q, k, v, gradient = replace(Case(16, keys=3), **empty).inputs()
    linear = run_linear_attention(Emulator(libraries), q, k, v, gradient, 1e-6)
    softmax = run_softmax_attention(Emulator(libraries), q, k, v, gradient)
    for result in (linear, softmax):
        assert result["out"].shape == q.shape
        assert torch.equal(result["dk"], torch.zeros_like(k))
        assert torch.equal(result["dv"], torch.zeros_like(v))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_zero_query_row_gives_zero_and_finite_gradients(
    libraries: dict[str, Path], eps: float
) -> None:
    q, k, v, gradient = Case(16, queries=20, keys=20).inputs()
    q[:, :, 7] = 0
    result = run_linear_attention(Emulator(libraries), q, k, v, gradient, eps)
    assert (result["out"][:, :, 7] == 0).all()
    assert all(x.isfinite().all() for x in result.values())
    assert (result["dq"][:, :, 7] == 0).all()


def test_nan_goes_where_it_must_and_nowhere_else(libraries: dict[str, Path]) -> None:
    clean = Case(16, queries=70, keys=40).inputs()
    for attention in (
        lambda *x: run_linear_attention(Emulator(libraries), *x, 1e-6)["out"],
        lambda *x: run_softmax_attention(Emulator(libraries), *x)["out"],
    ):
        q, k, v, gradient = (guarded(x) for x in clean)
        q[0, 0, 3, 5] = torch.nan
        out = attention(q, k, v, gradient)
        assert out[0, 0, 3].isnan().all()
        assert out.isnan().sum() == out.shape[-1]

        q, k, v, gradient = (guarded(x) for x in clean)
        k[0, 0, 33, 5] = torch.nan
        out = attention(q, k, v, gradient)
        assert out[0, 0].isnan().all()
        assert out[0, 1].isfinite().all()

        q, k, v, gradient = (guarded(x) for x in clean)
        v[0, 1, 33, 5] = torch.nan
        out = attention(q, k, v, gradient)
        assert out[0, 1, :, 5].isnan().all()
        assert out.isnan().sum() == out.shape[2]


def test_splits_fill_the_gpu_and_stay_worth_it(libraries: dict[str, Path]) -> None:
    def splits(batch_heads: int, tokens: int) -> int:
        emulated = Emulator(libraries, multiprocessors=132)
        library = emulated._libraries["linear_attention"]
        return emulated._splits(library.linear_attention_num_splits, batch_heads, tokens)

    assert splits(1, 1 << 20) == 264  # one head of one long sequence: two blocks a multiprocessor
    assert splits(768, 64) == 1  # many short ones
    assert splits(768, 1 << 20) == 16  # no more than 65,536 tokens in one float32 sum
    assert splits(1, 300) == 2  # at least 256 tokens a split
    assert splits(0, 64) == splits(64, 0) == 1


# ---- do these tests fail when they should? -------------------------------------------------------


# One head dim and element type: a mutant compiles in a second or two.
NARROW = ("-DLINEAR_VIT_HEAD_DIMS=32", "-DLINEAR_VIT_ELEMENT_TYPES=float")


def red(libraries: dict[str, Path], room: str) -> str | None:
    """The first failure of the checks a mutant has to pass, or None."""
    cases = (
        Case(32, heads=4, queries=133, keys=70, num_splits=3, eps=0.5),
        Case(32, heads=1, kv_heads=1, queries=21, keys=21),  # less than a tile
    )
    grids = (Grid((2, 5, 7, 40), 0, num_splits=2), Grid((1, 5, 7, 40), 1))
    checks: dict[str, list[Callable[[str], object]]] = {
        "linear_attention": [
            lambda order, case=case: check_linear_attention(libraries, replace(case, order=order))
            for case in cases
        ],
        "softmax_attention": [
            lambda order, case=case: check_softmax_attention(libraries, replace(case, order=order))
            for case in cases
        ],
        "ripple": [
            lambda order, grid=grid: check_ripple(libraries, replace(grid, order=order))
            for grid in grids
        ],
    }
    for order in ("forward", "reverse"):
        try:
            for check in checks[room]:
                check(order)
        except (AssertionError, RuntimeError) as error:
            return str(error)
    return None


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The unbroken kernels, built as the mutants are: what the checks say of each room."""
    libraries = emulator.build(emulator.sources(), tmp_path_factory.mktemp("sound"), NARROW)
    return {room: red(libraries, room) for room in emulator.ROOMS}


def see_red(mutation: Mutation, sound: dict[str, str | None], folder: Path) -> None:
    assert sound[mutation.room] is None, "the unbroken kernels must pass"
    kernels = folder / "kernels"
    shutil.copytree(emulator.KERNELS, kernels, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = kernels / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"not once in {mutation.file}: {mutation.old}"
    path.write_text(text.replace(mutation.old, mutation.new))
    sources = {mutation.room: emulator.sources(kernels)[mutation.room]}
    libraries = emulator.build(sources, folder, (*NARROW, "-Wno-unused"))
    assert red(libraries, mutation.room) is not None, f"nothing noticed: {mutation.name}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(
    mutation: Mutation, sound: dict[str, str | None], tmp_path: Path
) -> None:
    see_red(mutation, sound, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MORE_MUTATIONS, ids=lambda m: m.name)
def test_more_broken_kernels_are_noticed(
    mutation: Mutation, sound: dict[str, str | None], tmp_path: Path
) -> None:
    see_red(mutation, sound, tmp_path)


def test_the_host_notices_what_a_gpu_would_do_wrong(tmp_path: Path) -> None:
    """A barrier that not every thread reaches, and a write past shared memory, are errors."""
    source = tmp_path / "wrong.cu"
    source.write_text(
        f'#include "{emulator.KERNELS}/cuda/common.cuh"\n'
        "__global__ void diverge(int) { if (threadIdx.x != 3) __syncthreads(); }\n"
        "__global__ void overrun(int bytes) { shared_memory()[bytes / 4] = 1.0f; }\n"
        'extern "C" int run(int which) {\n'
        "  return launch(which ? overrun : diverge, 1, 1024, nullptr, 1024);\n"
        "}\n"
    )
    library = emulator.ctypes.CDLL(str(emulator.build({"wrong": source}, tmp_path)["wrong"]))
    library.cuda_host_failure.restype = emulator.ctypes.c_char_p
    library.cuda_host_configure(0)
    assert library.run(0) != 0
    assert b"barrier" in library.cuda_host_failure()
    assert library.run(1) != 0
    assert b"past the end of shared memory" in library.cuda_host_failure()


SANITIZED = """
import sys
from pathlib import Path
from tests import test_cuda_host as t
from tests.cuda_host import emulator

emulator.GUARD = 0  # so that the sanitizer's own red zones begin where a tensor ends
libraries = {room: Path(sys.argv[1], f"{room}.so") for room in emulator.ROOMS}
case = t.Case(32, heads=4, queries=37, keys=35, num_splits=2)
for layout in ("contiguous", "misaligned"):
    t.check_linear_attention(libraries, t.replace(case, layout=layout))
    t.check_softmax_attention(libraries, t.replace(case, layout=layout))
    t.check_ripple(libraries, t.Grid((1, 3, 5, 33), layout=layout, num_splits=2))
print("clean")
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    cxx = emulator.compiler()
    assert cxx is not None
    asan = subprocess.run(
        [cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(asan).is_file():
        pytest.skip("the compiler comes without AddressSanitizer's library")
    flags = (
        *NARROW,
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-DCUDA_HOST_SANITIZE",
    )
    emulator.build(emulator.sources(), tmp_path, flags)
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0",
        "PYTHONPATH": str(emulator.HERE.parent.parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
