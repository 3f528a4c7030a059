"""Cases that misbehave in every way, for the runner's tests; imports little, to start quickly."""

import os
import signal
import time
from pathlib import Path

from linear_vit.bench.gpu_runner import Case, NotHere, Result


def misbehave(case: Case) -> Result:
    """Does what the case's parameters say, in the runner's process."""
    p = case.parameters
    if "log" in p:
        with Path(p["log"]).open("a") as file:
            file.write(case.name + "\n")
    if p.get("do") == "raise":
        raise ValueError("the reason\nand more")
    if p.get("do") == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if p.get("do") == "exit":
        os._exit(3)
    if p.get("do") == "exhaust":
        raise MemoryError("no memory")
    if p.get("do") == "hang":
        time.sleep(60)
    if p.get("do") == "decline":
        raise NotHere("not on this device")
    return {"value": p.get("value", 1.0), "process": os.getpid()}
