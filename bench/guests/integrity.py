"""Whether a kernel's process has been tampered with: functions that are no longer what they were.

What is judged, and the clock that counts in the end, are in another process, so that a patch gains
nothing. It is named all the same: it was meant to.
"""

import builtins
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

_OURS = "linear_vit"


class Watch:
    """Remembers functions as they are now: of clocks, of PyTorch, and of this project."""

    def __init__(self) -> None:
        self._modules = list(_watched())
        self._before = dict(_functions(self._modules))

    def changed(self) -> list[str]:
        """The names of those that are others by now, or whose code is."""
        now = dict(_functions(self._modules))
        return sorted(
            name
            for name, before in self._before.items()
            if name in now and now[name] != before and not _is_torchs(now[name][1])
        )


def _watched() -> Iterator[ModuleType]:
    yield from (builtins, time, torch, torch.cuda, torch.testing, torch.autograd)
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] == _OURS:
            yield module


def _functions(modules: list[ModuleType]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """``module.name``, with what it is and, of a function in Python, its code."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if not callable(value) or name.startswith("__"):
                continue
            yield f"{module.__name__}.{name}", (value, _code(value))
            if isinstance(value, type) and _is_watched(value, module.__name__):
                for part in dir(value):
                    method = getattr(value, part, None)
                    if callable(method) and not part.startswith("__"):
                        yield f"{module.__name__}.{name}.{part}", (method, _code(method))


def _is_watched(kind: type, module: str) -> bool:
    """Whether a class counts, with its methods: once, and not wherever it was imported."""
    if kind.__module__.partition(".")[0] == _OURS:
        return kind.__module__ == module
    return kind in (torch.Tensor, torch.cuda.Event) and module in ("torch", "torch.cuda")


def _is_torchs(code: object) -> bool:
    """Whether PyTorch itself has put it there, as torch.compile does."""
    folder = str(Path(torch.__file__).parent)
    return isinstance(code, CodeType) and code.co_filename.startswith(folder)


def _code(value: object) -> object:
    return value.__code__ if isinstance(value, FunctionType) else None
