"""Downloads that are checked before they are used, and unpacked only where they belong."""

import hashlib
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from linear_vit.screen import say
from linear_vit.training.errors import UserError, first_line
from linear_vit.training.record import check_writable, writing

_SILENCE_S = 30  # how long a server may say nothing: a silent proxy would hang for good


@dataclass(frozen=True)
class Archive:
    """A published file: its address, its length in bytes and its MD5, as the publishers give it."""

    url: str
    size: int
    md5: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def fetch(archive: Archive, folder: Path) -> Path:
    """The archive in ``folder``: put there by hand, or downloaded; checked either way.

    Raises OSError where it can't be downloaded, UserError where the file is not the published one.
    """
    path = folder / archive.name
    if path.exists():
        check(path.read_bytes(), archive, path)
        return path
    check_writable(folder)  # before it is all there and can't be kept
    say(f"downloading {archive.url} to {path} ...", sys.stderr)
    with urllib.request.urlopen(archive.url, timeout=_SILENCE_S) as answer:
        content = answer.read()
    check(content, archive, path)
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def check(content: bytes, archive: Archive, path: Path) -> None:
    """UserError, naming the file, unless it has the archive's length and checksum."""
    if len(content) != archive.size:
        reason = f"holds {len(content):,} bytes, the published one {archive.size:,}"
    elif (md5 := hashlib.md5(content).hexdigest()) != archive.md5:
        reason = f"has the MD5 {md5}, the published one {archive.md5}"
    else:
        return
    raise UserError(f"{path} is damaged: it {reason}; delete it and get it again")


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a .tar.gz or .zip into ``folder``: whole or not at all, and nothing outside of it.

    Raises UserError, naming the archive, for one that is damaged or has paths that lead elsewhere.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as name:
        inside = Path(name).resolve()
        try:
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        if not (inside / member).resolve().is_relative_to(inside):
                            raise ValueError(f"{member!r} leads outside of its folder")
                    archive.extractall(inside)
            else:
                with tarfile.open(path) as tar:
                    tar.extractall(inside, filter="data")  # refuses links and paths to elsewhere
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            raise UserError(
                f"{path} cannot be unpacked into {folder}: {first_line(error):.200}; nothing was; "
                "delete it and get it again"
            ) from error
        for item in inside.iterdir():
            item.replace(folder / item.name)
