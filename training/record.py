"""Run records: one JSON file per run, all that tables and plots read.

``run.json``::

    schema        "linear-vit-run/2"
    status        "running", "finished", "interrupted" (by Ctrl-C) or "failed" (``error`` says why)
    config        every field of training.config.Config
    model         key of training.config.MODELS;  parameters: their number
    model_title, dataset_title  their names in full (in records since these fields are)
    dataset_subset  true where not all classes of the data set were there; its title says which part
    backend       of the attention's kernels: what runs, asked for or not (not in older ones)
    environment   as bench.instruments.machine describes it, with device ("cpu" or the GPU's
                  name), processes, sequence_parallel (how many of them share their images), fsdp
                  (whether they share weights; neither is in older ones) and revision (older: cores
                  of all the machine, platform)
    started       ISO time, UTC;  resumed: how often the run was taken up again
    init_from     of a run that began with another's weights: {checkpoint, model, model_title,
                  config, val_accuracy}, the last right after the swap; else not there
    train_accuracy_is  "plain", or "lambda-weighted" where the recipe mixes images: an image of two
                  labels counts by the weight of the predicted one. For watching, not for comparing
    epochs        list of {epoch, lr, loss, train_accuracy, val_accuracy, images, seconds,
                  images_per_second}; accuracies in [0, 1]; images trained on; seconds (their sum)
                  and images/s (of the median) of the training steps, waiting for the loader
                  included, evaluation apart
    images_per_second  median over the steps of the run, its first steps left out
    best_epoch    the epoch of the best validation accuracy, whose weights are tested
    test_accuracy of those weights, on the test set, read once, at the end
    peak_memory   most bytes that tensors took on a CUDA device; null on a CPU
    seconds       from the first step to the end, everything included; what a killed run did after
                  its last checkpoint is not counted
"""

import dataclasses
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels
from linear_vit.bench.instruments import machine
from linear_vit.training import distributed
from linear_vit.training.config import DATASETS, MODELS, RECIPES, Config, DatasetInfo
from linear_vit.training.errors import UserError

SCHEMA = "linear-vit-run/2"
# Speeds compare where these facts of the environment are equal.
MACHINE = ("device", "cpu", "torch", "threads", "processes")


# Each is told of a file that is there, whole: of a folder that is a copy of one elsewhere, say.
followers: list[Callable[[Path], None]] = []


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it on success and vanishes on failure."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # before the name: not even a power cut leaves half a file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    for follow in followers:
        follow(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; UserError where that is not possible."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically. NaN has no place in JSON and raises ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def check_writable(folder: Path) -> None:
    """Raises UserError now, not after an hour, if files can't be written to ``folder``."""
    write_text(folder / ".writable", "")
    (folder / ".writable").unlink()


class InUse(UserError):
    """Another process is training in a folder."""


def lock(folder: Path) -> int:
    """Keeps other processes from training in a folder, until this descriptor is closed or the
    process ends, however that happens; InUse where another process has it."""
    try:  # NFS, where other machines are to see it, locks no folder, and no file that is only read
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # nothing can be written there, so that nobody trains
        descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        unlock(descriptor)
        raise InUse(
            f"another process is training in {folder}: wait for it, or choose another --out"
        ) from error
    except OSError:
        pass  # a file system without locks
    return descriptor


def unlock(descriptor: int) -> None:
    """Lets other processes train in the folder again."""
    _locks.discard(descriptor)
    os.close(descriptor)


# A loader's workers, born by fork, would keep the folder for a while after its process was killed.
_locks: set[int] = set()
os.register_at_fork(after_in_child=lambda: list(map(unlock, tuple(_locks))))


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of a run that was killed while it wrote."""
    for name in ("last.pt", "best.pt", "run.json"):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def read_runs(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Every run record below ``folder``, and one line for each file that could not be used."""
    records: dict[Path, dict[str, Any]] = {}
    skipped: list[str] = []
    for path in sorted(folder.rglob("run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                found = record.get("schema") if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"schema {found!r}, expected {SCHEMA!r}")
            missing = {"status", "config", "environment", "model", "epochs"} - set(record)
            if missing:
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except (OSError, ValueError) as error:
            skipped.append(f"skipped {path}: {error}")
        else:
            records[path] = record
    return records, skipped


def finished_record(
    out: Path, config: Config, title: str | None = None, *, init_from: Path | None = None
) -> dict[str, Any] | None:
    """The record of a finished run of just this configuration, if ``out`` holds one.

    With a ``title``, of that data set or part of one; with ``init_from``, one that began there.
    """
    for run in read_runs(out)[0].values():
        of = run.get("dataset_title", title)
        same = run["config"] == dataclasses.asdict(config) and title in (None, of)
        began = run.get("init_from", {}).get("checkpoint")
        same = same and init_from in (None, began and Path(began))
        if run["status"] == "finished" and same:
            return run
    return None


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run happens, as a benchmark describes it; ``device`` is "cpu" or the GPU's name."""
    facts = machine.describe(device)
    return {
        **facts,
        "device": facts["device_name"] if device.type == "cuda" else "cpu",
        "processes": distributed.world(),
        "sequence_parallel": distributed.sequence_parallel(),
        "fsdp": distributed.uses_fsdp(),
        "revision": facts["git"],
    }


def same_machine(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether speeds of two environments may be compared."""
    alike = all(one.get(key) == other.get(key) for key in MACHINE)
    alone = {"sequence_parallel": 1, "fsdp": False}
    return alike and all(one.get(key, x) == other.get(key, x) for key, x in alone.items())


def new_record(
    config: Config, device: torch.device, parameters: int, info: DatasetInfo | None = None
) -> dict[str, Any]:
    """The record of a run that begins; ``info`` is of the data as they are there."""
    whole = DATASETS[config.dataset]
    info, operation = info or whole, MODELS[config.model].operation
    return {
        "schema": SCHEMA,
        "status": "running",
        "config": dataclasses.asdict(config),
        "model": config.model,
        "model_title": MODELS[config.model].title,
        "dataset_title": info.title,
        "dataset_subset": info.classes < whole.classes,
        "backend": config.backend or kernels.default_backend(operation, device),
        "parameters": parameters,
        "environment": environment(device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": 0,
        "train_accuracy_is": "lambda-weighted" if RECIPES[config.recipe].mixes else "plain",
        "epochs": [],
        "seconds": 0.0,
        "peak_memory": None,
    }


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(
        f"cannot write {path}: {reason}; what was there before is unchanged; "
        "make room or choose another folder with --out"
    )
