"""What a training run keeps and shows: record, checkpoints, curves, progress, and the way back."""

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit.bench.instruments.memory import is_out_of_memory
from linear_vit.bench.progress import Progress, clock
from linear_vit.screen import counted, shown
from linear_vit.training import board, distributed
from linear_vit.training.checkpoints import (
    check_classes,
    load_for_resume,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from linear_vit.training.clock import StepClock, median_images_per_second
from linear_vit.training.config import DATASETS, RECIPES, Config
from linear_vit.training.data.datasets import Dataset
from linear_vit.training.data.loader import Loader
from linear_vit.training.errors import UserError, first_line
from linear_vit.training.finetune import Start
from linear_vit.training.fsdp import cut_optimizer_state, whole
from linear_vit.training.metrics import accuracy
from linear_vit.training.record import (
    check_writable,
    lock,
    new_record,
    remove_leftovers,
    unlock,
    write_json,
)

WARMUP_STEPS = 5  # steps left out of images/s: they allocate, compile and fill caches
# What of the record a checkpoint takes along.
_PROGRESS = ("started", "resumed", "epochs", "best_epoch", "seconds", "peak_memory", "init_from")


class Logbook:
    """Keeps one run in its folder, as a context around the training loop.

    ``steps`` gives the loop its batches; ``step`` is told of each step, ``epoch`` of the validation
    images after each epoch, ``finish`` of the test images. What ends the loop otherwise is recorded
    and raised. Of several processes, the first alone writes and shows.

    Attributes:
        done: steps done; of a resumed run, those before it too.
        best, last: the checkpoints of the best epoch, and of the last one or whatever came later.
        record: what run.json holds.
        writes: whether this is the process that writes.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        data: Dataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        *,
        checkpoint_every: int = 0,
    ) -> None:
        """last.pt is written after every epoch, and after every ``checkpoint_every`` steps if that
        is not 0. Raises UserError where files can't be written."""
        self.config, self.data, self.checkpoint_every = config, data, checkpoint_every
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.run, self.best, self.last = out / "run.json", out / "best.pt", out / "last.pt"
        self._title = f"{config.dataset} {config.model}"
        self.device = next(model.parameters()).device
        self.writes = distributed.rank() == 0
        if self.writes:
            check_writable(out)
            self._unlock = weakref.finalize(self, unlock, lock(out))
            remove_leftovers(out)
        parameters = sum(p.numel() for p in model.parameters())
        self.record = new_record(config, self.device, parameters, data.info)
        self.history: dict[str, list[float]] = {
            name: [] for name in ("loss", "hits", "seconds", "images")
        }
        self.done = 0
        self._checkpoint: str | None = None  # what to go back to

    def take_up(self) -> None:
        """Puts back all of last.pt's state, if there is one; UserError where it is of another
        configuration."""
        if not self.last.exists():
            return
        saved = load_for_resume(self.last, self.config)
        check_classes(saved, self.data.class_names, self.last)
        load_weights(self.model, saved, self.last)
        self.optimizer.load_state_dict(cut_optimizer_state(self.optimizer, saved["optimizer"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if len(saved["rng"]) == distributed.world():  # else other dropout, of the same rate
            set_rng_state(saved["rng"][distributed.rank()], self.device)
        self.history = {name: values.tolist() for name, values in saved["history"].items()}
        self.done = saved["step"]
        self.record |= saved["progress"]
        self.record["resumed"] += 1
        self._checkpoint = f"{self.last} (step {self.done})"

    def began(self, start: Start, predictions: Tensor) -> None:
        """Record what the run began with: what is predicted of the validation images there."""
        val_accuracy = accuracy(predictions.cpu(), self.data.val.labels)
        self.record["init_from"] = start.facts(val_accuracy)
        self._title += f" from {start.config.model}"

    def __enter__(self) -> "Logbook":
        self._board: board.Board | None = None
        if self.writes:
            epochs_done = len(self.record["epochs"])
            self._board = board.open_board(self.run.parent, epochs_done=epochs_done)
        # A pass of one process through a model that several share would wait for the others.
        if self._board is not None and self.done == 0 and not distributed.share_a_model():
            self._board.add_graph(self.model, tuple(self.data.train.images.shape[1:]))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._begin = time.perf_counter() - self.record["seconds"]
        self._progress: Progress | None = None
        return self

    def steps(self, loader: Loader) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step, images, targets) of every step that is left; times them from here to ``step``."""
        self._loader = loader
        self._progress = Progress(self._title, loader.steps, done=self.done, silent=not self.writes)
        # Reading the loss waits for the device, and for other processes, so not at every step.
        alone = self.device.type == "cpu" and distributed.world() == 1
        self._read_every = 10 if alone else 50
        self._clock, self._unread = StepClock(self.device), list[Tensor]()
        batches = iter(loader)
        for step in range(self.done, loader.steps):
            self._clock.start()
            images, targets = next(batches)
            yield step, images, targets

    @property
    def epoch_ends(self) -> bool:
        """Whether the step just done was the last of an epoch."""
        return self.done % self._loader.steps_per_epoch == 0

    def step(self, loss: Tensor, hits: Tensor, lr: float) -> None:
        """A step is done: its loss and hits, on the device, and its learning rate."""
        self._clock.stop()
        self._unread.append(torch.stack([loss.double(), hits.double()]))
        self.done += 1
        saves = self.checkpoint_every > 0 and self.done % self.checkpoint_every == 0
        if self.epoch_ends or saves or len(self._unread) == self._read_every:
            self._read(lr)
        if saves and not self.epoch_ends:
            self._save(self.last)

    def _read(self, lr: float) -> None:
        """Reads the losses since the last reading; UserError where one is no number."""
        losses, hits = distributed.total(torch.stack(self._unread, dim=1)).tolist()
        first = self.done - len(losses)
        self.history["loss"] += losses
        self.history["hits"] += hits
        self.history["seconds"] += self._clock.seconds()
        self.history["images"] += [self._loader.batch_size(s) for s in range(first, self.done)]
        self._clock, self._unread = StepClock(self.device), []
        check_finite(losses, first_step=first, lr=lr, checkpoint=self._checkpoint)
        whole = self._loader.steps_per_epoch
        self._epoch = (self.done - 1) // whole + 1
        of_epoch = {name: v[(self._epoch - 1) * whole :] for name, v in self.history.items()}
        skip = WARMUP_STEPS if self._epoch == 1 else 0
        speed = median_images_per_second(of_epoch["seconds"], of_epoch["images"], skip=skip)
        self._summary = {
            "epoch": self._epoch,
            "lr": lr,
            "loss": sum(of_epoch["loss"]) / len(of_epoch["loss"]),
            "train_accuracy": sum(of_epoch["hits"]) / sum(of_epoch["images"]),
            "images_per_second": speed,
            "images": sum(of_epoch["images"]),
            "seconds": sum(of_epoch["seconds"]),
        }
        if self._progress is not None:
            left = clock(self._progress.left_s(self.done))
            self._progress.move(self.done, f"{self._shown(self._summary)}  {left} left")

    def epoch(self, predictions: Tensor) -> None:
        """An epoch is done: what is predicted of the validation images."""
        val = self.data.val
        entry = self._summary | {"val_accuracy": accuracy(predictions.cpu(), val.labels)}
        before = [other["val_accuracy"] for other in self.record["epochs"]]
        self.record["epochs"].append(entry)
        if self._progress is not None:
            of = f"{self._title}  epoch {self._epoch:3d}/{self.config.epochs}"
            self._progress.line(f"{of}  {self._shown(entry)}")
        if self._board is not None:
            self._board.add_curves(entry)
            if self._epoch in (1, self.config.epochs):
                pictures = val.images[:16], val.labels[:16], predictions[:16]
                names, info = self.data.class_names, self.data.info
                self._board.add_predictions(*pictures, names, info, self._epoch)
        if entry["val_accuracy"] > max(before, default=-1.0):
            self.record["best_epoch"] = self._epoch
            self._save(self.best, self.last)
        else:
            self._save(self.last)

    def _shown(self, entry: dict[str, Any]) -> str:
        train = "train (λ-weighted)" if RECIPES[self.config.recipe].mixes else "train"
        val = f"val {entry['val_accuracy']:6.1%}  " if "val_accuracy" in entry else ""
        return (
            f"loss {entry['loss']:.3f}  {train} {entry['train_accuracy']:6.1%}  {val}"
            f"{entry['images_per_second']:,.0f} images/s"
        )

    def _save(self, *paths: Path) -> None:
        """Writes checkpoints and record; every process has to be there."""
        self.record["seconds"] = time.perf_counter() - self._begin
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.record["peak_memory"] = max(peak, self.record["peak_memory"] or 0)
        state = {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "step": self.done,
            "epoch": self.done // self._loader.steps_per_epoch,
            "classes": self.data.class_names,
            "rng": distributed.gather(rng_state(self.device)),
            "history": {
                name: torch.tensor(values, dtype=torch.float64)
                for name, values in self.history.items()
            },
            "progress": {name: self.record[name] for name in _PROGRESS if name in self.record},
        }
        if self.writes:
            for path in paths:
                save_checkpoint(path, self.config, **state)
            write_json(self.run, self.record)
        self._checkpoint = f"{self.last} (step {self.done})"

    def finish(self, predictions: Tensor) -> None:
        """The run is over: what the best weights predict of the test images."""
        self.record["images_per_second"] = median_images_per_second(
            self.history["seconds"], self.history["images"], skip=WARMUP_STEPS
        )
        self.record["test_accuracy"] = accuracy(predictions.cpu(), self.data.test.labels)
        self.record["seconds"] = time.perf_counter() - self._begin
        self.record["status"] = "finished"
        write_json(self.run, self.record)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._board is not None:
            self._board.close()
        failure = error and self._record_failure(error)
        if self.writes:
            self._unlock()
        if failure is not error and failure is not None:
            raise failure from error

    def _record_failure(self, error: BaseException) -> BaseException:
        """Records what ended the loop; returns what says it best."""
        failure = out_of_memory(error, self.config) or distributed.unanswered(error) or error
        stopped = isinstance(failure, KeyboardInterrupt)
        self.record["status"] = "interrupted" if stopped else "failed"
        self.record["error"] = shown(str(failure)) or type(failure).__name__
        if self.writes:
            with suppress(UserError):  # a full disk, say: what went wrong first is what counts
                write_json(self.run, self.record)
        return failure


def check_finite(
    losses: list[float], *, first_step: int, lr: float, checkpoint: str | None
) -> None:
    """Stops a run whose loss is no longer a number, naming the step and what to go back to."""
    for step, loss in enumerate(losses, first_step + 1):
        if not math.isfinite(loss):
            back = "there is no checkpoint yet"
            if checkpoint is not None:
                back = f"the last good checkpoint is {checkpoint}"
            raise UserError(
                f"the loss or its gradient became {loss} at step {step} (learning rate {lr:.2g}): "
                f"training stopped; {back}; try a smaller --lr"
            )


def out_of_memory(error: BaseException, config: Config) -> UserError | None:
    """What to do where memory ran out; None for any other error."""
    if not is_out_of_memory(error):
        return None
    size = DATASETS[config.dataset].image_size
    smaller = max(1, config.batch_size // 2)
    return UserError(
        f"out of memory: a batch of {counted(config.batch_size, 'image')} of {size}x{size} did not "
        f"fit with the {config.model} model of dim {config.dim}, depth {config.depth} and "
        f"{counted(config.heads, 'head')} ({first_line(error):.120}); try --batch_size {smaller}, "
        f"or --accumulate {2 * config.accumulate}, which keeps the batch and its result"
    )
