"""A user's function as a backend, and an operation from outside."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.kernels import registry
from linear_vit.kernels.backends import run
from linear_vit.kernels.rows import BACKEND_ROWS, OPERATION_ROWS
from tests import processes


@pytest.fixture(autouse=True)
def tables_as_before() -> Iterator[None]:
    with registry.temporarily():
        yield


def tripled(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return 3 * q + k.mean() + eps


def register(name: str = "mine", **options: object) -> None:
    kernels.register("linear_attention", name, devices=("cpu",), **options)(tripled)  # type: ignore[arg-type]


Q = torch.arange(32, dtype=torch.float32).reshape(1, 2, 4, 4)


# ---- a backend -----------------------------------------------------------------------------------


def test_it_runs_by_name_on_what_was_validated() -> None:
    given = []

    @kernels.register("linear_attention", "mine", devices=("cpu", "cuda"))
    def mine(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        given.append(eps)
        return tripled(q, k, v, eps)

    assert callable(mine)  # the decorator gives back the function
    out = kernels.linear_attention(Q, Q, Q, eps=1, backend="mine")
    torch.testing.assert_close(out, 3 * Q + Q.mean() + 1)
    assert given == [1.0]
    with pytest.raises(ValueError, match="contiguous last axis"):
        kernels.linear_attention(Q.transpose(2, 3), Q, Q, backend="mine")
    assert len(given) == 1


def test_it_is_listed_where_it_was_registered() -> None:
    register(title="Mine", colour="#123456")
    assert kernels.backends("linear_attention", "cpu")["mine"] is None
    assert "mine" not in kernels.backends("softmax_attention", "cpu")
    assert "mine" not in kernels.BACKENDS
    row = kernels.backend_rows()["mine"]
    assert (row.title, row.colour, row.own) == ("Mine", "#123456", False)
    assert kernels.is_timeable("mine", "cpu")
    said = kernels.implementation("linear_attention", "mine", Q, Q, Q)
    assert said == f"mine: {__name__}.tripled"
    with pytest.raises(ValueError, match=r"unknown backend 'mine' for linear_attention_state"):
        kernels.linear_attention_state(Q, Q, backend="mine")


def test_titles_and_colours_are_found_for_it() -> None:
    register("one")
    register("two")
    rows = kernels.backend_rows()
    assert rows["one"].title == "one"
    assert len({row.colour for row in rows.values()}) == len(rows)


def test_it_is_never_the_default() -> None:
    before = kernels.default_backend("linear_attention", "cpu")
    register()
    register(before, replace=True)
    assert kernels.default_backend("linear_attention", "cpu") not in ("mine", before)
    assert not torch.equal(kernels.linear_attention(Q, Q, Q), tripled(Q, Q, Q, 1e-6))


def test_a_wrong_device_is_a_reason() -> None:
    kernels.register("linear_attention", "mine", devices=("cuda",))(tripled)
    reason = "mine is registered for cuda, not for cpu"
    assert kernels.backends("linear_attention", "cpu")["mine"] == reason
    with pytest.raises(ValueError, match=f"backend 'mine' can't run linear_attention .*{reason}"):
        kernels.linear_attention(Q, Q, Q, backend="mine")


def test_what_its_user_says_is_a_reason() -> None:
    asked = []

    def unusable(
        device: torch.device, dtype: torch.dtype | None, head_dim: int | None
    ) -> str | None:
        asked.append((device.type, dtype, head_dim))
        return None if head_dim in (None, 4) else f"head dim {head_dim} is not mine"

    register(unusable=unusable)
    assert kernels.backends("linear_attention", "cpu")["mine"] is None
    kernels.linear_attention(Q, Q, Q, backend="mine")
    assert asked == [("cpu", None, None), ("cpu", torch.float32, 4)]
    wide = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="head dim 8 is not mine"):
        kernels.linear_attention(wide, wide, wide, backend="mine")


def test_float64_is_for_the_reference() -> None:
    register()
    reason = kernels.backends("linear_attention", "cpu", dtype=torch.float64)["mine"]
    assert reason == "float64 is for the reference only: use backend='reference', or float32"


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown operation 'attention': there are linear_att"):
        kernels.register("attention", "mine", devices=("cpu",))


@pytest.mark.parametrize("name", ["torch", "cuda", "mine"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    register()
    with pytest.raises(ValueError, match=f"{name}' is .*linear_attention: .*replace=True"):
        register(name)


def test_a_backend_is_replaced_on_request() -> None:
    torch.testing.assert_close(
        kernels.linear_attention(Q, Q, Q, backend="torch"),
        kernels.linear_attention(Q, Q, Q, backend="reference"),
    )
    register("torch", replace=True)
    assert torch.equal(kernels.linear_attention(Q, Q, Q, backend="torch"), tripled(Q, Q, Q, 1e-6))
    register()
    kernels.linear_attention(Q, Q, Q, backend="mine")
    kernels.register("linear_attention", "mine", devices=("cpu",), replace=True)(
        lambda q, k, v, eps: -q
    )
    assert torch.equal(kernels.linear_attention(Q, Q, Q, backend="mine"), -Q)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"devices": "cuda"}, TypeError, "sequence of types like"),
        ({"devices": ()}, ValueError, "names no type"),
        ({"devices": ("gpu",)}, ValueError, "'cpu' and 'cuda', got 'gpu'"),
        ({"devices": ("cuda:0",)}, ValueError, "got 'cuda:0'"),
        ({"unusable": "no"}, TypeError, "unusable must be callable or None, got str"),
        ({"name": "my-own"}, ValueError, "letters, digits and _, got 'my-own'"),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {"name": "mine", "devices": ("cpu",)} | options
    with pytest.raises(error, match=message):
        kernels.register("linear_attention", **given)  # type: ignore[arg-type]


def test_what_is_no_function_or_no_reason_is_an_error() -> None:
    with pytest.raises(TypeError, match="a backend is a function, got int"):
        kernels.register("linear_attention", "mine", devices=("cpu",))(3)  # type: ignore[type-var]
    register(unusable=lambda *_: False)
    with pytest.raises(TypeError, match="unusable of mine must return None or the reason"):
        kernels.backends("linear_attention", "cpu")


def test_it_goes_through_torch_compile() -> None:
    """Whole graphs of it, and of what takes its place."""
    register()
    attend = torch.compile(
        lambda q: kernels.linear_attention(q, q, q, backend="mine"),
        fullgraph=True,
        backend="aot_eager",
    )
    q = Q.clone().requires_grad_()
    torch.testing.assert_close(attend(q), tripled(Q, Q, Q, 1e-6))
    attend(q).sum().backward()
    assert q.grad is not None
    kernels.register("linear_attention", "mine", devices=("cpu",), replace=True)(
        lambda q, k, v, eps: -q
    )
    torch.testing.assert_close(attend(Q), -Q)


def test_it_is_given_what_autocast_makes_of_it() -> None:
    dtypes = []

    @kernels.register("linear_attention", "mine", devices=("cpu",))
    def mine(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
        dtypes.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return q

    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernels.linear_attention(Q, Q, Q, backend="mine")
    assert dtypes == [(torch.bfloat16, False)]


# ---- entry points of installed packages ----------------------------------------------------------

PACKAGE = """
from linear_vit import kernels

def register():
    kernels.register("linear_attention", "packaged", devices=("cpu",))(lambda q, k, v, eps: 2 * q)
"""
ASKING = """
import sys, torch, warnings
warnings.simplefilter("always")
from linear_vit import kernels
q = torch.ones(1, 1, 2, 4)
kernels.linear_attention(q, q, q)
print("packaged_kernels" in sys.modules)
print(kernels.linear_attention(q, q, q, backend="packaged").sum().item())
print(kernels.backends("linear_attention", "cpu")["packaged"])
print(kernels.backend_rows()["packaged"].title)
"""


def installed(folder: Path, *points: str) -> None:
    info = folder / "packaged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[linear_vit.kernels]", *points]))
    (folder / "packaged_kernels.py").write_text(PACKAGE)


def test_kernels_of_packages_are_loaded_when_backends_are_asked_for(tmp_path: Path) -> None:
    installed(tmp_path, "packaged = packaged_kernels:register")
    done = processes.python("-c", ASKING, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False", "16.0", "None", "packaged"]


def test_a_package_that_fails_is_a_warning(tmp_path: Path) -> None:
    installed(tmp_path, "gone = gone_kernels", "packaged = packaged_kernels:register")
    done = processes.python("-c", ASKING, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == ["False", "16.0", "None", "packaged"]
    said = "kernels of gone_kernels (linear_vit.kernels, gone) are left out: ModuleNotFoundError"
    assert done.stderr.count(said) == 1


# ---- an operation --------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[str]:
    """A package of a toy operation, in a folder of its own: x + 1, in two ways."""
    package = tmp_path / "toy_room"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for backend, body in (("reference", "x + 1"), ("torch", "x.add(1)")):
        code = f"def toy(x):\n    return {body}\n"
        (package / f"{backend}.py").write_text(textwrap.dedent(code))
    sys.path.insert(0, str(tmp_path))
    yield package.name
    sys.path.remove(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == package.name]:
        del sys.modules[name]


def test_an_operation_from_outside(toy: str) -> None:
    row = kernels.add_operation("toy", package=toy, title="a toy")
    assert kernels.operations()["toy"] is row
    assert (row.title, row.family) == ("a toy", toy)
    assert "toy" not in kernels.OPERATIONS
    listed = kernels.backends("toy", "cpu")
    assert tuple(listed) == kernels.BACKENDS
    assert listed["reference"] is None
    assert listed["torch"] is None
    assert listed["triton"] == "toy has no such backend: there is no module toy_room.triton"
    assert kernels.default_backend("toy", "cpu") == "torch"
    x = torch.zeros(3)
    for backend in (None, "reference", "torch"):
        assert torch.equal(run("toy", backend, x), torch.ones(3))
    assert kernels.implementation("toy", "torch", x) == "torch: toy_room.torch"
    with pytest.raises(ValueError, match="backend 'cuda' can't run toy"):
        run("toy", "cuda", x)


def test_a_backend_of_an_operation_from_outside(toy: str) -> None:
    kernels.add_operation("toy", package=toy, has_head_dim=True, head_dims={"torch": (3,)})
    kernels.register("toy", "twice", devices=("cpu",))(lambda x: 2 * x)
    assert torch.equal(run("toy", "twice", torch.ones(3)), 2 * torch.ones(3))
    assert kernels.default_backend("toy", "cpu", head_dim=4) == "reference"
    with pytest.raises(ValueError, match="head dim 4 is not one of the kernels' 3"):
        run("toy", "torch", torch.ones(4))


def test_an_operation_that_cannot_be_added(toy: str) -> None:
    with pytest.raises(ValueError, match="there is an operation 'ripple_pool'"):
        kernels.add_operation("ripple_pool", package=toy)
    with pytest.raises(ValueError, match="no package 'no_such_room'"):
        kernels.add_operation("toy", package="no_such_room")
    with pytest.raises(ValueError, match="the operation's name is letters, digits and _"):
        kernels.add_operation("a toy", package=toy)
    kernels.add_operation("toy", package=toy)
    with pytest.raises(ValueError, match=r"there is an operation 'toy'.*replace=True"):
        kernels.add_operation("toy", package=toy)
    assert kernels.add_operation("toy", package=toy, replace=True).title == "toy"


# ---- the tables ----------------------------------------------------------------------------------


def test_what_joins_for_a_while_leaves_again() -> None:
    real = kernels.linear_attention(Q, Q, Q, backend="torch")
    with registry.temporarily():
        register()
        register("torch", replace=True)
        assert not torch.equal(kernels.linear_attention(Q, Q, Q, backend="torch"), real)
    assert torch.equal(kernels.linear_attention(Q, Q, Q, backend="torch"), real)
    assert "mine" not in kernels.backend_rows()
    with pytest.raises(ValueError, match="unknown backend 'mine'"):
        kernels.linear_attention(Q, Q, Q, backend="mine")


def test_a_backend_is_pretended_usable_for_a_while() -> None:
    before = kernels.backends("linear_attention", "cpu")["cuda"]
    assert before is not None
    with registry.pretend_usable("cuda"):
        assert kernels.backends("linear_attention", "cpu")["cuda"] is None
    assert kernels.backends("linear_attention", "cpu")["cuda"] == before


def test_every_row_has_its_files() -> None:
    """A file for each backend that an operation does not refuse, and a colour of its own."""
    folder = Path(kernels.__file__).parent
    for op in OPERATION_ROWS:
        for backend in BACKEND_ROWS:
            file = folder / op.family / f"{backend.name}.py"
            assert file.exists() != (backend.name in op.refused), file
            if file.exists():
                assert op.name in file.read_text()
    assert len({row.colour for row in BACKEND_ROWS}) == len(BACKEND_ROWS)
    assert len({row.title for row in OPERATION_ROWS}) == len(OPERATION_ROWS)
