"""How far a long job is: lines, and below them on a terminal a bar with the time left."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from linear_vit.screen import folded, say, shown, width


class Progress:
    """A bar with lines above it on a terminal, lines alone elsewhere.

    The bar is drawn when something is said and not in between: a thread that refreshes it would
    disturb what is timed.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        file: TextIO | None = None,
        write: Callable[[str, bool], None] | None = None,
        silent: bool = False,
    ) -> None:
        """``total`` units of work, of which ``done`` are done, shown on ``file`` (stdout).

        ``write`` shows a line, and whether it is bad news, where there is no terminal. ``silent``
        shows nothing: one process of several is enough to watch.
        """
        self._file = file or sys.stdout
        self._write = write or (lambda text, _bad: say(text, self._file))
        self._silent = silent
        self._bar = None if silent else _bar(self._file, title, total, done)
        self._total, self._from, self._started = total, done, time.monotonic()

    def line(self, text: str, *, red: bool = False) -> None:
        """Shows a line that stays; ``red`` where it is bad news."""
        if self._silent:
            return
        if self._bar is None:
            self._write(text, red)
        else:
            style = "red" if red else None
            text = folded(shown(text), self._bar.console.width)
            self._bar.console.print(text, style=style, markup=False, highlight=False)

    def move(self, done: int, note: str = "") -> None:
        """Moves the bar to ``done`` units; ``note`` stands beside it."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
            self._bar.refresh()

    def left_s(self, done: int) -> float:
        """Seconds that are left after ``done`` units, if the rest go as these did."""
        spent = time.monotonic() - self._started
        return spent / max(1, done - self._from) * (self._total - done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Countdown:
    """The progress of cases that were estimated to take so long each.

    The time left is what the cases to come are estimated to take, times what the finished ones took
    over their estimates.
    """

    def __init__(self, cases: Sequence[str], estimates_s: Mapping[str, float], writer: Any) -> None:
        """``writer``: pytest's terminal reporter, or None."""
        self._left = dict.fromkeys(cases)
        self._estimates = estimates_s
        self._total = len(cases)
        self._started = time.monotonic()
        self._estimated_done = 0.0
        terminal = getattr(getattr(writer, "_tw", None), "_file", None)

        def write(text: str, red: bool) -> None:
            writer.ensure_newline()
            writer.write_line(folded(text, width(elsewhere=0)), red=red)

        silent = writer is None
        self._progress = Progress("timing", self._total, file=terminal, write=write, silent=silent)

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
        self._progress.line(text, red=red)
        self._progress.move(count, f"{count} of {self._total}  {clock(left)} left")

    def line(self, text: str) -> None:
        """Shows a line that is of no case's end."""
        self._progress.line(text)

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
        self._progress.close()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(file: TextIO, title: str, total: int, done: int) -> Any:
    """rich's bar on a terminal; None elsewhere, and where there is no rich."""
    if not file.isatty():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(file=file, force_terminal=True),
        auto_refresh=False,
        transient=True,
    )
    bar.add_task(title, total=total, completed=done, note=f"of {total}")
    bar.start()
    return bar
