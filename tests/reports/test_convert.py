"""Runs of older versions: every number is kept, under the names that comparisons know."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from linear_vit.reports.__main__ import main
from linear_vit.reports.saved import convert
from linear_vit.reports.saved.runs import MEASUREMENTS, NoRuns, load
from tests.reports import saved

GOLDEN = Path(__file__).parent / "golden"


def documents() -> dict[str, dict[str, Any]]:
    """One of every kind that there has been, a saved one where one was kept."""
    names = ("benchmark", "cpu", "step-speed")
    found = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in names}
    return found | {"speed": saved.speed(), "cpu without a kind": saved.old_cpu()}


def numbers(value: Any) -> Iterator[float]:
    """Every number in a document; versions of schemas are none."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "schema":
                yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("kind", documents())
def test_no_number_is_lost(kind: str) -> None:
    old = documents()[kind]
    before, after = set(numbers(old)), set(numbers(convert.to_current(old)))
    assert before - after == set()
    assert convert.to_current(convert.to_current(old)) == convert.to_current(old)


def test_the_machine_stands_once_and_titles_and_colours_are_said() -> None:
    run = convert.to_current(documents()["benchmark"])
    suite = run["kernel_suite"]
    assert suite["schema"] == 2
    assert suite["machine"]["cpu"].startswith("Intel")
    assert not any("machine" in b["extra_info"] for b in run["benchmarks"])
    assert suite["operations"]["softmax_attention"] == {"title": "softmax attention"}
    assert suite["backends"]["cpu"] == {"title": "C++", "colour": "#CC79A7", "own": True}
    assert set(suite["backends"]) == {b["extra_info"]["backend"] for b in run["benchmarks"]} - {
        "default"
    }


def test_a_case_of_another_machine_keeps_it() -> None:
    old = documents()["benchmark"]
    other = old["benchmarks"][0]["extra_info"]["machine"] | {"threads": 7}
    old["benchmarks"][0]["extra_info"]["machine"] = other
    run = convert.to_current(old)
    assert [b["extra_info"].get("machine") for b in run["benchmarks"]][:2] == [other, None]


def test_pytest_benchmark_finds_the_same_cases(tmp_path: Path) -> None:
    """Its own comparison, of the old file and the new: each name twice, with the same median."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text((GOLDEN / "benchmark.json").read_text())
    assert main(["convert", str(old), str(new)]) == 0
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(old), str(new)]
    command += ["--columns=median", f"--csv={tmp_path / 'both.csv'}"]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    lines = (tmp_path / "both.csv").read_text().splitlines()
    medians: dict[str, list[str]] = {}
    for line in lines[1:]:
        name = re.search(r"test_\w+\[[^]]+\]", line)
        assert name is not None
        medians.setdefault(name.group(), []).append(line.rpartition(",")[2])
    names = {b["name"] for b in documents()["benchmark"]["benchmarks"]}
    assert set(medians) == names
    assert all(len(found) == 2 and len(set(found)) == 1 for found in medians.values()), medians


@pytest.mark.parametrize("kind", documents())
def test_a_run_means_the_same_before_and_after(tmp_path: Path, kind: str) -> None:
    """Read as it was saved, and read after its file was converted."""
    old = saved.save(tmp_path / "old" / "run.json", documents()[kind])
    new = tmp_path / "new" / "run.json"
    assert main(["convert", str(old.parent), str(new.parent)]) == 0
    one, other = load([old]), load([new])
    assert one.words == other.words
    for a, b in ((one.kernels, other.kernels), (one.training, other.training)):
        assert len(a) == len(b)
        for column in set(a.columns) - {"file", "seconds", "info", "settings", "ratios"}:
            assert a[column].astype(str).tolist() == b[column].astype(str).tolist(), column
    assert len(one.kernels) + len(one.training) > 0


def test_in_place_and_what_is_no_run_stays(tmp_path: Path, capsys) -> None:
    run = saved.save(tmp_path / "deep" / "run.json", documents()["benchmark"])
    check = saved.save(tmp_path / "check.json", saved.check())
    before = check.read_text()
    assert main(["convert", str(tmp_path), "--in-place"]) == 0
    assert capsys.readouterr().out.split() == [str(run)]
    assert json.loads(run.read_text())["kernel_suite"]["schema"] == 2
    assert check.read_text() == before
    assert main(["convert", str(check), "--in-place"]) == 2
    assert "no benchmark run, but check" in capsys.readouterr().err
    assert main(["convert", str(run)]) == 2
    assert "OLD and NEW" in capsys.readouterr().err


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    lacking = documents()["cpu"]
    del lacking["rows"][0]["seconds"]
    path = saved.save(tmp_path / "cpu.json", lacking)
    with pytest.raises(NoRuns, match=r"damaged \(KeyError: 'seconds'\)"):
        load([path])


def test_no_run_of_the_repository_is_of_an_old_schema() -> None:
    paths = [path for path in MEASUREMENTS.rglob("*.json") if "benchmarks" in path.read_text()]
    assert len(paths) >= 4
    for path in paths:
        document = json.loads(path.read_text())
        assert convert.to_current(document) == document, path
