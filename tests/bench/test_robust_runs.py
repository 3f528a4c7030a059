"""Runs that are killed, interrupted, crash or run out of memory, as a user meets them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import processes

OPTIONS = ("--benchmark-only", "--device", "cpu", "--tokens", "64,128", "--ops")
FORWARD = "linear_attention-forward-float32-N{}-torch"


def options(folder: Path, *more: str) -> list[str]:
    """pytest's, with what ``folder/sabotage.py`` breaks in its process."""
    asked = [*OPTIONS, "linear_attention", "--backends", "torch", "-p", "sabotage"]
    return [*asked, f"--benchmark-json={folder / 'run.json'}", *more]


def sabotage(folder: Path, body: str) -> None:
    """A plugin in whose reach ``calls`` counts those of linear attention; ``body`` acts on it."""
    (folder / "sabotage.py").write_text(
        "import os, signal, torch, kernels\n"
        "true, calls = kernels.linear_attention, 0\n"
        "def broken(q, k, v, *, eps=1e-6, backend=None):\n"
        "    global calls\n"
        "    calls += backend == 'torch'\n"
        "    n = q.shape[2]\n"
        f"    {body}\n"
        "    return true(q, k, v, eps=eps, backend=backend)\n"
        "kernels.linear_attention = broken\n"
    )


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return processes.pytest(*options(folder, *more), folder=folder)


def cases(folder: Path) -> list[str]:
    document = json.loads((folder / "run.json").read_text())
    return [case["name"].partition("[")[2].removesuffix("]") for case in document["benchmarks"]]


def suite(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["kernel_suite"]
    return found


def test_killed_run_goes_on_and_keeps_what_was_finished(tmp_path: Path) -> None:
    sabotage(tmp_path, "if n == 128: os.kill(os.getpid(), signal.SIGKILL)")
    done = run(tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "run.json").exists()
    journal = tmp_path / "run.json.journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    kept = {line["finished"]: line["result"]["seconds"] for line in lines if "finished" in line}
    assert len(kept) == 2

    sabotage(tmp_path, "assert n != 64, 'timed again'")
    done = run(tmp_path, "--resume-bench")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed: 2 finished cases kept" in done.stdout
    assert "4 passed" in done.stdout
    assert len(cases(tmp_path)) == 4
    assert suite(tmp_path)["resumed"] == 2
    document = json.loads((tmp_path / "run.json").read_text())
    by_name = dict(zip(cases(tmp_path), document["benchmarks"], strict=True))
    for name, seconds in kept.items():
        assert by_name[name]["stats"]["data"] == pytest.approx(seconds)
        assert by_name[name]["extra_info"]["telemetry"]["source"] == "Linux"
    assert not journal.exists()


@pytest.mark.slow
def test_a_case_that_kills_the_process_twice_is_left_alone(tmp_path: Path) -> None:
    sabotage(tmp_path, "if n == 64: os.kill(os.getpid(), signal.SIGKILL)")
    assert run(tmp_path).returncode == -signal.SIGKILL
    assert run(tmp_path, "--resume-bench").returncode == -signal.SIGKILL
    # The other pass of the same length kills as well.
    assert run(tmp_path, "--resume-bench").returncode == -signal.SIGKILL
    assert run(tmp_path, "--resume-bench").returncode == -signal.SIGKILL
    done = run(tmp_path, "--resume-bench")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout
    failed = suite(tmp_path)["failed"]
    assert set(failed.values()) == {"the process died in it 2 times"}
    assert all("N128" in name for name in cases(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_valid_file_and_the_way_on(tmp_path: Path, how: signal.Signals) -> None:
    flag = tmp_path / "reached"
    sabotage(
        tmp_path, f"if n == 128: open({str(flag)!r}, 'w').close(); __import__('time').sleep(9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *processes.PLUGINS, *options(tmp_path)],
        cwd=processes.ROOT,
        env=processes.environment(PYTHONPATH=str(tmp_path)),
        stdout=subprocess.PIPE,
        text=True,
        # Processes in the background of a shell without job control are born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "the same command with --resume-bench goes on" in output
    assert len(cases(tmp_path)) == 2
    assert suite(tmp_path)["interrupted"] is True
    assert (tmp_path / "run.json.journal").exists()


@pytest.mark.slow
def test_out_of_memory_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    sabotage(tmp_path, "if n == 128: torch.empty(2**62, dtype=torch.uint8)")
    done = run(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "2 out of memory" in done.stdout
    found = suite(tmp_path)
    assert found["failed"] == {}
    assert set(found["out_of_memory"]) == {
        f"linear_attention-{mode}-float32-N128-torch" for mode in ("forward", "forward+backward")
    }
    assert len(cases(tmp_path)) == 2


@pytest.mark.slow
def test_a_fallback_fails_its_case(tmp_path: Path) -> None:
    (tmp_path / "sabotage.py").write_text(
        "import kernels\n"
        "true = kernels.linear_attention\n"
        "def silent(q, k, v, *, eps=1e-6, backend=None):\n"
        "    return true(q, k, v, eps=eps, backend='torch')\n"
        "kernels.linear_attention = silent\n"
    )
    done = run(tmp_path, "--backends", "compiled,torch", "--tokens", "64")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = suite(tmp_path)["failed"]
    assert len(failed) == 2
    for name, reason in failed.items():
        assert name.endswith("-compiled")
        assert reason.startswith("another implementation ran: no compiled graph ran")


def test_dry_run_lists_and_times_nothing(tmp_path: Path) -> None:
    sabotage(tmp_path, "raise AssertionError('it ran')")
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [line for line in done.stdout.splitlines() if line.startswith("linear_attention-")]
    assert len(listed) == 4
    assert all(line.split()[-1] == "MiB" for line in listed)
    assert "4 cases, estimated to take 0:" in done.stdout
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "run.json.journal").exists()


@pytest.mark.slow
def test_profile_writes_a_trace_and_the_top_operators(tmp_path: Path) -> None:
    import gzip

    sabotage(tmp_path, "pass")
    done = run(tmp_path, "--profile", "--tokens", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    for case in json.loads((tmp_path / "run.json").read_text())["benchmarks"]:
        found = case["extra_info"]["profile"]
        trace = json.loads(gzip.decompress((tmp_path / found["trace"]).read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert found["top"][0]["name"] in names
        assert 0 < sum(row["share"] for row in found["top"]) <= 1.0001
        assert (found["ncu"], found["ncu_why"]) == (None, "no CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways", [[["--collect-only"]], [["--rehearse"], ["-k", "matches_nothing"]]]
)
def test_what_measures_nothing_takes_nothing_away(tmp_path: Path, ways: list[list[str]]) -> None:
    """Over a finished run, and then over one that there was no time for."""
    sabotage(tmp_path, "pass")
    out = tmp_path / "out"
    small = [*OPTIONS, "linear_attention", "--backends", "torch", "-p", "sabotage", f"--out={out}"]
    small[small.index("64,128")] = "64"

    def go(*more: str) -> subprocess.CompletedProcess[str]:
        return processes.pytest(*small, *more, folder=tmp_path)

    done = go()
    assert done.returncode == 0, done.stdout + done.stderr
    saved = (out / "benchmark.json").read_text()
    assert json.loads(saved)["kernel_suite"]["limits"]["copy_bytes_per_s"] > 0
    for more in ways:
        go(*more)
        assert (out / "benchmark.json").read_text() == saved, more
    done = go("--minutes", "0.00001")
    assert done.returncode == 0, done.stdout
    assert "left out: no time left" in done.stdout
    assert "the same command with --resume-bench goes on" in done.stdout
    assert (out / "benchmark.json").read_text() == saved
    assert (out / "benchmark.json.journal").exists()
    if ["--rehearse"] not in ways:
        return
    kept = tmp_path / "rehearsed.json"
    done = go("--rehearse", f"--benchmark-json={kept}")
    assert "none was kept" in done.stdout
    assert not kept.exists()


@pytest.mark.slow
def test_the_sweep_for_a_gpu_can_be_rehearsed(tmp_path: Path) -> None:
    """Every case that can run here, of every peer and in every pass: a GPU's time is scarce."""
    done = processes.pytest("--benchmark-only", "--rehearse", "--sweep", "gpu", f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert not list(tmp_path.iterdir())


def test_resume_needs_a_file() -> None:
    done = processes.pytest(*OPTIONS, "linear_attention", "--resume-bench")
    assert done.returncode == 4
    assert "--resume-bench: name the run's file with --benchmark-json" in done.stderr


def test_ncu_output_is_read() -> None:
    from linear_vit.bench.instruments.profiles import read_ncu

    text = (
        "==PROF== Connected to process 1\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","ns","register/thread"\n'
        '"0","_state","12,345","96"\n'
        '"1","_apply","678","n/a"\n'
    )
    assert read_ncu(text) == {
        "_state": {"gpu__time_duration.sum": 12345.0, "launch__registers_per_thread": 96.0},
        "_apply": {"gpu__time_duration.sum": 678.0},
    }
    assert read_ncu("==ERROR== ERR_NVGPUCTRPERM\n") == {}
