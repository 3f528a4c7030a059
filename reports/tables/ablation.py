"""One setting varied, all else equal: accuracy and speed of every value, as table and plot.

``ablation-<setting>.json``::

    schema       "linear-vit-ablation/1"
    setting      the name of the setting varied
    model, dataset, config    what the runs have in common, but for that setting and the seed
    environment  of the first run
    rows         one per value: value, seeds, parameters, accuracy and val_accuracy {mean,
                 half_width, values} in percent; images_per_second {median, values, how} and
                 speedup {median, low, high, values, how} over the first value: where how is "by
                 turns", of training steps of all values by turns in one process (low and high: 95 %
                 interval), else "in the runs", paired by seed (low and high: range of values)
    best         the value of the best validation accuracy (test accuracy chooses nothing)
    claimed_best what the original found best, or null
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from linear_vit.reports.claims import CLAIMS, DATASETS, model_of
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.statistics.seeds import paired_ratios, percent_text, t_interval
from linear_vit.reports.tables import pairs, table
from linear_vit.reports.tables.table import Cell, Line, Table, number
from linear_vit.reports.units import capital, exact

SCHEMA = "linear-vit-ablation/1"


def make(
    name: str,
    configs: Sequence[Mapping[str, Any]],
    runs: Sequence[Record],
    *,
    environment: Mapping[str, Any] | None = None,
    steps: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """The content of ablation-<name>.json from the records of these configurations.

    Args:
        name: the setting that is varied.
        configs: of every value and seed, as a record's ``config`` has them.
        runs: content of run.json files, of which those of other configurations are left out.
        environment: of the machine whose runs count; None takes that of the latest run.
        steps: timed training steps of every value, ``Runs.training``.

    Raises:
        ValueError: no run is of one of these configurations.
    """
    of_these = [run for run in runs if run["config"] in [dict(config) for config in configs]]
    if not of_these:
        raise ValueError(f"no finished run of {name} in these records")
    where = machines.label(
        environment or max(of_these, key=lambda run: run.get("started", ""))["environment"]
    )
    by_value: dict[Any, dict[int, Record]] = {}
    for run in sorted(of_these, key=lambda run: [dict(c) for c in configs].index(run["config"])):
        if machines.label(run["environment"]) == where:
            config = run["config"]
            by_value.setdefault(config[name], {})[config["seed"]] = run
    firsts = [(value, seeds[min(seeds)]) for value, seeds in by_value.items()]
    timed = pairs.by_turns(firsts, steps)
    rows = [_row(value, by_value, timed) for value in by_value]
    first = firsts[0][1]
    best = max(rows, key=lambda row: row["val_accuracy"]["mean"])
    return {
        "schema": SCHEMA,
        "setting": name,
        "model": first["model"],
        "model_title": first.get("model_title"),
        "dataset": first["config"]["dataset"],
        "dataset_title": first.get("dataset_title"),
        "config": {k: v for k, v in pairs.setting(first["config"]).items() if k != name},
        "environment": first["environment"],
        "rows": rows,
        "best": best["value"],
        "claimed_best": CLAIMS["best"].get(name),
    }


def _row(
    value: Any, by_value: dict[Any, dict[int, Record]], timed: Mapping[Any, Mapping[Any, Any]]
) -> dict[str, Any]:
    found, first = by_value[value], next(iter(by_value))
    seeds = sorted(found)
    rates = [found[seed]["images_per_second"] for seed in seeds]
    rate, how = statistics.median(rates), "in the runs"
    speedup = paired_ratios(found, by_value[first], lambda run: run["images_per_second"])
    if value in timed:
        rate, how = float(timed[value]["images_per_s"]), "by turns"
        values = (speedup or {}).get("values", [])
        speedup = {**pairs.over(timed[value], timed[first]), "values": values}
    validation = [max(e["val_accuracy"] for e in found[seed]["epochs"]) for seed in seeds]
    return {
        "value": value,
        "seeds": seeds,
        "parameters": found[seeds[0]]["parameters"],
        "accuracy": t_interval([100 * found[seed]["test_accuracy"] for seed in seeds]),
        "val_accuracy": t_interval([100 * accuracy for accuracy in validation]),
        "images_per_second": {"median": rate, "values": rates, "how": how},
        "speedup": speedup and {"how": how, **speedup},
    }


def describe(found: Record) -> str:
    """Which value is best, beside the claim, in a sentence."""
    rows = {row["value"]: row for row in found["rows"]}
    best = rows[found["best"]]["val_accuracy"]
    interval = "" if best["half_width"] is None else f" ± {best['half_width']:.1f}"
    claim = f"; claimed: {found['claimed_best']}" if found["claimed_best"] is not None else ""
    return (
        f"{found['setting']} of {', '.join(str(value) for value in rows)} on "
        f"{_dataset(found)}: best {found['best']} by validation accuracy "
        f"({best['mean']:.1f}{interval} %){claim}."
    )


def as_table(found: Record) -> Table:
    """A row per value; the best by validation accuracy is marked."""
    first = found["rows"][0]
    how = {
        "by turns": "training steps of all values by turns in one process; 95 % interval",
        "in the runs": "same seed; median and range",
    }[first["images_per_second"]["how"]]
    config = found["config"]
    title = (
        f"{capital(found['setting'].replace('_', ' '))} of {_model(found)} on {_dataset(found)}: "
        f"dim {config['dim']}, depth {config['depth']}, {config['epochs']} epochs; "
        f"{machines.label(found['environment'])}"
    )
    note = f"{describe(found)} Speed: images/s over those of {first['value']}: {how}."
    return table.of_lines(title, [_cells(row, found) for row in found["rows"]], note)


def _cells(row: dict[str, Any], found: Record) -> Line:
    rate, best = row["images_per_second"]["median"], row["value"] == found["best"]
    return {
        found["setting"]: number(str(row["value"]), row["value"]),
        "Parameters": number(f"{row['parameters']:,}", row["parameters"]),
        "Validation accuracy": _accuracy(row["val_accuracy"], "best" if best else ""),
        "Test accuracy": _accuracy(row["accuracy"]),
        "Images/s": number(f"{rate:,.0f}", rate, exact(rate, "images/s")),
        "Speed": pairs.speedup_cell(row["speedup"]),
        "Seeds": number(str(len(row["seeds"])), len(row["seeds"])),
    }


def _accuracy(interval: dict[str, Any], mark: str = "") -> Cell:
    tip = pairs.values(interval, "%")
    return number(percent_text(interval), interval["mean"], tip, mark)


def _model(found: Record) -> str:
    return model_of(found["model"], found.get("model_title")).title


def _dataset(found: Record) -> str:
    name = found["dataset"]
    return str(found.get("dataset_title") or DATASETS.get(name, (name, 0))[0])


def to_csv(found: Record) -> str:
    """One line per value."""
    return table.to_csv(
        [
            {
                found["setting"]: row["value"],
                "seeds": len(row["seeds"]),
                "parameters": row["parameters"],
                "val_accuracy_mean_percent": row["val_accuracy"]["mean"],
                "accuracy_mean_percent": row["accuracy"]["mean"],
                "accuracy_half_width_percent": row["accuracy"]["half_width"],
                "images_per_second": row["images_per_second"]["median"],
                "speedup_median": (row["speedup"] or {}).get("median"),
            }
            for row in found["rows"]
        ]
    )


def plot(found: Record, path: Path) -> None:
    """Accuracy above, images/s below, over the values; an SVG."""
    from matplotlib.figure import Figure

    rows = found["rows"]
    places = range(len(rows))
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for key, label, colour in (
        ("val_accuracy", "validation", "tab:gray"),
        ("accuracy", "test", "tab:blue"),
    ):
        above.errorbar(
            places,
            [row[key]["mean"] for row in rows],
            [row[key]["half_width"] or 0 for row in rows],
            marker="o",
            capsize=3,
            label=label,
            color=colour,
        )
    above.set_ylabel("accuracy, % (95 % t-interval)")
    above.set_title(f"{_model(found)} on {_dataset(found)}")
    above.legend()
    below.plot(places, [row["images_per_second"]["median"] for row in rows], "o-", color="tab:blue")
    below.set_ylim(bottom=0)
    below.set_ylabel("training images/s")
    below.set_xlabel(found["setting"])
    below.set_xticks(list(places), [str(row["value"]) for row in rows])
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="svg")
