"""Times training steps without making the device wait for the host."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class StepClock:
    """Duration of each step: device events on CUDA, the wall clock on a CPU.

    Call ``start`` and ``stop`` around the step. On CUDA the durations are read in ``seconds``,
    which waits for the device once.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self.begin = self._mark()

    def stop(self) -> None:
        self.marks.append((self.begin, self._mark()))

    def seconds(self) -> list[float]:
        """The duration of every step so far, in order."""
        if not self.cuda:
            return [end - begin for begin, end in self.marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self.marks]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stopwatch:
    """Seconds by name, of spans that are marked from hooks or with ``span``."""

    def __init__(self, device: torch.device) -> None:
        self.clocks: defaultdict[str, StepClock] = defaultdict(lambda: StepClock(device))
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.clocks[name].start()
        yield
        self.clocks[name].stop()

    def watch(self, module: nn.Module, name: str) -> None:
        """Counts a module's forward and backward under ``name``."""
        begin, end = (lambda *_: self.clocks[name].start()), (lambda *_: self.clocks[name].stop())
        self._hooks += [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_full_backward_pre_hook(begin),
            module.register_full_backward_hook(end),
        ]

    def release(self) -> None:
        """Modules are watched no longer; what was counted stays."""
        for hook in self._hooks:
            hook.remove()

    def seconds(self) -> dict[str, float]:
        return {name: sum(clock.seconds()) for name, clock in self.clocks.items()}


def median_images_per_second(
    seconds: Sequence[float], images: Sequence[float], skip: int = 0
) -> float:
    """The median over steps of images / seconds, the first ``skip`` steps (warm-up) left out.

    Where there are no more than ``skip`` steps, only the first is left out; a single step counts.
    """
    rates = [n / s for n, s in zip(images, seconds, strict=True)]
    return statistics.median(rates[skip:] or rates[1:] or rates)
