"""Command line: ``python -m reports scaling|compare|targets|table|page|results|convert``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from linear_vit.reports.saved import runs
from linear_vit.reports.saved.files import write_json, write_text

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except runs.NoRuns as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Plots, tables and pages from what was saved."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        made.set_defaults(run=run)
        return made

    _add_scaling(command("scaling", _scaling, "time, memory and speed-up against N, as plots"))
    text = "two runs: what became faster or slower; or the backends of one, with --baseline"
    _add_compare(command("compare", _compare, text))
    _add_targets(command("targets", _targets, "the bounds set for this project, judged from a run"))
    _add_table(command("table", _table, "the results table, from the records of training runs"))
    _add_page(command("page", _page, "one self-contained HTML page of everything saved"))
    text = "what the repository's own measurements say, as Markdown"
    made = command("results", _results, text)
    _out(made, "file", Path("docs/results.md"))
    text = "runs that an older version saved, in today's schema; nothing is lost"
    _add_convert(command("convert", _convert, text))
    return parser


def _names(text: str) -> list[str]:
    """A list with commas; an empty one is refused."""
    found = [name for name in text.replace(",", " ").split() if name]
    if not found:
        raise argparse.ArgumentTypeError("the list is empty")
    return found


def _operations(text: str) -> list[str]:
    return [name.replace("-", "_") for name in _names(text)]


def _add_cases(parser: argparse.ArgumentParser) -> None:
    """Which saved runs, and which of their cases."""
    _paths(parser)
    for option, kind, text in (
        ("op", _operations, "only these operations"),
        ("dtype", _names, "only these dtypes"),
        ("backend", _names, "only these backends"),
    ):
        spellings = (f"--{option}s", f"--{option}")
        parser.add_argument(
            *spellings, action="extend", type=kind, default=[], metavar="A,B", help=text
        )


def _paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="saved runs (default: the newest in reports/out, else reports/measurements)",
    )


def _out(parser: argparse.ArgumentParser, what: str, default: Path | None) -> None:
    text = f"{what} (%(default)s)" if default else what
    parser.add_argument("--out", type=Path, default=default, metavar="PATH", help=text)


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    _add_cases(parser)
    _out(parser, "folder", runs.DEFAULT_OUT / "scaling")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "BEFORE AFTER: per case faster, slower, same or undecided; with one run, BEFORE is "
        "reports/measurements. With --baseline: every backend of a run over that one."
    )
    _add_cases(parser)
    parser.add_argument("--baseline", metavar="NAME", help="compare backends with this one")
    text = "exit with 1 where a case, or all lengths of a backend together, are that"
    parser.add_argument("--fail-on", action="extend", type=_verdicts, default=[], metavar="A,B",
                        help=f"slower, faster, undecided or same: {text}")  # fmt: skip
    text = "a change of two runs that is surely smaller is none (3)"
    parser.add_argument("--margin", type=_percent, default=0.03, metavar="PERCENT", help=text)
    text = "backend whose code did not change, which shows the machine's drift; none: no drift is "
    parser.add_argument(
        "--control", default="torch", metavar="NAME", help=f"{text}taken off (%(default)s)"
    )
    text = "compare runs of different environments"
    parser.add_argument("--anyway", action="store_true", help=text)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the cases there, too")


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exits with 1 where a target is broken, with 2 where none can be read."
    parser.add_argument("paths", nargs=1, type=Path, metavar="RUN", help="a saved run")
    text = "which list (that of the run's device)"
    parser.add_argument("--targets", choices=("cpu", "gpu"), help=text)
    _out(parser, "file for the tables behind the verdicts, as Markdown", None)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of run records")
    _out(parser, "folder of the table", runs.DEFAULT_OUT / "training")
    text = "saved runs of the models' training steps (those in RUNS)"
    parser.add_argument("--speeds", nargs="+", type=Path, metavar="FILE", help=text)
    text = "exponents.csv, or a saved run (the newest beside the table)"
    parser.add_argument("--exponents", type=Path, metavar="FILE", help=text)
    text = "folder of ablation-*.json (%(default)s)"
    folder = runs.DEFAULT_OUT / "ablation"
    parser.add_argument("--ablations", type=Path, default=folder, metavar="FOLDER", help=text)


def _add_page(parser: argparse.ArgumentParser) -> None:
    _paths(parser)
    _out(parser, "file", runs.DEFAULT_OUT / "index.html")
    text = "folder that is searched for everything else (%(default)s)"
    parser.add_argument(
        "--results", type=Path, default=runs.DEFAULT_OUT, metavar="FOLDER", help=text
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    text = "a file, or a folder with its sub-folders"
    parser.add_argument("old", type=Path, metavar="OLD", help=text)
    text = "where the converted file, or files of the same names, go"
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help=text)
    parser.add_argument("--in-place", action="store_true", help="write over the old files")


def _verdicts(text: str) -> list[str]:
    from linear_vit.reports.changes import VERDICTS

    for name in _names(text):
        if name not in VERDICTS:
            raise argparse.ArgumentTypeError(f"no {name!r}; there are {', '.join(VERDICTS)}")
    return _names(text)


def _percent(text: str) -> float:
    value = float(text) / 100
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a percentage from 0 to 100, got {text}")
    return value


# ---- commands ------------------------------------------------------------------------------------


def _scaling(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import groups, scaling

    loaded = _load(arguments.paths or runs.default_paths())
    found = groups.groups(loaded, arguments.ops, arguments.dtypes, arguments.backends)
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
    asked = (arguments.backends, arguments.ops, arguments.dtypes)
    cases = compare.speedups(loaded, arguments.baseline, *asked)
    if arguments.csv:
        cases.to_csv(arguments.csv, index=False)
    print(compare.render(cases, arguments.baseline, loaded.words))
    return 0


def _compare_runs(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import changes

    if not 1 <= len(arguments.paths) <= 2:
        raise runs.NoRuns(
            "compare takes two runs, BEFORE and AFTER (or one, held against reports/measurements); "
            "to compare the backends of one run add --baseline NAME"
        )
    before = arguments.paths[:-1] or runs.measured()
    control = None if arguments.control == "none" else arguments.control
    found = changes.changes(
        _load(before),
        _load(arguments.paths[-1:]),
        control=control,
        margin=arguments.margin,
        anyway=arguments.anyway,
    ).only(arguments.ops, arguments.dtypes, arguments.backends)
    if arguments.csv:
        found.cases.to_csv(arguments.csv, index=False)
    print(changes.render(found))
    return 1 if found.verdicts & {*arguments.fail_on} else 0


def _targets(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import targets
    from linear_vit.reports.tables import documents

    loaded = _load(arguments.paths)
    chosen = targets.LISTS.get(arguments.targets) or targets.of_device(loaded)
    found = targets.verdicts(loaded, chosen)
    print("\n".join(map(str, found)))
    if arguments.out:
        write_text(arguments.out, documents.of_targets(loaded, found))
        print(f"written to {arguments.out}")
    return int(any(verdict.holds is False for verdict in found))


def _table(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import tables

    print(
        tables.write_results(
            arguments.runs,
            arguments.out,
            speeds=arguments.speeds,
            exponents=arguments.exponents,
            ablations=arguments.ablations,
        )
    )
    return 0


def _page(arguments: argparse.Namespace) -> int:
    from linear_vit.reports.page import page

    size = page.write(arguments.paths, arguments.results, arguments.out)
    print(f"{arguments.out} ({size / 2**20:.2f} MiB)")
    return 0


def _results(arguments: argparse.Namespace) -> int:
    from linear_vit.reports.tables import documents

    write_text(arguments.out, documents.of_measurements(runs.MEASUREMENTS))
    print(arguments.out)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.in_place == (arguments.new is not None):
        raise runs.NoRuns("convert takes OLD and NEW, or OLD and --in-place")
    if not arguments.old.exists():
        raise runs.NoRuns(f"{arguments.old}: there is no such file or folder")
    several = arguments.old.is_dir()
    paths = sorted(arguments.old.rglob("*.json")) if several else [arguments.old]
    converted = 0
    for path in paths:
        try:
            document = runs.read(path)
        except (ValueError, runs.OfAnotherKind) as error:
            if not several:
                raise runs.NoRuns(f"{path}: {error}") from error
            continue
        new = path if arguments.in_place else arguments.new
        if several and not arguments.in_place:
            new = arguments.new / path.relative_to(arguments.old)
        write_json(new, document)
        converted += 1
        print(new)
    return 0 if converted else 2


def _load(paths: Sequence[Path]) -> runs.Runs:
    loaded = runs.load(paths)
    for line in loaded.skipped:
        print(f"skipped {line}", file=sys.stderr)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
