"""The journal of a run: what survives a kill, and what is not gone on from."""

import json
from pathlib import Path

import pytest

from linear_vit.bench.journal import Journal, JournalError

HEAD = {"machine": {"cpu": "A"}, "sweep": "quick"}


def test_finished_cases_survive(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json.journal"
    first = Journal(path, HEAD, resume=False)
    first.start("a")
    first.finish("a", seconds=(1.0, 2.0), info={"N": 64})
    first.start("b")  # and here the process is killed
    again = Journal(path, HEAD, resume=True)
    assert again.finished == {"a": {"seconds": [1.0, 2.0], "info": {"N": 64}}}
    assert again.resumed == 1
    assert again.killer("b") is None  # once is no proof
    again.start("b")
    third = Journal(path, HEAD, resume=True)
    assert third.killer("b") == "the process died in it 2 times"
    assert third.killer("a") is None
    third.close(done=True)
    assert not path.exists()


def test_a_failure_or_ctrl_c_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for _ in range(3):
        journal = Journal(path, HEAD, resume=True)
        journal.start("fails")
        journal.fail("fails", "wrong result")
        journal.start("stopped")
        journal.interrupt()
        journal.close(done=False)
    last = Journal(path, HEAD, resume=True)
    assert last.deaths == {}
    assert last.finished == {}  # failed cases are tried again


def test_a_line_cut_off_by_the_kill_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, HEAD, resume=False).finish("a", seconds=[1.0])
    with path.open("a") as file:
        file.write('{"finished": "b", "seco')
    again = Journal(path, HEAD, resume=True)
    assert set(again.finished) == {"a"}
    again.finish("c", seconds=[2.0])
    assert set(Journal(path, HEAD, resume=True).finished) == {"a", "c"}


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"head": \n{"finished": "a"}\n{"finished": "b"}\n')
    with pytest.raises(JournalError, match="damaged in line 1"):
        Journal(path, HEAD, resume=True)
    assert path.read_text().count("\n") == 3  # nothing is lost


def test_another_machine_or_sweep_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, HEAD, resume=False).finish("a", seconds=[1.0])
    with pytest.raises(JournalError, match="sweep: quick then, full now"):
        Journal(path, {**HEAD, "sweep": "full"}, resume=True)
    anew = Journal(path, {**HEAD, "sweep": "full"}, resume=False)
    assert anew.finished == {}
    assert anew.set_aside == tmp_path / "journal.old"
    kept = [json.loads(line) for line in anew.set_aside.read_text().splitlines()]
    assert kept[1]["finished"] == "a"
