"""Command line: ``python -m reports scaling``, ``… compare`` and ``… page``."""

import argparse
import sys
from pathlib import Path

from linear_vit.reports.saved import runs


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
        help="two runs: what became faster or slower; or the backends of one, with --baseline",
        description=(
            "BEFORE AFTER: per case faster, slower, same or undecided; with one run, BEFORE is "
            "reports/measurements. With --baseline: every backend of a run over that one."
        ),
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
    compare.add_argument("--baseline", metavar="NAME", help="compare backends with this one")
    compare.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="with --baseline: only this one over it",
    )
    compare.add_argument(
        "--fail-on",
        action="append",
        default=[],
        choices=("slower", "faster", "undecided", "same"),
        help="exit with 1 where a case of two runs, or all lengths of a backend together, are that",
    )
    compare.add_argument(
        "--margin",
        type=_percent,
        default=0.03,
        metavar="PERCENT",
        help="a change of two runs that is surely smaller is none (3)",
    )
    compare.add_argument(
        "--control",
        default="torch",
        metavar="NAME",
        help="backend whose code did not change, which shows the machine's drift; none: no drift "
        "is taken off (%(default)s)",
    )
    compare.add_argument(
        "--anyway", action="store_true", help="compare runs of different environments"
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
    from linear_vit.reports import scaling

    loaded = _load(arguments.paths or runs.default_paths())
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
    if arguments.baseline is None:
        return _compare_runs(arguments)
    from linear_vit.reports import compare

    loaded = _load(arguments.paths or runs.default_paths())
    cases = compare.speedups(loaded, arguments.baseline, arguments.backend)
    if arguments.csv:
        cases.to_csv(arguments.csv, index=False)
    print(compare.render(cases, arguments.baseline))
    return 0


def _compare_runs(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import changes

    if not 1 <= len(arguments.paths) <= 2:
        raise runs.NoRuns(
            "compare takes two runs, BEFORE and AFTER (or one, held against reports/measurements); "
            "to compare the backends of one run add --baseline NAME"
        )
    before, after = [runs.MEASUREMENTS, *arguments.paths][-2:]
    control = None if arguments.control == "none" else arguments.control
    found = changes.changes(
        _load([before]),
        _load([after]),
        control=control,
        margin=arguments.margin,
        anyway=arguments.anyway,
    )
    if arguments.csv:
        found.cases.to_csv(arguments.csv, index=False)
    print(changes.render(found))
    return 1 if found.verdicts & {*arguments.fail_on} else 0


def _load(paths: list[Path]) -> runs.Runs:
    loaded = runs.load(paths)
    for line in loaded.skipped:
        print(f"skipped {line}", file=sys.stderr)
    return loaded


def _percent(text: str) -> float:
    value = float(text) / 100
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a percentage from 0 to 100, got {text}")
    return value


def _page(arguments: argparse.Namespace) -> int:
    from linear_vit.reports.page import page

    size = page.write(arguments.paths, arguments.results, arguments.out)
    print(f"{arguments.out} ({size / 2**20:.2f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
