"""``--kernels FILE``: a kernel from one file, through the check, the benchmark and docs/."""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench import guests
from linear_vit.bench.__main__ import main as command
from linear_vit.bench.guests import Entry, Failed, Guest, trials
from linear_vit.bench.guests.trials import Trial, touched
from linear_vit.bench.problems import AttentionShape, RippleShape, operation
from linear_vit.bench.sweep import Asked, make_sweep
from linear_vit.kernels import registry
from linear_vit.options import OptionError
from tests import processes

CPU = torch.device("cpu")
DOC = (processes.ROOT / "docs" / "your-kernel.md").read_text()
EXAMPLES = dict(re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE))
TAIL = """
    import torch

    from linear_vit import kernels


    @kernels.register("linear_attention", "mine", devices=("cpu",), title="Mine", colour="#123456")
    def mine(q, k, v, eps):
        k, v = k[:, :, : k.shape[2] // 8 * 8], v[:, :, : k.shape[2] // 8 * 8]  # no tail
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        q, k = (torch.cat([x.relu(), (-x).relu()], dim=-1) for x in (q, k))
        met = q @ k.sum(dim=-2).unsqueeze(-1)
        return q @ (k.transpose(-2, -1) @ v) / torch.where(met == 0, torch.inf, met + eps)


    @kernels.register("ripple_pool", "mine", devices=("cuda",))
    def elsewhere(x, weight, axis): ...
    """


@pytest.fixture(autouse=True)
def tables_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LINEAR_VIT_KERNELS", "")
    with registry.temporarily():
        yield
    guests.stop_all()


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


# ---- a file --------------------------------------------------------------------------------------


def test_a_file_is_listed_with_its_reasons_and_never_chosen(tmp_path: Path) -> None:
    before = kernels.default_backend("linear_attention", "cpu")
    entries = guests.announce([written(tmp_path, TAIL)])
    assert entries[0] == Entry(
        "linear_attention", "mine", ("cpu",), "Mine", "#123456", False, False, "mine", "mine"
    )
    assert kernels.backends("linear_attention", "cpu")["mine"] is None
    reason = "mine is registered for cuda, not for cpu"
    assert kernels.backends("ripple_pool", "cpu")["mine"] == reason
    assert kernels.backend_rows()["mine"].colour == "#123456"
    assert kernels.default_backend("linear_attention", "cpu") == before
    q = torch.ones(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="mine runs in a process of its own"):
        kernels.linear_attention(q, q, q, backend="mine")


def test_its_own_reasons_come_from_its_process(tmp_path: Path) -> None:
    text = """
        from linear_vit import kernels

        def unusable(device, dtype, head_dim):
            return f"no {head_dim} on {device}" if head_dim == 32 else None

        @kernels.register("linear_attention", "choosy", devices=("cpu",), unusable=unusable)
        def choosy(q, k, v, eps):
            return q
        """
    guests.announce([written(tmp_path, text)])
    said = [kernels.backends("linear_attention", "cpu", head_dim=d)["choosy"] for d in (16, 32)]
    assert said == [None, "no 32 on cpu"]


def test_what_is_interpreted_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
        import sys
        from linear_vit import kernels
        sys.modules["triton"] = sys
        kernels.register("linear_attention", "slowly", devices=("cpu",))(lambda q, k, v, eps: q)
        """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    guests.announce([written(tmp_path, text)])
    asked = Asked("cpu", tokens=(64,), operations=("linear_attention",))
    swept = make_sweep(asked)
    assert "slowly" not in {case.backend for case in swept.cases}
    assert "interpreter" in swept.left_out["backend slowly"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\nx = nothing\n", "mine.py, line 3: NameError: name 'nothing' is not"),
        ("def f(:\n", "mine.py, line 1: SyntaxError: invalid syntax"),
        ("x = 1\n", "mine.py registers no kernel: it has to call kernels.register"),
        ("raise SystemExit('no')\n", "mine.py, line 1: SystemExit: no"),
        (
            "from linear_vit import kernels\n"
            "kernels.register('linear_attention', 'torch', devices=('cpu',))(print)\n",
            "line 2: ValueError: 'torch' is a built-in backend of linear_attention",
        ),
        (
            "from linear_vit import kernels\nkernels.register('linear_attention', 'torch', "
            "devices=('cpu',), replace=True)(print)\n",
            "torch of linear_attention is there already: give yours another name",
        ),
        ("import os\nos._exit(3)\n", "its process ended with code 3"),
    ],
)
def test_a_file_that_does_not_load_is_a_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        guests.announce([written(tmp_path, text)])
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--kernels: none.py: FileNotFoundError: there is no"):
        guests.announce([tmp_path / "none.py"])


def test_two_files_have_colours_of_their_own(tmp_path: Path) -> None:
    for name in ("one", "two"):
        text = f"""
            from linear_vit import kernels
            kernels.register("linear_attention", "{name}", devices=("cpu",))(lambda q, k, v, e: q)
            """
        guests.announce([written(tmp_path, text, f"{name}.py")])
    rows = kernels.backend_rows()
    assert len({row.colour for row in rows.values()}) == len(rows)


# ---- the check -----------------------------------------------------------------------------------


def test_a_failure_is_reduced_and_shown_to_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    asked = ["--kernels", str(written(tmp_path, TAIL)), "--dtypes", "float32", "--device", "cpu"]
    assert command(["check", *asked, "--plain", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "0 passed, 1 failed, 1 not usable here" in shown
    results = json.loads(out.read_text())["results"]
    assert [r["operation"] for r in results] == ["linear_attention", "ripple_pool"]
    assert re.search(r"AttentionShape\(B=1, H=1, Hk=1, N=1, M=[2-7], D=64\)", results[0]["reason"])
    lines = shown.partition("To see it fail in a Python of yours")[2].splitlines()
    snippet = "\n".join(line[4:] for line in lines[1:])
    assert snippet == results[0]["snippet"]
    done = processes.python("-c", snippet)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"out rms error .* False\n", done.stdout)


def test_a_layout_and_a_draw_are_what_they_say() -> None:
    shape = AttentionShape(2, 2, 2, 5, 5, 4)
    plain = Trial("linear_attention", shape).problem()
    for layout, strides in {"transposed": (40, 4, 8, 1), "odd": (70, 35, 7, 1)}.items():
        problem = Trial("linear_attention", shape, layout=layout).problem()
        assert problem.inputs["k"].stride() == strides
        assert torch.equal(problem.inputs["k"], plain.inputs["k"])
    shared = Trial("linear_attention", shape, layout="shared").problem().inputs
    assert len({x.untyped_storage().data_ptr() for x in shared.values()}) == 1
    expanded = Trial("linear_attention", shape, layout="expanded").problem().inputs
    assert expanded["v"].stride(1) == 0
    other = Trial("linear_attention", shape).problem(draw=1)
    assert not torch.equal(other.inputs["q"], plain.inputs["q"])
    for trial in (Trial("ripple_pool", RippleShape(1, 3, 4, 5)), Trial("linear_attention", shape)):
        first = trial.problem()
        for name, x in touched(first, 3).inputs.items():
            rows = (x != first.inputs[name]).any(-1).sum()
            assert rows == 1, name


@pytest.mark.parametrize("op", kernels.OPERATIONS)
def test_what_is_right_passes_every_trial(op: str) -> None:
    """The reference, in the place of a guest's kernel."""
    for attempt in trials.named(operation(op), "float32", (16,)):
        trial, problem = attempt.trial, attempt.trial.problem()
        results = [x.detach() for x in problem.call("reference", attempt.mode)()]
        found = trial.judge(problem, attempt.mode, results, trial.expected(problem))
        assert all(verdict.passed for verdict in found.values()), (trial, found)


# ---- a process that lies -------------------------------------------------------------------------


def test_what_makes_no_sense_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Guest([str(written(tmp_path, TAIL))]) as guest:
        guest.begin()
        monkeypatch.setattr(guest, "ask", lambda *_, **__: {"seconds": "soon"})
        with pytest.raises(Failed, match="its process answers what makes no sense"):
            guest.run()


# ---- the benchmark -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a benchmark of the file says, and its folder."""
    tmp_path = tmp_path_factory.mktemp("run")
    plain = written(tmp_path, EXAMPLES["plain.py"], "plain.py")
    options = ["--device", "cpu", "--tokens", "64", "-k", "(torch or plain) and not backward"]
    done = processes.pytest("--benchmark-only", f"--kernels={plain}", *options, f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, tmp_path


def test_it_is_timed_beside_ours(run: tuple[str, Path]) -> None:
    shown, folder = run
    assert "yours: plain (linear_attention), each case in a process of its own" in shown
    document = json.loads((folder / "benchmark.json").read_text())
    cases = [case["extra_info"] for case in document["benchmarks"]]
    assert {case["operation"] for case in cases} == {"linear_attention"}
    assert {case["backend"] for case in cases} == {"torch", "plain"}
    yours: list[dict[str, Any]] = [case for case in cases if case["backend"] == "plain"]
    assert all(case["guest"]["calls_judged"] >= 5 for case in yours)
    turns = {(case["pass"], case["N"]): case["turns"] for case in cases if case not in yours}
    assert all(turns[case["pass"], case["N"]] == case["turns"] for case in yours)
    assert document["kernel_suite"]["backends"]["plain"]["colour"] == "#56B4E9"


@pytest.mark.slow
def test_it_is_on_the_page(run: tuple[str, Path]) -> None:
    saved, page = (run[1] / name for name in ("benchmark.json", "index.html"))
    made = processes.python("-m", "reports", "page", str(saved), "--out", str(page))
    assert made.returncode == 0, made.stderr
    assert "plain" in page.read_text()


# ---- what docs/ shows ----------------------------------------------------------------------------


def example(folder: Path, name: str) -> Path:
    for file, text in EXAMPLES.items():
        (folder / file).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("name", "interpreted"),
    [
        pytest.param("plain.py", False, marks=pytest.mark.slow),
        pytest.param("compiled.py", False, marks=pytest.mark.slow),
        pytest.param("cpp_kernel.py", False, marks=pytest.mark.slow),
        pytest.param("triton_kernel.py", True, marks=pytest.mark.slow),
    ],
)
def test_an_example_is_right(
    name: str, interpreted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = ["--kernels", str(example(tmp_path, name)), "--dtypes", "float32", "--plain"]
    assert command(["check", *asked, "--device", "cpu", "--draws", "3"]) == 0


def test_all_kinds_of_examples_are_there() -> None:
    kinds = {"plain.py", "compiled.py", "triton_kernel.py", "cpp_kernel.py", "cuda_kernel.py"}
    assert kinds <= set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel"), [("triton_kernel.py", "_forward"), ("cuda_kernel.py", "attend_kernel")]
)
def test_static_finds_the_kernels_of_a_file(name: str, kernel: str, tmp_path: Path) -> None:
    out = tmp_path / "static.json"
    asked = ["--kernels", str(example(tmp_path, name)), "--arch", "sm_90a", "--out", str(out)]
    command(["static", *asked, "--dtypes", "float32", "--head-dims", "64", "--jobs", "1"])
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {kernel}
    assert all(row["registers"] > 16 for row in rows)


@pytest.mark.slow
def test_static_of_a_file_without_gpu_kernels_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--kernels", str(example(tmp_path, "plain.py")), "--arch", "sm_90a"]
    assert command(["static", *asked, "--dtypes", "float32", "--head-dims", "16"]) == 2
    assert "no Triton kernel was launched, and no .cu file" in capsys.readouterr().err
