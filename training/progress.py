"""What a training run shows while it works: a live bar on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A line per epoch on stdout; above it, where rich and a terminal are there, a live bar."""

    def __init__(self, title: str, epochs: int, steps_per_epoch: int) -> None:
        self.title = title
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.bar: Any = None
        self.task: Any = None
        if sys.stdout.isatty():
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
            self.task = self.bar.add_task(self.title, total=total, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.advance(self.task)

    def epoch(self, values: dict[str, Any]) -> None:
        """Shows an entry of a run record's ``epochs``."""
        note = (
            f"loss {values['loss']:.3f}  train {values['train_accuracy']:6.1%}  "
            f"val {values['val_accuracy']:6.1%}  {values['images_per_second']:,.0f} images/s"
        )
        number = f"epoch {values['epoch']:3d}/{self.epochs}"
        if self.bar is not None:
            self.bar.update(self.task, note=note)
            self.bar.console.print(f"{self.title}  {number}  {note}", highlight=False)
        else:
            print(f"{self.title}  {number}  {note}", flush=True)
