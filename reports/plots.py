"""The plots: one colour and marker per backend everywhere, units on every axis, log-log."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from linear_vit.reports import units
from linear_vit.reports.groups import MEMORY, TIME, Group, Picture
from linear_vit.reports.statistics.fits import Fit
from linear_vit.reports.styles import style

INK = "#222222"

_LINES = ("-", "--")
# Of what was disturbed while it was measured.
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markersize": 8, "linewidth": 0}


def draw(
    group: Group,
    picture: Picture,
    frame: pd.DataFrame,
    passes: Iterable[str],
    *,
    width: float = 5.6,
) -> Figure:
    """One panel per pass, side by side; ``frame`` is that of :func:`reports.groups.pictures`."""
    passes = list(passes)
    figure, axes = plt.subplots(
        1, len(passes), figsize=(width * len(passes), 5.4), sharey=True, squeeze=False
    )
    title, _, unit = picture.words(group)
    for axis, mode in zip(axes[0], passes, strict=True):
        _panel(axis, frame[frame["pass"] == mode], picture, group, mode)
        axis.set_title(mode.replace("+", " + "), fontsize=11, color=INK)
    axes[0][0].set_ylabel(unit, color=INK)
    letters = 70 * len(passes)
    heading = "\n".join(textwrap.fill(line, letters) for line in (title, group.where))
    figure.suptitle(heading, fontsize=10, color=INK)
    figure.tight_layout()
    return figure


def _panel(axis: Axes, frame: pd.DataFrame, picture: Picture, group: Group, mode: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    several = frame["operation"].nunique() > 1
    for (operation, backend), curve in frame.groupby(["operation", "backend"], sort=False):
        curve = curve.sort_values("N")
        colour, marker = style(str(backend), group.words)
        second = group.operations.index(str(operation)) % len(_LINES)
        text = str(backend)
        if several:
            text += f", {group.words.operation(str(operation))}"
        fit = group.fits.get((str(operation), mode, str(backend)))
        if picture is TIME and fit is not None and fit.reason is None:
            text += f": {_exponent(fit)}"
        drawn = curve[curve["disturbed"].isna()]
        axis.plot(
            drawn["N"],
            drawn["value"],
            _LINES[second],
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="none" if second else colour,
            linewidth=1.6,
            label=text,
        )
        lost = curve[curve["disturbed"].notna()]
        axis.plot(lost["N"], lost["value"], color=colour, marker=marker, **_HOLLOW)
        if picture is TIME:
            axis.vlines(curve["N"], curve["q1_s"], curve["q3_s"], color=colour, linewidth=2.5)
    if frame["disturbed"].notna().any():
        axis.plot([], [], color=INK, marker="o", label="hollow, off the line: disturbed", **_HOLLOW)
    if picture.is_ratio:
        axis.axhline(1, color=INK, linewidth=0.8)
    _decorate(axis, frame, picture)


def _decorate(axis: Axes, frame: pd.DataFrame, picture: Picture) -> None:
    lengths = sorted(frame["N"].unique())
    # At most nine labels fit: every length, or every second.
    shown = lengths[:: 1 + len(lengths) // 9]
    axis.set_xticks(shown, [units.short_number(n) for n in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens N", color=INK)
    low, high = axis.get_ylim()
    if picture is MEMORY:
        axis.set_yscale("log", base=2)  # sizes are told in powers of two
        axis.yaxis.set_major_locator(LogLocator(2, numticks=10))
        axis.yaxis.set_minor_locator(NullLocator())
    elif high / low < 300:
        # Few decades: label within them, too.
        axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(LogLocator(10, numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: picture.format_y(y)))
    axis.tick_params(colors=INK, which="both", labelsize=9)
    axis.grid(True, which="major", color="#999999", alpha=0.3, linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)
    if axis.get_legend_handles_labels()[1]:
        # Below the panel: within it, bars of quartiles would end behind it.
        where = (0, -0.12)
        axis.legend(
            fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=where
        )


def _exponent(fit: Fit) -> str:
    half = max(fit.high - fit.exponent, fit.exponent - fit.low)
    return f"$N^{{{fit.exponent:.2f} \\pm {half:.2f}}}$"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PNG and SVG beside each other; the figure is closed."""
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    # Without dates and with fixed ids, the same data gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem.name}):
        figure.savefig(paths[0], dpi=150, facecolor="white")
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return paths
