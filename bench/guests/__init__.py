"""Kernels from outside, of ``--kernels FILE``: each runs in a process of its own, a guest.

The parent does not import the file. It asks a guest what the file registers, and has a backend of
each name in its own tables: listed, with reasons, colours and titles, but for a function that
refuses to be called here.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.guests.guest import Entry, Failed, Guest, OutOfMemory, stop_all
from linear_vit.kernels import registry
from linear_vit.options import OptionError

__all__ = [
    "Entry", "Failed", "Guest", "OutOfMemory", "announce", "announce_again", "files_of", "is_guest",
    "is_interpreted",
    "spelled", "stop_all",
]  # fmt: skip

# Files, that a process which measures for this one has to know, too.
_KEPT = "LINEAR_VIT_KERNELS"
_files: dict[tuple[str, str], tuple[str, ...]] = {}
_interpreted: set[tuple[str, str]] = set()


def announce(files: Iterable[Path | str]) -> list[Entry]:
    """Have the kernels of these files among the backends of this process.

    Args:
        files: Python files, or modules by their dotted names.

    Returns:
        What they register.

    Raises:
        OptionError: one does not load, registers nothing, or something that can't be: in one line.
    """
    found: list[Entry] = []
    kept = dict.fromkeys(part for part in os.environ.get(_KEPT, "").split(",") if part)
    for file in map(spelled, files):
        guest = Guest([file])
        try:
            entries = guest.begin()
        except Failed as error:
            text = str(error).removeprefix("ImportError: ")
            raise OptionError(f"--kernels: {text}") from error
        if not entries:
            raise OptionError(f"--kernels: {file} registers no kernel: it has to call "
                              "kernels.register(operation, name, devices=...)")  # fmt: skip
        for entry in entries:
            _register(entry, guest)
            _files[entry.operation, entry.name] = (file,)
            if entry.interpreted:
                _interpreted.add((entry.operation, entry.name))
        found += entries
        kept[file] = None
    os.environ[_KEPT] = ",".join(kept)
    return found


def announce_again() -> None:
    """In a process that was started by one that announced some: the same."""
    files = [part for part in os.environ.get(_KEPT, "").split(",") if part]
    if files:
        announce(files)


def is_guest(operation: str, backend: str) -> bool:
    """Whether a backend's kernel is a guest."""
    known = registry.registered(operation, backend) is not None
    return known and (operation, backend) in _files


def is_interpreted(operation: str, backend: str) -> bool:
    """Whether Triton interprets a guest's kernel: it is right, but has no time worth reporting."""
    return is_guest(operation, backend) and (operation, backend) in _interpreted


def files_of(operation: str, backend: str) -> tuple[str, ...]:
    """The files that a guest of this kernel has to load."""
    return _files[operation, backend]


def spelled(file: Path | str) -> str:
    """A file by its whole path, since other processes have other folders; a module as it is."""
    path = Path(file)
    return str(path.resolve()) if path.suffix == ".py" or path.exists() else str(file)


def _register(entry: Entry, guest: Guest) -> None:
    what = f"{entry.name} of {entry.operation}"
    if entry.name in registry.BACKENDS or is_guest(entry.operation, entry.name):
        raise OptionError(f"--kernels: {what} is there already: give yours another name")
    taken = {row.colour for row in registry.backend_rows().values()}
    try:
        registry.register(
            entry.operation,
            entry.name,
            devices=entry.devices,
            unusable=_unusable(entry, guest),
            title=entry.title,
            colour=entry.colour if entry.colour not in taken else None,
            replace=True,  # of the same name from an installed package, or from -p
        )(_stand_in(entry))
    except (ValueError, TypeError) as error:
        raise OptionError(f"--kernels: {error}") from error


def _unusable(entry: Entry, guest: Guest) -> registry.Unusable:
    def unusable(
        device: torch.device, dtype: torch.dtype | None, head_dim: int | None
    ) -> str | None:
        try:
            reason: str | None = guest.ask(
                "unusable",
                operation=entry.operation,
                name=entry.name,
                device=str(device),
                dtype=None if dtype is None else str(dtype).removeprefix("torch."),
                head_dim=head_dim,
            )["reason"]
        except Failed as error:
            return str(error)
        return reason

    return unusable


def _stand_in(entry: Entry) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> Any:
        raise RuntimeError(f"{entry.name} runs in a process of its own, when checked or timed")

    def refuse_masked(*arguments: Any, key_mask: Any = None) -> Any:
        refuse()

    stand_in = refuse_masked if entry.key_mask else refuse
    stand_in.__module__, stand_in.__qualname__ = entry.module, entry.function
    return stand_in
