"""How often ``compare`` is right: recorded runs of the same code, and of code that does more work.

What ``python -m bench noise --only repeats`` records is one fresh process a file, in a folder each
for the share of work that was planted, in per cent: ``0``, ``2``, ``5``, ``10``. Of those of 0 and
of a share r each are drawn at a time, without replacement, as if they were all there is, and judged
as :mod:`reports.changes` judges all lengths of a backend together. What it calls slower or faster
of the same code is a false alarm; how often it calls more work slower is its power.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from linear_vit.reports.changes import FASTER, MARGIN, SLOWER, verdicts
from linear_vit.reports.claims import PYTORCH
from linear_vit.reports.saved import machines, runs, schema, schema_records
from linear_vit.reports.saved.files import read_json
from linear_vit.reports.statistics import pair, pools, repeats, turns
from linear_vit.reports.tables import table
from linear_vit.reports.tables.table import NOTHING, Cell, Line, Table, word
from linear_vit.reports.units import capital
from linear_vit.screen import counted

KIND = "repeats"
_RUNS = (1, 2, 3, 5, 8)  # a side
_DRAWS = 500
Record = dict[str, Any]


def condensed(folder: Path) -> Record:
    """What the runs below a folder say of the one backend beside the control.

    Returns:
        ``tokens`` (lengths), and in ``processes`` per run its ``planted`` share, and by length the
        ``median_s``, the ``log`` of its ratio to the control, turn by turn, and the ``error`` of
        that. A run in which a case is missing or was disturbed is left out, and in ``left_out``.

    Raises:
        NoRuns: there are none, or too few of them.
    """
    loaded = {path.name: runs.load([path], every=True) for path in sorted(_folders(folder))}
    lengths = sorted({int(n) for run in loaded.values() for n in run.kernels["N"]})
    heads = [head for run in loaded.values() for head in run.heads]
    processes = []
    for name, run in loaded.items():
        for _, cases in run.kernels[run.kernels["disturbed"].isna()].groupby("file"):
            if found := _process(cases.to_dict("records"), lengths):
                processes.append({"planted": float(name) / 100, **found})
    (operation,), (backend,) = (_only(loaded, name) for name in ("operation", "backend"))
    return {
        "kind": KIND,
        "schema": 1,
        "created": max(head["datetime"] for head in heads),
        "machine": heads[-1]["facts"],
        "operation": operation,
        "backend": backend,
        "tokens": lengths,
        "left_out": len(heads) - len(processes),
        "processes": processes,
    }


def read(path: Path) -> Record:
    """What was recorded; NoRuns where the file is none, or damaged."""
    try:
        found: Record = read_json(path)
        schema.check(schema_records.Repeats, found)
    except ValueError as error:
        raise runs.NoRuns(f"{path}: {error}") from error
    return found


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    if "0" not in {path.name for path in found}:
        why = "no folder 0 with runs of the same code (python -m bench noise --only repeats)"
        raise runs.NoRuns(f"{folder}: {why}")
    return found


def _only(loaded: dict[str, runs.Runs], column: str) -> list[str]:
    """The one operation, or backend besides the control, that all runs are of."""
    found = {str(name) for run in loaded.values() for name in run.kernels[column]} - {PYTORCH}
    if len(found) != 1:
        raise runs.NoRuns(f"runs of one {column} beside {PYTORCH} are wanted, not of {found}")
    return list(found)


def _process(cases: Sequence[Any], lengths: Sequence[int]) -> Record | None:
    """The ratios of one run; None where a length lacks one."""
    at = {(int(case["N"]), case["backend"] == PYTORCH): case for case in cases}
    found: Record = {"median_s": [], "log": [], "error": []}
    for n in lengths:
        own, base = at.get((n, False)), at.get((n, True))
        ratio = turns.ratio(own, base) if own and base else None
        if own is None or ratio is None:
            return None
        for name, value in (("median_s", own["median_s"]), ("log", ratio.log),
                            ("error", ratio.error)):  # fmt: skip
            found[name].append(float(f"{value:.6g}"))
    return found


def called(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What ``compare`` says of all lengths together, draw by draw.

    Args:
        before, after: (2, draws, runs, lengths): ratios to the control, and errors, of their logs.
    """
    edge, lengths = float(np.log1p(MARGIN)), before.shape[-1]
    if before.shape[2] == 1:
        x = after[0, :, 0] - before[0, :, 0]
        errors = [np.maximum(side[1, :, 0] ** 2, pair.LEAST_VARIANCE) for side in (before, after)]
        found = [pools.mean_change(*one) for one in zip(x, sum(errors), strict=True)]
        change, error, freedom = (np.array(column, float) for column in zip(*found, strict=True))
        sure_of = edge
    else:
        means = [stats.trim_mean(side[0], 0.1, axis=-1) for side in (before, after)]
        errors = [(side[1] ** 2).sum(axis=(1, 2)) / side.shape[2] ** 2 for side in (before, after)]
        # Draws are judged one by one, as if each were all there is.
        of = repeats.estimates(means[0], means[1], sum(errors) / lengths**2, backends=1)
        change, error, freedom, sure_of = of.change, of.error, of.freedom, 0.0
    half = stats.t.isf(repeats.tail(1), freedom) * error
    return verdicts(change, half, edge, sure_of)


def of_each(record: Record) -> list[Record]:
    """A row per planted share: what it made of the time, and how often that is called a change."""
    x = {
        share: np.array([[p["log"], p["error"]] for p in part]).transpose(1, 0, 2)
        for share, part in _by_share(record).items()
    }
    luck = _luck(x[0.0])
    rows = []
    for share, after in x.items():
        rng = np.random.default_rng(0)
        row: Record = {"planted": share, "processes": after.shape[1], "called": {}}
        row["ratio"] = float(np.exp(after[0].mean() - x[0.0][0].mean()))
        row["needed"] = repeats.needed(luck, share) if share else None
        row["luck"] = luck
        for count in _RUNS:
            if count > x[0.0].shape[1] // (1 if share else 2) or count > after.shape[1]:
                continue
            orders = [rng.permuted(np.tile(np.arange(side.shape[1]), (_DRAWS, 1)), axis=1)
                      for side in (x[0.0], after)]  # fmt: skip
            first = orders[0][:, :count]
            second = orders[1][:, :count] if share else orders[0][:, count : 2 * count]
            said = called(x[0.0][:, first], after[:, second])
            alarms = said == SLOWER if share else (said == SLOWER) | (said == FASTER)
            row["called"][count] = float(alarms.mean())
        rows.append(row)
    return rows


def _by_share(record: Record) -> dict[float, list[Record]]:
    shares = sorted({process["planted"] for process in record["processes"]})
    found = {s: [p for p in record["processes"] if p["planted"] == s] for s in shares}
    if len(found.get(0.0, [])) < 2:
        raise runs.NoRuns("fewer than two undisturbed runs of the same code: nothing to draw from")
    return found


def _luck(same: np.ndarray) -> float:
    """Standard deviation of processes of the same code, as compare says it."""
    return float(stats.trim_mean(same[0], 0.1, axis=-1).std(ddof=1))


def as_table(record: Record, rows: Sequence[Record]) -> Table:
    """A row per planted share, of :func:`of_each`."""
    lines = []
    for row in rows:
        line: Line = {
            "planted": word(f"{row['planted']:.0%} more work" if row["planted"] else "nothing"),
            "time": word(f"{row['ratio']:.3f}×"),
            "recorded": word(counted(row["processes"], "run")),
        }
        for count in _RUNS:
            share = row["called"].get(count)
            line[f"{count} a side"] = Cell(NOTHING if share is None else f"{share:.1%}", share)
        asked = row["needed"] or f"over {repeats.MOST_REPEATS}"
        line["asked for"] = Cell(str(asked) if row["planted"] else NOTHING)
        lines.append(line)
    where = machines.label(record["machine"])
    what = f"{record['operation'].replace('_', ' ')}, {record['backend']}"
    lost = record["left_out"]
    left_out = f" {counted(lost, 'disturbed run')} left out." if lost else ""
    note = (
        f"{capital(what)}, forward, N = {', '.join(f'{n:,}' for n in record['tokens'])}, all "
        f"lengths together. Of {_DRAWS:,} draws of so many runs a side: how often compare calls "
        "the same code slower or faster (nothing planted), or more work slower. Draws share runs, "
        "so that these are rough where few were recorded. Time: over that of the same code. Asked "
        f"for: the runs a side that the luck of a process, {rows[0]['luck']:.1%} here, asks for to "
        f"see the change 9 times in 10. Recorded {record['created'][:10]}.{left_out}"
    )
    return Table(f"False alarms and power of compare; {where}", lines, note)


def to_csv(rows: Sequence[Record]) -> str:
    """A row per planted share."""
    return table.to_csv(
        [
            {name: row[name] for name in ("planted", "processes", "ratio", "needed", "luck")}
            | {f"called_of_{count}": row["called"].get(count) for count in _RUNS}
            for row in rows
        ]
    )
