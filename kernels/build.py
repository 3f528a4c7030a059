"""Builds and loads the C++ and CUDA sources, once per machine, and says so.

Each operation's folder with a ``cuda.cu`` is one extension, and each with a ``cpu.cpp`` another,
built at first use into PyTorch's extensions folder (``TORCH_EXTENSIONS_DIR``, by default in the
user's cache) under a name made of a hash of its sources, flags, architectures and PyTorch's
version. So a rebuild happens when one of these changes, and never otherwise.
``python -m kernels build`` does it ahead of time.
"""

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from linear_vit.kernels.toolchains import (
    EXTENSIONS,
    INSTRUCTION_SETS,
    Extension,
    fingerprint,
    first_error,
    without,
)
from linear_vit.screen import say

RETRY_S = 3600.0  # after which a build that failed is tried again
_KERNELS = Path(__file__).resolve().parent
_loaded: dict[tuple[str, str], Path] = {}  # and its folder
_failures: dict[tuple[str, str], str] = {}


class BuildError(RuntimeError):
    """The extension could not be built; the message is one line, with the reason and the log."""


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why the backend's extension can't be used on the device, in one line with the remedy.

    Compiles nothing, and is cheap to ask again.

    Returns:
        None if it is built, or can be expected to build.
    """
    extension = _extension(backend)
    reason = extension.no_device(device)
    if reason is not None:
        return reason
    architectures = extension.architectures(device)
    try:
        folders = {f: folder_of(backend, f, architectures) for f in extension.families()}
    except BuildError as error:
        return str(error)
    for family, folder in folders.items():
        why = _failures.get((backend, family)) or earlier_failure(folder)
        if why is not None:
            return _failures.setdefault((backend, family), why)
    if all((folder / "complete").exists() for folder in folders.values()):
        return None
    return extension.no_toolchain()


def load(
    backend: str,
    family: str | None = None,
    *,
    architectures: Sequence[str] | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Load the extension, which defines ``torch.ops.linear_vit.<backend>_…``; build it if need be.

    Two processes may do this at once: one builds, the other waits.

    Args:
        backend: ``"cuda"`` or ``"cpu"``.
        family: the folder of the operations; None for all of them, built side by side.
        architectures: compute capabilities like ``"9.0a"``; that of the current device by default.
            Of no meaning for ``"cpu"``.
        flags: more for the compiler, as ``-DLINEAR_VIT_HEAD_DIMS=64``.

    Raises:
        BuildError: it does not build; :func:`unavailable` gives the same reason from then on.
    """
    extension = _extension(backend)
    wanted = extension.families() if family is None else (family,)
    families = [f for f in wanted if (backend, f) not in _loaded]
    if not families:
        return
    if architectures is None:
        architectures = extension.architectures(torch.device(backend))
    folders = {f: folder_of(backend, f, architectures, flags) for f in families}
    pending = [f for f in families if not (folders[f] / "complete").exists()]
    if pending:
        reason = extension.no_toolchain()
        if reason is not None:
            raise BuildError(reason)
        with extension.environment(architectures), ThreadPoolExecutor(len(pending)) as pool:
            list(pool.map(lambda f: _build(backend, f, folders[f], architectures, flags), pending))
    for family, folder in folders.items():
        try:
            torch.ops.load_library(_library(folder))
        except OSError as error:
            why = _failures[backend, family] = (
                f"loading {family}'s {extension.label} extension failed: {error} (delete {folder} "
                "to build it anew)"
            )
            raise BuildError(why) from error
        _loaded[backend, family] = folder


def folder_of(
    backend: str, family: str, architectures: Sequence[str], flags: Sequence[str] = ()
) -> Path:
    """Where the extension of these sources and flags is, or will be: <name>_<hash>."""
    extension = _extension(backend)
    digest = hashlib.sha256()
    for path in extension.files(family):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key = (torch.__version__, *extension.commands(), *flags, *architectures)
    digest.update("\0".join(key).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or users_cache() / "torch_extensions"
    return Path(root) / f"linear_vit_{backend}_{family}_{digest.hexdigest()[:16]}"


def users_cache() -> Path:
    """The folder of the user's caches.

    Raises:
        BuildError: the user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named) if named else Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(
            "there is no folder to build into, since the user has no home: set XDG_CACHE_HOME or "
            "TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error


def earlier_failure(folder: Path) -> str | None:
    """Why an earlier process couldn't build into the folder; None where it is worth another try.

    It is, after an hour and with other compilers: memory that ran out and a full disk pass.
    """
    log, compilers = folder / "build.log", folder / "compilers.txt"
    try:
        if (folder / "complete").exists() or time.time() - log.stat().st_mtime > RETRY_S:
            return None
        if compilers.read_text() != fingerprint():
            return None
        return _describe_failure(folder, log.read_text("utf-8", "replace"))
    except OSError:  # nothing failed, or not even that could be written
        return None


def failure(backend: str) -> str | None:
    """Why the backend's extension did not build, in this process or a recent one; else None."""
    return next((why for (name, _), why in _failures.items() if name == backend), None)


def _extension(backend: str) -> Extension:
    if backend not in EXTENSIONS:
        raise ValueError(f"unknown extension {backend!r}: there are {', '.join(EXTENSIONS)}")
    return EXTENSIONS[backend]


def _build(
    backend: str, family: str, folder: Path, architectures: Sequence[str], flags: Sequence[str]
) -> None:
    """Build a family's extension into its folder; the marker ``complete`` says that it is whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "linear_vit.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it if this process is killed
            if not (folder / "complete").exists():
                _compile(backend, family, folder, architectures, flags)
                (folder / "complete").touch()
    except OSError as error:
        raise BuildError(
            f"can't write the {EXTENSIONS[backend].label} extension to {folder} "
            f"({error.strerror}): set TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error


def _compile(
    backend: str, family: str, folder: Path, architectures: Sequence[str], flags: Sequence[str]
) -> None:
    extension = EXTENSIONS[backend]
    what = f"{family}'s {extension.label} extension"
    target = f"for {', '.join(architectures)} " if architectures else ""
    _say(f"building {what} {target}({extension.takes}) ...")
    start = time.perf_counter()
    try:
        extension.compile(_KERNELS / family, _library(folder), flags)
    except Exception as error:  # a compiler's message, or whatever linking and loading raised
        why = _failures[backend, family] = _describe_failure(folder, str(error))
        with contextlib.suppress(OSError):  # on a full disk there is no room for the reason
            (folder / "build.log").write_text(str(error), "utf-8", "replace")
            (folder / "compilers.txt").write_text(fingerprint())
        raise BuildError(why) from error
    _say(f"built {what} in {time.perf_counter() - start:.0f} s")
    for said in _left_out(folder):
        _say(f"{what} {said}")


def left_out(backend: str, family: str) -> list[str]:
    """What the loaded library has not, since the toolchain refused it: a line each, and why."""
    return _left_out(_loaded[backend, family])


def _left_out(folder: Path) -> list[str]:
    """Empty unless the folder holds a CPU library."""
    reasons = {name: without(_library(folder), name) for name in INSTRUCTION_SETS}
    return [
        f"was built without {name.upper()}: {path.read_text('utf-8', 'replace')} (install newer "
        f"compilers and delete {folder} to build it anew)"
        for name, path in reasons.items()
        if path.exists()
    ]


def _library(folder: Path) -> Path:
    return folder / f"{folder.name.rpartition('_')[0]}.so"


def _say(message: str) -> None:
    say(message, sys.stderr)


def _describe_failure(folder: Path, message: str) -> str:
    """One line of what a build said: the first error, and what to do."""
    label = next(
        extension.label
        for name, extension in EXTENSIONS.items()
        if f"linear_vit_{name}_" in folder.name
    )
    return (
        f"building the {label} extension failed: {first_error(message)} (all of it in "
        f"{folder / 'build.log'}; tried again in an hour, or delete {folder})"
    )
