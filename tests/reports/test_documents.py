"""What is generated from the repository's measurements: made again, it does not change."""

import json
from pathlib import Path

import pytest

from linear_vit.reports import tables
from linear_vit.reports.__main__ import main
from linear_vit.reports.saved import records
from linear_vit.reports.saved.runs import MEASUREMENTS
from linear_vit.reports.tables import ablation, results_text
from linear_vit.reports.tables.table import join

ROOT = Path(__file__).resolve().parents[2]
HINT = "generated from other files than these: run `python -m reports results`"


def test_the_results_page_is_what_the_measurements_say(tmp_path: Path, capsys) -> None:
    out = tmp_path / "results.md"
    assert main(["results", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), HINT
    # A figure of each part, and the file of each.
    for figure in (
        "| RippleViT | 31,754 | 81.7 ± 0.8 % | +1.5 ± 0.9 |",
        "| HydraViT + local branch | 26,510 | 95.5 ± 1.0 % | +2.1 ± 1.8 |",
        "| 2 | 30,474 | 97.0 ± 0.8 % |",
        "| forward | float32 | torch | N ≈ 279 (224 to 335) |",
        "| linear attention | forward | float32 | torch | 1.01 (0.91 to 1.12) |",
        "| exponent of time against N | 1.00 ± 0.05 | N^1.01 (0.99 to 1.02) |",
        "| RippleViT | 72.9 ms | 51.7 ms | 1.42× |",
        "bfloat16 on the matrix unit, over compiled | mean ≥ 12×, worst ≥ 8× | mean 13.14×",
        "| RippleViT | 17.8 ms | 41.1 ms | 17.0 ms | 2.29× | 1.80× [1.70 – 1.90] |",
        "1.143× the time (1.069 to 1.222)",
        "| 65,536 | 115 ms | – | 74.7 ms | – | 57.7 ms | 1.29 | 195 KiB | – |",
    ):
        assert figure in text, figure
    sources = [path for path in MEASUREMENTS.glob("xeon*/**/*.json") if "ablation-runs" not in
               str(path) and path.name != "check.json"]  # fmt: skip
    assert len(sources) == 12
    for path in sources:
        assert f"reports/measurements/{path.relative_to(MEASUREMENTS)}" in text.replace("\n", " ")


def test_prose_is_wrapped_and_every_part_names_a_file_and_a_machine() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    prose = [line for line in text.splitlines() if not line.startswith(("|", "#"))]
    assert (
        max(len(line) for line in prose if " → " not in line and "cases together" not in line)
        <= 100
    )
    for part in text.split("\n## ")[1:]:
        assert "From `reports/measurements/" in part, part[:80]


@pytest.mark.parametrize(
    "name",
    [f"xeon-2.5ghz-2-cores/{name}" for name in ("cpu", "cpu-memory-kept")]
    + [f"xeon-2.1ghz-amx-2-cores/{name}" for name in ("cpu", "ripple")],
)
def test_pages_of_targets_are_those_of_their_runs(tmp_path: Path, name: str) -> None:
    run = MEASUREMENTS / f"{name}.json"
    out = tmp_path / "page.md"
    assert main(["targets", str(run), "--out", str(out)]) == 1
    assert out.read_text() == run.with_suffix(".md").read_text()


def test_tables_beside_their_data_are_made_of_it(tmp_path: Path) -> None:
    found = list(MEASUREMENTS.rglob("table.json"))
    assert len(found) == 2
    for path in found:
        content = json.loads(path.read_text())
        assert join(results_text.document(content)) == path.with_suffix(".md").read_text(), path
        assert results_text.to_csv(content) == path.with_suffix(".csv").read_text(), path
    (training,) = MEASUREMENTS.glob("*/training")
    for content in records.read_ablations(training)[0]:
        csv = training / f"ablation-{content['setting']}.csv"
        assert ablation.to_csv(content) == csv.read_text(), csv
    tables.write_steps(training / "step-speed.json", tmp_path)
    tables.write_breakdown(training / "step-breakdown.json", tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (training / path.name).read_text(), path.name
