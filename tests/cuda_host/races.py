"""The races that races.h finds: how a library is built to look for them, and where they are."""

import re
import shutil
import subprocess
from pathlib import Path

# The compiler tells of every access as it would tell ThreadSanitizer, whose library is left out.
FLAGS = (
    "-DCUDA_HOST_RACES",
    "-g1",
    "-fsanitize=thread",
    "-nodefaultlibs",
    *("-lstdc++", "-lm", "-lc", "-lgcc", "-lgcc_s"),
)

_KERNEL = re.compile(r"\w+_kernel\b")


def explain(failure: str, library: Path) -> str:
    """The failure with each return address in it, a ``+0x...``, as ``file:line``.

    Calls are innermost first, inlined ones and callers, up to the kernel, which is named.
    """
    if shutil.which("addr2line") is None:
        return failure
    return re.sub(r"\+0x[0-9a-f]+(?: \+0x[0-9a-f]+)*", lambda at: _calls(at[0], library), failure)


def _calls(addresses: str, library: Path) -> str:
    before = [hex(int(address, 16) - 1) for address in addresses.split()]  # of the call itself
    command = ["addr2line", "-f", "-C", "-i", "-s", "-e", str(library), *before]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    places = []
    for function, place in zip(lines[::2], lines[1::2], strict=True):
        places.append(place.split(" ")[0])
        if kernel := _KERNEL.search(function):
            places.append(kernel[0])
            break
    return " < ".join(places)
