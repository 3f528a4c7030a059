"""``python -m bench check``: what it finds, what it says, and what joins it from outside."""

import contextlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench import check, sweep
from linear_vit.bench.__main__ import COMMANDS
from linear_vit.bench.__main__ import main as command
from linear_vit.kernels import registry
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TWO = {"ops": ["ripple_pool"], "backends": ["reference", "torch"], "dtypes": ["float32"]}


def bench(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = f"import sys; sys.path.insert(0, {str(path)!r});" if path else "import sys;"
    code = f"{search} from linear_vit.bench.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return processes.python("-c", code, *arguments)


# ---- results -------------------------------------------------------------------------------------


def test_what_is_right_passes() -> None:
    seen: list[str] = []
    results = check.cross_check(CPU, **TWO, progress=seen.append)
    assert [r["status"] for r in results] == ["passed", "passed"]
    assert seen == ["ripple_pool float32 reference", "ripple_pool float32 torch"]
    assert {t["tensor"] for t in results[1]["tensors"]} == {"out", "grad x", "grad weight"}
    assert len({t["shape"] for t in results[1]["tensors"]}) == 2
    assert len({t["way"] for t in results[1]["tensors"]}) == 4
    assert 0 < results[1]["worst_rms_error"] < 1e-6


def test_what_is_wrong_fails_and_the_exit_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with registry.temporarily():

        @kernels.register("ripple_pool", "broken", devices=("cpu",), title="Broken")
        def broken(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            plain: torch.Tensor = kernels.ripple_pool(x, weight, axis=axis, backend="torch")
            return plain * 1.001

        @kernels.register("ripple_pool", "raising", devices=("cpu",))
        def raising(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            raise RuntimeError("no such thing")

        out = tmp_path / "new" / "check.json"
        asked = ["--ops", "ripple-pool", "--dtypes", "float32", "--device", "cpu"]
        asked += ["--backends", "torch,broken,raising", "--out", str(out)]
        assert command(["check", *asked]) == 1
    shown = capsys.readouterr().out
    assert "FAILED ripple_pool float32 broken: wrong out" in shown
    assert "FAILED ripple_pool float32 raising: RuntimeError: no such thing" in shown
    assert "1 passed, 2 failed, 0 not usable here, 0 left out" in shown
    document = json.loads(out.read_text())
    assert (document["kind"], document["schema"], document["device"]) == ("check", 1, "cpu")
    assert document["machine"]["torch"] == torch.__version__
    assert document["operations"] == {"ripple_pool": {"title": "ripple pool"}}
    assert document["backends"]["broken"]["title"] == "Broken"
    assert [r["status"] for r in document["results"]] == ["passed", "failed", "failed"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x: not x.requires_grad and torch.is_grad_enabled(), "without gradients"),
        (lambda x: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "under"),
        (lambda x: torch.is_inference_mode_enabled(), "in inference mode"),
    ],
)
def test_a_forward_pass_that_is_wrong_by_itself_is_seen(wrong: Any, reason: str) -> None:
    """As of a kernel that leaves its output unwritten where nobody wants a gradient."""
    with registry.temporarily():

        @kernels.register("ripple_pool", "lazy", devices=("cpu",))
        def lazy(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            plain: torch.Tensor = kernels.ripple_pool(x, weight, axis=axis, backend="torch")
            return torch.full_like(plain, 7.0) if wrong(x) else plain

        (found,) = check.cross_check(CPU, **{**TWO, "backends": ["lazy"]})
    assert found["status"] == "failed"
    assert f"wrong out, {reason}" in found["reason"]


def test_a_forward_pass_alone_is_fine() -> None:
    """In the check, and in a sweep, which leaves out what is not offered."""
    with registry.temporarily():

        @kernels.register("ripple_pool", "forward_only", devices=("cpu",))
        def forward_only(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            plain: torch.Tensor = kernels.ripple_pool(x, weight, axis=axis, backend="torch")
            return plain.detach()

        (found,) = check.cross_check(CPU, **{**TWO, "backends": ["forward_only"]})
        swept = sweep.make_sweep(
            sweep.Asked(
                "cpu", tokens=(64,), backends=("forward_only",), operations=("ripple_pool",)
            )
        )
    assert found["status"] == "passed"
    assert "its gradient is not offered" in found["reason"]
    assert {t["way"] for t in found["tensors"]} == {
        "without gradients",
        "under no_grad",
        "in inference mode",
    }
    assert [case.mode for case in swept.cases] == ["forward"]
    assert swept.left_out["forward_only, ripple_pool forward+backward"] == (
        "its gradient is not offered"
    )


def test_a_gradient_that_is_missing_is_named() -> None:
    with registry.temporarily():

        @kernels.register("ripple_pool", "half", devices=("cpu",))
        def half(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            plain: torch.Tensor = kernels.ripple_pool(
                x, weight.detach(), axis=axis, backend="torch"
            )
            return plain

        (found,) = check.cross_check(CPU, **{**TWO, "backends": ["half"]})
    assert "RuntimeError: weight has no gradient, and others have" in found["reason"]


def test_who_writes_over_its_inputs_is_found_and_costs_no_other() -> None:
    with registry.temporarily():

        @kernels.register("ripple_pool", "rude", devices=("cpu",))
        def rude(x: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
            plain: torch.Tensor = kernels.ripple_pool(x, weight, axis=axis, backend="torch")
            weight.data.zero_()
            return plain

        asked = {**TWO, "backends": ["rude", "torch"]}
        found = {r["backend"]: r for r in check.cross_check(CPU, **asked)}
    assert "ChangedInput: it writes over its input: weight" in found["rude"]["reason"]
    assert found["torch"]["status"] == "passed"


def test_what_cannot_run_says_why() -> None:
    (result,) = check.cross_check(
        CPU, ops=["linear_attention"], backends=["cuda"], dtypes=["float16"]
    )
    assert result["status"] == "unusable"
    assert "not on cpu" in result["reason"]


def test_what_compiles_is_spared_unless_all_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(prepared: list[Any], backend: str) -> dict[str, Any]:
        return {"status": "passed", "shapes": len(prepared)}

    def found(full: bool) -> list[tuple[str, int | None]]:
        results = check.cross_check(CPU, ops=["ripple_pool"], backends=["compiled"], full=full)
        return [(r["status"], r.get("shapes")) for r in results]

    monkeypatch.setattr(check, "_check_shapes", checked)
    if kernels.backends("ripple_pool", CPU)["compiled"] is not None:
        pytest.skip("nothing compiles here")
    assert found(full=False) == [("passed", 1), ("left out", None), ("left out", None)]
    assert found(full=True) == [("passed", 2)] * 3


def test_every_operation_and_backend_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def one(operation: Any, backend: str, *rest: Any) -> dict[str, Any]:
        asked.append((operation.name, backend))
        return {"status": "passed"}

    monkeypatch.setattr(check, "_check", one)
    check.cross_check(CPU, dtypes=["float32"])
    assert asked == [(op, b) for op in kernels.OPERATIONS for b in kernels.BACKENDS]


def test_what_a_compiler_makes_wrong_is_shown_and_no_verdict_on_us(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's failure must not look like ours, nor hide one of ours."""
    failing = {"compiled"}

    def one(operation: Any, backend: str, *rest: Any) -> dict[str, Any]:
        if backend in failing:
            return {"status": "failed", "reason": "BackendCompilerFailed: timed out"}
        return {"status": "passed", "reason": None, "worst_rms_error": 0.0}

    monkeypatch.setattr(check, "_check", one)
    asked = ["check", "--ops", "ripple_pool", "--backends", "compiled,torch", "--device", "cpu"]
    assert command(asked) == 0
    assert "FAILED ripple_pool float32 compiled (not ours)" in capsys.readouterr().out
    failing.add("torch")
    assert command(asked) == 1


# ---- interpreters --------------------------------------------------------------------------------


def unusable(backend: str = "triton") -> dict[str, Any]:
    result = {"operation": "ripple_pool", "backend": backend, "dtype": "float32"}
    return {**result, "device": "cpu", "status": "unusable", "reason": "no GPU", "mode": "native"}


def test_an_interpreter_stands_in_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    seen: list[str] = []
    (found,) = check.with_interpreters([unusable()], seen.append)
    assert found["mode"] == "interpreter"
    reason = kernels.backends("ripple_pool", "cpu")["triton"]
    if "not installed" not in str(reason):
        assert found["status"] in ("passed", "unusable")  # the interpreter wants an older NumPy
        assert bool(seen) == (found["status"] == "passed")


def test_an_interpreter_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (found,) = check.with_interpreters([unusable()], print)
    assert (found["status"], found["mode"]) == ("failed", "interpreter")
    assert "ended with code 1" in found["reason"]


def test_one_that_runs_here_or_interpreted_already_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for results in ([unusable("cuda")], [{**unusable(), "status": "passed"}]):
        assert check.with_interpreters(results, print) == results
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert check.with_interpreters([unusable()], print) == [unusable()]


# ---- the command ---------------------------------------------------------------------------------


def test_unknown_names_are_answered_by_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, message in (
        (["--only", "tritn"], "unknown backend 'tritn'; there are reference, torch"),
        (["--ops", "pool"], "unknown operation 'pool'; there are linear_attention"),
        (["--dtypes", "float8"], "unknown dtype 'float8'; there are float32"),
        (["--device", "tpu9"], "cpu or cuda"),
    ):
        with pytest.raises(SystemExit):
            command(["check", *options])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # argparse's
        assert command([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["chekc"]) == 2
    assert "no command 'chekc'" in capsys.readouterr().err
    assert command(["-p", "no_such_module", "check"]) == 2
    assert "no module of this name" in capsys.readouterr().err


def test_an_interrupt_ends_it_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "cross_check", interrupted)
    assert command(["check"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["check", "static"])  # a module, and a folder
def test_the_old_spelling_still_works(name: str) -> None:
    done = processes.python("-m", f"bench.{name}", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m bench {name}" in done.stdout


def test_what_is_gone_names_what_there_is() -> None:
    done = processes.python("-m", "bench.gpu")
    assert done.returncode == 1
    assert "bench.gpu is gone: use pytest --benchmark-only --sweep gpu" in done.stderr


# ---- from outside --------------------------------------------------------------------------------

TOY = {
    "toy/__init__.py": "",
    "toy/reference.py": """
        def doubled(x):
            return 2 * x
        """,
    "toy/torch.py": """
        def doubled(x):
            return x + x
        """,
    "toy_plugin.py": """
        from dataclasses import dataclass

        from linear_vit import kernels
        from linear_vit.bench import problems
        from linear_vit.bench.problems.inputs import Drawn
        from linear_vit.kernels.backends import run

        kernels.add_operation("doubled", package="toy", title="Doubling")


        @kernels.register("doubled", "thrice", devices=("cpu", "cuda"), title="Wrong on purpose")
        def thrice(x):
            return 3 * x


        @kernels.register("linear_attention", "borrowed", devices=("cpu", "cuda"))
        def borrowed(q, k, v, eps):
            return kernels.linear_attention(q, k, v, eps=eps, backend="torch")


        @dataclass(frozen=True)
        class Row(problems.Shape):
            B: int
            N: int

            @property
            def tokens(self):
                return self.N


        class Doubled(Drawn):
            name, title = "doubled", "Doubling"

            def shape(self, tokens, batch=1):
                return Row(batch, tokens)

            def drawn(self, normal, shape):
                return {"x": normal(shape.B, shape.N)}, {"out": normal(shape.B, shape.N)}

            def run(self, shape):
                return lambda tensors, backend: (run("doubled", backend, tensors["x"]),)

            def lengths(self, device_type, extent):
                return (64, 256)

            def check_shapes(self, head_dim, *, interpreted=False):
                return (Row(2, 33),)

            def least_work(self, mode, shape, element_size):
                both = mode == problems.FORWARD_BACKWARD
                size = shape.B * shape.N
                return problems.Work(2 * size * element_size * (1 + both), size * (1 + both))


        problems.register(Doubled())
        """,
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with an operation, its backends, and a backend of an operation that there was."""
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def test_an_operation_and_a_backend_from_outside_are_checked(toy: Path) -> None:
    out = toy / "check.json"
    asked = ["--ops", "doubled,linear_attention", "--dtypes", "float32", "--out", str(out)]
    asked += ["--backends", "reference,torch,thrice,borrowed", "--device", "cpu"]
    done = bench("-p", "toy_plugin", "check", *asked, path=toy)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    header = next(line for line in lines if "operation" in line and "dtype" in line)
    assert {"thrice", "borrowed"} <= set(header.split())
    assert any(line.split()[:2] == ["doubled", "float32"] for line in lines)
    document = json.loads(out.read_text())
    statuses = {(r["operation"], r["backend"]): r["status"] for r in document["results"]}
    assert statuses == {
        ("doubled", "reference"): "passed",
        ("doubled", "torch"): "passed",
        ("doubled", "thrice"): "failed",
        ("linear_attention", "reference"): "passed",
        ("linear_attention", "torch"): "passed",
        ("linear_attention", "borrowed"): "passed",
    }
    assert document["operations"]["doubled"]["title"] == "Doubling"
    assert document["backends"]["thrice"]["title"] == "Wrong on purpose"
