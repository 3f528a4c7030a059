"""Command line: ``python -m reports scaling``, ``… compare`` and ``… page``."""

import argparse
import sys
from pathlib import Path

from reports import runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Plots and pages from saved benchmark runs."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    scaling = commands.add_parser(
        "scaling",
        help="complexity plots: time, memory and speed-up against N",
        description="Draw time, memory and speed-up against N, with exponents and crossovers.",
    )
    page = commands.add_parser(
        "page",
        help="one self-contained HTML page of all results",
        description="Write one HTML file that shows everything measured.",
    )
    compare = commands.add_parser(
        "compare",
        help="backends against one of them, case by case",
        description="Speed-up of every backend over one, with intervals, geometric mean and worst.",
    )
    for command in (scaling, compare, page):
        command.add_argument(
            "paths",
            nargs="*",
            type=Path,
            metavar="FILE_OR_FOLDER",
            help="saved runs (default: the newest in reports/out, else reports/measurements)",
        )
    scaling.add_argument(
        "--out", type=Path, default=runs.DEFAULT_OUT / "scaling", help="folder (%(default)s)"
    )
    scaling.add_argument("--op", action="append", default=[], metavar="NAME", help="only this one")
    scaling.add_argument("--dtype", action="append", default=[], metavar="NAME", help="likewise")
    compare.add_argument("--baseline", required=True, metavar="NAME", help="a backend")
    compare.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="only this one over it"
    )
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write the cases there, too")
    page.add_argument(
        "--out", type=Path, default=runs.DEFAULT_OUT / "index.html", help="file (%(default)s)"
    )
    page.add_argument(
        "--results",
        type=Path,
        default=runs.DEFAULT_OUT,
        help="folder of check.json and training/table.json (%(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return {"scaling": _scaling, "compare": _compare, "page": _page}[arguments.command](
            arguments
        )
    except runs.NoRuns as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _scaling(arguments: argparse.Namespace) -> int:
    from reports import scaling

    loaded = runs.load(arguments.paths or runs.default_paths())
    for line in loaded.skipped:
        print(f"skipped {line}", file=sys.stderr)
    found = scaling.groups(loaded, arguments.op, arguments.dtype)
    if not found:
        raise runs.NoRuns(
            f"the saved runs time no operation (only training steps). Make one with: "
            f"{runs.HOW_TO_MEASURE}"
        )
    written = scaling.write(found, arguments.out)
    print(scaling.summary(found))
    print(f"{len(written)} files in {arguments.out}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from reports import compare

    loaded = runs.load(arguments.paths or runs.default_paths())
    for line in loaded.skipped:
        print(f"skipped {line}", file=sys.stderr)
    cases = compare.speedups(loaded, arguments.baseline, arguments.backend)
    if arguments.csv:
        cases.to_csv(arguments.csv, index=False)
    print(compare.render(cases, arguments.baseline))
    return 0


def _page(arguments: argparse.Namespace) -> int:
    from reports import page

    size = page.write(arguments.paths, arguments.results, arguments.out)
    print(f"{arguments.out} ({size / 2**20:.2f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
