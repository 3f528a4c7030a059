"""A run's results: what survives a kill, what is not gone on from, and the file they become."""

import json
from pathlib import Path
from typing import Any

import pytest

from linear_vit.bench.store import (
    FAILED,
    LEFT_OUT,
    MEASURED,
    OUT_OF_MEMORY,
    Result,
    Store,
    StoreError,
    sources,
)

HEAD: dict[str, Any] = {"machine": {"cpu": "A", "git": "1"}, "sweep": "quick", "sources": "one"}


def measured(name: str, *seconds: float) -> Result:
    info = {
        "schema": 2,
        "operation": "o",
        "backend": "b",
        "sources": "one",
        "share_of_limit": float("nan"),
    }
    return Result(name, MEASURED, None, "test_kernel", "g", seconds or (1.0, 2.0, 3.0), info)


def test_finished_cases_survive(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    first = Store(path, HEAD)
    first.start("a")
    first.keep(measured("a"))
    first.start("b")  # and here the process is killed
    again = Store(path, HEAD, resume=True)
    found = again.finished("a")
    assert found is not None
    assert found.seconds == (1.0, 2.0, 3.0)
    assert found.info["share_of_limit"] is None  # NaN is no JSON
    assert again.resumed == 1
    assert again.killer("b") is None  # once is no proof
    again.start("b")
    third = Store(path, HEAD, resume=True)
    assert third.killer("b") == "the process died in it 2 times"
    assert third.killer("a") is None
    third.close(done=True)
    assert not Store.journal(path).exists()


def test_a_failure_or_ctrl_c_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for _ in range(3):
        run = Store(path, HEAD, resume=True)
        run.start("fails")
        run.keep(Result("fails", FAILED, "wrong result"))
        run.start("stopped")
        run.interrupt()
        run.close(done=False)
    last = Store(path, HEAD, resume=True)
    assert last.deaths == {}
    assert last.finished("fails") is None  # failed cases are tried again


def test_a_line_cut_off_by_the_kill_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Store(path, HEAD).keep(measured("a"))
    with Store.journal(path).open("a") as file:
        file.write('{"finished": "b", "resu')
    again = Store(path, HEAD, resume=True)
    assert set(again.results) == {"a"}
    again.keep(measured("c"))
    assert set(Store(path, HEAD, resume=True).results) == {"a", "c"}


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Store.journal(path).write_text('{"head": \n{"finished": "a"}\n{"finished": "b"}\n')
    with pytest.raises(StoreError, match="damaged in line 1"):
        Store(path, HEAD, resume=True)
    assert Store.journal(path).read_text().count("\n") == 3  # nothing is lost


def test_another_machine_or_sweep_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Store(path, HEAD).keep(measured("a"))
    with pytest.raises(StoreError, match="sweep: quick then, full now"):
        Store(path, {**HEAD, "sweep": "full"}, resume=True)
    anew = Store(path, {**HEAD, "sweep": "full"})
    assert anew.results == {}
    assert anew.set_aside == tmp_path / "run.json.journal.old"
    kept = [json.loads(line) for line in anew.set_aside.read_text().splitlines()]
    assert kept[1]["finished"] == "a"


def test_what_was_measured_of_other_sources_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Store(path, HEAD).keep(measured("a"))
    other = {**HEAD, "sources": "other", "machine": {"cpu": "A", "git": "2"}}
    assert Store(path, other, resume=True).finished("a") is None
    # A commit that changes nothing of what is measured takes nothing away.
    later = {**HEAD, "machine": {"cpu": "A", "git": "3"}}
    assert Store(path, later, resume=True).finished("a") is not None


def test_the_document_is_pytest_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run = Store(path, {**HEAD, "not_timed": {"backend x": "no"}})
    run.keep(measured("a"))
    run.keep(Result("b", FAILED, "wrong result"))
    run.keep(Result("c", OUT_OF_MEMORY, "out of memory: none"))
    run.keep(Result("d", LEFT_OUT, "no time left"))
    run.write()
    run.close(done=True)
    document = json.loads(path.read_text())
    (case,) = document["benchmarks"]
    assert case["name"] == "test_kernel[a]"
    assert case["fullname"] == "bench/bench_kernels.py::test_kernel[a]"
    assert case["stats"]["data"] == [1.0, 2.0, 3.0]
    assert (case["stats"]["median"], case["stats"]["rounds"]) == (2.0, 3)
    suite = document["kernel_suite"]
    assert suite["operations"] == {"o": {"title": "o"}}
    assert suite["backends"] == {"b": {"title": "b", "colour": None, "own": False}}
    assert (suite["kind"], suite["schema"]) == ("benchmarks", 2)
    assert suite["failed"] == {"b": "wrong result"}
    assert suite["out_of_memory"] == {"c": "out of memory: none"}
    assert suite["not_timed"] == {"backend x": "no", "d": "no time left"}
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        Store(tmp_path / "file" / "run.json", HEAD)


def test_sources_are_named_by_their_content(tmp_path: Path) -> None:
    assert sources() == sources()
    assert len(sources()) == 16


def test_nobody_is_blamed_for_a_death_while_several_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for _ in range(2):
        run = Store(path, HEAD, resume=True)
        run.start("a")
        run.take_turns()  # and here the process is killed
    assert Store(path, HEAD, resume=True).deaths == {}


def test_a_damaged_last_line_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Store(path, HEAD).keep(measured("a"))
    with Store.journal(path).open("a") as file:
        file.write('{"finished": "b", "resu\n')
    Store(path, HEAD, resume=True).keep(measured("c"))
    assert set(Store(path, HEAD, resume=True).results) == {"a", "c"}


def test_what_was_left_out_is_not_complete(tmp_path: Path) -> None:
    run = Store(None, HEAD)
    run.keep(measured("a"))
    assert run.complete
    run.keep(Result("d", LEFT_OUT, "no time left"))
    assert not run.complete


def test_what_could_not_be_tried_again_takes_nothing_away(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.json", HEAD)
    store.keep(measured("a"))
    for status in (LEFT_OUT, OUT_OF_MEMORY):
        store.keep(Result("a", status, "no time left"))
        assert store.results["a"].status == MEASURED
    store.keep(Result("a", FAILED, "wrong result"))
    assert store.results["a"].status == FAILED
    # Nor does a resumed run bring back what has failed since.
    assert "a" not in Store(tmp_path / "run.json", HEAD, resume=True).results
