"""Every slow test is in exactly one shard, and the shards are of about one length."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests import conftest, processes, shards

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{file}.py::test_{i}[{j}]" for file in "ab" for i in range(3) for j in "xyz"]


@pytest.mark.parametrize("count", [1, 2, 6, 40])
def test_every_test_is_in_one_shard(count: int) -> None:
    found = shards.assign(TESTS, count, {})
    assert found.keys() == set(TESTS)
    assert set(found.values()) <= set(range(1, count + 1))
    assert len(set(found.values())) == min(count, len(TESTS))
    assert found == shards.assign(reversed(TESTS), count, {})


def test_shards_are_about_as_long_as_each_other() -> None:
    seconds = {test: float(i * i) for i, test in enumerate(TESTS)}
    found = shards.assign(TESTS, 3, seconds)
    lengths = [sum(seconds[t] for t in TESTS if found[t] == shard) for shard in (1, 2, 3)]
    assert sum(lengths) == sum(seconds.values())
    assert max(lengths) < 1.1 * min(lengths)


def test_what_an_unrecorded_test_weighs() -> None:
    seconds = {"a.py::one": 4.0, "a.py::two": 8.0, "a.py::two[first]": 30.0}
    assert shards.weight("a.py::two[second]", seconds) == 8.0
    assert shards.weight("a.py::two[first]", seconds) == 30.0
    assert shards.weight("a.py::new[x]", seconds) == 14.0
    assert shards.weight("b.py::new", seconds) == shards.UNKNOWN_S


def test_a_record_is_by_function_and_names_what_is_far_above_it() -> None:
    seconds = {"a.py::f[1]": 40.0, "a.py::f[2]": 2.0, "a.py::f[3]": 2.5, "b.py::g": 0.52}
    assert shards.summarise(seconds) == {"a.py::f": 2.5, "a.py::f[1]": 40.0, "b.py::g": 0.5}


def test_the_record_is_of_tests_that_are_there() -> None:
    for name in shards.load():
        file, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), name


TOY = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("i", range(7))
def test_slow(i): pass

def test_quick(): pass
"""


def toy(folder: Path, *options: str) -> list[str]:
    """The names of the tests that pytest runs of a project like this one."""
    done = processes.python("-m", "pytest", "-v", "-p", "no:cacheprovider", *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines() if "PASSED" in line]


def test_pytest_runs_each_in_one_shard(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("conftest.py", "shards.py", "slow_seconds.json"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "tests" / "test_toy.py").write_text(TOY)
    assert toy(tmp_path) == ["tests/test_toy.py::test_quick"]
    record = tmp_path / "seconds.tsv"
    parts = [
        toy(tmp_path, "-m", "slow", "--shard", f"{k}/2", f"--record-seconds={record}")
        for k in (1, 2)
    ]
    slow = [f"tests/test_toy.py::test_slow[{i}]" for i in range(7)]
    assert sorted(test for part in parts for test in part) == slow
    assert [len(part) for part in parts] == [4, 3]
    assert sorted(line.split("\t")[0] for line in record.read_text().splitlines()) == slow


@pytest.mark.parametrize("text", ["0/6", "7/6", "3", "a/b", "-1/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="k/n with 1 <= k <= n"):
        shards.parse(text)


def test_what_needs_a_gpu_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def marker(name: str) -> bool | None:
        return True if name == "device" else None

    item = SimpleNamespace(get_closest_marker=marker)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA device"):
        conftest.pytest_runtest_setup(cast(pytest.Item, item))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    conftest.pytest_runtest_setup(cast(pytest.Item, item))
