"""Saved runs as a notebook shows them: ``reports.runs.load([path])`` as the last line of a cell.

Static plots, since a notebook that is not trusted, or exported, runs no script of its outputs.
"""

import html
import math

from linear_vit.reports import plots, scaling
from linear_vit.reports.saved.runs import Runs


def show(loaded: Runs) -> str:
    """HTML of a run: where it was made, median times by case and backend, and its plots."""
    where = "".join(
        f"<li>{html.escape(head['machine'])}: {head['cases']} cases, "
        f"{html.escape(head['datetime'][:16].replace('T', ' '))} "
        f"<code>{html.escape(head['file'])}</code></li>"
        for head in loaded.heads
    )
    parts = [f"<ul>{where}</ul>"]
    if not loaded.kernels.empty:
        key = ["machine", "total_tokens", "operation", "pass", "dtype", "N"]
        for name in ("machine", "total_tokens"):
            if loaded.kernels[name].nunique() == 1:
                key.remove(name)
        times = loaded.kernels.pivot_table("median_s", key, "backend", sort=False)
        parts.append(times.map(_duration).to_html())
    for number, group in enumerate(scaling.groups(loaded)):
        for picture, frame in scaling.pictures(group):
            figure = scaling.draw(group, picture, frame, group.passes)
            svg = plots.inline_svg(figure, f"n{number}-{picture.name}")
            parts.append(f"<figure>{svg}<figcaption>{picture.caption}</figcaption></figure>")
    parts += [f"<p>Skipped {html.escape(line)}</p>" for line in loaded.skipped]
    return "\n".join(parts)


def _duration(value: float) -> str:
    return "–" if math.isnan(value) else plots.duration(value)
