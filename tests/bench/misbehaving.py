"""Groups that misbehave in every way, for the worker's tests; imports little, to start quickly."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from linear_vit.bench.store import FAILED, MEASURED, OUT_OF_MEMORY, Result


@dataclass(frozen=True)
class Deed:
    """What a case does, checked or ("turns") when it takes turns with the others."""

    name: str
    does: str = ""
    log: str = ""


def misbehave(deeds: Sequence[Deed], plan: object, started: Callable[[str], None]) -> list[Result]:
    results = []
    for deed in deeds:
        started(deed.name)
        if deed.log:
            with Path(deed.log).open("a") as file:
                file.write(deed.name + "\n")
        results.append(_result(deed))
        if deed.does == "break the device":
            return results  # nobody comes after
    started(None)
    if any(deed.does == "turns" for deed in deeds):
        os.kill(os.getpid(), signal.SIGSEGV)
    return results


def _result(deed: Deed) -> Result:
    if deed.does == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if deed.does == "exit":
        os._exit(3)
    if deed.does == "hang":
        time.sleep(60)
    if deed.does == "exhaust":
        return Result(deed.name, OUT_OF_MEMORY, "out of memory: no memory")
    if deed.does == "break the device":
        return Result(deed.name, FAILED, "RuntimeError: CUDA error: an illegal memory access")
    return Result(deed.name, MEASURED, info={"process": os.getpid()})
