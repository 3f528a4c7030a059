"""Text and tables for a terminal of any width: what does not fit is folded, and nothing is cut.

A cell is folded between words, never within a number and its unit or an interval. Columns that
still don't fit go into a block below, beside the columns that say what a row is about.
"""

import contextlib
import functools
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from linear_vit import options

_GAP = 2
_NO_BREAK = "\u00a0"
_SHORT = 12  # characters of a cell that is not folded at all
# 371 µs, 80.2 ± 0.6 %, N ≈ 279, 96 – 168, and what stands in short brackets.
_TOGETHER = re.compile(
    r"(?<=\d) (?=[^\W\d]|%)|(?<=[±≈–≥≤=~]) (?=\w)|(?<=\w) (?=[±≈–≥≤=~])|(?<=±) +"
)
_INTERVAL = re.compile(r"[(\[][^)\]]{1,18}[)\]]")

Row = Sequence[str]

_shown_as: dict[str, str] = {}


def width(elsewhere: int = 200) -> int:
    """Columns of the terminal, or COLUMNS of the environment; for lack of both ``elsewhere``."""
    return shutil.get_terminal_size((elsewhere, 24)).columns


def prose(text: str, columns: int) -> str:
    """A paragraph in lines of at most so many columns, and at most 100."""
    return textwrap.fill(text, min(columns, 100), break_long_words=False, break_on_hyphens=False)


def counted(count: int, noun: str) -> str:
    """``1 case``, ``2,000 cases``, ``2 processes``."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def show_as(folder: Path, name: str) -> None:
    """From now on, paths in a folder are shown as paths below this name, which it is a copy of."""
    _shown_as[str(folder)] = name


def shown(text: str) -> str:
    """The text with folders as :func:`show_as` has them."""
    for folder, name in _shown_as.items():
        text = text.replace(folder, name)
    return text


def say(text: object, file: TextIO | None = None) -> None:
    """Print lines, each folded where it is wider than the terminal; as they are where none is."""
    to = file or sys.stdout
    columns = width(elsewhere=0) if to.isatty() or "COLUMNS" in os.environ else 0
    print(folded(options.as_printed(shown(str(text))), columns), file=to, flush=True)


def folded(text: str, columns: int) -> str:
    """The text with every line that is wider folded between words, with its rest indented.

    Args:
        columns: at most so many, unless a word is longer; 0 leaves the lines as they are.
    """
    lines = text.splitlines()
    return "\n".join(_folded(line, columns) if 0 < columns < len(line) else line for line in lines)


def _folded(line: str, columns: int) -> str:
    """Folded at a gap if that will do; what is below stands where the first gap ends."""
    found = re.match(r" *(\S+( \S+)? {2,})?", line)
    begin = found[0] if found else ""
    rest, indent = line[len(begin) :], len(begin)
    if not begin.strip() or indent > columns // 3:
        begin = line[: len(line) - len(line.lstrip())]
        rest, indent = line.strip(), min(len(begin) + 4, columns // 3)
    lines = [begin]
    for part in re.split(r" {2,}", glued(rest.strip())):
        gap = "" if lines[-1].endswith(" ") or not lines[-1] else "  "
        if gap and len(lines[-1] + gap + part) > columns >= indent + len(part):
            lines.append(" " * indent + part)
            continue
        lines[-1:] = textwrap.wrap(
            (lines[-1] + gap + part).replace("  ", _NO_BREAK + " "),
            columns,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(line.replace(_NO_BREAK, " ").rstrip() for line in lines)


Main = Callable[..., int]


def command(main: Main) -> Main:
    """A command's main, which prints any character, and ends quietly where nobody reads on.

    ``... | head -1`` closes the pipe. The status is then 141, as of whatever SIGPIPE ends, and 130
    after Ctrl-C.
    """

    @functools.wraps(main)
    def run(*args: Any, **given: Any) -> int:
        options.spell_out()
        try:
            try:
                return main(*args, **given)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _unread():
                raise
            return 141
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


def _unread() -> bool:
    """Whether nobody reads standard output or error; what is left for them goes nowhere."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # no file of the system's
            there = select.poll()
            there.register(stream.fileno(), 0)
            if any(state & select.POLLERR for _, state in there.poll(0)):
                found = True
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    return found


def draw(
    columns: Row,
    rows: Sequence[Row],
    *,
    words: Sequence[bool] = (True,),
    keys: int = 1,
    at_most: int | None = None,
    colour: bool = False,
) -> str:
    """A table at most so many columns wide, unless a single cell's longest word is wider.

    Args:
        columns: their names.
        rows: cells of each.
        words: by column, whether it stands on the left; those not said stand on the right.
        keys: how many columns, from the first, say what a row is about.
        at_most: columns of the screen; None takes the terminal's.
        colour: whether names may be set in bold.
    """
    at_most = width() if at_most is None else at_most
    printed = [list(map(options.as_printed, row)) for row in (columns, *rows)]
    cells = [
        [glued(name), *(glued(cell, whole=_SHORT) for cell in column)]
        for name, *column in zip(*printed, strict=True)
    ]
    left = [*words, *[False] * (len(cells) - len(words))]
    least = [max(len(piece) for cell in column for piece in _pieces(cell)) for column in cells]
    room = at_most - sum(size + _GAP for size in least[:keys])
    if keys > 1 and max(least[keys:], default=0) > room:
        # Numbers tell the rows of all blocks apart where the names are too wide to stand in each.
        cells.insert(0, ["#", *map(str, range(1, len(rows) + 1))])
        left, least, keys = [False, *left], [len(str(len(rows))), *least], 1
    # What a row is about folds last: it has two fifths of the screen, if it needs them.
    for i in range(keys):
        least[i] = max(least[i], min(max(map(len, cells[i])), 2 * at_most // (5 * keys)))
    blocks = _blocks(least, keys, at_most)
    drawn = [
        _drawn([cells[i] for i in block], [left[i] for i in block], at_most, colour)
        for block in blocks
    ]
    return "\n".join(drawn).replace(_NO_BREAK, " ")


def _blocks(least: Sequence[int], keys: int, at_most: int) -> list[list[int]]:
    """Columns that fit beside the keys, block by block."""
    if sum(least) + _GAP * (len(least) - 1) <= at_most or len(least) <= keys:
        return [list(range(len(least)))]
    of_keys = list(range(keys))
    start = sum(least[i] + _GAP for i in of_keys)
    blocks: list[list[int]] = []
    taken = at_most
    for i in range(keys, len(least)):
        if taken + least[i] > at_most:
            blocks.append([*of_keys])
            taken = start
        blocks[-1].append(i)
        taken += least[i] + _GAP
    return blocks


def _drawn(cells: list[list[str]], left: Sequence[bool], at_most: int, colour: bool) -> str:
    sizes = _sizes(cells, at_most)
    folded = [[_fold(cell, size) for cell in col] for col, size in zip(cells, sizes, strict=True)]
    head, *body = zip(*folded, strict=True)
    lines = []
    for row in (head, *body):
        tall = max(map(len, row))
        # Names of columns stand above their rule, cells begin on their row's first line.
        padded = [[""] * (tall - len(c)) + c if row is head else c + [""] * (tall - len(c))
                  for c in row]  # fmt: skip
        for parts in zip(*padded, strict=True):
            aligned = [part.ljust(size) if is_left else part.rjust(size)
                       for part, size, is_left in zip(parts, sizes, left, strict=True)]  # fmt: skip
            line = (" " * _GAP).join(aligned).rstrip()
            lines.append(f"\033[1m{line}\033[0m" if colour and row is head else line)
        if row is head:
            lines.append((" " * _GAP).join("─" * size for size in sizes))
        elif tall > 1 and row is not body[-1]:
            lines.append("")
    return "\n".join(lines) + "\n"


def _sizes(cells: list[list[str]], at_most: int) -> list[int]:
    """Of each column: its cells on one line, or as much of that as there is room for."""
    whole = [max(map(len, column)) for column in cells]
    least = [max(len(piece) for cell in column for piece in _pieces(cell)) for column in cells]
    room = at_most - _GAP * (len(cells) - 1)
    for most in range(max(whole), 0, -1):
        sizes = [max(low, min(high, most)) for low, high in zip(least, whole, strict=True)]
        if sum(sizes) <= room:
            return sizes
    return least


def glued(text: str, whole: int = 0) -> str:
    """The text with spaces that can't be folded at where it may not be, and no others if short."""
    if len(text) <= whole:
        return text.replace(" ", _NO_BREAK)
    text = _INTERVAL.sub(lambda found: found[0].replace(" ", _NO_BREAK), text)
    return _TOGETHER.sub(_NO_BREAK, text)


def _pieces(text: str) -> list[str]:
    """What is never folded; ``forward+backward`` may be, behind its sign."""
    return re.split(r" +|(?<=\w\+)(?=\w)", text)


def _fold(text: str, size: int) -> list[str]:
    lines = [""]
    for piece in _pieces(text):
        joint = " " if lines[-1] and not re.search(r"\w\+$", lines[-1]) else ""
        if lines[-1] and len(lines[-1]) + len(joint) + len(piece) > size:
            lines.append(piece)
        else:
            lines[-1] += joint + piece
    return lines
