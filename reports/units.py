"""Numbers as a reader sees them: with the unit that suits, and the digits that mean something."""


def short_number(value: float) -> str:
    """1024 as 1k, as token counts are written."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def seconds(value: float) -> str:
    """A round number of an axis: 10 ms."""
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
            amount = value / size
            return f"{amount:.0f} {unit}" if amount >= 999.5 else f"{amount:.3g} {unit}"
    return f"{value * 2**20:.0f} B"


def factor(value: float) -> str:
    return f"{value:g}×"


def rate(value: float) -> str:
    """Of GFLOP/s or GB/s."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def exact(value: float, unit: str = "") -> str:
    """Six significant digits, for a tooltip."""
    return f"{value:,.6g} {unit}".rstrip()


def capital(text: str) -> str:
    """The text as a sentence begins; the rest of it keeps its case."""
    return text[:1].upper() + text[1:]
