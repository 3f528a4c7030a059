"""pytest as a user runs it, in a process of its own: with --benchmark-only, and without."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import pytest as run_pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("run") / "new" / "run.json"
    options = ["--device", "cpu", "--tokens", "64", "--ops", "linear_attention"]
    options += ["--backends", "torch", f"--benchmark-json={path}"]
    done = run_pytest("--benchmark-only", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())


def test_only_the_cases_asked_for_are_run(run) -> None:
    output, document = run
    names = [benchmark["name"] for benchmark in document["benchmarks"]]
    assert names == [
        "test_kernel[linear_attention-forward-float32-N64-torch]",
        "test_kernel[linear_attention-forward+backward-float32-N64-torch]",
    ]
    assert "2 passed" in output
    assert "skipped" not in output
    assert "deselected" not in output


def test_extra_info_has_what_a_report_needs(run) -> None:
    _, document = run
    for benchmark, work in zip(document["benchmarks"], (1, 3), strict=True):
        info, stats = benchmark["extra_info"], benchmark["stats"]
        assert info["schema"] == 2
        assert (info["operation"], info["backend"]) == ("linear_attention", "torch")
        assert info["shape"] == {"B": 1, "H": 6, "Hk": 6, "N": 64, "M": 64, "D": 64}
        assert info["least_flop"] == work * 8 * 64 * 64 * 64 * 6
        assert info["gb_per_s"] == pytest.approx(info["least_bytes"] / stats["median"] / 1e9)
        assert info["tflop_per_s"] == pytest.approx(info["least_flop"] / stats["median"] / 1e12)
        assert info["peak_memory_bytes"] > 0
        assert info["implementation"]
        assert len(info["error"]) == (1 if work == 1 else 4)
        for error in info["error"].values():
            assert 0 < error["rms"] <= error["rms_tolerance"]
    suite = document["kernel_suite"]
    assert suite["machine"]["torch"] == torch.__version__
    assert suite["machine"]["cores"] >= 1
    assert suite["machine"]["cpu"]
    assert suite["operations"] == {"linear_attention": {"title": "linear attention"}}
    assert suite["backends"]["torch"]["title"] == "PyTorch"
    assert suite["kind"] == "benchmarks"
    assert suite["failed"] == {}
    assert suite["limits"]["matmul_flop_per_s"]["float32"] > 0
    assert suite["limits"]["measured"]


def test_statistics_are_those_of_the_measured_rounds(run) -> None:
    _, document = run
    for benchmark in document["benchmarks"]:
        stats = benchmark["stats"]
        assert len(stats["data"]) == stats["rounds"] >= 3
        assert min(stats["data"]) == stats["min"] > 0
        assert statistics.median(stats["data"]) == pytest.approx(stats["median"])


def test_output_shows_progress_and_a_table(run) -> None:
    output, _ = run
    assert "[1/2 " in output
    assert "[2/2 " in output
    assert "linear_attention, forward+backward, float32" in output
    assert "GFLOP/s" in output


def test_plain_pytest_collects_no_benchmark() -> None:
    done = run_pytest("--collect-only", "-q", "bench", "tests/reports/test_fits.py")
    assert "bench" not in done.stdout
    assert "tests/reports/test_fits.py" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "torch"], "--backends is for benchmarks: add --benchmark-only"),
        (["--benchmark-only", "--backends", "nope"], "unknown backend 'nope'; there are reference"),
        (["--benchmark-only", "--tokens", "64,x"], "--tokens"),
        pytest.param(["--benchmark-only", "--dtypes", ","], "--dtypes", marks=pytest.mark.slow),
        pytest.param(["--benchmark-only", "--minutes", "0"], "--minutes", marks=pytest.mark.slow),
    ],
)
def test_wrong_options_end_with_one_clear_line(arguments: list[str], message: str) -> None:
    done = run_pytest(*arguments)
    assert done.returncode == 4
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_result_fails_its_case_and_goes_into_the_file(tmp_path: Path) -> None:
    """A backend that is fast and wrong: a plugin breaks it in the process under test."""
    (tmp_path / "sabotage.py").write_text(
        "import kernels\n"
        "true = kernels.linear_attention\n"
        "def wrong(q, k, v, *, eps=1e-6, backend=None):\n"
        "    out = true(q, k, v, eps=eps, backend=backend)\n"
        "    return out * 1.001 if backend == 'torch' else out\n"
        "kernels.linear_attention = wrong\n"
    )
    path = tmp_path / "run.json"
    options = ["--benchmark-only", "--device", "cpu", "--tokens", "64", "-p", "sabotage"]
    options += ["--ops", "linear_attention", "--backends", "reference,torch"]
    done = run_pytest(*options, f"--benchmark-json={path}", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout
    document = json.loads(path.read_text())
    timed = {benchmark["extra_info"]["backend"] for benchmark in document["benchmarks"]}
    assert timed == {"reference"}
    failed = document["kernel_suite"]["failed"]
    assert set(failed) == {
        "linear_attention-forward-float32-N64-torch",
        "linear_attention-forward+backward-float32-N64-torch",
    }
    assert all(reason.startswith("wrong result: ") for reason in failed.values())


@pytest.mark.slow
def test_a_run_of_disturbed_cases_ends_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "storm.py").write_text(
        "from types import SimpleNamespace\n"
        "from linear_vit.bench.instruments.telemetry import Watch\n"
        "canary = SimpleNamespace(slow=lambda: ['slow memory'])\n"
        "Watch.of = lambda device: Watch(canary=canary)\n"
    )
    path = tmp_path / "run.json"
    options = ["--benchmark-only", "--device", "cpu", "--tokens", "64", "-k", "forward-"]
    options += ["--ops", "linear_attention", "--backends", "torch", "-p", "storm"]
    done = run_pytest(*options, f"--benchmark-json={path}", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every case was disturbed, so no time is shown" in done.stdout
    for unit in (" ms", " µs", "GFLOP/s"):
        assert unit not in done.stdout
    name = "linear_attention-forward-float32-N64-torch"
    (case,) = json.loads(path.read_text())["benchmarks"]
    by = case["extra_info"]["disturbed"]
    assert "turns disturbed: slow memory" in by
    assert f"disturbed: {name}: {by}" in done.stdout.splitlines()[-2:][0]


@pytest.mark.slow
def test_repeats_are_runs_of_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = ["--benchmark-only", "--device", "cpu", "--tokens", "64", "-k", "forward-"]
    options += ["--ops", "linear_attention", "--backends", "torch", "--repeats", "2"]
    done = run_pytest(*options, f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run.1.json", "run.2.json"]
    infos = [
        json.loads((tmp_path / f"run.{k}.json").read_text())["benchmarks"][0]["extra_info"]
        for k in (1, 2)
    ]
    assert infos[0]["operation"] == infos[1]["operation"] == "linear_attention"
    assert infos[0]["turns"] != infos[1]["turns"]
    done = run_pytest(*options, f"--benchmark-json={path}", "--resume-bench")
    assert done.stdout.count("is there already") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--repeats", "2"], "name the runs' file"), (["--repeats", "0"], "a positive number, got 0")],
)
def test_repeats_that_cannot_be(options: list[str], message: str) -> None:
    done = run_pytest("--benchmark-only", *options)
    assert done.returncode == 4
    assert f"--repeats: {message}" in done.stderr
