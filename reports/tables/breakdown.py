"""What a training step spends its time on, as a table; see training/breakdown.py for the record."""

from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.tables import table
from linear_vit.reports.tables.table import Line, Table, number, word
from linear_vit.reports.units import capital, duration, exact

_NOTE = (
    "Shares of one step, forward and backward together, not compiled. Projections are the linear "
    "layers around attention; other is norms, embedding, head, loss and clipping."
)


def parts(found: Record) -> list[str]:
    """What a step is divided into, in the record's order."""
    return list(dict.fromkeys(name for row in found["rows"] for name in row["shares"]))


def as_table(found: Record) -> Table:
    """A row per model, shares in percent."""
    s = found["setting"]
    recipe = f", recipe {s['recipe']}" if s.get("recipe") else ""
    title = (
        f"Shares of a training step, {s.get('backend') or 'the fastest backend'}; {s['dataset']}, "
        f"dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}{recipe}, amp {s['amp']}; "
        f"{machines.label(found['environment'])}"
    )
    return Table(title, [_line(row, parts(found)) for row in found["rows"]], _NOTE)


def _line(row: Record, names: list[str]) -> Line:
    return {
        "Model": word(row["title"]),
        **{capital(n): number(row["shares"][n], "{:.1%}", tip(row, n)) for n in names},
        "Step": number(row["seconds"], duration),
        "Images/s": number(row["images_per_second"], "{:,.0f}"),
    }


def tip(row: Record, name: str) -> str:
    """The exact figures of a share."""
    share = row["shares"][name]
    milliseconds = exact(1e3 * share * row["seconds"])
    return f"{row['title']}, {name}\n{share:.2%} of a step, {milliseconds} ms"


def to_csv(found: Record) -> str:
    """One line per model: seconds, images/s and shares."""
    plain, names = ("model", "seconds", "images_per_second"), parts(found)
    return table.to_csv(
        [
            {name: row[name] for name in plain} | {name: row["shares"][name] for name in names}
            for row in found["rows"]
        ]
    )
