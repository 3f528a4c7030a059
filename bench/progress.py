"""How far a benchmark run is: a bar with the time left on a terminal, a line per case elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any


class Progress:
    """Lines of finished cases, and below them the bar where there is a terminal.

    The time left is what the cases to come are estimated to take, times what the finished ones took
    over their estimates.
    """

    def __init__(self, cases: Sequence[str], estimates_s: Mapping[str, float], writer: Any) -> None:
        """``writer``: pytest's terminal reporter, or None."""
        self._left = dict.fromkeys(cases)
        self._estimates = estimates_s
        self._total = len(cases)
        self._writer = writer
        self._started = time.monotonic()
        self._estimated_done = 0.0
        self._bar = _bar(writer, self._total)

    def skip(self, case: str) -> None:
        """The case takes no time: its result was there already."""
        self._estimates = {**self._estimates, case: 0.0}

    def done(self, case: str, line: str, *, red: bool = False) -> None:
        if self._left.pop(case, 0) is None:
            self._estimated_done += self._estimates.get(case, 0.0)
        spent, left = self.times()
        count = self._total - len(self._left)
        remaining = f", {clock(left)} left" if self._left else ""
        text = f"[{count:>{len(str(self._total))}}/{self._total} {clock(spent)}{remaining}] {line}"
        if self._bar is not None:
            self._bar.update(text, count, left, red=red)
        elif self._writer is not None:
            self._writer.ensure_newline()
            self._writer.write_line(text, red=red)

    def times(self) -> tuple[float, float]:
        """Seconds spent, and seconds left."""
        spent = time.monotonic() - self._started
        rate = spent / self._estimated_done if self._estimated_done else 1.0
        return spent, rate * sum(self._estimates.get(case, 0.0) for case in self._left)

    @property
    def finished(self) -> bool:
        """Whether no case is left."""
        return not self._left

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Bar:
    """rich's bar, drawn only between cases: a thread that refreshes it would disturb the timing."""

    def __init__(self, file: Any, total: int) -> None:
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn("timing"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[left]}"),
            console=Console(file=file, force_terminal=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, left="")
        self._progress.start()

    def update(self, line: str, count: int, left: float, *, red: bool) -> None:
        style = "red" if red else None
        self._progress.console.print(line, style=style, markup=False, highlight=False)
        self._progress.update(self._task, completed=count, left=f"{clock(left)} left")
        self._progress.refresh()

    def close(self) -> None:
        self._progress.stop()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(writer: Any, total: int) -> _Bar | None:
    terminal = getattr(writer, "_tw", None)
    file = getattr(terminal, "_file", None)
    if file is None or not file.isatty():
        return None
    try:
        return _Bar(file, total)
    except ImportError:
        return None
