"""How often compare is right: counted from recorded runs as compare itself would have judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linear_vit.reports.__main__ import main
from linear_vit.reports.changes import changes
from linear_vit.reports.saved.runs import MEASUREMENTS, NoRuns, load
from linear_vit.reports.tables import power
from tests.reports import saved, synthetic

BACKENDS = ("torch", "compiled")
NAME = "linear_attention-forward-float32-N{}-compiled"


def record(folder: Path, shares: dict[int, int], noise: str = "process") -> Path:
    """Made-up runs as bench noise leaves them: so many of each planted share, in per cent."""
    rng = np.random.default_rng(0)
    for share, count in shares.items():
        slower = {NAME.format(n): 1 + share / 100 for n in synthetic.LENGTHS}
        for number in range(count):
            document = synthetic.run(rng, noise, slower, BACKENDS)
            saved.save(folder / str(share) / f"{number}.json", document)
    return folder


def made_up(processes: int, luck: float) -> dict[str, Any]:
    """A record of processes with this luck; 10 % more work in as many."""
    rng = np.random.default_rng(0)
    logs = {p: luck * rng.standard_normal(processes) + np.log1p(p) for p in (0.0, 0.1)}
    return {
        "kind": "repeats",
        "schema": 1,
        "created": "2030-01-02T03:04:05+00:00",
        "machine": saved.MACHINE,
        "operation": "linear_attention",
        "backend": "cpu",
        "tokens": [1024, 2048, 4096],
        "left_out": 0,
        "processes": [
            {"planted": p, "median_s": [1.0] * 3, "log": [log] * 3, "error": [1e-4] * 3}
            for p, of in logs.items()
            for log in of
        ],
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_draw_is_judged_as_compare_judges_it(tmp_path: Path, count: int) -> None:
    record(tmp_path, {0: count, 4: count})
    found = power.condensed(tmp_path)
    x = np.array([[p["log"], p["error"]] for p in found["processes"]]).transpose(1, 0, 2)
    (said,) = power.called(x[:, None, :count], x[:, None, count:])
    judged = changes(*(load([tmp_path / name], every=True) for name in ("0", "4")))
    (of_compare,) = judged.pools["verdict"]
    assert said == of_compare


def test_luck_hides_a_change_until_there_are_as_many_runs_as_it_asks_for() -> None:
    same, slower = power.of_each(made_up(40, 0.04))
    assert same["called"][3] <= 0.1
    assert slower["ratio"] == pytest.approx(1.1, abs=0.03)
    assert slower["called"][2] < slower["called"][3] < slower["called"][8]
    assert slower["needed"] in (4, 5, 6)
    assert slower["called"][5] > 0.7
    # One run a side can't tell luck from a change: it raises false alarms.
    assert same["called"][1] > 0.1


def test_only_what_is_asked_for_is_drawn_without_replacement() -> None:
    same, slower = power.of_each(made_up(6, 0.001))
    assert list(same["called"]) == [1, 2, 3]  # twice as many have to be there
    assert list(slower["called"]) == [1, 2, 3, 5]
    assert set(slower["called"].values()) == {1.0}


def test_the_command_makes_the_same_table_of_runs_and_of_their_record(
    tmp_path: Path, capsys
) -> None:
    runs, out, again = record(tmp_path / "runs", {0: 4, 10: 2}), tmp_path / "out", tmp_path / "two"
    assert main(["power", str(runs), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "False alarms and power of compare; Test CPU" in shown
    assert "10% more work" in shown
    assert main(["power", str(out), "--out", str(again)]) == 0
    for name in ("repeats.md", "repeats.csv", "repeats.json"):
        assert (out / name).read_text() == (again / name).read_text()
    assert (out / "repeats.json").stat().st_size < 10_000
    with (out / "repeats.csv").open() as rows:
        assert len(list(rows)) == 3


@pytest.mark.parametrize("path", sorted(MEASUREMENTS.glob("*/repeats.json")) or [None])
def test_what_is_committed_is_what_would_be_made(tmp_path: Path, path: Path | None) -> None:
    if path is None:
        path = saved.save(tmp_path / "kept/repeats.json", made_up(6, 0.01))
        assert main(["power", str(path.parent)]) == 0
    assert main(["power", str(path.parent), "--out", str(tmp_path / "again")]) == 0
    for name in ("repeats.md", "repeats.csv"):
        assert (tmp_path / "again" / name).read_text() == path.with_name(name).read_text()


def test_disturbed_runs_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    record(tmp_path, {0: 3, 10: 2})
    for name in ("0/1.json", "10/0.json"):
        run = json.loads((tmp_path / name).read_text())
        run["benchmarks"][-1]["extra_info"]["disturbed"] = "threads waited"
        saved.save(tmp_path / name, run)
    found = power.condensed(tmp_path)
    assert len(found["processes"]) == 3
    assert "2 disturbed runs left out." in power.as_table(found, power.of_each(found)).note


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"processes": []}, "processes"),
        ({"tokens": [64, 128]}, "tokens"),
        ({"tokens": [64, 128, 256, 512]}, "processes[0].median_s: not a value for each of tokens"),
        ({"machine": None}, "machine"),
        ({"kind": "check"}, "kind"),
    ],
)
def test_a_damaged_record_is_named(
    tmp_path: Path, capsys, damage: dict[str, Any], words: str
) -> None:
    path = saved.save(tmp_path / "repeats.json", made_up(2, 0.01) | damage)
    assert main(["power", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert words in said


def test_no_runs_to_count_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoRuns, match="no folder 0 with runs of the same code"):
        power.condensed(tmp_path)
    same = [p for p in made_up(3, 0.01)["processes"] if p["planted"]]
    with pytest.raises(NoRuns, match="fewer than two undisturbed runs"):
        power.of_each(made_up(3, 0.01) | {"processes": same})
