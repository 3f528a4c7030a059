"""An operation and a backend from outside: in the benchmark, the plots, the tables and the page.

``tests/bench/test_check.py`` shows them in the check. Nothing of the project names them.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.bench.test_check import TOY

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = "64,256,1024,4096"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    for name, text in TOY.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(textwrap.dedent(text))
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A saved run of both, timed by a process that was told of them with ``-p``."""
    options = ["-p", "toy_plugin", "-p", "no:cacheprovider", "--device", "cpu", "--tokens", LENGTHS]
    common = [sys.executable, "-m", "pytest", "--benchmark-only", *options]
    doubled = call(folder, *common, "--ops", "doubled", f"--out={folder / 'doubled'}")
    assert doubled.returncode == 1, doubled.stdout  # one of its backends is wrong on purpose
    assert "wrong result: out" in doubled.stdout
    chosen = ["--ops", "linear_attention", "--backends", "torch,borrowed"]
    borrowed = call(folder, *common, *chosen, f"--out={folder / 'linear'}")
    assert borrowed.returncode == 0, borrowed.stdout
    return folder


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_they_are_timed_with_their_titles(run: Path) -> None:
    doubled = json.loads((run / "doubled" / "benchmark.json").read_text())
    suite = doubled["kernel_suite"]
    assert suite["operations"] == {"doubled": {"title": "Doubling"}}
    timed = {
        (c["extra_info"]["operation"], c["extra_info"]["backend"]) for c in doubled["benchmarks"]
    }
    assert timed == {("doubled", "torch")}
    assert {name.rpartition("-")[2] for name in suite["failed"]} == {"thrice"}
    linear = json.loads((run / "linear" / "benchmark.json").read_text())
    assert set(linear["kernel_suite"]["backends"]) == {"torch", "borrowed"}
    assert linear["kernel_suite"]["backends"]["borrowed"]["colour"].startswith("#")


def test_they_are_in_the_plots_and_on_the_page(run: Path) -> None:
    for name, shown in (("doubled", "Doubling"), ("linear", "borrowed")):
        saved = str(run / name / "benchmark.json")
        out = run / f"{name}-plots"
        done = call(run, sys.executable, "-m", "reports", "scaling", saved, "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout + "".join(p.read_text() for p in out.glob("*.csv"))
        assert any(shown in p.read_text() for p in out.glob("*.svg"))
        page = run / f"{name}.html"
        done = call(run, sys.executable, "-m", "reports", "page", saved, "--out", str(page))
        assert done.returncode == 0, done.stderr
        assert shown in page.read_text()
