"""Who trains in a folder of a store: a lease that ends by itself, where nothing can be locked.

The files ``.lease-1``, ``.lease-2``, ... in a run's folder are leases, each created where none of
its name was. Who created the last one trains there until it ends. It is renewed meanwhile, and
ended when the run does. Numbers only grow, so that of several that find an ended one just one has
the next, and who was superseded sees it.
"""

import errno
import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import sleep
from typing import Any

from linear_vit.training.errors import UserError, notice
from linear_vit.training.record import InUse

LEASE_S = 180.0  # so long after its last sign of life, others may go on with a run
RENEW_S = 30.0
_PATIENCE_S = 10.0  # with a store that hangs, where a run is to end
_NAME = ".lease-"


class TakenOver(UserError):
    """Another process may be training where this one did: it writes nothing more there."""


def create(fs: Any, path: str, content: bytes) -> None:
    """Writes a file of a store that is not there yet, and its folder; FileExistsError if it is.

    In one step where the store can do so. No bucket is made: its name may be mistyped.
    """
    try:
        _create(fs, path, content)
    except FileNotFoundError:
        folder = path.rpartition("/")[0]
        top = "/".join(folder.split("/")[: 2 if folder.startswith("/") else 1])
        if not fs.exists(top):
            raise
        fs.makedirs(folder, exist_ok=True)
        _create(fs, path, content)


def _create(fs: Any, path: str, content: bytes) -> None:
    # Not pipe_file(mode="create"), which looks first and then writes where a store has none itself.
    try:
        with fs.open(path, "xb") as file:
            file.write(content)
    except OSError as error:
        # How s3fs tells that a condition did not hold, where a store of S3's kind does not name it,
        # or that two created the file at once.
        if error.errno in (errno.EINVAL, errno.EIO) and fs.exists(path):
            raise FileExistsError(path) from error
        raise


class Lease:
    """Keeps others from training in a folder, from its creation to ``end``.

    Where this process dies, it ends ``LEASE_S`` after it was renewed. Clocks have to agree within
    a minute or so.
    """

    def __init__(self, fs: Any, folder: str, url: str, owner: str) -> None:
        """Waits for the end of the lease of a process that may be dead, which it is if it does not
        renew it. That of the same ``owner`` is taken over at once: it is the same run, which was
        begun again because that process is dead. ``url`` is shown.

        Raises:
            InUse: another process trains there.
        """
        self._fs, self._folder, self._url, self._owner = fs, folder, url, owner
        # Another's may have this one's number, after somebody has deleted this one.
        self._mark = uuid.uuid4().hex
        # Listing has a cache, emptied before, and nobody here reads a renewal that is half written.
        self._asking = threading.RLock()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        before = self._ended_ones()
        self._number = max(before, default=0) + 1
        try:
            with suppress(FileExistsError):  # another's, or mine: a lost answer is asked for again
                create(fs, self._path(self._number), self._content(LEASE_S))
            if not self._is_mine():
                raise self._just_begun()
            for number in before:
                with suppress(FileNotFoundError):
                    fs.rm_file(self._path(number))
        except BaseException:
            with suppress(Exception):
                if self._is_mine():
                    self._end()
            raise
        self._renewing.start()

    def check(self) -> None:
        """Raises TakenOver where another process has taken the folder over."""
        if self._is_mine():
            return
        if self._numbers():
            raise TakenOver(
                f"another process has taken over {self._url}, since this one gave no sign of life "
                f"for {LEASE_S:.0f} s: what it trained since is left out"
            )
        raise TakenOver(
            f"{self._url} has lost its {_NAME}{self._number}, which keeps others from training "
            "there: somebody has deleted it. What was trained since is left out"
        )

    def end(self) -> None:
        """Lets others train there again."""
        self._ended.set()
        self._renewing.join(_PATIENCE_S)
        if not self._renewing.is_alive():  # else it may still renew it: it ends by itself
            with suppress(Exception):
                if self._is_mine():
                    self._end()

    def _end(self) -> None:
        self._fs.pipe_file(self._path(self._number), self._content(0.0))

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            # The next time, maybe; a run's own writes tell of it.
            with suppress(Exception), self._asking:
                self.check()
                self._fs.pipe_file(self._path(self._number), self._content(LEASE_S))

    def _is_mine(self) -> bool:
        """Whether the last lease there is this one."""
        with self._asking, suppress(FileNotFoundError):
            if self._numbers()[-1:] == [self._number]:
                return bool(self._read(self._path(self._number))[0].get("mark") == self._mark)
        return False

    def _numbers(self) -> list[int]:
        """Those of all leases there, in order."""
        with self._asking, suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            names = [path.rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]
            found = [name.removeprefix(_NAME) for name in names if name.startswith(_NAME)]
            return sorted(int(number) for number in found if number.isdecimal())
        return []

    def _path(self, number: int) -> str:
        return f"{self._folder}/{_NAME}{number}"

    def _content(self, seconds: float) -> bytes:
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        facts = {"owner": self._owner, "host": socket.gethostname(), "process": os.getpid()}
        return json.dumps({**facts, "mark": self._mark, "until": until.isoformat()}).encode()

    def _ended_ones(self) -> list[int]:
        """The leases there, once the last of them has ended; InUse where it is renewed."""
        first = None
        while there := self._numbers():
            try:
                lease, until = self._read(self._path(there[-1]))
            except FileNotFoundError:  # by now there is the next one
                raise self._just_begun() from None
            if lease.get("owner") == self._owner or until <= datetime.now(UTC):
                break
            who = f"{lease.get('host', 'unknown')}, process {lease.get('process', 'unknown')}"
            first = first or (there[-1], until)
            if first != (there[-1], until):
                raise InUse(f"another process is training in {self._url} ({who}): wait for it")
            notice(
                f"another process has begun to train in {self._url} ({who}): waiting for a sign of "
                f"life of it, until {until:%H:%M:%S} UTC"
            )
            sleep(RENEW_S / 10)
        return there

    def _read(self, path: str) -> tuple[dict[str, Any], datetime]:
        """What a lease says, and when it ends."""
        try:
            lease = json.loads(self._fs.cat_file(path))
            return lease, datetime.fromisoformat(lease["until"])
        except ValueError:  # half written, where a store shows such
            return {}, self._fs.modified(path) + timedelta(seconds=LEASE_S)

    def _just_begun(self) -> InUse:
        return InUse(f"another process has just begun to train in {self._url}: wait for it")
