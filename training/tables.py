"""From records to tables (Markdown, CSV, JSON): each returns its text for the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linear_vit.training import ablation, breakdown, results, speed
from linear_vit.training.config import Config
from linear_vit.training.errors import notice
from linear_vit.training.record import finished_runs, write_json, write_text


def write_results(runs: Path, out: Path, *, exponents: Path | None, ablations: Path) -> str:
    speeds, skipped = speed.read_models(runs)
    for line in skipped:
        notice(line)
    table = results.make_table(
        list(finished_runs(runs).values()),
        speeds=speeds,
        exponents=results.read_exponents(exponents),
        ablations=ablation.read(ablations),
    )
    markdown = results.to_markdown(table)
    write_json(out / "table.json", table)
    write_text(out / "table.md", markdown)
    write_text(out / "table.csv", results.to_csv(table))
    return f"\n{markdown}\nwritten to {out}/table.md, table.csv and table.json"


def write_ablation(
    setting: str,
    configs: Sequence[Mapping[str, Any]],
    folder: Path,
    out: Path,
    *,
    environment: dict[str, Any],
    speeds: Sequence[Path],
) -> str:
    of = [Config(**config) for config in configs]
    records = list(finished_runs(folder).values())
    values = {str(getattr(config, setting)): getattr(config, setting) for config in of}
    rates = json.loads(speeds[0].read_text())["rates"] if speeds else {}
    by_value = {values[text]: rate for text, rate in rates.items()}
    found = ablation.summarise(setting, of, records, environment, by_value)
    write_json(out / f"ablation-{setting}.json", found)
    write_text(out / f"ablation-{setting}.csv", ablation.to_csv(found))
    markdown = ablation.to_markdown(found)
    write_text(out / f"ablation-{setting}.md", markdown)
    try:
        ablation.plot(found, out / f"ablation-{setting}.svg")
    except ImportError as error:
        notice(f"no plot ({error}): pip install matplotlib")
    return f"\n{markdown}\nwritten to {out}/ablation-{setting}.md, .csv, .json and .svg"


def write_steps(saved: Path, out: Path) -> str:
    markdown = speed.to_markdown(json.loads(saved.read_text()))
    write_text(out / "step-speed.md", markdown)
    return f"\n{markdown}\nwritten to {out}/step-speed.md and .json"


def write_breakdown(saved: Path, out: Path) -> str:
    markdown = breakdown.to_markdown(json.loads(saved.read_text()))
    write_text(out / "step-breakdown.md", markdown)
    return f"\n{markdown}\nwritten to {out}/step-breakdown.md and .json"
