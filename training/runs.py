"""Where the runs of a table or an ablation are kept: in a folder, or in a store that fsspec knows.

A run in a store works in a folder of this machine. Each file that it leaves there goes to the store
at once, in one piece, and a run that goes on fetches them first. ``leases`` keep runs apart.
"""

import copy
import functools
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from linear_vit import screen
from linear_vit.training.errors import UserError, first_line
from linear_vit.training.leases import Lease, TakenOver, create
from linear_vit.training.record import check_writable, followers, lock, remove_leftovers, unlock

_LOOK_S = 15.0  # between two looks at how far runs are: each asks the store for a file a run
_FILES = ("run.json", "last.pt", "best.pt")


class Runs:
    """Runs in a folder.

    Attributes:
        folder: where records can be read, each run's in a folder of its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Raises UserError now, not after an hour, where nothing can be written."""
        check_writable(self.folder)

    def exists(self) -> bool:
        """Whether there is anything that a table could be made of."""
        return self.folder.is_dir()

    def read(self) -> None:
        """Brings what is recorded now into ``folder``."""

    def look(self, names: Sequence[str]) -> None:
        """Does so for the runs of these names, if the last look was a while ago."""

    def save(self, path: Path) -> None:
        """Keeps a file of ``folder`` that is no run's."""

    def sent(self) -> "Runs":
        """The same for a process with another working folder, and for one begun in its place."""
        return Runs(self.folder.absolute())

    @contextmanager
    def run(self, name: str) -> Iterator[Path]:
        """The folder that a run is to work in."""
        yield self.folder / name


class Stored(Runs):
    """Runs in a store; ``folder`` has copies of their records, and of the saved runs beside them.

    All that talks to the store raises UserError where it does not answer, or refuses.
    """

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(folder)
        self._asked, self._url = url, _without_password(url)  # the one with a password is not shown
        self._owner, self._looked = uuid.uuid4().hex, 0.0
        self._fs, root = _file_system(url)
        self._root = root.rstrip("/")

    @functools.cached_property
    def _fs(self) -> Any:
        return _file_system(self._asked)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fs"}

    def exists(self) -> bool:
        return any(self.folder.rglob(_FILES[0]))

    def check(self) -> None:
        path = f"{self._root}/.writable-{uuid.uuid4().hex}"
        with _told("write", self._url):
            try:
                create(self._fs, path, b" ")
                with suppress(FileExistsError):
                    create(self._fs, path, b" ")
                    raise ValueError
            except (NotImplementedError, ValueError) as error:
                raise UserError(
                    f"--runs {self._url}: this store can't refuse to write a file that is there, "
                    "so that nothing would keep two commands apart: take another, or a folder"
                ) from error
            finally:
                with suppress(Exception):  # where it was not made, say: that is told
                    self._fs.rm_file(path)

    def read(self) -> None:
        with _told("read", self._url):
            self._fs.invalidate_cache()
            below = {path: self._below(path) for path in self._fs.find(self._root)}
        wanted = [p for p, q in below.items() if q.name == _FILES[0] or q == Path(q.stem + ".json")]
        self._fetch(wanted)

    def look(self, names: Sequence[str]) -> None:
        if time.monotonic() - self._looked > _LOOK_S:
            with suppress(UserError):  # it is for the screen alone
                self._fetch([f"{self._root}/{name}/{_FILES[0]}" for name in names])
            self._looked = time.monotonic()

    def save(self, path: Path) -> None:
        self._put(path, f"{self._root}/{path.relative_to(self.folder).as_posix()}")

    def sent(self) -> Runs:
        other = copy.copy(self)
        other._owner = uuid.uuid4().hex
        return other

    @contextmanager
    def run(self, name: str) -> Iterator[Path]:
        there, url = f"{self._root}/{name}", f"{self._url}/{name}"
        with _told("write", url):
            lease = Lease(self._fs, there, url, self._owner)
        try:
            with self._locked(there), self._copy(there, url, lease) as out:
                yield out
        finally:
            lease.end()

    @contextmanager
    def _locked(self, there: str) -> Iterator[None]:
        """Keeps a run apart from commands that call the store's folder by its path, if it has one,
        and clears it of what a killed run half wrote."""
        if not self._is_local():
            yield
            return
        descriptor = lock(Path(there))
        try:
            remove_leftovers(Path(there))
            yield
        finally:
            unlock(descriptor)

    @contextmanager
    def _copy(self, there: str, url: str, lease: Lease) -> Iterator[Path]:
        """A folder of this machine with a run's files, whose changes go to the store."""
        scratch = Path(tempfile.mkdtemp(prefix="linear-vit-"))
        out, left = scratch / Path(there).name, False
        screen.show_as(out, url)

        def follow(path: Path) -> None:
            nonlocal left
            if path.parent != out or path.name not in _FILES:
                return
            try:
                with _told("write", url):
                    lease.check()
                self._put(path, f"{there}/{path.name}")
            except TakenOver:
                raise
            except UserError as error:
                left, here = True, f"{scratch} of {socket.gethostname()}"
                raise UserError(
                    f"{error}; what it has is as it was, and this run's newest files are in {here}"
                ) from error

        followers.append(follow)
        try:
            out.mkdir()
            for file in _FILES:
                self._get(f"{there}/{file}", out / file)
            yield out
        finally:
            followers.remove(follow)
            for path in out.glob("events.*"):  # TensorBoard's
                with suppress(UserError):
                    self._put(path, f"{there}/{path.name}")
            if not left:
                shutil.rmtree(scratch, ignore_errors=True)

    def _below(self, path: str) -> Path:
        return Path(path.removeprefix(self._root).lstrip("/"))

    def _fetch(self, paths: list[str]) -> None:
        """Copies small files to their places below ``folder``, several at once."""
        with _told("read", self._url):
            found = self._fs.cat(paths, on_error="return") if paths else {}
            for path, content in found.items():
                if isinstance(content, FileNotFoundError):
                    continue
                if isinstance(content, Exception):
                    raise content
                here = self.folder / self._below(path)
                here.parent.mkdir(parents=True, exist_ok=True)
                here.write_bytes(content)

    def _get(self, there: str, path: Path) -> None:
        with _told("read", f"{self._url}/{self._below(there)}"):
            try:
                self._fs.get_file(there, str(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)  # some packages leave an empty one

    def _put(self, path: Path, there: str) -> None:
        """A reader sees what was there before, or all of the file."""
        with _told("write", f"{self._url}/{self._below(there)}"):
            if not self._is_local():  # an object is there once it is whole
                self._fs.put_file(str(path), there)
                return
            folder, _, name = there.rpartition("/")
            # A name of its own: a process that was stopped in its midst may go on with it later.
            beside = f"{folder}/.{name}.{uuid.uuid4().hex}"
            try:
                self._fs.put_file(str(path), beside)
                self._fs.mv(beside, there)
            except BaseException:
                with suppress(Exception):
                    self._fs.rm_file(beside)
                raise

    def _is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self._fs, LocalFileSystem)


@contextmanager
def opened(runs: str) -> Iterator[Runs]:
    """The runs in a folder, or at a URL of fsspec's, whose records are read now."""
    if "://" not in runs:
        yield Runs(Path(runs))
        return
    protocol, _, rest = runs.partition("://")
    url = f"{protocol}://{rest.rstrip('/')}"
    if not rest.rstrip("/"):
        raise UserError(f"--runs {runs}: after :// name a folder of the store")
    if found := re.search(r"::|[*?[\]]", runs):
        raise UserError(
            f"--runs {_without_password(runs)}: {found[0]} means more to fsspec than a character "
            "of a name: take a plain URL"
        )
    with tempfile.TemporaryDirectory(prefix="linear-vit-") as folder:
        screen.show_as(Path(folder), _without_password(url))
        stored = Stored(url, Path(folder))
        stored.read()
        yield stored


def _without_password(url: str) -> str:
    """The URL as it may be shown."""
    return re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1@", url)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        how = f"{first_line(error)} (with pip, on every machine that trains)"
        raise UserError(f"--runs {_without_password(url)}: {how}") from error
    except Exception as error:  # an unknown protocol, say
        raise UserError(f"--runs {_without_password(url)}: {first_line(error)}") from error


@contextmanager
def _told(do: str, url: str) -> Iterator[None]:
    """Whatever a store's library raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot {do} {url}: {reason}; see whether the store can be reached, and lets you {do}"
        ) from error
