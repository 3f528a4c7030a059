"""From records to tables (Markdown, CSV, JSON): each returns its text for the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path

from linear_vit.training import ablation, breakdown, results, speed
from linear_vit.training.config import Config
from linear_vit.training.errors import notice
from linear_vit.training.record import finished_runs, write_json, write_text


def write_results(*, runs: Path, out: Path, exponents: Path | None, ablations: Path) -> str:
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


def write_ablation(*, setting: str, runs: Sequence[Path], speeds: Path | None, out: Path) -> str:
    records = [json.loads(path.read_text()) for path in runs]
    configs = [Config(**run["config"]) for run in records]
    rates = json.loads(speeds.read_text())["rates"] if speeds else {}
    values = {str(getattr(config, setting)): getattr(config, setting) for config in configs}
    by_value = {values[text]: rate for text, rate in rates.items()}
    found = ablation.summarise(setting, configs, records, records[0]["environment"], by_value)
    write_json(out / f"ablation-{setting}.json", found)
    write_text(out / f"ablation-{setting}.csv", ablation.to_csv(found))
    markdown = ablation.to_markdown(found)
    write_text(out / f"ablation-{setting}.md", markdown)
    try:
        ablation.plot(found, out / f"ablation-{setting}.svg")
    except ImportError as error:
        notice(f"no plot ({error}): pip install matplotlib")
    return f"\n{markdown}\nwritten to {out}/ablation-{setting}.md, .csv, .json and .svg"


def write_steps(*, saved: Path, out: Path) -> str:
    markdown = speed.to_markdown(json.loads(saved.read_text()))
    write_text(out / "step-speed.md", markdown)
    return f"\n{markdown}\nwritten to {out}/step-speed.md and .json"


def write_breakdown(*, saved: Path, out: Path) -> str:
    markdown = breakdown.to_markdown(json.loads(saved.read_text()))
    write_text(out / "step-breakdown.md", markdown)
    return f"\n{markdown}\nwritten to {out}/step-breakdown.md and .json"
