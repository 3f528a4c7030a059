"""The plots: one colour and marker per backend everywhere, units on every axis, log-log.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; markers say the same again.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from linear_vit.reports.statistics import turns
from linear_vit.reports.statistics.fits import Fit

_STYLES = {
    "reference": ("#7f7f7f", "x"),
    "torch": ("#0072B2", "o"),
    "compiled": ("#E69F00", "s"),
    "triton": ("#009E73", "^"),
    "cuda": ("#D55E00", "D"),
    "cpu": ("#CC79A7", "P"),
}
_OTHER = (("#56B4E9", "v"), ("#F0E442", "*"), ("#000000", "h"))
# matplotlib's marker by its name in Observable Plot.
_SYMBOLS = {
    "x": "times",
    "o": "circle",
    "s": "square",
    "^": "triangle",
    "D": "diamond",
    "P": "cross",
    "v": "wye",
    "*": "star",
    "h": "hexagon",
}
# Text and axes take this colour, which the page replaces by that of its theme.
INK = "#222222"

_SHORT = {
    "linear_attention": "linear attention",
    "softmax_attention": "softmax attention",
    "linear_attention_state": "state",
    "linear_attention_apply": "apply",
    "ripple_pool": "ripple pool",
    "ripple_expand": "ripple expand",
    "ripple_pool_stages": "ripple pyramid down",
    "ripple_expand_stages": "ripple pyramid up",
    "linear_attention_packed": "linear attention, packed",
    "softmax_attention_packed": "softmax attention, packed",
}
# Operations that share a picture; the first is drawn solid, the second dashed.
FAMILIES = {
    "attention": ("linear_attention", "softmax_attention"),
    "state": ("linear_attention_state", "linear_attention_apply"),
    "packed": ("linear_attention_packed", "softmax_attention_packed"),
    "ripple": ("ripple_pool", "ripple_expand"),
    "pyramid": ("ripple_pool_stages", "ripple_expand_stages"),
}
_LINES = ("-", "--")

FitTable = dict[tuple[str, str, str], Fit]  # (operation, pass, backend) of one machine and dtype


@dataclass(frozen=True)
class Picture:
    """What a figure shows: its column of numbers, its words, and how the y axis is marked."""

    name: str
    title: str
    caption: str
    unit: str
    format_y: Callable[[float], str]


def label(operation: str) -> str:
    """An operation's name as prose has it."""
    return _SHORT.get(operation, operation.replace("_", " "))


def operations_of(room: str) -> list[str]:
    """The operations of a room of ``kernels``, by their common beginning."""
    return [name for name in _SHORT if name.startswith(room)]


def style(backend: str) -> tuple[str, str]:
    """Colour and marker of a backend; one that is not in the table gets its own, too."""
    if backend in _STYLES:
        return _STYLES[backend]
    return _OTHER[sum(map(ord, backend)) % len(_OTHER)]


def page_style(backend: str) -> dict[str, str]:
    """The same colour and marker, as the page's plotting library names them."""
    colour, marker = style(backend)
    # Black is the colour of text, which a dark page turns over.
    return {"colour": "currentColor" if colour == "#000000" else colour, "symbol": _SYMBOLS[marker]}


def title(operations: tuple[str, ...], picture: Picture) -> str:
    """What a picture of these operations shows."""
    if picture is OVER_SOFTMAX:
        return picture.title
    return f"{' and '.join(label(name) for name in operations)}: {picture.title}".capitalize()


def short_number(value: float) -> str:
    """1024 as 1k, as token counts are written."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size * 0.9999:
            return f"{value / size:g} {unit}"
    return f"{value / 1e-9:g} ns"


def duration(value: float) -> str:
    """Three significant digits with the unit that suits: 1.23 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:#.3g} {unit}".replace(". ", " ")
    return f"{value * 1e9:.0f} ns"


def mebibytes(value: float) -> str:
    for unit, size in (("GiB", 1024.0), ("MiB", 1.0), ("KiB", 1 / 1024)):
        if value >= size * 0.9999:
            return f"{value / size:.3g} {unit}"
    return f"{value * 2**20:.0f} B"


def factor(value: float) -> str:
    return f"{value:g}×"


TIME = Picture(
    "time",
    "time per call",
    "Lower is better. A straight line is a power of N; the legend gives its exponent with a 95 % "
    "interval where the data supports one. Bars are the quartiles of the rounds.",
    "time per call",
    seconds,
)
MEMORY = Picture(
    "memory",
    "peak memory beyond inputs and outputs",
    "Lower is better. What an implementation needs for itself; a point is missing where it needs "
    "nothing that PyTorch's allocator sees.",
    "peak memory beyond inputs and outputs",
    mebibytes,
)
OVER_SOFTMAX = Picture(
    "speedup-over-softmax",
    "Speed-up of linear attention over softmax attention (torch: SDPA)",
    "Above the line at 1× linear attention is the faster one; a curve passes it at the crossover "
    "length.",
    "speed-up over torch's softmax attention",
    factor,
)
OVER_TORCH = Picture(
    "speedup-over-torch",
    "speed-up over the torch backend",
    "Above the line at 1× a backend is faster than what a good PyTorch user writes today.",
    "speed-up over the torch backend",
    factor,
)


def picture_data(frame: pd.DataFrame, picture: Picture) -> pd.DataFrame:
    """The rows of a family with the drawn quantity as ``value`` (seconds, MiB, or a ratio)."""
    frame = frame.copy()
    if picture is TIME:
        frame["value"] = frame["median_s"]
    elif picture is MEMORY:
        frame["value"] = pd.to_numeric(frame["peak_memory_bytes"]) / 2**20
        frame = frame[frame["value"] > 0]
    else:
        base = frame[frame["backend"] == "torch"]
        if picture is OVER_SOFTMAX:
            base = base[base["operation"] == "softmax_attention"]
            frame = frame[frame["operation"] == "linear_attention"]
            key = ["pass", "N"]
        else:
            frame = frame[frame["backend"] != "torch"]
            key = ["operation", "pass", "N"]
        base = base[[*key, *turns.OF_A_CASE]]
        frame = frame.merge(base, on=key, suffixes=("", "_base"))
        frame["value"] = np.exp(turns.speedups(frame)["log"])
    return frame.reset_index(drop=True)


def draw(
    frame: pd.DataFrame,
    picture: Picture,
    operations: tuple[str, ...],
    passes: Iterable[str],
    where: str,
    fits: FitTable,
    *,
    width: float = 5.6,
) -> Figure:
    """One panel per pass, side by side; ``frame`` comes from :func:`picture_data`."""
    passes = list(passes)
    figure, axes = plt.subplots(
        1, len(passes), figsize=(width * len(passes), 4.6), sharey=True, squeeze=False
    )
    for axis, mode in zip(axes[0], passes, strict=True):
        _panel(axis, frame[frame["pass"] == mode], picture, operations, mode, fits)
        axis.set_title(mode.replace("+", " + "), fontsize=11, color=INK)
    axes[0][0].set_ylabel(picture.unit, color=INK)
    letters = 70 * len(passes)
    heading = "\n".join(
        textwrap.fill(line, letters) for line in (title(operations, picture), where)
    )
    figure.suptitle(heading, fontsize=10, color=INK)
    figure.tight_layout()
    return figure


def _panel(
    axis: Axes,
    frame: pd.DataFrame,
    picture: Picture,
    operations: tuple[str, ...],
    mode: str,
    fits: FitTable,
) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    several = frame["operation"].nunique() > 1
    for (operation, backend), curve in frame.groupby(["operation", "backend"], sort=False):
        curve = curve.sort_values("N")
        colour, marker = style(str(backend))
        second = operations.index(str(operation)) % len(_LINES)
        text = f"{backend}, {label(str(operation))}" if several else str(backend)
        fit = fits.get((str(operation), mode, str(backend)))
        if picture is TIME and fit is not None and fit.reason is None:
            text += f": {_exponent(fit)}"
        axis.plot(
            curve["N"],
            curve["value"],
            _LINES[second],
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="none" if second else colour,
            linewidth=1.6,
            label=text,
        )
        if picture is TIME:
            axis.vlines(curve["N"], curve["q1_s"], curve["q3_s"], color=colour, linewidth=2.5)
    if picture.format_y is factor:
        axis.axhline(1, color=INK, linewidth=0.8)
    _decorate(axis, frame, picture)


def _decorate(axis: Axes, frame: pd.DataFrame, picture: Picture) -> None:
    lengths = sorted(frame["N"].unique())
    # At most nine labels fit: every length, or every second.
    shown = lengths[:: 1 + len(lengths) // 9]
    axis.set_xticks(shown, [short_number(n) for n in shown])
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
        axis.legend(fontsize=8, frameon=False, labelcolor=INK)


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


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: scales, and takes its ink from the text's colour."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    # Ids are unique within a figure only, and a page has many.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]+"', "", text)
    text = re.sub(r"font:[^;\"]*'DejaVu Sans'[^;\"]*", _page_font, text)
    return text.replace(INK, "currentColor")


def _page_font(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match.group())
    return f"font: {size.group() if size else '10px'} system-ui, sans-serif"
