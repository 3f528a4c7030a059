"""The README and docs/: short enough, nothing named that isn't there, commands that parse."""

import argparse
import contextlib
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from linear_vit import command as tools
from linear_vit.kernels import registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_GENERATED = ("results.md", "features.md")
PAGES = (
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "reports/measurements/README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in _GENERATED),
)
COLUMNS = 100
_FILE = re.compile(r"[\w./*-]+(?:/|\.(?:py|md|csv|json|txt|toml|cff|cu|h|cpp|png|svg))")
# Files that commands write, or that a reader makes.
_WRITTEN = {
    "run.json",
    "run.1.json",
    "run.2.json",
    "run.5.json",
    "mine.py",
    "plain.py",
    "compiled.py",
    "triton_kernel.py",
    "cpp_kernel.py",
    "attend.cpp",
    "cuda_kernel.py",
    "attend.cu",
    "attend_cuda.cpp",
    "check.json",
    "data/",
    "cpu/",
    "cuda/",
    "triton/",
    "peers/",
}
_MODULES = {
    "bench": "linear_vit.bench.__main__",
    "kernels": "linear_vit.kernels.__main__",
    "reports": "linear_vit.reports.__main__",
}
_NOT_OURS = {"torchrun": 1, "tensorboard": 0, "pip": 0}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- what a page is made of ----------------------------------------------------------------------


def fenced(text: str, language: str) -> list[str]:
    """The blocks of code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def without_old_spellings(text: str) -> str:
    """A page without the column of a table whose head says old."""
    lines, old = [], False
    for line in text.splitlines():
        old = line.startswith("|") and (old or line.startswith("| old |"))
        lines.append("|".join(["", *line.split("|")[2:]]) if old else line)
    return "\n".join(lines)


def commands(text: str) -> list[str]:
    """Command lines: indented or in a block of code, and in `quotes`; comments are cut off."""
    text = without_old_spellings(text).replace("\\\n", " ")
    whole = re.findall(r"^    +(\S.*)$", prose(text), re.MULTILINE)
    whole += [line for block in fenced(text, "(?:sh|bash)?") for line in block.splitlines()]
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", prose(text), flags=re.MULTILINE))
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in (*whole, *quoted)]
    programs = ("python", "pytest", "make", "linear-vit", *_NOT_OURS)
    return [line for line in lines if line.split()[:1] and line.split()[0] in programs]


# ---- length and names ----------------------------------------------------------------------------


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 160


def too_long(text: str) -> list[str]:
    """Lines of prose over the limit; tables, and links and pictures that can't be broken, aside."""
    whole = re.sub(r"!\[[^]]*\]\([^)]*\)", "", prose(text), flags=re.DOTALL)
    lines = [line for line in whole.splitlines() if not line.startswith("|")]
    return [x for x in lines if len(x) > COLUMNS and not re.fullmatch(r"\s*\S*\]\(\S+", x)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_prose_is_wrapped(page: Path) -> None:
    assert not too_long(page.read_text())


def test_a_long_line_is_seen() -> None:
    assert too_long("word " * 21)
    assert not too_long("|" + "word " * 21)


@cache
def _there() -> frozenset[str]:
    """Paths of the repository from every folder they are in, a folder's with a / at its end."""
    left_out = {".git", ".venv", "out", "linear_vit", "__pycache__", "data", "runs"}
    found = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if not left_out & set(parts[:2]):
            slash = "/" if path.is_dir() else ""
            found |= {"/".join(parts[i:]) + slash for i in range(len(parts))}
    return frozenset(found)


def missing_files(page: Path, text: str) -> list[str]:
    """Links of a page to files, and `files` it names, that are not there."""
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", prose(text))]
    wrong = [
        link + mark + place
        for link, mark, place in links
        if "://" not in link and not _leads_somewhere(page, link, place)
    ]
    names = re.findall(r"`([^`\s]+)`", without_old_spellings(prose(text)))
    for name in filter(_FILE.fullmatch, names):
        if not name.startswith("reports/out") and name not in {*_there(), *_WRITTEN}:
            wrong.append(name)
    return wrong


def _leads_somewhere(page: Path, link: str, place: str) -> bool:
    target = page.parent / link if link else page
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if place else []
    return not place or place in {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_named_is_there(page: Path) -> None:
    assert not missing_files(page, page.read_text())


def test_a_missing_file_is_seen() -> None:
    text = (
        "[a](docs/none.md) [b](README.md#nowhere) [c](LICENSE) `kernels/none.py` `kernels/rows.py`"
    )
    assert missing_files(README, text) == ["docs/none.md", "README.md#nowhere", "kernels/none.py"]


# ---- commands ------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A command line was accepted; BaseException, so that no command takes it for its own error."""


@contextlib.contextmanager
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a command parses, it does no more."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(self, *arguments)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patched.setenv("LINEAR_VIT_PLUGINS", "")
        patched.setitem(sys.modules, "mine", ModuleType("mine"))
        yield


def accept(command: str, config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a command line to its parser.

    Raises:
        SystemExit, pytest.UsageError: it is refused.
        LookupError: there is no such command.
    """
    program, *words = shlex.split(command)
    if program == "linear-vit":
        program, words = _in_a_checkout(words)
    if program == "torchrun":
        program, words = "python", words[words.index("train_minimal.py") :]
    if program == "python" and words[:2] == ["-m", "pytest"]:
        program, words = "pytest", words[2:]
    if program == "make":
        return _accept_targets(words)
    if program == "pytest":
        return _accept_tests(words, config)
    if program in _NOT_OURS:
        return None
    if words[:1] == ["train_minimal.py"]:
        module, words = "linear_vit.train_minimal", words[1:]
    elif words[:1] == ["-m"] and words[1] in _MODULES:
        module, words = _MODULES[words[1]], words[2:]
    else:
        raise LookupError(command)
    main = importlib.import_module(module).main
    with only_parsing(monkeypatch):
        try:
            raise SystemExit(main(words))  # it gave up before it parsed anything
        except Parsed:
            return None


def _in_a_checkout(words: list[str]) -> tuple[str, list[str]]:
    """A command of the installed tool as a checkout has it."""
    tool, *rest = words
    if tool in ("pytest", "train_minimal.py"):
        return ("pytest", rest) if tool == "pytest" else ("python", words)
    if tool not in tools.TOOLS:
        raise LookupError(tool)
    return "python", ["-m", *words]


def _accept_targets(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        used = rf"\b{name}\b" if is_variable else rf"^{name}:"
        if not re.search(used, makefile, re.MULTILINE):
            raise LookupError(word)


def _accept_tests(words: list[str], config: pytest.Config) -> None:
    given = config._parser.parse(words)  # pytest has no public way to parse and not to run
    for path in given.file_or_dir:
        if not (ROOT / path).exists():
            raise LookupError(path)


COMMANDS = sorted({line for page in PAGES for line in commands(page.read_text())})


def test_every_command_is_accepted(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {}
    for command in COMMANDS:
        try:
            accept(command, pytestconfig, monkeypatch)
        except (SystemExit, LookupError, pytest.UsageError) as error:
            refused[command] = f"{error!r} {capsys.readouterr().err}"
    assert not refused
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(
    "command",
    [
        "pytest --benchmark-only --tokenz 64",
        "pytest --benchmark-only --tokens many",
        "pytest tests/none",
        "python -m pytest --sweep huge",
        "python -m bench chekc",
        "python -m bench check --nly cpu",
        "python -m reports scaling --opps x",
        "python -m kernels build --arch fast",
        "python -m none",
        "python train_minimal.py --epochs many",
        "python train_minimal.py tabel",
        "make tset",
        "linear-vit benhc check",
        "linear-vit bench chekc",
    ],
)
def test_a_wrong_command_is_refused(
    command: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((SystemExit, LookupError, pytest.UsageError)):
        accept(command, pytestconfig, monkeypatch)


def test_commands_are_found() -> None:
    text = "a `make x` b\n\n    pytest \\\n    -k y   # z\n\n"
    text += "| old | new |\n| `pytest a` | `pytest b` |"
    assert [shlex.split(line) for line in sorted(commands(text))] == [
        ["make", "x"],
        ["pytest", "-k", "y"],
        ["pytest", "b"],
    ]


# ---- code and figures ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if fenced(p.read_text(), "python")], ids=named)
def test_python_runs(page: Path, monkeypatch) -> None:
    # What torchrun tells a process that is alone.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": "docs"}
    with registry.temporarily():
        for block in fenced(page.read_text(), "python"):
            exec(compile(block, named(page), "exec"), names)


def test_the_readmes_result_is_the_files() -> None:
    table = ROOT / "reports/measurements/xeon-2.5ghz-2-cores/training/table.md"
    measured = _models(table.read_text().partition("\n## CIFAR-100")[0])
    shown = _models(README.read_text())
    assert len(measured) == 5
    assert shown.keys() == measured.keys()
    for model, cells in shown.items():
        assert set(cells) <= set(measured[model]), model


def _models(text: str) -> dict[str, list[str]]:
    """The rows of a table of models by their title."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    rows = (line.strip("|").replace("−", "-").split("|") for line in lines)
    stripped = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: row[1:] for row in stripped if re.search(r"ViT( \+|$)", row[0])}


def test_the_readme_says_how_long_the_tests_take() -> None:
    makefile = (ROOT / "Makefile").read_text()
    said = [re.search(r"make test .*?(\d+) minutes", x) for x in (README.read_text(), makefile)]
    assert said[0] is not None
    assert said[1] is not None
    assert said[0][1] == said[1][1]


def test_the_citation_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
