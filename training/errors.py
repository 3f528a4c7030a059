"""What the user is told: the one exception whose message is for them, and notices on stderr."""

import sys

from linear_vit.screen import say

_notices: set[str] = set()


class UserError(Exception):
    """A wrong argument, file or environment: what was wrong, what is allowed, what to do.

    The command line prints it without a traceback.
    """


def notice(text: str) -> None:
    """Prints a line to stderr, once a process."""
    if text not in _notices:
        _notices.add(text)
        say(text, sys.stderr)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
