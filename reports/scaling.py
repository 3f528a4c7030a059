"""``python -m reports scaling``: complexity plots, exponents and crossovers from saved runs."""

import re
from collections.abc import Sequence
from pathlib import Path

from linear_vit.reports import plots
from linear_vit.reports.groups import Group, crossovers, file_name, pictures
from linear_vit.reports.tables.scaling import crossover_frame, fit_frame

# Columns of a case that a CSV file has no place for.
_NOT_IN_CSV = "datetime|seconds|turns|info|ratios|name|setting|sweep"


def write(found: Sequence[Group], out: Path) -> list[Path]:
    """Write every picture as PNG, SVG and CSV, and the two tables as CSV; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    several = len({group.machine for group in found}) > 1
    written = []
    for group in found:
        prefix = f"{_slug(group.machine)}-" if several else ""
        for picture, frame in pictures(group):
            stem = out / f"{prefix}{_slug(file_name(group, picture), keep='_+')}"
            present = [mode for mode in group.passes if mode in set(frame["pass"])]
            written += plots.save(plots.draw(group, picture, frame, present), stem)
            table = stem.with_name(stem.name + ".csv")
            frame.filter(regex=f"^(?!({_NOT_IN_CSV})(_base)?$)").to_csv(table, index=False)
            written.append(table)
    for name, frame in (("exponents", fit_frame(found)), ("crossovers", crossover_frame(found))):
        written.append(out / f"{name}.csv")
        frame.to_csv(written[-1], index=False)
    return written


def summary(found: Sequence[Group]) -> str:
    """Exponents and crossovers as text."""
    lines = []
    for group in found:
        lines += [f"{group.family.name}, {group.where}"]
        for (operation, mode, backend), fit in group.fits.items():
            lines.append(f"  {group.words.operation(operation)}, {mode}, {backend}: time ~ {fit}")
        for _, mode, backend, answer in crossovers([group]):
            first = group.words.operation(group.family.operations[0])
            lines.append(
                f"  crossover of {first} ({backend}) with {group.family.incumbent}, {mode}: "
                f"{answer.text}"
            )
    return "\n".join(lines)


def _slug(text: str, keep: str = "") -> str:
    return re.sub(rf"[^a-z0-9{re.escape(keep)}]+", "-", text.lower()).strip("-")
