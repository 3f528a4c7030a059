"""Every command that shows a table, on the repository's records: whole at any width."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_vit.reports import scaling, tables
from linear_vit.reports.__main__ import main
from linear_vit.reports.saved import records
from linear_vit.reports.saved.runs import MEASUREMENTS
from linear_vit.reports.tables import results_text
from linear_vit.reports.tables.table import on_screen
from tests.reports import saved

MACHINE = MEASUREMENTS / "xeon-2.5ghz-2-cores"
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
    shown = re.split(r"\n(?:skipped|written to)\s", capsys.readouterr().out)[0]
    assert max(map(len, shown.splitlines())) <= 60
    assert "28,490" not in shown  # those records are of another model
    assert "27,980" in shown


_RUN, _CPU = str(MACHINE / "benchmark.json"), str(MACHINE / "cpu.json")
_PROSE = {
    "compare": ["compare", _RUN, _RUN],
    "compare --baseline": ["compare", _CPU, "--baseline", "compiled"],
    "compare, without runs": ["compare"],
    "targets": ["targets", _CPU],
    "targets, of none": ["targets", str(MACHINE / "check.json")],
    "scaling": ["scaling", _RUN, "--ops", "linear_attention,softmax_attention"],
    "scaling, of no operation": ["scaling", _RUN, "--ops", "convolution"],
}


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("command", _PROSE)
def test_lines_fit_too(monkeypatch: pytest.MonkeyPatch, capsys, command: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(scaling, "write", lambda *_: [])  # pictures have tests of their own
    main(_PROSE[command])
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    assert lines
    # A word that is longer than the screen is not cut: the name of a file, say.
    assert not [line for line in lines if len(line) > width and len(line.split()) > 1]


_ONE_OF_SEVERAL = re.compile(r"(?<![\d.,])1 (?!is\b|was\b|has\b|takes\b|lies\b)[a-z]+s\b(?! of)")


def test_one_is_no_plural(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A run of one length, by every command and on the page; another with two lengths."""
    monkeypatch.setattr(scaling, "write", lambda *_: [tmp_path])
    paths = []
    for name, lengths in (("one", {64}), ("two", {64, 128})):
        run = saved.run()
        run["kernel_suite"]["machine"] |= {"threads": 1, "cores": 1}
        run["benchmarks"] = [
            case
            for case in run["benchmarks"]
            if case["extra_info"].get("N") in lengths and case["extra_info"]["pass"] == "forward"
        ]
        paths.append(str(saved.save(tmp_path / f"{name}.json", run)))
    page = tmp_path / "page.html"
    for command in (
        ["scaling", paths[0], "--out", str(tmp_path)],
        ["compare", *paths],
        ["compare", paths[1], paths[0]],
        ["compare", paths[0], "--baseline", "torch"],
        ["page", paths[0], "--results", str(tmp_path), "--out", str(page)],
    ):
        assert main(command) == 0
    shown = capsys.readouterr()
    assert "no fit: 1 length, at least 5 are needed" in shown.out
    for text in (shown.out, shown.err, page.read_text()):
        assert not [text[m.start() - 30 : m.end()] for m in _ONE_OF_SEVERAL.finditer(text)]
