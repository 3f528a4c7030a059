"""What the tables of training share: runs set beside others, and steps timed by turns."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from linear_vit.reports.claims import DATASETS
from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.seeds import (
    paired_ratios,
    percent_text,
    ratio_text,
    t_interval,
)
from linear_vit.reports.tables.table import NOTHING, Cell, disturbance, number
from linear_vit.reports.units import exact

# What tells the runs of one table apart.
OF_A_RUN = ("attention_type", "local_branch", "seed")

Step = Mapping[Any, Any]  # a row of Runs.training
BySeed = Mapping[int, Record]


def setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs that may share a table have in common: all but the model and the seed."""
    return {name: value for name, value in config.items() if name not in OF_A_RUN}


def part_of(run: Record) -> str | None:
    """The title of a part of a data set, where a run had not all of its classes."""
    if not run.get("dataset_subset"):
        return None
    whole = DATASETS.get(run["config"]["dataset"], (run["config"]["dataset"], 0))[0]
    title = run.get("dataset_title")
    return str(title) if title and title != whole else f"{whole}, a part of its classes"


def compared(
    runs: BySeed, base: BySeed, step: Step | None, base_step: Step | None
) -> dict[str, Any]:
    """Fields of a row of table.json or of an ablation: seeds, parameters, accuracy and speed.

    Speeds are those of the steps by turns, of both or of neither: one clock for what is compared.
    """
    seeds = sorted(runs)
    own = [runs[seed]["images_per_second"] for seed in seeds]
    rate, how = statistics.median(own), "in the runs"
    speedup = paired_ratios(runs, base, lambda run: run["images_per_second"])
    if step and base_step:
        rate, how = float(step["images_per_s"]), "by turns"
        speedup = {**over(step, base_step), "values": (speedup or {}).get("values", [])}
    return {
        "seeds": seeds,
        "parameters": runs[seeds[0]]["parameters"],
        "accuracy": t_interval([100 * runs[seed]["test_accuracy"] for seed in seeds]),
        "images_per_second": {"median": rate, "values": own, "how": how},
        "speedup": speedup and {**speedup, "how": how},
    }


def by_turns(
    runs: Sequence[tuple[Hashable, Record]], steps: pd.DataFrame | None
) -> dict[Any, Step]:
    """Timed steps of the models of these runs, of one saved run; without it none.

    That is the newest which has the first of them; one that it lacks is left out.

    Args:
        runs: a name and a record each; the first is what the others are compared with.
        steps: rows of ``Runs.training``; those of the record's model, settings, backend and machine
            count.
    """
    if steps is None or steps.empty or not runs:
        return {}
    steps = steps[[not disturbance(step) for step in steps.to_dict("records")]]
    of_first = _of_run(runs[0][1], steps).sort_values("datetime", kind="stable")
    if of_first.empty:
        return {}
    one = steps[steps["file"] == of_first["file"].iloc[-1]]
    found = {name: _of_run(run, one).to_dict("records") for name, run in runs}
    return {name: rows[0] for name, rows in found.items() if rows}


def _of_run(run: Record, steps: pd.DataFrame) -> pd.DataFrame:
    """The steps of a record's model, settings, backend and machine."""
    here = steps[
        (steps["machine"] == machines.label(run["environment"]))
        & (steps["model"] == run["model"])
        & (steps["backend"] == (run["config"].get("backend") or "default"))
    ]
    wanted = without_backend(run["config"])
    return here[here["settings"].map(lambda one: without_backend(one) == wanted).astype(bool)]


def without_backend(config: Mapping[str, Any]) -> dict[str, Any]:
    """What steps may differ in and still be of one table's setting: model, seed and backend."""
    return {name: value for name, value in setting(config).items() if name != "backend"}


def over(own: Step, base: Step) -> dict[str, Any]:
    """How much faster a step is than one that took turns with it: {median, low, high, how}."""
    log, error = (0.0, 0.0) if own is base else turns.speedup(own, base)
    ratio, low, high = turns.interval(log, error)
    return {"median": ratio, "low": low, "high": high, "how": "by turns"}


def speedup_cell(ratio: Mapping[str, Any] | None) -> Cell:
    """A speed-up with its interval, and how it was taken."""
    if ratio is None:
        return Cell(NOTHING)
    tip = f"{exact(ratio['median'])}×, {ratio['low']:.3f} to {ratio['high']:.3f} "
    return number(ratio["median"], ratio_text(ratio), tip + ratio.get("how", "by seed"))


def accuracy_cell(interval: Mapping[str, Any] | None, mark: str = "", missing: str = "") -> Cell:
    """A mean over seeds with its interval, and the single values; or the tip on what is missing."""
    if interval is None:
        return Cell(NOTHING, tip=missing)
    return number(interval["mean"], percent_text(interval), values(interval, "%"), mark)


def values(of: Mapping[str, Any], unit: str) -> str:
    """Single values, for a tooltip."""
    return f"{', '.join(f'{value:,.4g}' for value in of['values'])} {unit}" if of["values"] else ""
