"""Kernels of installed packages: entry points that register them, loaded when somebody asks.

A package names a module, or a function without arguments, that calls ``kernels.register``::

    [project.entry-points."linear_vit.kernels"]
    mine = "my_package.kernels"

``import kernels`` loads none of them, and neither does a call that leaves the choice of the backend
to us: they are loaded when backends are listed, or one is named that is not ours.
"""

import importlib.metadata
import threading
import warnings

GROUP = "linear_vit.kernels"
_lock = threading.RLock()
_loaded = False


def load() -> None:
    """Load them, once a process. One that fails is a warning of one line, and costs no other."""
    global _loaded
    if _loaded:
        return
    with _lock:
        if _loaded:
            return
        _loaded = True  # before, since what is loaded may itself ask for backends
        for point in importlib.metadata.entry_points(group=GROUP):
            try:
                found = point.load()
                if callable(found):
                    found()
            except Exception as error:  # somebody else's code raises what it likes
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(
                    f"kernels of {point.value} ({GROUP}, {point.name}) are left out: {reason}",
                    stacklevel=3,
                )


def leave_out() -> None:
    """From now on none is loaded in this process."""
    global _loaded
    _loaded = True
