"""Run records: one JSON file per run, all that tables and plots read.

``run.json``::

    schema        "linear-vit-run/2"
    status        "running", "finished", "interrupted" (by Ctrl-C) or "failed" (``error`` says why)
    config        every field of training.config.Config
    model         key of training.config.MODELS;  parameters: their number
    environment   torch, python, device, cpu, cores, threads, processes, platform, revision
    started       ISO time, UTC;  resumed: how often the run was taken up again
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

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linear_vit.training import distributed
from linear_vit.training.errors import UserError

SCHEMA = "linear-vit-run/2"
# Speeds compare where these facts of the environment are equal.
MACHINE = ("device", "cpu", "torch", "threads", "processes")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it on success and vanishes on failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner reads
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # before the name: not even a power cut leaves half a file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


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


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files of a run that was killed while it wrote."""
    for name in ("last.pt", "best.pt", "run.json"):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def read_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every run record below ``folder``, and one line for each file that could not be used."""
    fields = {"status", "config", "environment", "model", "epochs"}
    return read_records(folder.rglob("run.json"), SCHEMA, fields)


def read_records(
    paths: Iterable[Path], schema: str, fields: set[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The JSON records of a schema with all its fields, and one line for each file that is none."""
    records: list[dict[str, Any]] = []
    skipped: list[str] = []
    for path in sorted(paths):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("schema") != schema:
                found = record.get("schema") if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"schema {found!r}, expected {schema!r}")
            missing = fields - set(record)
            if missing:
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except (OSError, ValueError) as error:
            skipped.append(f"skipped {path}: {error}")
            continue
        records.append(record)
    return records, skipped


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run happens: software, hardware, and the revision of this checkout."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world(),
        "platform": platform.platform(),
        "revision": _revision(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    """The commit, with "-dirty" where tracked files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(
        f"cannot write {path}: {reason}; what was there before is unchanged; "
        "make room or choose another folder with --out"
    )
