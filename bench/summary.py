"""The table a benchmark run ends with: backends side by side, one block per operation and pass."""

from dataclasses import dataclass
from typing import Any

from linear_vit.bench.tables import draw


@dataclass(frozen=True)
class Row:
    """One measured case: its extra_info and the median in seconds."""

    info: dict[str, Any]
    median: float

    def line(self) -> str:
        """What the progress shows."""
        i = self.info
        spread = f"{format_seconds(self.median):>8} ±{i['relative_iqr'] / 2:4.0%}"
        if "model" in i:
            return f"{i['operation']} {i['model']:15} {spread}  {i['images_per_s']:8.0f} images/s"
        what = f"{i['operation']} {i['pass']} {i['dtype']} N={i['N']} {i['backend']}"
        return f"{what:62} {spread}  {i['tflop_per_s'] * 1e3:7.1f} GFLOP/s"


def render(rows: list[Row], width: int, colour: bool) -> str:
    """Blocks of text, at most ``width`` columns wide where rich is there to fit them."""
    blocks = []
    kernels = [row for row in rows if "model" not in row.info]

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
    note = (
        "Median time per call, ± half the interquartile range of the rounds; * fastest. Of limit: "
        "the time that the measured copy or matmul rate allows for the least traffic or work, over "
        "the time taken.\n"
    )
    others = {r.info["backend"]: r.info.get("other_function") for r in kernels}
    note += "".join(
        f"† {name}: another function, {what}\n" for name, what in others.items() if what
    )
    return "".join(draw(*block, width, colour) for block in blocks) + note


def _title(info: dict[str, Any]) -> str:
    title = f"{info['operation']}, {info['pass']}, {info['dtype']}"
    total = info.get("total_tokens")
    return f"{title}, {total:,} tokens a call" if total else title


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
    table = []
    for tokens in sorted({row.info["N"] for row in rows}):
        at = {row.info["backend"]: row for row in rows if row.info["N"] == tokens}
        # What computes another function does not compete.
        alike = [r for r in at.values() if not r.info.get("other_function")] or [*at.values()]
        fastest = min(alike, key=lambda row: row.median)
        cells = [f"{tokens:,}"]
        for backend in backends:
            if backend not in at:
                cells.append("–")
                continue
            row = at[backend]
            mark = "*" if row is fastest and len(at) > 1 else " "
            mark = "†" if row.info.get("other_function") else mark
            half = row.info["relative_iqr"] / 2
            cells.append(f"{format_seconds(row.median)} ±{half:3.0%}{mark}")
        cells.append(f"{fastest.info['tflop_per_s'] * 1e3:.3g}")
        cells.append(f"{fastest.info['gb_per_s']:.3g}")
        cells.append(f"{fastest.info['share_of_limit']:.0%} {fastest.info['limit']}")
        table.append(cells)
    return title, ["N", *backends, "GFLOP/s*", "GB/s*", "of limit*"], table


def _training_block(rows: list[Row]) -> _Block:
    settings = rows[0].info["settings"]
    title = (
        f"training step: dim {settings['dim']}, depth {settings['depth']}, batch "
        f"{settings['batch_size']}, {settings['dataset']}, {rows[0].info['dtype']}"
    )
    baseline = {r.info["backend"]: r.median for r in rows if r.info["model"] == "baseline"}
    table = []
    for row in rows:
        backend = row.info["backend"]
        base = baseline.get(backend)
        table.append(
            [
                row.info["model_title"] + ("" if backend == "default" else f" ({backend})"),
                f"{format_seconds(row.median)} ±{row.info['relative_iqr'] / 2:3.0%}",
                f"{row.info['images_per_s']:,.0f}",
                f"{base / row.median:.2f}×" if base else "–",
            ]
        )
    return title, ["model", "time", "images/s", "over baseline"], table
