"""What a training step spends its time on, as a table; see training/breakdown.py for the record."""

import csv
import io

from linear_vit.reports.saved import machines
from linear_vit.reports.saved.records import Record
from linear_vit.reports.tables.table import Row, Table, columns, number, word
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
    names, rows = parts(found), []
    for row in found["rows"]:
        cells = [word(row["title"])]
        for name in names:
            share = row["shares"][name]
            cells.append(number(f"{share:.1%}", share, tip(row, name)))
        cells.append(number(duration(row["seconds"]), row["seconds"]))
        rate = row["images_per_second"]
        cells.append(number(f"{rate:,.0f}", rate, exact(rate, "images/s")))
        rows.append(Row(cells))
    titles = ["Model", *map(capital, names), "Step", "Images/s"]
    return Table(title(found), columns(titles, ["Model"]), rows, _NOTE)


def title(found: Record) -> str:
    s = found["setting"]
    recipe = f", recipe {s['recipe']}" if s.get("recipe") else ""
    return (
        f"Shares of a training step, {s.get('backend') or 'the fastest backend'}; {s['dataset']}, "
        f"dim {s['dim']}, depth {s['depth']}, batch {s['batch_size']}{recipe}, amp {s['amp']}; "
        f"{machines.label(found['environment'])}"
    )


def tip(row: Record, name: str) -> str:
    """The exact figures of a share."""
    share = row["shares"][name]
    milliseconds = exact(1e3 * share * row["seconds"])
    return f"{row['title']}, {name}\n{share:.2%} of a step, {milliseconds} ms"


def to_csv(found: Record) -> str:
    """One line per model: seconds, images/s and shares."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = parts(found)
    writer.writerow(["model", "seconds", "images_per_second", *names])
    for row in found["rows"]:
        shares = [row["shares"][name] for name in names]
        writer.writerow([row["model"], row["seconds"], row["images_per_second"], *shares])
    return text.getvalue()
