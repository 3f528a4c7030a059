"""An operation and a backend from outside: in the benchmark, the plots, the tables and the page.

``tests/bench/test_check.py`` shows them in the check. Nothing of the project names them.
"""

import json
import textwrap
from pathlib import Path

import pytest

from tests import processes
from tests.bench.test_check import TOY

LENGTHS = "64,256,1024"


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
    options = ["-p", "toy_plugin", "--device", "cpu", "--tokens", LENGTHS]
    options += ["--ops", "doubled,linear_attention", "-k", "torch or borrowed or thrice"]
    done = processes.pytest("--benchmark-only", *options, f"--out={folder}", folder=folder)
    assert done.returncode == 1, done.stdout  # one of the backends is wrong on purpose
    assert "wrong result: out" in done.stdout
    return folder / "benchmark.json"


def test_they_are_timed_with_their_titles(run: Path) -> None:
    document = json.loads(run.read_text())
    suite = document["kernel_suite"]
    assert suite["operations"]["doubled"] == {"title": "Doubling"}
    infos = [case["extra_info"] for case in document["benchmarks"]]
    timed = {(info["operation"], info["backend"]) for info in infos}
    assert timed == {
        ("doubled", "torch"),
        ("linear_attention", "torch"),
        ("linear_attention", "borrowed"),
    }
    assert {name.rpartition("-")[2] for name in suite["failed"]} == {"thrice"}
    assert suite["backends"]["borrowed"]["colour"].startswith("#")


def test_they_are_in_the_plots_and_on_the_page(run: Path) -> None:
    out = run.parent / "plots"
    done = processes.python("-m", "reports", "scaling", str(run), "--out", str(out))
    assert done.returncode == 0, done.stderr
    page = run.parent / "index.html"
    done = processes.python("-m", "reports", "page", str(run), "--out", str(page))
    assert done.returncode == 0, done.stderr
    pictures = [path.read_text() for path in out.glob("*.svg")]
    for shown in ("Doubling", "borrowed"):
        assert any(shown in picture for picture in pictures), shown
        assert shown in page.read_text()
