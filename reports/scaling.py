"""``python -m reports scaling``: complexity plots, exponents and crossovers from saved runs."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from linear_vit.reports import plots
from linear_vit.reports.groups import Group, crossovers, file_name, pictures

# Columns of a case that a CSV file has no place for.
_NOT_IN_CSV = "datetime|seconds|turns|info|ratios|name|setting|sweep"


def fit_table(found: Sequence[Group]) -> pd.DataFrame:
    """A row per curve: the exponent with its interval, or why there is none."""
    rows = [
        {
            "machine": group.machine,
            "operation": operation,
            "pass": mode,
            "dtype": group.dtype,
            "backend": backend,
            "exponent": None if fit.reason else fit.exponent,
            "low": None if fit.reason else fit.low,
            "high": None if fit.reason else fit.high,
            "floor_s": None if fit.reason else fit.floor,
            "residual": fit.residual,
            "local_slope": fit.local_slope,
            "lengths": fit.lengths,
            "reason": fit.reason or "",
            "sweep": group.sweep,
            "setting": group.setting,
        }
        for group in found
        for (operation, mode, backend), fit in group.fits.items()
    ]
    return pd.DataFrame(rows)


def crossover_table(found: Sequence[Group]) -> pd.DataFrame:
    """A row per backend that is set against an incumbent: the length from which on it is faster."""
    rows = []
    for group, mode, backend, answer in crossovers(found):
        rows.append(
            {
                "machine": group.machine,
                "pass": mode,
                "dtype": group.dtype,
                "total_tokens": group.total_tokens,
                "backend": backend,
                "estimate": answer.estimate,
                "low": answer.low,
                "high": answer.high,
                "text": answer.text,
                "sweep": group.sweep,
                "setting": group.setting,
            }
        )
    return pd.DataFrame(rows)


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
    for name, table_frame in (
        ("exponents.csv", fit_table(found)),
        ("crossovers.csv", crossover_table(found)),
    ):
        table_frame.to_csv(out / name, index=False)
        written.append(out / name)
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
