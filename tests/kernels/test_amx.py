"""The AMX kernels on emulated tiles, where there are none, and beside the real ones elsewhere.

The tests of the other instruction sets run on both: test_cpu_kernels.py, here again in processes of
their own, since the emulator is chosen when the extension is built.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from tests import processes
from tests.kernels.cases import Attention, assert_accurate, comparisons, results
from tests.kernels.tiles import EMULATED, REASON, has_vectors

ROOT = Path(__file__).parents[2]
UNUSABLE = REASON or kernels.backends("linear_attention", "cpu")["cpu"]
pytestmark = [
    pytest.mark.skipif(UNUSABLE is not None, reason=str(UNUSABLE)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the cases' tensors are on the GPU"),
]


def has_tiles() -> bool:
    return " for AMX" in kernels.implementation("linear_attention", "cpu")


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX, real or (in a process of its own) emulated."""
    if not has_tiles():
        pytest.skip("no AMX here; the emulated tests run in processes of their own")
    monkeypatch.setenv("LINEAR_VIT_CPU", "amx")


def on_emulated_tiles(
    *arguments: str, kind: str = "emulated", root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    world = {"KERNEL_TESTS_TILES": kind, "LINEAR_VIT_CPU": "amx", "OMP_NUM_THREADS": "1"}
    return processes.python(*arguments, cwd=root, timeout=3000, **world)


def pytest_on_emulated_tiles(
    expression: str, kind: str = "emulated", root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """This file's and test_cpu_kernels.py's tests of AMX that match."""
    files = [f"tests/kernels/test_{name}.py" for name in ("cpu_kernels", "amx")]
    options = ["-q", "-m", "", "-p", "no:cacheprovider", "--no-header", "--tb=short", "--color=no"]
    chosen = f"amx and not emulated and ({expression})"
    return on_emulated_tiles("-m", "pytest", *options, *files, "-k", chosen, kind=kind, root=root)


# ---- tiles ---------------------------------------------------------------------------------------


def products(tmp_path: Path, *flags: str) -> str:
    """What compare_tiles.cpp prints."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "compare_tiles"
    source = ROOT / "tests/kernels/compare_tiles.cpp"
    options = ["-std=c++17", "-O2", f"-I{ROOT / 'kernels'}", *flags]
    command = [compiler, *options, str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def test_emulated_tiles_are_as_the_processors(tmp_path: Path) -> None:
    """Bit for bit, over random tiles: of ordinary numbers, of subnormals, of any bits."""
    real = products(tmp_path)
    emulated = products(tmp_path, f'-DLINEAR_VIT_TILES="{EMULATED}"')
    assert len(emulated.splitlines()) == 400
    if real == "no tiles\n":
        pytest.skip("no AMX here to compare with")
    assert emulated == real


# ---- small numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-40, 1e-6])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 5)])
def test_tiny_queries(amx: None, rows: slice, eps: float) -> None:
    """A query's size changes nothing where eps is 0, though the unit takes subnormals for zeros."""
    q, k, v = (x.detach().clone() for x in Attention(dtype=torch.bfloat16).inputs())
    q[:, :, rows] *= 2.0**-128
    assert ((q != 0) & (q.abs() < 2.0**-126)).any()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = kernels.linear_attention(*inputs, eps=eps, backend="cpu")
    exact = kernels.linear_attention(*(x.double() for x in inputs), eps=eps, backend="reference")
    assert_close(out, exact)
    gradient = torch.randn(out.shape).bfloat16()
    actual = torch.autograd.grad(out, inputs[1:], gradient)
    expected = torch.autograd.grad(exact, inputs[1:], gradient.double())
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("which", ["k", "v", "dout"])
@pytest.mark.parametrize("size", [2.0**-128, 2.0**-70, 2.0**60])
def test_tiny_and_large(amx: None, which: str, size: float) -> None:
    tensors = {
        name: torch.randn(1, 2, 100, 24).bfloat16().mul(size if name == which else 1.0)
        for name in ("q", "k", "v", "dout")
    }
    dout = tensors.pop("dout")
    inputs = [x.requires_grad_() for x in tensors.values()]
    out = kernels.linear_attention(*inputs, eps=0.0, backend="cpu")
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = kernels.linear_attention(*doubles, eps=0.0, backend="reference")
    assert_close(out, exact)
    actual = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(exact, doubles, dout.double())
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within bfloat16's rounding, subnormals' included."""
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= 0.02 * expected.abs().max() + 2.0**-134


def test_all_zeros(amx: None) -> None:
    q, k, v = (x.detach() for x in Attention(dtype=torch.bfloat16).inputs())
    for tensors in ((q * 0, k, v), (q, k * 0, v), (q, k, v * 0)):
        inputs = [x.clone().requires_grad_() for x in tensors]
        out = kernels.linear_attention(*inputs, backend="cpu")
        assert torch.equal(out, torch.zeros_like(out))
        for gradient in torch.autograd.grad(out, inputs, torch.ones_like(out)):
            assert gradient.isfinite().all()


# ---- gradients that cancel -----------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("scale", "mean"), [(1e-2, 0.0), (1.0, 1.0), (1e-2, 1.0), (30.0, 1.0)])
def test_no_worse_than_composition(amx: None, scale: float, mean: float, kv_heads: int) -> None:
    """In parts, and over heads that share their keys: one sum made of several calls."""
    case = Attention(
        dtype=torch.bfloat16, scale=scale, mean=mean, queries=700, keys=600, kv_heads=kv_heads
    )
    bounds = dict(comparisons(case, "torch"))
    for name, comparison in comparisons(case, "cpu"):
        limit = max(1.5 * bounds[name].rms_error, torch.finfo(torch.bfloat16).eps / 4)
        assert comparison.rms_error <= limit, f"{name}: {comparison}, composition {bounds[name]}"


def test_a_large_eps(amx: None) -> None:
    case = Attention(dtype=torch.bfloat16, eps=30.0, mean=2.0, queries=90, keys=60)
    assert_accurate(case, "cpu")


def test_a_state_of_both_signs(amx: None) -> None:
    """No keys give one, but a difference of two states is: z's mean says nothing of S."""
    torch.manual_seed(0)
    q, dout = (torch.rand(1, 1, 40, 64).bfloat16() for _ in range(2))
    S, z = torch.randn(1, 1, 128, 64), torch.rand(1, 1, 128) + 0.5
    z[..., 64:] *= (
        -z[..., :64].sum() / z[..., 64:].sum() * 0.9999
    )  # q, of one sign, meets half of it
    found = {}
    for backend, double in (("cpu", False), ("reference", True)):
        inputs = [x.double() if double else x for x in (q, S, z)]
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = kernels.linear_attention_apply(*inputs, eps=1e-6, backend=backend)
        found[backend] = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    for a, b in zip(found["cpu"], found["reference"], strict=True):
        assert (a.double() - b).norm() < 6e-3 * b.norm()


def test_narrow_heads_are_not_for_tiles(amx: None) -> None:
    ran = torch.ops.linear_vit.cpu_linear_attention_instruction_set
    assert (ran(True, 15), ran(True, 16), ran(False, 64)) == ("AVX-512", "AMX", "AVX-512")
    q = torch.randn(1, 1, 4, 8).bfloat16()
    assert "AVX-512" in kernels.implementation("linear_attention", "cpu", q, q, q)


def test_state_and_apply_are_the_whole(amx: None) -> None:
    """Forward and backward in two halves, whose gradients cancel between them (v has a mean)."""
    case = Attention(dtype=torch.bfloat16, mean=1.0, heads=4, queries=90, keys=300, head_dim=40)
    q, k, v = case.inputs()
    S, z = kernels.linear_attention_state(k, v, backend="cpu")
    out = kernels.linear_attention_apply(q, S, z, backend="cpu")
    halves = [out.detach(), *torch.autograd.grad(out, (q, k, v), case.gradient())]
    for half, whole in zip(halves, results(case, "cpu"), strict=True):
        scale = whole.double().square().mean().sqrt()
        assert (half.double() - whole.double()).square().mean().sqrt() <= 6e-3 * scale


def test_large_outputs_are_streamed_alike(amx: None) -> None:
    """Past the caches where an output is large: the same bits as a part of it by itself."""
    shape = (1, 2, 20_000, 64)
    q, k, v, dout = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(4))
    S, z = (x.detach() for x in kernels.linear_attention_state(k, v, backend="cpu"))

    def made(tokens: int) -> list[Tensor]:
        rows = slice(0, tokens)
        out = kernels.linear_attention_apply(q[:, :, rows], S, z, backend="cpu")
        states = kernels.linear_attention_state(k[:, :, rows], v[:, :, rows], backend="cpu")
        dq = torch.autograd.grad(out, q, dout[:, :, rows])
        made = [out, *dq, *torch.autograd.grad(states, (k, v), (S, z))]
        return [x[:, :, :1000] for x in made]

    assert q.numel() * q.element_size() > 4 << 20
    for i, (whole, part) in enumerate(zip(made(20_000), made(1000), strict=True)):
        # dk by the mean of the call's own values, which are others in a part.
        near = 1e-2 * part.abs().max() if i == 2 else 0
        assert (whole - part).abs().max() <= near


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(16, 257, 7))
def test_every_head_dim(amx: None, head_dim: int) -> None:
    assert_accurate(Attention(head_dim=head_dim, dtype=torch.bfloat16, queries=35, keys=133), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [*range(1, 36), 63, 64, 95, 127, 128, 129, 159, 161, 255, 257])
def test_every_tail(amx: None, tokens: int) -> None:
    case = Attention(dtype=torch.bfloat16, head_dim=64, queries=tokens, keys=tokens + 1)
    assert_accurate(case, "cpu")


# ---- the same, emulated --------------------------------------------------------------------------

QUICK = (
    "test_head_dims and dtype2 and (48- or 64- or 96-) or test_nan or test_no_keys"
    " or tiny_queries and 0.0"
)
ALL = "not dtype0 and not dtype1 and not ripple and not one_nan_token"


@pytest.mark.parametrize(
    ("expression", "kind", "least"),
    [
        pytest.param(QUICK, "emulated", 8, id="quick", marks=pytest.mark.slow),
        pytest.param(ALL, "emulated", 80, id="all", marks=pytest.mark.slow),
        pytest.param(QUICK, "plain", 8, id="plain", marks=pytest.mark.slow),
    ],
)
def test_emulated(expression: str, kind: str, least: int) -> None:
    done = pytest_on_emulated_tiles(expression, kind)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed is not None
    assert int(passed[1]) >= least, done.stdout
    assert "skipped" not in done.stdout


RESULTS = """
import sys
import torch
from tests.kernels import tiles
from tests.kernels.cases import Attention, results

found = []
for size in (dict(head_dim=64, queries=300, keys=211, heads=4), dict(head_dim=24, mean=1.0),
             dict(head_dim=100, queries=40, keys=70, layout="odd"), dict(head_dim=32, eps=0.5)):
    found += results(Attention(dtype=torch.bfloat16, **size), "cpu")
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_emulated_results_are_the_real_ones(tmp_path: Path) -> None:
    if not has_tiles() or not has_vectors():
        pytest.skip("no AMX here to compare with")
    found = {}
    for kind in ("emulated", "real"):
        file = tmp_path / f"{kind}.pt"
        done = on_emulated_tiles("-c", RESULTS, str(file), kind=kind)
        assert done.returncode == 0, done.stderr[-4000:]
        found[kind] = torch.load(file)
    for emulated, real in zip(found["emulated"], found["real"], strict=True):
        assert torch.equal(emulated, real)


# ---- broken on purpose ---------------------------------------------------------------------------


class Mutation(NamedTuple):
    name: str
    file: str  # kernels/linear_attention/cpu_amx<file>
    old: str
    new: str
    tests: str  # a pytest -k expression: what must notice


MUTATIONS = [
    Mutation(
        "a copied block lacks its last row",
        ".h",
        "n < wanted && n < there; ++n",
        "n < wanted && n + 1 < there; ++n",
        "test_head_dims and 48-dtype2",
    ),
    Mutation(
        "partial states are left out",
        ".cpp",
        "if (*other.empty != 0) continue;",
        "if (*other.empty == 0) continue;",
        "test_sizes and 1500",
    ),
    Mutation(
        "S is not centred",
        "_gradients.h",
        "if (kCentred) x -= z[f] * load_wide(mean), y -= z[f] * load_wide(mean + 16);",
        "",
        "test_no_worse",
    ),
    Mutation(
        "g/E has one term",
        "_gradients.h",
        "round_two(rest[0], rest[1])",
        "Halves{}",
        "test_no_worse",
    ),
    Mutation(
        "eps is forgotten where S is centred",
        "_gradients.h",
        "(sum_of(total) - eps * mean_g)",
        "sum_of(total)",
        "test_a_large_eps",
    ),
    Mutation(
        "what the unit takes for zero is not noticed in queries",
        "_apply.h",
        "if (low != 0 && any_in(low, head_dim, q, last_row, tokens)) fine = false;",
        "",
        "test_tiny_queries",
    ),
    Mutation(
        "nor in keys and values",
        ".cpp",
        "if (most >= (127 - 40) << 7) return true;",
        "return true;",
        "test_tiny_and_large",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_broken_emulated_kernel_is_noticed(
    mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("kernels", "attention", "linear_vit", "tests/kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests/processes.py", tmp_path / "tests")
    file = tmp_path / f"kernels/linear_attention/cpu_amx{mutation.file}"
    source = file.read_text()
    assert source.count(mutation.old) == 1, f"{file.name} no longer has {mutation.old!r} once"
    file.write_text(source.replace(mutation.old, mutation.new))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    done = pytest_on_emulated_tiles(mutation.tests, root=tmp_path)
    assert done.returncode == 1, f"not noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert re.search(r"AssertionError|^E +assert", done.stdout, re.MULTILINE), done.stdout
