"""What the tables of training share: steps timed by turns, and how a speed-up is shown."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.seeds import ratio_text
from linear_vit.reports.tables.table import NOTHING, Cell, number
from linear_vit.reports.units import exact

# What tells the runs of one table apart.
OF_A_RUN = ("attention_type", "local_branch", "seed")

Step = Mapping[Any, Any]  # a row of Runs.training


def setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs that may share a table have in common: all but the model and the seed."""
    return {name: value for name, value in config.items() if name not in OF_A_RUN}


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
    _, run = runs[0]
    of_first = _of_run(run, steps).sort_values("datetime", kind="stable")
    if of_first.empty:
        return {}
    one = steps[steps["file"] == of_first["file"].iloc[-1]]
    found = {name: _of_run(run, one).to_dict("records") for name, run in runs}
    return {name: rows[0] for name, rows in found.items() if rows}


def _of_run(run: Record, steps: pd.DataFrame) -> pd.DataFrame:
    """The steps of a record's model, settings, backend and machine."""
    here = steps[steps["machine"] == machines.label(run["environment"])]
    here = here[here["model"] == run["model"]]
    here = here[here["backend"] == (run["config"].get("backend") or "default")]
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
    return number(ratio_text(ratio), ratio["median"], tip + ratio.get("how", "by seed"))


def values(of: Mapping[str, Any], unit: str) -> str:
    """Single values, for a tooltip."""
    return f"{', '.join(f'{value:,.4g}' for value in of['values'])} {unit}" if of["values"] else ""
