"""What is proven without a GPU, as tables: kernels compiled (bench.static), bytes counted."""

from typing import Any

import pandas as pd

_STATIC_KEY = ["backend", "room", "kernel", "architecture"]
STATIC_COLUMNS = (
    "backend",
    "kernel",
    "architecture",
    "configurations",
    "registers",
    "spilled bytes",
    "shared KiB",
    "occupancy",
    "tensor-core instructions",
    "16-byte accesses",
)


def static_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line per kernel and architecture: the range over its configurations, the worst spill."""
    frame = pd.DataFrame(rows)
    lines = []
    for (backend, room, kernel, architecture), part in frame.groupby(_STATIC_KEY, sort=False):
        shared = (part["static_shared"] + part["dynamic_shared"].fillna(0)) / 1024
        lines.append(
            [
                str(backend),
                f"{room}: {kernel}",
                str(architecture),
                str(len(part)),
                _range(part["registers"]),
                f"{int((part['spill_stores'] + part['spill_loads']).max()):,}",
                _range(shared.round()),
                f"{_range(100 * part['occupancy'].dropna())} %",
                _range(part["tensor_core"]),
                _range(part["wide_loads"] + part["wide_stores"]),
            ]
        )
    return lines


TRAFFIC_COLUMNS = (
    "operation",
    "pass",
    "dtype",
    "shape",
    "launches",
    "tensor",
    "loaded",
    "of them distinct",
    "stored",
    "× least",
)


def traffic_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line per operation, pass, dtype and tensor, as bench.traffic counted it."""
    return [
        [
            str(row["operation"]),
            str(row["pass"]),
            str(row["dtype"]),
            str(row["shape"]),
            str(len(row["launches"].split())),
            str(row["tensor"]),
            f"{row['loaded']:,}",
            f"{row['distinct']:,}",
            f"{row['stored']:,}",
            _times_least(row),
        ]
        for row in rows
    ]


def _times_least(row: dict[str, Any]) -> str:
    if row["tensor"] == "workspace":  # beside the least traffic, not a part of it
        return "–" if row["ratio"] is None else f"+{row['ratio']:.1%}"
    return "not needed" if row["ratio"] is None else f"{row['ratio']:.2f}"


def _range(values: pd.Series) -> str:
    if values.empty:
        return "–"
    low, high = round(values.min()), round(values.max())
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"
