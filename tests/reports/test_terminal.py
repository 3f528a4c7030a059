"""Every command that shows a table, on the repository's records: whole at any width."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_vit.reports import tables
from linear_vit.reports.__main__ import main
from linear_vit.reports.saved import records
from linear_vit.reports.saved.runs import MEASUREMENTS
from linear_vit.reports.tables import results_text
from linear_vit.reports.tables.table import on_screen

(MACHINE,) = MEASUREMENTS.glob("xeon*")
TRAINING = MACHINE / "training"


def _ablation(setting: str, model: str) -> Callable[[Path], str]:
    def write(out: Path) -> str:
        folder = TRAINING / "ablation-runs"
        configs = [r["config"] for r in records.read_runs(folder)[0] if r["model"] == model]
        return tables.write_ablation(setting, configs, folder, out)

    return write


# As train_minimal.py and python -m reports call them.
COMMANDS: dict[str, Callable[[Path], str]] = {
    "table": lambda out: tables.write_results(TRAINING, out, ablations=TRAINING),
    "ablate --ripple_stages": _ablation("ripple_stages", "ripple"),
    "ablate --hydra_branches": _ablation("hydra_branches", "hydra"),
    "bench": lambda out: tables.write_steps(TRAINING / "step-speed.json", out),
    "profile": lambda out: tables.write_breakdown(TRAINING / "step-breakdown.json", out),
}


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_in_the_file_is_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown, _, where = COMMANDS[command](tmp_path).rpartition("written to ")
    shown = shown.partition("\nskipped ")[0]  # lines with the names of files
    assert str(tmp_path) in where
    assert max(map(len, shown.splitlines())) <= width
    assert not re.search(r"…|^\| ", shown, re.M)  # nothing is cut, and no Markdown
    (markdown,) = (path.read_text() for path in tmp_path.glob("*.md"))
    assert_whole(markdown, shown)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("data", ["training", "fashion-mnist"])
def test_results_tables_of_every_column(data: str, width: int) -> None:
    content = json.loads((MACHINE / data / "table.json").read_text())
    shown = on_screen(results_text.document(content), width)
    assert max(map(len, shown.splitlines())) <= max(width, 60)  # a command is never broken
    assert_whole((MACHINE / data / "table.md").read_text(), shown)


def assert_whole(markdown: str, shown: str) -> None:
    """Every cell of the Markdown's tables is on the screen: figures on one line, names by words."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    assert rows
    for cell in (cell.strip("| ") for row in rows for cell in row if "---" not in cell):
        figure = re.fullmatch(r"[-+\d.,]+( ± [\d.]+)?( %|×| h| m?s)?", cell)
        for part in [cell] if figure else cell.split():
            assert part in shown, cell


def test_reports_table_is_drawn_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["table", str(TRAINING), "--out", str(tmp_path)]) == 0
    shown = re.split(r"\n(?:skipped|written to) ", capsys.readouterr().out)[0]
    assert max(map(len, shown.splitlines())) <= 60
    assert "28,490" not in shown  # those records are of another model
    assert "27,980" in shown
