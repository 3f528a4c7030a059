"""``python -m reports scaling|compare|targets|table|models|page|results|power|convert``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from linear_vit import options, screen
from linear_vit.reports.saved import runs
from linear_vit.reports.saved.files import write_json, write_text

Parser = argparse.ArgumentParser


@screen.command
def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except (runs.NoRuns, runs.Damaged, options.OptionError) as error:
        screen.say(error, sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        screen.say(f"cannot write {error.filename}: {error.strerror}", sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(
        prog="python -m reports", description="Plots, tables and pages from what was saved."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        name, description = run.__name__.removeprefix("_"), f"{text[0].upper()}{text[1:]}."
        made = commands.add_parser(name, help=text, description=description)
        made.set_defaults(run=run)
        return made

    scaling = command(_scaling, "time, memory and speed-up against N, as plots")
    _add_cases(scaling)
    _add_path(scaling, "--out", "folder (reports/out/scaling)", metavar="PATH")
    text = "two runs: what became faster or slower; or the backends of one, with --baseline"
    _add_compare(command(_compare, text))
    targets = command(_targets, "the bounds set for this project, judged from a run")
    targets.epilog = "Exits with 1 where a target is broken, with 2 where none can be read."
    targets.add_argument("paths", nargs=1, type=Path, metavar="RUN", help="a saved run")
    text = "which list (that of the run's device)"
    targets.add_argument("--targets", choices=("cpu", "gpu"), help=text)
    text = "file for the tables behind the verdicts, as Markdown"
    _add_path(targets, "--out", text, metavar="PATH")
    table = command(_table, "the results table, from the records of training runs")
    table.add_argument("runs", type=Path, metavar="RUNS", help="folder of run records")
    out = runs.DEFAULT_OUT / "training"
    _add_path(table, "--out", "folder of the table", out, metavar="PATH")
    text = "saved runs of the models' training steps (those in RUNS)"
    _add_path(table, "--speeds", text, nargs="+")
    text = "exponents.csv, or a saved run (the newest beside the table)"
    _add_path(table, "--exponents", text)
    folder = runs.DEFAULT_OUT / "ablation"
    _add_path(table, "--ablations", "folder of ablation-*.json", folder, metavar="FOLDER")
    text = "whole models with their attention swapped: from which resolution each pays, and why"
    models = command(_models, text)
    _add_paths(models)
    _add_path(models, "--out", "folder", runs.DEFAULT_OUT / "models", metavar="PATH")
    page = command(_page, "one self-contained HTML page of everything saved")
    _add_paths(page)
    _add_path(page, "--out", "file", runs.DEFAULT_OUT / "index.html", metavar="PATH")
    text = "folder that is searched for everything else"
    _add_path(page, "--results", text, runs.DEFAULT_OUT, metavar="FOLDER")
    results = command(_results, "what the repository's own measurements say, as Markdown")
    _add_path(results, "--out", "file", Path("docs/results.md"), metavar="PATH")
    text = "how often compare is right, of recorded runs whose truth is known"
    power = command(_power, text)
    text = "of repeats.json, or of what python -m bench noise --only repeats records"
    power.add_argument("folder", type=Path, metavar="FOLDER", help=text)
    _add_path(power, "--out", "folder of the table (FOLDER)", metavar="PATH")
    text = "runs that an older version saved, in today's schema; nothing is lost"
    convert = command(_convert, text)
    text = "a file, or a folder with its sub-folders"
    convert.add_argument("old", type=Path, metavar="OLD", help=text)
    text = "where the converted file, or files of the same names, go"
    convert.add_argument("new", type=Path, nargs="?", metavar="NEW", help=text)
    convert.add_argument("--in-place", action="store_true", help="write over the old files")
    return parser


def _add_path(
    parser: Parser, option: str, text: str, default: Path | None = None, **more: Any
) -> None:
    shown = f"{text} (%(default)s)" if default else text
    more = {"metavar": "FILE"} | more
    parser.add_argument(option, type=Path, default=default, help=shown, **more)


def _add_paths(parser: Parser) -> None:
    text = "saved runs (default: the newest in reports/out, else reports/measurements)"
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_FOLDER", help=text)


def _add_cases(parser: Parser) -> None:
    """Which saved runs, and which of their cases."""
    _add_paths(parser)
    for name, what in (("op", "operations"), ("dtype", "dtypes"), ("backend", "backends")):
        settings = options.settings(f"{name}s", f"only these {what}")
        options.option(parser, f"--{name}s", f"--{name}", action="extend", **settings)


def _add_compare(parser: Parser) -> None:
    parser.description = (
        "BEFORE AFTER: per case faster, slower, same or undecided; with one run, BEFORE is "
        "reports/measurements. Of several runs a side, each a process: BEFORE... --with AFTER..., "
        "which tells the luck of a process from a change; three runs or more of one version say "
        "how large it is. With --baseline: every backend of a run over that one."
    )
    _add_cases(parser)
    _add_path(parser, "--with", "the later runs", dest="after", nargs="+", metavar="AFTER")
    parser.add_argument("--baseline", metavar="NAME", help="compare backends with this one")
    text = "missing, slower (and so missing), faster, undecided or same: exit with 1 where a case, "
    text += "or all lengths of a backend together, are that"
    verdicts: dict[str, Any] = {"action": "extend", "type": _verdicts, "default": []}
    parser.add_argument("--fail-on", metavar="A,B", help=text, **verdicts)
    text = "a change of two runs that is surely smaller is none (3)"
    parser.add_argument("--margin", type=_percent, default=0.03, metavar="PERCENT", help=text)
    text = "backend whose code did not change, which shows the machine's drift; none: no drift is "
    parser.add_argument(
        "--control", default="torch", metavar="NAME", help=f"{text}taken off (%(default)s)"
    )
    text = "compare runs of different environments"
    parser.add_argument("--anyway", action="store_true", help=text)
    _add_path(parser, "--csv", "write the cases there, too")


def _verdicts(text: str) -> tuple[str, ...]:
    from linear_vit.reports.changes import VERDICTS

    try:
        return options.known("fail-on", options.words(text), VERDICTS)
    except options.OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _percent(text: str) -> float:
    value = float(text) / 100
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a percentage from 0 to 100, got {text}")
    return value


# ---- commands ------------------------------------------------------------------------------------


def _scaling(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import groups, scaling

    paths = arguments.paths or _default_paths()
    # What is in reports/out is taken for one's own.
    folder = "repository" if paths == runs.measured() else "scaling"
    out = arguments.out or runs.DEFAULT_OUT / folder
    loaded = _load(paths)
    found = groups.groups(loaded.only(arguments.ops, arguments.dtypes, arguments.backends))
    if not found:
        raise runs.NoRuns(
            f"the saved runs time no operation (only training steps). Make one with: "
            f"{runs.HOW_TO_MEASURE}"
        )
    written = scaling.write(found, out)
    screen.say(scaling.summary(found))
    screen.say(f"{screen.counted(len(written), 'file')} in {out}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import changes, compare

    asked = arguments.ops, arguments.dtypes
    if arguments.baseline is not None:
        loaded = _load(arguments.paths or _default_paths())
        cases = compare.speedups(loaded.only(*asked), arguments.baseline, arguments.backends)
        text, failed = compare.render(cases, arguments.baseline, loaded.words), False
    elif arguments.paths or arguments.after:
        # Of several runs of one version the luck of a process is asked for, and no change.
        one_version = len(arguments.paths) > 2 and not arguments.after
        before = arguments.paths if arguments.after or one_version else arguments.paths[:-1]
        after = arguments.after or (arguments.paths if one_version else arguments.paths[-1:])
        found = changes.changes(
            _load(before or runs.measured(), every=True),
            _load(after, every=True),
            control=None if arguments.control == "none" else arguments.control,
            margin=arguments.margin,
            anyway=arguments.anyway,
        ).only(*asked, arguments.backends)
        cases = found.cases
        text = found.luck or "too few lengths of a backend besides the control"
        text = text if one_version else changes.render(found)
        failed = found.fails(arguments.fail_on)
    else:
        raise runs.NoRuns(
            "compare takes two runs, BEFORE and AFTER (or one, held against reports/measurements); "
            "of several a side, BEFORE... --with AFTER...; to compare the backends of one run add "
            "--baseline NAME"
        )
    if arguments.csv:
        cases.to_csv(arguments.csv, index=False)
    screen.say(text)
    return int(failed)


def _targets(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import targets
    from linear_vit.reports.tables import documents

    loaded = _load(arguments.paths)
    chosen = targets.LISTS.get(arguments.targets) or targets.of_device(loaded)
    found = targets.verdicts(loaded, chosen)
    screen.say("\n".join(map(str, found)))
    if arguments.out:
        write_text(arguments.out, documents.of_targets(loaded, found))
        screen.say(f"written to {arguments.out}")
    return int(any(verdict.holds is False for verdict in found))


def _table(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import tables

    asked = {name: getattr(arguments, name) for name in ("speeds", "exponents", "ablations")}
    screen.say(tables.write_results(arguments.runs, arguments.out, **asked))
    return 0


def _models(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import models

    screen.say(models.write(_load(arguments.paths or _default_paths()), arguments.out))
    return 0


def _page(arguments: argparse.Namespace) -> int:
    from linear_vit.reports.page import page

    size = page.write(arguments.paths, arguments.results, arguments.out)
    screen.say(f"{arguments.out} ({size / 2**20:.2f} MiB)")
    return 0


def _results(arguments: argparse.Namespace) -> int:
    from linear_vit.reports.tables import documents

    write_text(arguments.out, documents.of_measurements(runs.MEASUREMENTS))
    screen.say(arguments.out)
    return 0


def _power(arguments: argparse.Namespace) -> int:
    from linear_vit.reports import tables

    screen.say(tables.write_power(arguments.folder, arguments.out or arguments.folder))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    old, new = arguments.old, arguments.old if arguments.in_place else arguments.new
    if arguments.in_place == (arguments.new is not None):
        raise runs.NoRuns("convert takes OLD and NEW, or OLD and --in-place")
    if not old.exists():
        raise runs.NoRuns(f"{old}: there is no such file or folder")
    converted = 0
    for path in sorted(old.rglob("*.json")) if old.is_dir() else [old]:
        try:
            document = runs.read(path)
        except (ValueError, runs.OfAnotherKind) as error:
            if not old.is_dir():
                raise runs.NoRuns(f"{path}: {error}") from error
            continue
        screen.say(write_json(new / path.relative_to(old), document))
        converted += 1
    return 0 if converted else 2


def _default_paths() -> list[Path]:
    paths = runs.default_paths()
    if paths == runs.measured():
        text = f"no run in {runs.DEFAULT_OUT}: these are the repository's own measurements"
        screen.say(text, sys.stderr)
    return paths


def _load(paths: Sequence[Path], *, every: bool = False) -> runs.Runs:
    loaded = runs.load(paths, every=every)
    for line in loaded.skipped:
        screen.say(f"skipped {line}", sys.stderr)
    for line in loaded.disturbed():
        screen.say(f"left out of fits, means and verdicts: {line}", sys.stderr)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
