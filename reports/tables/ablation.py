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

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from linear_vit.reports.claims import CLAIMS, DATASETS, model_of
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.statistics.seeds import t_interval
from linear_vit.reports.tables import pairs, table
from linear_vit.reports.tables.table import Line, Table, count, number, word
from linear_vit.reports.units import capital
from linear_vit.screen import counted

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
    latest = max(of_these, key=lambda run: run.get("started", ""))
    part, where = pairs.part_of(latest), machines.label(environment or latest["environment"])
    by_value: dict[Any, dict[int, Record]] = {}
    for run in sorted(of_these, key=lambda run: [dict(c) for c in configs].index(run["config"])):
        if (pairs.part_of(run), machines.label(run["environment"])) == (part, where):
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
        "dataset_title": part or first.get("dataset_title"),
        "config": {k: v for k, v in pairs.setting(first["config"]).items() if k != name},
        "environment": first["environment"],
        "rows": rows,
        "best": best["value"],
        "claimed_best": None if part else CLAIMS["best"].get(name),
    }


def _row(
    value: Any, by_value: dict[Any, dict[int, Record]], timed: Mapping[Any, pairs.Step]
) -> dict[str, Any]:
    found, first = by_value[value], next(iter(by_value))
    best = [100 * max(e["val_accuracy"] for e in run["epochs"]) for _, run in sorted(found.items())]
    compared = pairs.compared(found, by_value[first], timed.get(value), timed.get(first))
    return {"value": value, **compared, "val_accuracy": t_interval(best)}


def describe(found: Record) -> str:
    """Which value is best, beside the claim, in a sentence."""
    rows = {row["value"]: row for row in found["rows"]}
    best = rows[found["best"]]["val_accuracy"]
    interval = "" if best["half_width"] is None else f" ± {best['half_width']:.1f}"
    claim = f"; claimed: {found['claimed_best']}" if found["claimed_best"] is not None else ""
    return (
        f"{found['setting']} of {', '.join(map(str, rows))} on {_dataset(found)}: best "
        f"{found['best']} by validation accuracy ({best['mean']:.1f}{interval} %){claim}."
    )


def as_table(found: Record) -> Table:
    """A row per value; the best by validation accuracy is marked."""
    first, config = found["rows"][0], found["config"]
    how = {
        "by turns": "training steps of all values by turns in one process; 95 % interval",
        "in the runs": "same seed; median and range",
    }[first["images_per_second"]["how"]]
    title = (
        f"{capital(found['setting'].replace('_', ' '))} of {_model(found)} on {_dataset(found)}: "
        f"dim {config['dim']}, depth {config['depth']}, {counted(config['epochs'], 'epoch')}; "
        f"{machines.label(found['environment'])}"
    )
    note = f"{describe(found)} Speed: images/s over those of {first['value']}: {how}."
    return Table(title, [_line(row, found) for row in found["rows"]], note)


def _line(row: dict[str, Any], found: Record) -> Line:
    value, best = row["value"], "best" if row["value"] == found["best"] else ""
    return {
        found["setting"]: word(value) if isinstance(value, str) else number(value, str),
        "Parameters": count(row["parameters"]),
        "Validation accuracy": pairs.accuracy_cell(row["val_accuracy"], best),
        "Test accuracy": pairs.accuracy_cell(row["accuracy"]),
        "Images/s": number(row["images_per_second"]["median"], "{:,.0f}"),
        "Speed": pairs.speedup_cell(row["speedup"]),
        "Seeds": count(len(row["seeds"])),
    }


def _model(found: Record) -> str:
    return model_of(found["model"], found.get("model_title")).title


def _dataset(found: Record) -> str:
    name = found["dataset"]
    return str(found.get("dataset_title") or DATASETS.get(name, (name, 0))[0])


_CSV = {
    "parameters": "parameters",
    "val_accuracy_mean_percent": "val_accuracy.mean",
    "accuracy_mean_percent": "accuracy.mean",
    "accuracy_half_width_percent": "accuracy.half_width",
    "images_per_second": "images_per_second.median",
    "speedup_median": "speedup.median",
}


def to_csv(found: Record) -> str:
    """One line per value."""
    return table.to_csv(
        [
            {found["setting"]: row["value"], "seeds": len(row["seeds"]), **table.picked(row, _CSV)}
            for row in found["rows"]
        ]
    )


def plot(found: Record) -> str:
    """Accuracy above, images/s below, over the values; an SVG."""
    from matplotlib.figure import Figure

    rows = pd.json_normalize(found["rows"])
    values = [str(value) for value in rows["value"]]
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    curves = (("val_accuracy", "validation", "tab:gray"), ("accuracy", "test", "tab:blue"))
    for key, label, colour in curves:
        half = rows[f"{key}.half_width"].fillna(0)
        how = {"marker": "o", "capsize": 3, "label": label, "color": colour}
        above.errorbar(range(len(rows)), rows[f"{key}.mean"], half, **how)
    above.set(ylabel="accuracy, % (95 % t-interval)", title=f"{_model(found)} on {_dataset(found)}")
    above.legend()
    below.plot(rows["images_per_second.median"], "o-", color="tab:blue")
    below.set_ylim(bottom=0)
    below.set(ylabel="training images/s", xlabel=found["setting"])
    below.set_xticks(range(len(rows)), values)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()
