"""The options that all commands share: one name, spelling and meaning each.

Lists have commas between their words, and ``_`` and ``-`` are the same everywhere. For argparse's
parsers and for pytest's groups of options::

    options.add(parser, "ops", "device", "out")
    given = parser.parse_args()
    operations = options.known("ops", given.ops, kernels.operations())
"""

import argparse
import codecs
import importlib
import importlib.util
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

Name = TypeVar("Name")


class OptionError(ValueError):
    """What was asked for is not there; the message names the option, and what there is."""


def words(text: str) -> tuple[str, ...]:
    """``a,b`` or ``a b`` as its words."""
    found = tuple(text.replace(",", " ").split())
    if not found:
        raise argparse.ArgumentTypeError("names with commas between them are wanted, not nothing")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """``64,1024`` as numbers, none of them less than 1."""
    found = words(text)
    if not all(word.isdecimal() and int(word) for word in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers with commas between them")
    return tuple(map(int, found))


def paths(text: str) -> tuple[Path, ...]:
    """``a.py,b.py`` as paths; they may have spaces in them, but no commas."""
    found = tuple(Path(part) for part in text.split(",") if part)
    if not found:
        raise argparse.ArgumentTypeError("files with commas between them are wanted, not nothing")
    return found


def architectures(text: str) -> tuple[str, ...]:
    """``sm_90a``, ``sm-90a``, ``90a`` and ``9.0a`` are the same GPU architecture."""
    return tuple(map(_architecture, words(text)))


def _architecture(word: str) -> str:
    digits = re.fullmatch(r"(?:sm[-_]?)?(\d+)\.?(\d[af]?)", word.lower())
    if digits is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no architecture like sm_90a or 9.0a")
    return f"sm_{digits[1]}{digits[2]}"


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


_SHARED: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "ops": (words, "A,B", "operations, or all (the default)"),
    "backends": (words, "A,B", "implementations, or all (the default)"),
    "dtypes": (words, "A,B", "float32, float16, bfloat16, or all (the default)"),
    "tokens": (numbers, "A,B", "token counts N, as 64,1024"),
    "device": (str, "NAME", "cpu or cuda[:i] (default: cuda if there)"),
    "minutes": (positive, "COUNT", "to spend, at most"),
    "out": (Path, "PATH", "where to write what was found"),
    "kernels": (paths, "FILE", "a Python file that registers kernels of yours"),
    "arch": (architectures, "A,B", "GPU architectures, as sm_90a or 9.0a; all by default"),
}
_PLUGINS = "LINEAR_VIT_PLUGINS"  # modules, with commas, that a child process imports, too
# What a message calls one of them.
_ONE = {"ops": "operation", "backends": "backend", "dtypes": "dtype", "arch": "architecture"}


def add(parser: Any, *names: str, **helps: str) -> None:
    """Add shared options by name to an argparse parser, or to a group of pytest's.

    Args:
        parser: has ``add_argument`` or ``addoption``.
        names: among ops, backends, dtypes, tokens, device, minutes, out, kernels, arch.
        helps: more of them by keyword, with a text of the command's own.
    """
    for name, text in {**dict.fromkeys(names), **helps}.items():
        option(parser, f"--{name}", **settings(name, text))


def settings(name: str, text: str | None = None) -> dict[str, Any]:
    """How a shared option is read, for :func:`option`; ``text`` is help of the command's own."""
    parse, metavar, usual = _SHARED[name]
    return {"type": parse, "metavar": metavar, "help": text or usual}


def option(parser: Any, spelling: str, *hidden: str, **settings: Any) -> None:
    """Add an option, and spellings of it that ``--help`` doesn't show.

    Whatever they are, ``--head_dims`` is ``--head-dims``.
    """
    new = getattr(parser, "addoption", None) or parser.add_argument
    new(spelling, **settings)
    name = settings.pop("dest", spelling.removeprefix("--").replace("-", "_"))
    others = [*hidden, *(s[:2] + s[2:].replace("-", "_") for s in (spelling, *hidden))]
    settings |= {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    for other in dict.fromkeys(others):
        if other != spelling:
            new(other, dest=name, **settings)


def known(name: str, asked: Iterable[str] | None, there_are: Iterable[Name]) -> tuple[Name, ...]:
    """What was asked for, as those that there are spell it; all of them for None and ``all``.

    Args:
        name: of the option.
        asked: words of :func:`words`.
        there_are: the names to choose among.

    Raises:
        OptionError: something that is not among them.
    """
    by_spelling = {_plain(there): there for there in there_are}
    spelled = None if asked is None else [_plain(word) for word in asked]
    if spelled is None or spelled == ["all"]:
        return tuple(by_spelling.values())
    for word in spelled:
        if word not in by_spelling:
            what = f"unknown {_ONE.get(name, name.rstrip('s').replace('-', ' '))} {word!r}"
            there = ", ".join(map(str, by_spelling.values()))
            raise OptionError(f"--{name}: {what}; there are {there}")
    return tuple(by_spelling[word] for word in dict.fromkeys(spelled))


def _plain(word: object) -> str:
    return str(word).replace("-", "_")


# What stands for a character that an encoding lacks; others are spelled \u03bb.
_PLAIN = {
    **dict.fromkeys("–—−─", "-"),
    **{"│": "|", "×": "x", "µ": "u", "±": "+-", "≈": "~", "≤": "<=", "≥": ">=", "²": "^2"},
    **{"→": "->", "…": "...", "·": "*", "∞": "inf", "†": "#", "‡": "!", "§": "&", "⌈": "ceil("},
    **{"⌉": ")", "‘": "'", "’": "'", "“": '"', "”": '"', "\N{NO-BREAK SPACE}": " "},
}


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    of_one = error.object[error.start]
    spelled = of_one.encode("ascii", "backslashreplace").decode()
    return _PLAIN.get(of_one, spelled), error.start + 1


codecs.register_error("linear-vit-plainly", _plainly)


def spell_out() -> None:
    """From now on standard output takes any character: what its encoding lacks is put plainly.

    For a command to call as it starts: hours of work are not to die of a λ or ± in their last line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in (
            "strict",
            "surrogateescape",
            "backslashreplace",  # Python's own for stderr
        ):
            stream.reconfigure(errors="linear-vit-plainly")


def as_printed(text: str) -> str:
    """The text in the characters that standard output has, so that a table's columns line up."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "linear-vit-plainly").decode(encoding)


def device(name: str | None) -> Any:
    """The ``torch.device`` to use: cuda where there is one, unless it is named.

    Raises:
        OptionError: it is no device that anything here runs on, or is not in this machine.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device: {name!r} is no device; take cpu or cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise OptionError(f"--device: {name!r} can't be used; take cpu or cuda")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise OptionError(f"--device {name}: PyTorch finds no CUDA device here; take cpu")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise OptionError(f"--device {name}: there are {torch.cuda.device_count()} of them")
    return found


def load_plugins(names: Iterable[str] = ()) -> None:
    """Import modules that add operations and backends: these, and a parent process's.

    What is named is kept in the environment, so that child processes have the same.
    """
    kept = os.environ.get(_PLUGINS, "").split(",")
    wanted = [name for name in dict.fromkeys((*kept, *names)) if name]
    for name in wanted:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise OptionError(f"-p {name}: there is no module of this name to import") from error
    if wanted:
        os.environ[_PLUGINS] = ",".join(wanted)


def load_module(name: str) -> ModuleType:
    """Import a user's file, or a module by its dotted name.

    Raises:
        ImportError: it fails; the message is one line with its own error, and the file's line.
    """
    path = Path(name)
    try:
        if path.suffix == ".py" or path.exists():
            return _load_file(path)
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        where = f", line {line}" if (line := _line_of(error, path)) else ""
        text = f"{path.name}{where}: {type(error).__name__}: {lines[0]}"
        raise ImportError(text) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    # As Python itself does for a program: what lies beside it can be imported.
    sys.path.insert(0, str(path.parent.resolve()))
    name = path.stem if path.stem not in sys.modules else f"yours_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _line_of(error: BaseException, path: Path) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    found = [frame.lineno for frame in frames if frame.filename == str(path.resolve())]
    return found[-1] if found else None
