"""What a training run shows while it works: a live bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A line per epoch on stdout; above it, where rich and a terminal are there, a live bar.

    ``silent`` shows nothing: one process of several is enough to watch. ``accuracy`` is what the
    training accuracy is called ("train", or "train (λ-weighted)" of mixed images).
    """

    def __init__(
        self,
        title: str,
        epochs: int,
        steps_per_epoch: int,
        *,
        start: int = 0,
        accuracy: str = "train",
        silent: bool = False,
    ) -> None:
        self.title = title
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.start = start
        self.accuracy = accuracy
        self.silent = silent
        self.bar: Any = None
        self.task: Any = None
        if sys.stdout.isatty() and not silent:
            try:
                from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                transient=True,
            )

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            total = self.epochs * self.steps_per_epoch
            self.task = self.bar.add_task(
                self.title, total=total, completed=self.start, note=f"of {total} steps"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def steps(self, done: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Moves the bar to ``done`` steps of the run; the values are of the last few."""
        if self.bar is not None:
            note = f"loss {loss:.3f}  {self.accuracy} {accuracy:6.1%}  "
            note += f"{images_per_second:,.0f} images/s"
            self.bar.update(self.task, completed=done, note=note)

    def epoch(self, values: dict[str, Any]) -> None:
        """Shows an entry of a run record's ``epochs``."""
        if self.silent:
            return
        note = (
            f"loss {values['loss']:.3f}  {self.accuracy} {values['train_accuracy']:6.1%}  "
            f"val {values['val_accuracy']:6.1%}  {values['images_per_second']:,.0f} images/s"
        )
        line = f"{self.title}  epoch {values['epoch']:3d}/{self.epochs}  {note}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)
