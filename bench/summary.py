"""The table a benchmark run ends with: backends side by side, one block per operation and pass."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linear_vit import screen
from linear_vit.bench.tables import draw

# Of a case that does not say more.
_BEATEN = "above the limit: its data were in a cache, or it does less than the work that is counted"


@dataclass(frozen=True)
class Row:
    """One measured case: its extra_info and the median in seconds."""

    info: dict[str, Any]
    median: float

    @property
    def name(self) -> str:
        i = self.info
        if "model" in i:
            return f"{i['model']} {i['backend']}"
        if "whole_model" in i:
            return f"{i['whole_model']} {i['attention']} {i['resolution']} {i['pass']}"
        if "processes" in i:
            return f"{i['pass']} {i['dtype']} N={i['N']} {_over(i)}"
        return f"{i['operation']} {i['pass']} {i['dtype']} N={i['N']} {i['backend']}"

    @property
    def competes(self) -> bool:
        """Whether it may be the fastest: of the function that is asked for, and undisturbed."""
        return not (self.info.get("other_function") or self.info.get("disturbed"))

    @property
    def time(self) -> str:
        """With its spread, and a mark where a note below says more."""
        marks = (("other_function", "†"), ("disturbed", "‡"))
        said = "".join(mark for name, mark in marks if self.info.get(name))
        return f"{said}{format_seconds(self.median)} ±{self.info['relative_iqr'] / 2:.0%}"

    def line(self) -> str:
        """What the progress shows."""
        i = self.info
        spread = f"{format_seconds(self.median):>8} ±{i['relative_iqr'] / 2:4.0%}"
        if "model" in i:
            return f"{i['operation']} {i['model']:15} {spread}  {i['images_per_s']:8.0f} images/s"
        if "whole_model" in i:
            return f"{self.name:62} {spread}  {i['images_per_s']:7.1f} images/s"
        if "processes" in i:
            return f"{self.name:62} {spread}  {i['sent_bytes'] / 2**20:7.1f} MiB sent"
        return f"{self.name:62} {spread}  {i['tflop_per_s'] * 1e3:7.1f} GFLOP/s"


def render(rows: list[Row], width: int, colour: bool) -> str:
    """Blocks of text, at most ``width`` columns wide."""
    blocks = []
    apart = {"model", "whole_model", "processes"}
    kernels = [row for row in rows if not apart & set(row.info)]

    plain = [_title(row.info) for row in kernels]
    settings: dict[str, set[str]] = {}
    for title, row in zip(plain, kernels, strict=True):
        settings.setdefault(title, set()).add(_setting(row.info))
    # Batches, heads and graphs have tables of their own, where there are several.
    titles = [
        f"{title}, {_setting(row.info)}" if len(settings[title]) > 1 else title
        for title, row in zip(plain, kernels, strict=True)
    ]
    for title in dict.fromkeys(titles):
        block = [row for row, its in zip(kernels, titles, strict=True) if its == title]
        blocks.append(_kernel_block(title, block))
    steps = [row for row in rows if "model" in row.info]
    if steps:
        blocks.append(_training_block(steps))
    whole = [row for row in rows if "whole_model" in row.info]
    titles = [_model_title(row.info) for row in whole]
    for title in dict.fromkeys(titles):
        block = [row for row, its in zip(whole, titles, strict=True) if its == title]
        blocks.append(_model_block(title, block))
    over = [row for row in rows if "processes" in row.info]
    titles = [f"attention over processes, {r.info['pass']}, {r.info['dtype']}" for r in over]
    for title in dict.fromkeys(titles):
        block = [row for row, its in zip(over, titles, strict=True) if its == title]
        blocks.append(
            _side_by_side(title, block, "N", lambda row: row.info["N"], lambda row: _over(row.info))
        )
    notes = ["Median time per call, ± half the interquartile range of the rounds; * fastest."]
    if kernels:
        notes[0] += (
            " Of limit: the time that the measured copy or matmul rate allows for the least "
            "traffic or work, over the time taken."
        )
    beaten = [r.info.get("limit_note") for r in kernels if (r.info.get("share_of_limit") or 0) > 1]
    notes += [f"§ {why or _BEATEN}" for why in dict.fromkeys(beaten)]
    others = {r.info["backend"]: r.info.get("other_function") for r in kernels}
    notes += [f"† {name}: another function, {what}" for name, what in others.items() if what]
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.info.get("disturbed"):
            by_reason.setdefault(row.info["disturbed"], []).append(row.name)
    differences = [r.info["second_clock"]["difference"] for r in rows if r.info.get("second_clock")]
    if differences:
        notes.append(
            f"By a second clock (CUPTI) of {len(differences)} of the cases: events show "
            f"{statistics.median(differences):+.1%} in the median, {min(differences):+.1%} to "
            f"{max(differences):+.1%}."
        )
    for why, names in by_reason.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        notes.append(f"‡ disturbed, so compared with nothing: {names[0]}{more}: {why}")
    drawn = "".join(draw(*block, width, colour) for block in blocks)
    return drawn + "".join(f"{screen.prose(note, width)}\n" for note in notes)


def _title(info: dict[str, Any]) -> str:
    title = f"{info['operation']}, {info['pass']}, {info['dtype']}"
    total = info.get("total_tokens")
    return f"{title}, {screen.counted(total, 'token')} a call" if total else title


def _setting(info: dict[str, Any]) -> str:
    """What apart from its length tells a case from others of its table."""
    length = {"N", "M", "rows", "cols", *(("B",) if info.get("total_tokens") else ())}
    sizes = [f"{name}={value}" for name, value in info["shape"].items() if name not in length]
    return " ".join([*sizes, *(["replayed"] if info.get("captured") else [])])


def format_seconds(seconds: float) -> str:
    """Three significant digits with the unit that suits: 1.23 ms."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e9:.0f} ns"


_Block = tuple[str, list[str], list[list[str]]]


def _kernel_block(title: str, rows: list[Row]) -> _Block:
    backends = list(dict.fromkeys(row.info["backend"] for row in rows))
    on_device = any(row.info.get("host_s") for row in rows)
    table = []
    for tokens in sorted({row.info["N"] for row in rows}):
        at = {row.info["backend"]: row for row in rows if row.info["N"] == tokens}
        # What computes another function, or was disturbed, does not compete.
        alike = [row for row in at.values() if row.competes]
        fastest = min(alike, key=lambda row: row.median, default=None)
        cells = [f"{tokens:,}"]
        for backend in backends:
            row = at.get(backend)
            mark = "*" if row is fastest and len(alike) > 1 else ""
            cells.append(mark + row.time if row else "–")
        table.append([*cells, *_rates(fastest), *([_host(fastest)] if on_device else [])])
    host = ["host*"] if on_device else []
    return title, ["N", *backends, "GFLOP/s*", "GB/s*", "of limit*", *host], table


def _rates(fastest: Row | None) -> list[str]:
    """What the fastest of a length reaches."""
    if fastest is None:
        return ["–"] * 3
    i, share = fastest.info, fastest.info.get("share_of_limit")
    of_limit = "–" if share is None else f"{'§' * (share > 1)}{share:.0%} {i['limit']}"
    return [f"{i['tflop_per_s'] * 1e3:.3g}", f"{i['gb_per_s']:.3g}", of_limit]


def _host(fastest: Row | None) -> str:
    """What the host takes to enqueue the fastest of a length: no eager call takes less."""
    seconds = fastest.info.get("host_s") if fastest else None
    return format_seconds(seconds) if seconds else "–"


def _training_block(rows: list[Row]) -> _Block:
    settings = rows[0].info["settings"]
    title = (
        f"training step: dim {settings['dim']}, depth {settings['depth']}, batch "
        f"{settings['batch_size']}, {settings['dataset']}, {rows[0].info['dtype']}"
    )
    baseline = {
        r.info["backend"]: r.median for r in rows if r.info["model"] == "baseline" and r.competes
    }
    table = []
    for row in rows:
        backend = row.info["backend"]
        base = baseline.get(backend) if row.competes else None
        table.append(
            [
                row.info["model_title"] + ("" if backend == "default" else f" ({backend})"),
                row.time,
                f"{row.info['images_per_s']:,.0f}",
                f"{base / row.median:.2f}×" if base else "–",
            ]
        )
    return title, ["model", "time", "images/s", "over baseline"], table


def _model_title(info: dict[str, Any]) -> str:
    return f"{info['whole_model']}, {info['pass']}, batch {info['batch']}, {info['dtype']}"


def _model_block(title: str, rows: list[Row]) -> _Block:
    """A line per resolution, a column per attention."""

    def column(row: Row) -> str:
        backend = row.info["backend"]
        return row.info["attention"] + ("" if backend == "default" else f" ({backend})")

    return _side_by_side(title, rows, "side", lambda row: row.info["resolution"], column)


def _over(info: dict[str, Any]) -> str:
    return f"{info['backend']}, {screen.counted(info['processes'], 'process')}"


def _side_by_side(
    title: str, rows: list[Row], head: str, size: Callable[[Row], int], column: Callable[[Row], str]
) -> _Block:
    """A line per size, and how many tokens that is; a column for each kind of case."""
    columns = list(dict.fromkeys(map(column, rows)))
    with_tokens = [] if head == "N" else ["N"]
    table = []
    for at_size in sorted({size(row) for row in rows}):
        at = {column(row): row for row in rows if size(row) == at_size}
        able = [row for row in at.values() if row.competes]
        fastest = min(able, key=lambda row: row.median, default=None)
        marks = {name: "*" if row is fastest and len(able) > 1 else "" for name, row in at.items()}
        cells = [marks[name] + at[name].time if name in at else "–" for name in columns]
        tokens = next(iter(at.values())).info.get("N")
        more = [f"{tokens:,}" if tokens else "–"] if with_tokens else []
        table.append([f"{at_size:,}", *more, *cells])
    return title, [head, *with_tokens, *columns], table
