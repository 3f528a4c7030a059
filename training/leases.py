"""Who trains in a folder of a store: a lease that ends by itself, where nothing can be locked.

The files ``.lease-1``, ``.lease-2``, ... in a run's folder are leases, each created where none of
its name was. Who created the last one trains there until it ends. It is renewed meanwhile, and
ended when the run does. Numbers only grow, so that of several that find an ended one just one has
the next, and who was superseded sees it.
"""

import json
import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from time import sleep
from typing import Any

from linear_vit.training.errors import UserError, notice
from linear_vit.training.record import InUse

LEASE_S = 180.0  # so long after its last sign of life, others may go on with a run
RENEW_S = 30.0
_NAME = ".lease-"


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
    with fs.open(path, "xb") as file:
        file.write(content)


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
        self._listing = threading.Lock()  # of a cache of the store's package, emptied before
        before = self._ended_ones()
        self._number, content = max(before, default=0) + 1, self._content(LEASE_S)
        with suppress(FileExistsError):  # another's, or mine: a lost answer is asked for again
            create(fs, self._path(self._number), content)
        if not self._is_last() or fs.cat_file(self._path(self._number)) != content:
            raise self._just_begun()
        for number in before:
            with suppress(FileNotFoundError):
                fs.rm_file(self._path(number))
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def check(self) -> None:
        """Raises UserError where another process has taken the folder over."""
        if not self._is_last():
            raise UserError(
                f"another process has taken over {self._url}, since this one gave no sign of life "
                f"for {LEASE_S:.0f} s: what it trained since is left out"
            )

    def end(self) -> None:
        """Lets others train there again."""
        self._ended.set()
        self._renewing.join()
        with suppress(Exception):  # it ends by itself
            self._fs.pipe_file(self._path(self._number), self._content(0.0))

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(Exception):  # the next time, maybe; a run's own writes tell of it
                self.check()
                self._fs.pipe_file(self._path(self._number), self._content(LEASE_S))

    def _is_last(self) -> bool:
        return self._numbers()[-1:] == [self._number]

    def _numbers(self) -> list[int]:
        """Those of all leases there, in order."""
        with self._listing, suppress(FileNotFoundError):
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
        return json.dumps({**facts, "until": until.isoformat()}).encode()

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
