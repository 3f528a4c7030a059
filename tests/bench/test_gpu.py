"""The run on a GPU, without one: its runner against cases that misbehave, and its dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit.bench import gpu, gpu_plan, gpu_runner
from linear_vit.bench.gpu_runner import (
    FAILED,
    LEFT_OUT,
    MEASURED,
    OUT_OF_MEMORY,
    Case,
    Result,
    Store,
)
from linear_vit.bench.gpu_verdicts import Verdict, verdicts
from tests.bench.misbehaving import misbehave

ROOT = Path(__file__).resolve().parents[2]


# ---- the runner ----------------------------------------------------------------------------------


def run(cases: list[Case], store: Store, seconds: float = 60.0, **options: Any) -> None:
    gpu_runner.run(cases, store, misbehave, deadline=time.monotonic() + seconds, **options)


def store_in(folder: Path, sources: str = "one") -> Store:
    return Store(folder, {"dry_run": True, "machine": {}}, sources)


def outcomes(folder: Path, section: str = "s") -> dict[str, Result]:
    document = json.loads((folder / f"{section}.json").read_text())
    assert (document["kind"], document["schema"]) == ("gpu", gpu_runner.SCHEMA)
    return {result["case"]: result for result in document["results"]}


def test_what_a_case_does_costs_no_other(tmp_path: Path) -> None:
    deeds = ("raise", "crash", "exit", "exhaust", "decline")
    cases = [Case("s", deed, {"do": deed}, seconds=1) for deed in deeds]
    run([*cases, Case("s", "sound", {"value": float("inf")}, seconds=1)], store_in(tmp_path))
    found = outcomes(tmp_path)
    expected = {
        "raise": (FAILED, "ValueError: the reason"),
        "crash": (FAILED, "its process ended with signal SIGSEGV"),
        "exit": (FAILED, "its process ended with code 3"),
        "exhaust": (OUT_OF_MEMORY, "MemoryError: no memory"),
        "decline": (LEFT_OUT, "not on this device"),
        "sound": (MEASURED, None),
    }
    assert {n: (r["status"], r["reason"]) for n, r in found.items()} == expected
    assert found["sound"]["value"] is None  # infinity is no JSON
    assert found["raise"]["took_s"] > 0  # a process had to start


def test_a_process_is_kept_until_it_dies(tmp_path: Path) -> None:
    names = ("first", "second", "crash", "third")
    cases = [Case("s", n, {"do": n if n == "crash" else None}, seconds=1) for n in names]
    run(cases, store_in(tmp_path))
    found = outcomes(tmp_path)
    assert found["first"]["process"] == found["second"]["process"] != os.getpid()
    assert found["third"]["process"] != found["first"]["process"]


def test_a_case_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "_GRACE_S", 1.0)
    cases = [Case("s", "hang", {"do": "hang"}, seconds=0.1), Case("s", "sound", seconds=0.1)]
    started = time.monotonic()
    run(cases, store_in(tmp_path))
    found = outcomes(tmp_path)
    assert found["hang"]["status"] == FAILED
    assert "no result within" in found["hang"]["reason"]
    assert found["sound"]["status"] == MEASURED
    assert time.monotonic() - started < 30


def test_the_time_is_kept_to(tmp_path: Path) -> None:
    cases = [
        Case("s", "too long", {"do": "hang"}, seconds=100),
        Case("s", "short", seconds=0.1),
        Case("s", "longer than it said", {"do": "hang"}, seconds=0.1),
    ]
    started = time.monotonic()
    run(cases, store_in(tmp_path), seconds=15.0)
    assert time.monotonic() - started < 25
    found = outcomes(tmp_path)
    assert found["too long"]["status"] == LEFT_OUT
    assert "it takes about 100" in found["too long"]["reason"]
    assert found["short"]["status"] == MEASURED
    assert found["longer than it said"]["status"] == FAILED


def test_what_is_finished_is_not_measured_again(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    cases = [
        Case("s", "right", {"log": log}, seconds=1),
        Case("s", "memory", {"log": log, "do": "exhaust"}, seconds=1),
        Case("s", "wrong", {"log": log, "do": "raise"}, seconds=1),
    ]
    run(cases, store_in(tmp_path / "out"))
    run(cases, store_in(tmp_path / "out"))
    again = ["right", "memory", "wrong", "wrong"]
    assert Path(log).read_text().split() == again  # a failure is tried again
    other = [Case("s", "right", {"log": log, "value": 2.0}, seconds=1)]
    run(other, store_in(tmp_path / "out"))
    assert Path(log).read_text().split() == [*again, "right"]
    assert outcomes(tmp_path / "out")["right"]["value"] == 2.0
    assert outcomes(tmp_path / "out")["memory"]["status"] == OUT_OF_MEMORY  # kept beside it
    run(other, store_in(tmp_path / "out", sources="other"))
    assert Path(log).read_text().split() == [*again, "right", "right"]


def test_leaving_out_takes_no_earlier_result_away(tmp_path: Path) -> None:
    case = Case("s", "case", seconds=1)
    run([case], store_in(tmp_path))
    run([case], store_in(tmp_path, sources="other"), seconds=0.5)
    assert outcomes(tmp_path)["case"]["status"] == MEASURED


def test_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"kind": "gpu", "schema"')
    run([Case("s", "case", seconds=1)], store_in(tmp_path))
    assert outcomes(tmp_path)["case"]["status"] == MEASURED


def test_others_go_first_while_a_build_runs(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    done = iter((False, False, True, True))
    cases = [
        Case("s", "built", {"log": log}, seconds=1, builds="cuda"),
        Case("s", "other", {"log": log}, seconds=1),
    ]
    run(cases, store_in(tmp_path / "out"), builds={"cuda": lambda: next(done)})
    assert Path(log).read_text().split() == ["other", "built"]


# ---- the plan ------------------------------------------------------------------------------------


def test_the_plan_has_each_case_once_and_correctness_first() -> None:
    cases = gpu_plan.plan("cuda", ("triton", "cuda", "torch", "compiled"), dry_run=False)
    names = [(case.section, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert cases[0].section == "check"
    assert [c.section for c in cases].index("ceilings") < [c.section for c in cases].index("sweep")
    assert set(gpu.gpu_measure.SECTIONS) == {case.section for case in cases}
    assert all(case.parameters["device"] == "cuda" for case in cases)
    heads, tokens = gpu_plan.REAL.huge
    assert (heads - 1) * tokens * gpu_plan.REAL.head_dim == 2**31  # no int32 reaches the last
    checked = {(c.parameters["operation"], c.parameters["dtype"], c.parameters["backend"])
               for c in cases if c.section == "check"}  # fmt: skip
    operations = len(gpu.kernels.OPERATIONS)
    assert len(checked) == operations * 3 * 4
    json.dumps([dict(case.parameters) for case in cases])


def test_a_dry_run_walks_through_every_section_that_a_real_one_has() -> None:
    real, tiny = (
        {c.section for c in gpu_plan.plan("cpu", ("cpu", "torch"), dry_run=dry)}
        for dry in (False, True)
    )
    assert tiny == real


# ---- verdicts ------------------------------------------------------------------------------------


def sweep_row(
    what: str, mode: str, shape: tuple[int, int, int], seconds: dict[str, float]
) -> Result:
    B, H, N = shape
    moved = 1e9
    return {
        "section": "sweep",
        "case": what,
        "status": MEASURED,
        "what": what,
        "mode": mode,
        "dtype": "bfloat16",
        "shape": {"B": B, "H": H, "N": N},
        "times": {n: {"seconds": s, "bytes_per_s": moved / s} for n, s in seconds.items()},
    }


OURS, RIVAL, COMPILED = "linear_attention/triton", "sdpa/flash", "linear_attention/compiled"


def results(factor: float = 1.0) -> list[Result]:
    """A run that keeps every bound by a little; times of ours are stretched by ``factor``."""
    best = 1e-3 * factor  # moves 1 GB in a millisecond, at a copy rate of 1 TB/s
    rows = [
        sweep_row("long", mode, (1, 16, n), {OURS: best / 0.9, COMPILED: 3.6e-3})
        for mode in ("forward", "backward")
        for n in (65_536, 1_048_576)
    ]
    rows.append(sweep_row("single", "forward", (1, 1, 1_048_576), {OURS: best / 0.82}))
    rows += [
        sweep_row("crossover", "forward", (4, 16, n), {OURS: best, RIVAL: rival})
        for n, rival in ((256, 0.9e-3), (512, 1.01e-3), (1024, 2e-3))
    ]
    rows.append(sweep_row("vit", "forward", (128, 6, 64), {OURS: best, RIVAL: 1.01e-3}))
    ceiling = {"section": "ceilings", "case": "copy", "status": MEASURED, "copy_bytes_per_s": 1e12}
    right = {"section": "check", "case": "c", "status": MEASURED}
    return [*rows, ceiling, right]


def holds(found: Iterable[Verdict]) -> list[bool | None]:
    return [verdict.holds for verdict in found]


def test_bounds_that_are_kept_pass() -> None:
    found = verdicts(results())
    assert holds(found) == [True] * 8, "\n".join(map(str, found))
    assert "90.0%" in found[1].found
    assert "3.24×" in found[4].found
    assert "from N=512 on" in found[6].found


def test_bounds_that_are_broken_fail() -> None:
    found = verdicts(results(factor=1.3))
    assert holds(found) == [True] + [False] * 7, "\n".join(map(str, found))
    assert str(found[1]).startswith("FAIL")


def test_a_wrong_result_breaks_the_first_bound() -> None:
    wrong = {"section": "check", "case": "c triton", "status": FAILED, "reason": "grad q"}
    found = verdicts([*results(), wrong])
    assert found[0].holds is False
    assert "c triton: grad q" in found[0].found


def test_what_was_not_measured_is_no_verdict() -> None:
    assert holds(verdicts([])) == [None] * 8
    without_copy = [r for r in results() if r["section"] != "ceilings"]
    assert holds(verdicts(without_copy))[1:4] == [None, None, None]


# ---- the command ---------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--backends", "torch", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Processes in the background of a shell without job control are born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was never printed:\n{seen}")


def test_a_dry_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    sections = ("--only", "sweep,training,graphs", "--out", str(tmp_path))
    killed = start(*sections)
    try:
        read_until(killed, "[ 6/")
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    before = {r["case"]: r for p in tmp_path.glob("*.json") for r in json_results(p)}
    assert len(before) >= 6

    output, _ = start(*sections).communicate(timeout=400)
    finished = sum(r["status"] == MEASURED for r in before.values())
    assert f"{finished} finished before" in output.splitlines()[0]
    assert "dry run: the times mean nothing" in output
    after = {r["case"]: r for p in tmp_path.glob("*.json") for r in json_results(p)}
    assert after.items() >= before.items()
    assert {r["status"] for r in after.values()} <= {MEASURED, LEFT_OUT}, output
    timed = [r for r in json_results(tmp_path / "sweep.json") if r["status"] == MEASURED]
    assert all(r["times"]["linear_attention/torch"]["seconds"] > 0 for r in timed)
    assert {r["mode"] for r in timed} == {"forward", "backward"}
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["dry_run"] is True
    assert document["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path: Path) -> None:
    """Every section, with every backend that can be timed here."""
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.stem for p in tmp_path.glob("*.json")} >= {"check", "ceilings", "sweep", "training"}
    checked = json_results(tmp_path / "check.json")
    assert {r["operation"] for r in checked if r["status"] == MEASURED} == set(
        gpu.kernels.OPERATIONS
    )


def json_results(path: Path) -> list[Result]:
    return json.loads(path.read_text())["results"]


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    process = start("--only", "check", "--out", str(tmp_path))
    read_until(process, "[ 2/")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "what is finished is kept" in output
    assert len(json_results(tmp_path / "check.json")) >= 2


def test_a_dry_run_never_writes_into_the_measurements(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = gpu.MEASUREMENTS / "xeon" / "gpu"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 2
    assert "mean nothing" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_options_that_name_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--only", "sweeps"], "no 'sweeps'; there are check"),
        (["--backends", "cudnn"], "no 'cudnn'; there are reference"),
        (["--minutes", "0"], "a positive number of minutes"),
    ):
        with pytest.raises(SystemExit):
            gpu.main([*options, "--dry-run"])
        assert message in capsys.readouterr().err
