"""``python -m reports models``: whole models with their attention swapped, as tables and plots."""

import re
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from linear_vit.reports import plots, units
from linear_vit.reports.saved.files import write_text
from linear_vit.reports.saved.runs import NoRuns, Runs
from linear_vit.reports.styles import style
from linear_vit.reports.tables import models
from linear_vit.reports.tables.models import Swapped
from linear_vit.reports.tables.table import Part, join, on_screen

HOW_TO_MEASURE = (
    "pytest --benchmark-only --models timm:vit_tiny_patch16_224 --out reports/out/models"
)


def write(runs: Runs, out: Path) -> str:
    """Write models.md, models.csv and a plot of each model and pass; what a terminal shows.

    Raises:
        NoRuns: these runs have no whole model.
    """
    found = models.groups(runs)
    if not found:
        raise NoRuns(f"no whole model was timed. Make it with: {HOW_TO_MEASURE}")
    parts: list[Part] = []
    for one in (models.paying(found), *map(models.as_table, found)):
        if one is not None:
            parts += [f"{one.title}.", one, *filter(None, [one.note])]
    write_text(out / "models.md", join(parts))
    write_text(out / "models.csv", models.to_csv(found))
    for swapped in found:
        name = re.sub(r"[^a-z0-9]+", "-", f"models-{swapped.model}-{swapped.mode}".lower())
        plots.save(draw(swapped, runs), out / name)
    return f"{on_screen(parts)}\nwritten to {out}/models.{{md,csv}}, with plots beside them"


def draw(swapped: Swapped, runs: Runs) -> Figure:
    """Time, and memory, against the side of the image; what was disturbed is hollow."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10.4, 4.6))
    for name, cases in swapped.at.items():
        colour, marker = style(name, runs.words)
        drawn: dict[str, Any] = {"color": colour, "marker": marker}
        sides = sorted(cases)
        quiet = [side for side in sides if swapped.quiet(name, side)]
        time.plot(quiet, [cases[side]["median_s"] for side in quiet], label=name, **drawn)
        lost = [side for side in sides if side not in quiet]
        drawn_hollow = {**drawn, "markerfacecolor": "none", "linestyle": "none"}
        time.plot(lost, [cases[side]["median_s"] for side in lost], **drawn_hollow)
        peaks = [models.known(cases[side]["peak_memory_bytes"]) for side in sides]
        memory.plot(sides, [peak and peak / 2**20 for peak in peaks], **drawn)
    axes = ((time, "time of a call", units.seconds), (memory, "peak memory", units.mebibytes))
    for axis, label, form in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10 if axis is time else 2)
        axis.set_xticks(swapped.resolutions, [str(side) for side in swapped.resolutions])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _, form=form: form(y)))
        axis.set_xlabel("side of the image, pixels", color=plots.INK)
        axis.set_ylabel(label, color=plots.INK)
        axis.grid(True, which="major", color="#999999", alpha=0.3, linewidth=0.6)
    time.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    time.yaxis.set_minor_locator(NullLocator())
    time.legend(fontsize=8, frameon=False, labelcolor=plots.INK)
    figure.suptitle(swapped.where, fontsize=10, color=plots.INK)
    figure.tight_layout()
    return figure
